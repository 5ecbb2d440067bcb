# SPDX-License-Identifier: Apache-2.0
"""Conversations from local folders that look like the Hub's sets, and a task that the package does not have."""

import json

import pytest
import yaml

from conftest import call
from finteam_experts.data.conversations import read_chats
from finteam_experts.data.files import read_task, tasks_of
from finteam_experts.errors import InputError
from finteam_experts.publishing.repositories import data_licences


def write(folder, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def hub(tmp_path):
    """A set of questions and answers, one of messages with some that are no conversations, and rows of a task."""
    asked = [
        {"question": f"What were sales in {n}?", "answer": f"They were {n}.", "transcript": "…"} for n in range(60)
    ]
    write(tmp_path / "calls", "train", [*asked, asked[0], {"question": "Who?", "answer": "", "transcript": ""}])
    talks = [
        {"messages": [{"role": "user", "content": f"Hello {n}"}, {"role": "assistant", "content": "Hi."}]}
        for n in range(60)
    ]
    write(tmp_path / "talk", "train", [*talks, {"messages": [{"role": "user", "content": "Nobody answers."}]}])
    labels = ("kept", "cut")
    for split in ("train", "test"):
        write(tmp_path / "grades", split, [{"t": f"Opinion {split} {n}.", "l": labels[n % 2]} for n in range(12)])
    task = {"task": "rating", "doc_to_choice": list(labels), "metadata": {"question": "Is the grade kept?"}}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/rating.yaml").write_text(yaml.safe_dump(task))
    table = {
        "tasks": {"rating": {"dataset": str(tmp_path / "grades"), "text": ["t"], "label": "l", "licence": "MIT"}},
        "chats": {
            "micro": [
                {
                    "dataset": str(tmp_path / "calls"),
                    "question": "question",
                    "answer": "answer",
                    "licence": "CC BY 4.0",
                }
            ],
            "general": [{"dataset": str(tmp_path / "talk"), "messages": "messages", "licence": "Apache-2.0"}],
        },
    }
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump(table))
    return tmp_path


def fetch(hub, *arguments):
    call("scripts/fetch_data.py", "--sources", hub / "sources.yaml", *arguments)


def test_conversations_and_a_task_of_its_own(hub, capsys):
    fetch(hub, "--check")
    assert "chats/general" in capsys.readouterr().out.replace("\n", "")
    fetch(hub, "--data_dir", hub / "data")
    printed = capsys.readouterr().out
    assert "61 rows: 1 left out, they are no conversations (first: row 61" in printed
    assert "62 rows: 1 left out, they repeat an earlier text (first: row 61, 'What were sales in 0?" in printed
    for role in ("micro", "general"):
        train, heldout = (read_chats(hub / "data", role, heldout=flag) for flag in (False, True))
        assert len(train) + len(heldout) == 60
        assert heldout
        assert not {answer + turns[0]["content"] for turns, answer in train} & {
            a + t[0]["content"] for t, a in heldout
        }
    (task,) = tasks_of(hub / "data").values()
    assert (task.name, len(read_task(hub / "data", task, "train"))) == ("rating", 12)
    assert data_licences(hub / "data")[str(hub / "talk")] == "Apache-2.0"


def test_a_source_without_a_conversation_is_named(hub):
    write(hub / "talk", "train", [{"messages": [{"role": "user", "content": "Nobody answers."}]}] * 3)
    with pytest.raises(InputError, match="chats/general, .*talk: its 3 rows gave nothing. Look at its columns"):
        fetch(hub, "--data_dir", hub / "data")
    assert not (hub / "data").exists()


def test_a_source_of_conversations_says_where_they_are(hub):
    table = yaml.safe_load((hub / "sources.yaml").read_text())
    del table["chats"]["micro"][0]["answer"]
    (hub / "sources.yaml").write_text(yaml.safe_dump(table))
    with pytest.raises(InputError, match="chats.micro.0: .*name messages, or both question and answer"):
        fetch(hub, "--check")


def test_a_task_that_is_described_nowhere(hub):
    (hub / "tasks/rating.yaml").unlink()
    with pytest.raises(InputError, match="unknown task 'rating'. Describe another one in .*tasks/rating.yaml"):
        fetch(hub, "--check")
