# SPDX-License-Identifier: Apache-2.0
"""Values of fetched rows: only text is text, what is missing is missing, and what is left out is counted and named."""

import datetime
import json

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value

from conftest import call
from finteam_experts.data.conversations import read_chats
from finteam_experts.data.files import read_corpus, read_task, tasks_of
from finteam_experts.data.leaks import check_data_dir
from finteam_experts.errors import InputError

LABELS = ["NA", "none", "up", "down"]
STRUCT = {"answer": "42", "unit": "EUR"}


@pytest.fixture
def source(tmp_path):
    """Write a table of one source; returns a function that fetches it and gives the data directory."""
    task = {"task": "move", "doc_to_choice": LABELS, "metadata": {"question": "Where does it go?"}}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/move.yaml").write_text(yaml.safe_dump(task))

    def fetch(group, *arguments, **fields):
        entry = {"dataset": str(tmp_path / "set"), "licence": "mine", **fields}
        table = {group: {"move": entry} if group == "tasks" else {"macro": [entry]}}
        (tmp_path / "sources.yaml").write_text(yaml.safe_dump(table))
        data = tmp_path / "data"
        call("scripts/fetch_data.py", "--sources", tmp_path / "sources.yaml", "--data_dir", data, *arguments)
        return data

    (tmp_path / "set").mkdir()
    fetch.folder = tmp_path / "set"
    fetch.task = lambda *arguments, **fields: fetch("tasks", *arguments, text=["text"], label="label", **fields)
    return fetch


def write(folder, split, rows):
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(data, split):
    (task,) = tasks_of(data).values()
    return read_task(data, task, split)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (STRUCT, "dict"),
        (["fine", STRUCT], "dict"),
        ([["a", 2.5]], "float"),
        (2.5, "float"),
        (7, "int"),
        (True, "bool"),
        (b"bytes", "bytes"),
        (datetime.date(2020, 1, 2), "date"),
        (datetime.datetime(2020, 1, 2), "datetime"),
        ([[["deep"]]], "list"),
    ],
)
@pytest.mark.parametrize("group", ["roles", "chats"])
def test_what_is_no_text_is_never_written_as_text(source, capsys, group, value, named):
    rows = [{"q": f"Question {n}?", "a": value} for n in range(20)]
    try:
        write(source.folder, "train", rows)
    except TypeError:  # what JSON does not have
        (source.folder / "train.jsonl").unlink(missing_ok=True)
        Dataset.from_list(rows).to_parquet(source.folder / "train.parquet")
    fields = {"text": ["a"]} if group == "roles" else {"question": "q", "answer": "a"}
    with pytest.raises(InputError, match="its 20 rows gave nothing"):
        source(group, **fields)
    assert (
        f"they hold a value of type {named} in column 'a', which is no text (first: row 1, " in capsys.readouterr().out
    )


def test_rows_without_text_are_left_out_and_the_others_stay(source, capsys):
    values = [*(f"Answer {n}." for n in range(30)), None, "", "  "]
    write(source.folder, "train", [{"q": f"Question {n}?", "a": value} for n, value in enumerate(values)])
    data = source("chats", question="q", answer="a")
    chats = [answer for flag in (False, True) for _, answer in read_chats(data, "macro", heldout=flag)]
    assert sorted(chats) == sorted(values[:30])
    assert "33 rows: 3 left out, they are no conversations (first: row 31, " in capsys.readouterr().out


def test_a_missing_item_of_a_list_is_no_word(source):
    lists = [[f"First {n}.", None, "Third."] for n in range(20)]
    tables = [[["year", "sales"], [None, str(n)]] for n in range(20)]
    Dataset.from_dict({"lines": lists, "table": tables}).to_parquet(source.folder / "train.parquet")
    texts = read_corpus(source("roles", text=["lines", "table"]), "macro")
    assert "None" not in "".join(texts)
    assert "First 0.\nThird.\n\nyear | sales\n | 0" in texts + read_corpus(
        source.folder.parent / "data", "macro", heldout=True
    )


@pytest.mark.parametrize("separator", [",", "\t"])
def test_csv_columns_are_read_as_they_are_written(source, capsys, separator):
    texts = ["NA", "NULL", "nan", "1E5", "007", "1.50", "true", "2020-01-01", "None", "#N/A 1", "-inf"]
    for split in ("train", "test"):
        lines = [
            "text,label,number",
            *(f"{t}{'' if split == 'test' else ' x'},NA,1E5" for t in texts),
            ",up,1",
            "blank,,2",
        ]
        kind = "csv" if separator == "," else "tsv"
        (source.folder / f"{split}.{kind}").write_text("\n".join(lines).replace(",", separator))
    data = source.task()
    assert [(row["text"], row["label"]) for row in rows_of(data, "test")] == [(text, "NA") for text in texts]
    printed = capsys.readouterr().out
    assert "13 rows: 1 left out, they have no text (first: row 12" in printed
    assert "13 rows: 1 left out, they have no label (first: row 13, ''" in printed


def test_numbered_classes_are_known_by_their_names(source, capsys):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["Down", "UP"])})
    for split in ("train", "test"):
        rows = {"text": [f"{split} {n}" for n in "abcd"], "label": [0, 1, -1, None]}
        Dataset.from_dict(rows, features=features).to_parquet(source.folder / f"{split}.parquet")
    assert [row["label"] for row in rows_of(source.task(), "test")] == ["down", "up"]
    assert "4 rows: 2 left out, they have no label (first: row 3, -1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "labels", "expected"),
    [
        ([0, 1, None, -1], {0: "down", 1: "up"}, ["down", "up"]),
        ([0.0, 1.0, None, float("nan")], {0: "down", 1: "up"}, ["down", "up"]),
        ([True, False, None], {True: "up", False: "down"}, ["up", "down"]),
        (["0", "1", "", "-1"], {0: "down", 1: "up"}, ["down", "up"]),
        ([-1, 1], {-1: "down", 1: "up"}, ["down", "up"]),
        (["Up\u200b", "do\u00adwn\u00a0", "\uff35\uff30"], {}, ["up", "down", "up"]),
        (["bought", "sold", "held"], {"Bought": "up", "sold": "down", "held": None}, ["up", "down"]),
    ],
)
def test_labels(source, values, labels, expected):
    for split in ("train", "test"):
        rows = {"text": [f"{split} {'abcde'[n]}" for n in range(len(values))], "label": values}
        Dataset.from_dict(rows).to_parquet(source.folder / f"{split}.parquet")
    assert [row["label"] for row in rows_of(source.task(labels=labels), "test")] == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["up", "sideways", "sideways", "hold"], r"unknown labels: 'sideways' \(2 rows\), 'hold' \(1 rows\).*labels: {'sideways': null}"),
        (["up", "dwon"], "unknown labels: 'dwon' .*Did you mean 'down'"),
        ([["up"], ["down"]], r"unknown labels: \['up'\] \(list\)"),
        ([STRUCT, STRUCT], r"unknown labels: {'answer'.*\(dict\)"),
        ([datetime.date(2020, 1, 2)], r"unknown labels: datetime.date\(2020, 1, 2\) \(date\)"),
        ([0.5], r"unknown labels: 0.5"),
        ([-2], r"unknown labels: -2"),
    ],
)  # fmt: skip
def test_labels_that_the_task_does_not_have(source, values, message):
    for split in ("train", "test"):
        rows = {"text": [f"{split} {'abcde'[n]}" for n in range(len(values))], "label": values}
        Dataset.from_dict(rows).to_parquet(source.folder / f"{split}.parquet")
    with pytest.raises(InputError, match=message):
        source.task()
    assert not (source.folder.parent / "data").exists()


@pytest.mark.parametrize("unlabelled", [None, -1])
def test_a_set_of_train_rows_alone_is_tested_on_a_share_of_them(source, capsys, unlabelled):
    rows = [{"text": f"Shares of maker {n} moved.", "label": ("up", "down")[n % 2]} for n in range(50)]
    write(source.folder, "train", [*rows, rows[3]])
    if unlabelled:  # as where the labels of a benchmark's test rows are kept
        write(source.folder, "test", [{"text": "Hidden.", "label": unlabelled}])
        table = {"labels": {0: "up"}}
    first = source.task("--seed", "3", **(table if unlabelled else {}))
    parts = {split: {row["text"] for row in rows_of(first, split)} for split in ("train", "test")}
    assert (len(parts["train"]), len(parts["test"])) == (40, 10)
    assert not parts["train"] & parts["test"]
    assert "10 of its train rows, drawn with seed 3, are the test rows" in capsys.readouterr().out
    first.rename(first.with_name("first"))
    again = source.task("--seed", "3", **(table if unlabelled else {}))
    assert {row["text"] for row in rows_of(again, "test")} == parts["test"]
    again.rename(again.with_name("again"))
    other = source.task("--seed", "4", **(table if unlabelled else {}))
    assert {row["text"] for row in rows_of(other, "test")} != parts["test"]


def test_a_set_without_test_rows_is_tested_on_its_validation_rows(source, capsys):
    for split, count in (("train", 20), ("validation", 6)):
        write(source.folder, split, [{"text": f"{split} {n}", "label": "up"} for n in range(count)])
    data = source.task()
    assert len(rows_of(data, "test")) == 6
    assert not (data / "tasks/move_valid.jsonl").exists()
    assert "Its validation rows are the test rows" in capsys.readouterr().out


def test_splits_of_other_names(source):
    for split, count in (("train_sft", 20), ("test_sft", 6)):
        write(source.folder, split, [{"text": f"{split} {n}", "label": "up"} for n in range(count)])
    (source.folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - {split: train_sft, path: train_sft.jsonl}\n  - {split: test_sft, path: test_sft.jsonl}\n---\n"
    )
    with pytest.raises(InputError, match=r"no split 'train'; it has train_sft, test_sft. Name another with splits"):
        source.task()
    data = source.task(splits={"train": "train_sft", "test": "test_sft"})
    assert (len(rows_of(data, "train")), len(rows_of(data, "test"))) == (20, 6)


def test_repetitions_are_counted_with_those_of_another_label(source, capsys):
    for split in ("train", "test"):
        write(source.folder, split, [{"text": f"{split} {text}", "label": label} for text, label in
              (("rose.", "up"), ("Rose", "up"), ("rose", "down"), ("fell", "down"))])  # fmt: skip
    assert len(rows_of(source.task(), "test")) == 2
    printed = capsys.readouterr().out
    assert "4 rows: 1 left out, they repeat an earlier row (first: row 2, 'test Rose')" in printed
    assert "4 rows: 1 left out, they repeat an earlier row with another label (first: row 3, 'test rose')" in printed


def test_rows_whose_figures_differ_are_no_repetitions(source):
    for split in ("train", "test"):
        texts = [f"{split}: sales moved {change}." for change in ("+3.2 %", "-3.2 %", "1.25", "12.5", "(3.2)")]
        write(source.folder, split, [{"text": text, "label": "up"} for text in texts])
    data = source.task()
    assert len(rows_of(data, "train")) == len(rows_of(data, "test")) == 5
    check_data_dir(data)


def test_a_folder_that_holds_a_scored_text_in_another_file_is_free_of_it(source, capsys):
    scored = "The committee left its rate where it was and said that the risks to prices are now balanced."
    write(source.folder, "train", [{"text": f"{scored} We quote it in speech {n}. " + "x" * n} for n in range(30)])
    data = source.folder.parent / "data"
    table = {
        "tasks": {
            "move": {
                "dataset": str(source.folder.parent / "task"),
                "text": ["text"],
                "label": "label",
                "licence": "mine",
            }
        },
        "roles": {"macro": [{"dataset": str(source.folder), "text": ["text"], "licence": "mine"}]},
    }
    (source.folder.parent / "task").mkdir()
    write(source.folder.parent / "task", "train", [{"text": f"train {n}", "label": "up"} for n in range(9)])
    write(source.folder.parent / "task", "test", [{"text": scored, "label": "up"}])
    (source.folder.parent / "sources.yaml").write_text(yaml.safe_dump(table))
    with pytest.raises(InputError, match="corpora/macro.jsonl: every row holds a text that is scored"):
        call("scripts/fetch_data.py", "--sources", source.folder.parent / "sources.yaml", "--data_dir", data)
    assert "(first: " in capsys.readouterr().out
