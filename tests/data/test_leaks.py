# SPDX-License-Identifier: Apache-2.0
"""What is trained on is not measured with, in whatever form it is written; repetitions are counted."""

import json
import shutil
import unicodedata

import numpy as np
import pytest

from finteam_experts.data.files import corpus_file, read_task, task_file, text_key
from finteam_experts.data.leaks import check_corpora, check_tasks, repetitions
from finteam_experts.data.tasks import default_tasks
from finteam_experts.errors import InputError
from finteam_experts.evaluation.metrics import scores_with_errors, text_units, unlike_written

TASKS = default_tasks()

TEXT = "Café Fiduciaire’s operating profit rose to EUR 13.1 mn, from EUR 8.7 mn in the year before."


@pytest.fixture
def data(tmp_path, toy_data):
    return shutil.copytree(toy_data, tmp_path / "data")


def add(path, **row):
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


@pytest.mark.parametrize(
    "other",
    [TEXT.upper(), unicodedata.normalize("NFD", TEXT), TEXT.replace("Fi", "ﬁ"), f"  {TEXT} ", TEXT.replace(" ", " ")],
)
@pytest.mark.parametrize(("scored", "trained"), [("test", "train"), ("test", "valid"), ("valid", "train")])
def test_the_same_text_in_two_splits(data, scored, trained, other):
    add(task_file(data, "fpb", trained), text=TEXT, label="neutral")
    add(task_file(data, "fpb", scored), text=other, label="neutral")
    if not task_file(data, "fpb", "valid").exists():
        add(task_file(data, "fpb", "valid"), text="Unlike the others.", label="neutral")
    with pytest.raises(
        InputError, match=rf"fpb_{scored}\.jsonl, line \d+: the same text is in .*fpb_{trained}\.jsonl, line"
    ):
        check_tasks(data, ["fpb"])


def test_rows_of_signs_alone_are_compared_as_they_are(data):
    add(task_file(data, "fpb", "train"), text="🚀🚀", label="positive")
    add(task_file(data, "fpb", "test"), text="📉", label="negative")
    check_tasks(data, TASKS)
    assert text_key({"text": "🚀"}) != text_key({"text": "📉"})


def test_a_corpus_that_holds_its_held_out_text(data):
    shutil.copy(corpus_file(data, "macro"), corpus_file(data, "macro", heldout=True))
    with pytest.raises(InputError, match=r"macro_heldout\.jsonl, line 1: the same text is in .*macro\.jsonl, line 1"):
        check_corpora(data, ["macro"])


@pytest.mark.parametrize("text", [TEXT, "Up 3 %"])
def test_a_corpus_that_holds_a_test_text(data, text):
    add(task_file(data, "fpb", "test"), text=text, label="neutral")
    around = f"They wrote: {TEXT.upper()} And so on." if text == TEXT else text
    add(corpus_file(data, "micro"), text=around)
    with pytest.raises(
        InputError, match=r"micro\.jsonl, line 61: it holds the text of a test row, .*fpb_test\.jsonl, line 13"
    ):
        check_corpora(data, ["micro"])
    check_corpora(data, ["macro", "quant"])


def test_repetitions_are_counted_and_count_once():
    rows = [{"text": "Up.", "label": "a"}, {"text": "UP", "label": "a"}, {"text": "up", "label": "b"},
            {"text": "Up.", "label": "b", "question": "Other?"}]  # fmt: skip
    assert repetitions(rows) == {"repeated": 1, "contradicting": 1}
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(2, size=(2, 60))
    once = scores_with_errors(true, predicted, 2)
    rows = [{"text": f"Row {n}", "label": "a"} for n in range(60)]
    twice = scores_with_errors(np.tile(true, 2), np.tile(predicted, 2), 2, text_units(rows * 2))
    assert twice["accuracy"] == once["accuracy"]
    assert twice["accuracy_stderr"] == pytest.approx(once["accuracy_stderr"], rel=0.05)


def test_scores_and_words_that_differ_by_more_than_chance():
    scored = np.array([True] * 40)
    units = np.arange(40)
    assert not unlike_written(scored, scored, units)
    assert not unlike_written(scored, np.arange(40) > 1, units)  # two rows of forty
    assert unlike_written(scored, np.arange(40) > 15, units)
    assert unlike_written(scored, ~scored, units)


@pytest.mark.parametrize(
    ("question", "expected"), [(None, {}), ("", {}), ("  ", {}), ("Up or down?", {"question": "Up or down?"})]
)
def test_a_question_that_is_not_asked(data, question, expected):
    task_file(data, "fpb", "test").write_text(
        json.dumps({"text": "x", "label": "neutral", "question": question}) + "\n"
    )
    assert read_task(data, TASKS["fpb"], "test") == [{"text": "x", "label": "neutral", **expected}]


@pytest.mark.parametrize("question", [7, ["Up?"], True])
def test_a_question_that_is_no_text(data, question):
    add(task_file(data, "fpb", "test"), text="x", label="neutral", question=question)
    with pytest.raises(InputError, match=r"fpb_test\.jsonl, line 13: the question is .*Write text, or null"):
        read_task(data, TASKS["fpb"], "test")
