# SPDX-License-Identifier: Apache-2.0
import shutil

import pytest

from finteam_experts.data.calibration import role_text
from finteam_experts.data.conversations import chat_file
from finteam_experts.data.files import write_rows
from finteam_experts.models import as_chats, load_tokenizer


def conversations(count: int) -> list[dict]:
    turns = [("What is duration {} about?", "Duration {} is about rates.")] * count
    return [
        {
            "messages": [
                {"role": role, "content": text.format(n)}
                for role, text in zip(("user", "assistant"), turn, strict=True)
            ]
        }
        for n, turn in enumerate(turns)
    ]


@pytest.fixture
def shares(new_run):
    """Of 3,000 tokens of the macro analyst's text, 80 % of them in the chat format: in conversations, prompts and messages."""

    def measure(talks: int) -> dict[str, int]:
        if talks:
            chat_file(new_run / "data", "macro").parent.mkdir(exist_ok=True)
            write_rows(chat_file(new_run / "data", "macro"), conversations(talks))
        form = as_chats(load_tokenizer(new_run / "base"), new_run / "base")
        template = form.prompts([""])[0][:3]
        text, held_back = role_text(new_run / "data", "macro", form, 3000, seed=0, chat_share=0.8)
        assert held_back and sum(len(part.ids) for part in text) <= 3000
        found = dict.fromkeys(("conversations", "others", "plain"), 0)
        for part in text:
            told = form.tokenizer.decode(part.ids)
            kind = "conversations" if "duration" in told else "others" if part.ids[:3] == template else "plain"
            found[kind] += len(part.ids)
        return found

    return measure


def test_conversations_and_task_prompts_have_three_quarters_and_a_quarter_of_the_chat_tokens(shares):
    found = shares(400)
    assert found["conversations"] == pytest.approx(1800, abs=1), found
    assert found["others"] == pytest.approx(600, rel=0.02), found
    assert found["plain"] > 500


def test_where_conversations_are_few_task_prompts_fill_up(shares):
    found = shares(4)
    assert 0 < found["conversations"] < 1000, found
    assert found["conversations"] + found["others"] == pytest.approx(2400, rel=0.02), found


def test_without_either_passages_are_asked(shares, new_run):
    shutil.rmtree(new_run / "data/tasks")
    found = shares(0)
    assert found["conversations"] == 0
    assert found["others"] == pytest.approx(2400, rel=0.05), found
