# SPDX-License-Identifier: Apache-2.0
import re
import shutil

import pytest

from finteam_experts.data.calibration import CHAT_TOKENS, FIRST_TOKENS, role_text
from finteam_experts.data.conversations import chat_file
from finteam_experts.data.files import corpus_file, write_rows
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
    # the last conversation may be cut before the word that tells it
    assert found["conversations"] == pytest.approx(1800, abs=40), found
    assert found["others"] == pytest.approx(600, abs=52), found
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


LONG = "Rates and yields rose and fell again. "  # of 10 tokens or so


@pytest.mark.parametrize(
    ("system", "passage", "question", "answer"),
    [(60, 0, 1, 1), (60, 60, 1, 1), (0, 60, 1, 1), (60, 60, 1, 60), (60, 60, 60, 1), (60, 60, 60, 60), (0, 0, 1, 60)],
)
def test_a_long_conversation_is_cut_around_its_question_and_answer(new_run, capsys, system, passage, question, answer):
    turns = [
        {"role": "system", "content": f"Be brief. {LONG * system}"},
        {"role": "user", "content": f"{LONG * passage}\n\n{'Why? ' * question}"},
        {"role": "assistant", "content": "Since yields fell. " * answer},
    ]
    chat_file(new_run / "data", "macro").parent.mkdir(exist_ok=True)
    write_rows(chat_file(new_run / "data", "macro"), [{"messages": turns}] * 40)
    form = as_chats(load_tokenizer(new_run / "base"), new_run / "base")
    text, _ = role_text(new_run / "data", "macro", form, 3000, seed=0)
    assert re.search(r"macro: \d+ of \d+ conversations have more than 192 tokens", capsys.readouterr().out)
    talks = [part for part in text if "Since yields fell" in form.tokenizer.decode(part.ids)]
    assert sum(len(part.ids) for part in talks) > 1000
    whole = form.exchanges([(turns[:-1], turns[-1]["content"])])[0]
    for part in talks[:3]:
        read = [id for id, telling in zip(part.ids, part.telling, strict=True) if telling]
        assert CHAT_TOKENS - 8 < len(part.ids) <= CHAT_TOKENS
        assert part.ids[:FIRST_TOKENS] == whole.ids[:FIRST_TOKENS]
        assert "Why?" in form.tokenizer.decode(read)
        asked_and_answered = [id for id, span in zip(whole.ids, whole.spans, strict=True) if span > 0]
        if len(asked_and_answered) < CHAT_TOKENS - FIRST_TOKENS:
            assert form.tokenizer.decode(read).endswith(form.tokenizer.decode(asked_and_answered))
        assert not passage or question + answer > 2 or "rose and fell" in form.tokenizer.decode(read)


def test_a_long_passage_as_a_message_is_cut_at_its_end(new_run):
    shutil.rmtree(new_run / "data/tasks")
    write_rows(corpus_file(new_run / "data", "macro"), [{"text": f"{n} {LONG * 40}"} for n in range(60)])
    form = as_chats(load_tokenizer(new_run / "base"), new_run / "base")
    text, _ = role_text(new_run / "data", "macro", form, 3000, seed=0)
    messages = [part for part in text if "<|im_start|>" in form.tokenizer.decode(part.ids)]
    assert sum(sum(part.telling) for part in messages) > 1500
