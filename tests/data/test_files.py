# SPDX-License-Identifier: Apache-2.0
"""Reading a data directory: what is wrong is named with its file and line."""

import dataclasses
import json
import re
import shutil

import pytest

from finteam_experts.data.files import check_files, corpus_file, evenly_spread, read_corpus, read_task, task_file
from finteam_experts.data.leaks import check_data_dir
from finteam_experts.data.mixture import tuning_rows
from finteam_experts.data.prompts import HEADER, compact_prices
from finteam_experts.data.tasks import default_tasks, render
from finteam_experts.errors import InputError

TASKS = default_tasks()


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
        assert {"text", "label"} <= read_task(data, TASKS[task], "test")[0].keys()


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
        ("[1]", r"line 3: found '\[1\]'. Write one JSON object per line"),
    ],
)
def test_bad_rows(data, row, message):
    rewrite(task_file(data, "headlines", "train"), 3, row)
    with pytest.raises(InputError, match=message):
        read_task(data, TASKS["headlines"], "train")


@pytest.mark.parametrize("label", [1, 2.5, True, None, ["No"], {"a": "No"}, ""])
def test_a_label_that_is_no_text(data, label):
    rewrite(task_file(data, "headlines", "test"), 2, {"text": "x", "label": label})
    wanted = (
        rf"headlines_test\.jsonl, line 2: no text in column 'label'.*found {re.escape(repr(label))}; text is in quotes"
    )
    with pytest.raises(InputError, match=wanted):
        read_task(data, TASKS["headlines"], "test")


@pytest.mark.parametrize(
    "label", ["strong buy", "strong\u00a0buy", "\ufeffstrong buy\u200b", " strong  buy\n", "str\u00adong buy"]
)
def test_a_label_with_characters_that_cannot_be_seen_is_the_label(data, label):
    task = dataclasses.replace(TASKS["fpb"], labels=("strong buy", "caf\u00e9", "\u2764\ufe0f"))
    rewrite(task_file(data, "fpb", "test"), 1, {"text": "x", "label": label})
    for line, other in enumerate(("cafe\u0301", "\u2764"), start=2):
        rewrite(task_file(data, "fpb", "test"), line, {"text": "x", "label": other})
    rows = task_file(data, "fpb", "test").read_text().splitlines()[:3]
    task_file(data, "fpb", "test").write_text("\n".join(rows) + "\n")
    assert [row["label"] for row in read_task(data, task, "test")] == list(task.labels)


def test_what_cannot_be_seen_in_an_unknown_label_is_named(data):
    rewrite(task_file(data, "fpb", "train"), 1, {"text": "x", "label": "posi\u200btiv\u00a0"})
    wanted = (
        r"unknown label '.*' \(it has U\+200B ZERO WIDTH SPACE, U\+00A0 NO-BREAK SPACE\)\. .* Did you mean 'positive'"
    )
    with pytest.raises(InputError, match=wanted):
        read_task(data, TASKS["fpb"], "train")


@pytest.mark.parametrize(("name", "advice"), [
    ("tasks/fpb_validation.jsonl", "Rename it to fpb_valid.jsonl"), ("tasks/fpb_dev.jsonl", "Rename it to fpb_valid.jsonl"),
    ("tasks/fpb-test.jsonl", "Rename it to fpb_test.jsonl"), ("tasks/fpb_Train.jsonl", "Rename it to fpb_train.jsonl"),
    ("tasks/fpb.jsonl", "TASK_train.jsonl, TASK_valid.jsonl or TASK_test.jsonl"), ("tasks/fpb_held_out.jsonl", "fpb_test.jsonl"),
    ("tasks/fpb_valid.json", "Write its rows to tasks/fpb_valid.jsonl"), ("tasks/fpb_valid.csv", "tasks/fpb_valid.jsonl"),
    ("chats/macro.json", "Write its rows to chats/macro.jsonl"), ("chats/macro.jsonl.gz", "chats/macro.jsonl"),
    ("chats/macro_held-out.jsonl", "macro_heldout.jsonl"), ("chats/macro_test.jsonl", "macro_heldout.jsonl"),
    ("corpora/macro.txt", "corpora/macro.jsonl"), ("corpora/macro.JSONL", "corpora/macro.jsonl"), ("corpora/more/x.jsonl", "corpora/more"),
    ("corpora/macro_train.jsonl", "Rename it to macro.jsonl"), ("corpora/macro-heldout.jsonl", "Rename it to macro_heldout.jsonl"),
    ("corpus/macro.jsonl", "Rename it to corpora"), ("chat/macro.jsonl", "Rename it to chats"), ("Tasks/x.jsonl", "Rename it to tasks"),
])  # fmt: skip
def test_a_file_that_no_step_reads_is_refused(data, name, advice):
    (data / name).parent.mkdir(exist_ok=True)
    (data / name).write_text("{}\n")
    with pytest.raises(
        InputError,
        match=f"{name.split('.')[0] if 'more' not in name else 'corpora/more'}|{name.split('/')[0]}: no step.*",
    ):
        check_files(data)
    with pytest.raises(InputError, match=advice):
        check_data_dir(data)


def test_other_files_beside_the_data(data, capsys):
    for name in (
        "README.md",
        "LICENSE",
        ".gitattributes",
        "finteam.json",
        "tasks/.DS_Store",
        "corpora/README.md",
        "chats/x.jsonl.partial",
    ):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text("x")
    check_files(data)
    assert capsys.readouterr().out == ""
    (data / "raw").mkdir()
    (data / "train.jsonl").write_text("{}\n")
    check_files(data)
    printed = capsys.readouterr().out
    assert "raw is read by no step" in printed
    assert "train.jsonl is read by no step" in printed


def test_unknown_label_names_the_nearest(data):
    rewrite(task_file(data, "fpb", "train"), 1, {"text": "x", "label": "Positive"})
    with pytest.raises(InputError, match="Did you mean 'positive'"):
        read_task(data, TASKS["fpb"], "train")


def test_test_row_in_train(data):
    row = json.loads(task_file(data, "fpb", "train").read_text().splitlines()[4])
    rewrite(task_file(data, "fpb", "test"), 2, row | {"text": row["text"].upper() + " !"})
    with pytest.raises(InputError, match=r"fpb_test\.jsonl, line 2: the same text is in .*fpb_train\.jsonl, line 5"):
        check_data_dir(data)


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


def test_validation_rows_are_a_tenth_of_train_or_a_file_of_their_own(data):
    path = task_file(data, "fpb", "train")
    path.write_text("".join(json.dumps({"text": f"Text {n}.", "label": "neutral"}) + "\n" for n in range(600)))
    valid = read_task(data, TASKS["fpb"], "valid")
    assert 30 < len(valid) < 100
    limits = dict.fromkeys(TASKS)
    held_back, all_rows = (tuning_rows(data, TASKS, 0, limits, hold_out=flag) for flag in (True, False))
    trained = [row for task, row in held_back if task == "fpb"]
    assert len(trained) + len(valid) == 600
    assert not {row["text"] for row in trained} & {row["text"] for row in valid}
    assert sum(task == "fpb" for task, _ in all_rows) == 600

    task_file(data, "fpb", "valid").write_text(json.dumps({"text": "Another.", "label": "neutral"}) + "\n")
    assert [row["text"] for row in read_task(data, TASKS["fpb"], "valid")] == ["Another."]
    assert sum(task == "fpb" for task, _ in tuning_rows(data, TASKS, 0, limits, hold_out=True)) == 600


def test_tuning_rows_keep_their_limits_and_follow_the_seed(data):
    limits = dict.fromkeys(TASKS, 9) | {"fiqasa": 4}
    rows = tuning_rows(data, TASKS, 0, limits, hold_out=False)
    assert {task: sum(name == task for name, _ in rows) for task in TASKS} == limits
    assert rows == tuning_rows(data, TASKS, 0, limits, hold_out=False)
    assert rows != tuning_rows(data, TASKS, 1, limits, hold_out=False)


@pytest.mark.parametrize("seed", range(5))
def test_few_rows_of_a_task_have_its_labels_in_proportion(data, seed):
    labels = ["negative"] * 100 + ["positive"] * 200
    path = task_file(data, "fpb", "train")
    path.write_text("".join(json.dumps({"text": f"{n}.", "label": label}) + "\n" for n, label in enumerate(labels)))
    rows = tuning_rows(data, TASKS, seed, dict.fromkeys(TASKS, 12), hold_out=False)
    assert sum(task == "fpb" and row["label"] == "negative" for task, row in rows) in (3, 4, 5)


def test_passages_are_spread_evenly():
    assert evenly_spread(list("abcdefghi"), 3) == ["a", "e", "i"]
    assert evenly_spread(["a", "b"], 5) == ["a", "b"]


def test_price_windows_are_said_shortly():
    """A published row: moves and the last day's averages in one line each, tweets with the newest first."""
    days = [f"2015-06-0{day},0.1,0.2,-0.3,9.9,{day}.5,0.{day},1,2,3,4,-1.{day}" for day in (1, 2, 3)]
    tweets = ["2015-06-01: $aep up, they say, 1,2,3,4,5,6,7,8,9,10,11", "2015-06-03: quiet"]
    assert compact_prices("\n".join([HEADER, *days, *tweets])) == (
        "Daily moves in %: 1.5, 2.5, 3.5\n"
        "Averages against the close in %: 5 days 0.3, 30 days -1.3\n"
        "2015-06-03: quiet\n2015-06-01: $aep up, they say, 1,2,3,4,5,6,7,8,9,10,11"
    )
    for other in ("Net sales rose.", HEADER, f"{HEADER}\nno numbers"):
        assert compact_prices(other) == other
