# SPDX-License-Identifier: Apache-2.0
"""Reading a data directory: what is wrong is named with its file and line."""

import json
import shutil

import pytest

from finteam_experts.data import corpus_file, read_corpus, read_task, task_file
from finteam_experts.errors import InputError
from finteam_experts.tasks import TASKS, render


@pytest.fixture
def data(tmp_path, toy_data):
    return shutil.copytree(toy_data, tmp_path / "data")


def rewrite(path, line, row):
    lines = path.read_text().splitlines()
    lines[line - 1] = row if isinstance(row, str) else json.dumps(row)
    path.write_text("\n".join(lines) + "\n")


def test_reads_every_file(data):
    assert len(read_corpus(data, "macro")) == 60
    for task in TASKS:
        assert {"text", "label"} <= read_task(data, task, "test")[0].keys()


def test_missing_and_empty_files(data):
    corpus_file(data, "macro").unlink()
    with pytest.raises(InputError, match=r"macro\.jsonl does not exist"):
        read_corpus(data, "macro")
    corpus_file(data, "micro").write_text("")
    with pytest.raises(InputError, match=r"micro\.jsonl is empty"):
        read_corpus(data, "micro")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "x", "label": "No"}, r"headlines_train\.jsonl, line 3: no text in column 'text'.*found txt, label"),
        ({"text": "x", "label": "Maybe"}, r"line 3: unknown label 'Maybe'.*No, Yes"),
        ({"text": " ", "label": "No"}, "line 3: no text in column 'text'"),
        ("{not json", "line 3: not JSON"),
        ("[1]", "line 3: no text in column 'text'.*found list"),
    ],
)
def test_bad_rows(data, row, message):
    rewrite(task_file(data, "headlines", "train"), 3, row)
    with pytest.raises(InputError, match=message):
        read_task(data, "headlines", "train")


def test_unknown_label_names_the_nearest(data):
    rewrite(task_file(data, "fpb", "train"), 1, {"text": "x", "label": "Positive"})
    with pytest.raises(InputError, match="Did you mean 'positive'"):
        read_task(data, "fpb", "train")


def test_test_row_in_train(data):
    row = json.loads(task_file(data, "fpb", "train").read_text().splitlines()[4])
    rewrite(task_file(data, "fpb", "test"), 2, row | {"text": row["text"].upper() + " !"})
    with pytest.raises(InputError, match=r"fpb_test\.jsonl, line 2: the same text is in .*fpb_train\.jsonl, line 5"):
        read_task(data, "fpb", "test")


def test_prompt_keeps_the_question_when_the_text_is_long(toy_base):
    from finteam_experts.models import load_tokenizer

    tokenizer, task = load_tokenizer(toy_base), TASKS["headlines"]
    prompt = render(task, {"text": "crude oil " * 400, "question": "Up or down?"}, tokenizer)
    text = prompt.partition("\n\n")[0]
    assert prompt.endswith("Up or down? Answer No or Yes.")
    assert len(tokenizer(text)["input_ids"]) <= task.max_text_tokens < len(tokenizer("crude oil " * 400)["input_ids"])
    assert render(TASKS["fpb"], {"text": "Short."}, tokenizer) == (
        f"Short.\n\n{TASKS['fpb'].question} Answer negative, neutral or positive."
    )
