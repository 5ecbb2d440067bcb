# SPDX-License-Identifier: Apache-2.0
"""Fetching: local folders with the columns of the Hub's sets become a data directory without a test text in it."""

import json

import pytest
import yaml
from datasets.exceptions import DatasetNotFoundError

from conftest import call, load_script
from finteam_experts.data import read_corpus, read_task
from finteam_experts.errors import InputError
from finteam_experts.runs import read_record, work_folder
from finteam_experts.tasks import TASKS

SENTENCE = (
    "Operating profit of the Kelvik group rose to EUR 13.1 mn from EUR 8.7 mn in the same period a year earlier."
)
SPEECH = "The committee judged that the risks to growth and to prices are balanced, and that policy is well placed for now. "


def write(folder, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def hub(tmp_path):
    """Local folders that look like the Hub's sets, and the table that names them."""
    folder = tmp_path / "hub"
    for split, count in (("train", 12), ("valid", 3), ("test", 5)):
        rows = [
            {"id": number, "query": "…", "answer": ("Positive", "neutral", "negative")[number % 3],
             "text": f"{SENTENCE} Order {split} {number}.", "choices": [], "gold": 0}
            for number in range(count)
        ]  # fmt: skip
        if split == "train":
            rows += [rows[0], {**rows[0], "text": f"{SENTENCE} Order test 2."}]  # a repetition, and a test text
        write(folder / "fpb", split, rows)
        headlines = [
            {"query": f"Does the headline talk about price {direction}? Please answer Yes or No.\nText: gold {split} {n}\nAnswer:",
             "text": f"gold {split} {n}", "answer": ("Yes", "No")[n % 2]}
            for n in range(count) for direction in ("going up", "going down")
        ]  # fmt: skip
        write(folder / "headlines", split, headlines)
    speeches = [{"text": f"Speech {number}.\n" + f"{SPEECH}It was point {number}. " * 30} for number in range(60)]
    speeches.append({"text": f"{SPEECH * 3} We quote: {SENTENCE} Order test 4. {SPEECH * 3}"})
    write(folder / "speeches", "train", speeches)
    reports = [
        {"pre_text": [f"Report {n}.", SPEECH, SPEECH], "table": [["year", "2020"], ["sales", str(n)]]}
        for n in range(60)
    ]
    write(folder / "reports", "train", reports)
    table = {
        "tasks": {
            "fpb": {"dataset": str(folder / "fpb"), "text": ["text"], "label": "answer", "licence": "CC BY-NC-SA 3.0"},
            "headlines": {"dataset": str(folder / "headlines"), "text": ["text"], "label": "answer", "question": "query",
                          "licence": "MIT"},
        },
        "roles": {
            "macro": [{"dataset": str(folder / "speeches"), "text": ["text"], "licence": "Apache-2.0"}],
            "quant": [{"dataset": str(folder / "reports"), "text": ["pre_text", "table"], "licence": "MIT"}],
        },
    }  # fmt: skip
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump(table))
    return tmp_path


def fetch(hub, *arguments):
    call("scripts/fetch_data.py", "--sources", hub / "sources.yaml", "--data_dir", hub / "data", *arguments)


def change(hub, group, name, **values):
    path = hub / "sources.yaml"
    table = yaml.safe_load(path.read_text())
    entry = table[group][name]
    (entry[0] if isinstance(entry, list) else entry).update(values)
    path.write_text(yaml.safe_dump(table))


def test_the_shipped_table_reads():
    script = load_script("scripts/fetch_data.py")
    sources = script.read_sources(script.SOURCES)
    assert set(sources.tasks) == set(TASKS)
    assert set(sources.roles) == {"macro", "micro", "quant"}


def test_fetched_folder_is_a_data_directory(hub):
    fetch(hub)
    data = hub / "data"
    train, test = (read_task(data, "fpb", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (15, 5)  # train and valid, without the repetition and the test text
    assert {row["label"] for row in train} == {"positive", "neutral", "negative"}
    questions = {row["question"] for row in read_task(data, "headlines", "test")}
    assert questions == {f"Does the headline talk about price going {way}?" for way in ("up", "down")}
    assert len(read_task(data, "headlines", "test")) == 10
    assert (data / "README.md").read_text().count("| ") >= 5
    assert "CC BY-NC-SA 3.0" in (data / "README.md").read_text()
    rows = read_record(data)["results"]["rows"]
    assert rows["tasks/fpb_train.jsonl"] == 15


def test_corpora_are_passages_without_test_texts_and_split_by_document(hub, capsys):
    fetch(hub)
    train, heldout = (read_corpus(hub / "data", "macro", heldout=part) for part in (False, True))
    assert len(train) > 60
    assert len(heldout) > 0
    assert all(200 <= len(text) <= 1500 for text in train + heldout)
    assert not any("Order test 4" in text for text in train + heldout)
    assert "macro: 1 passages left out, they hold a test text" in capsys.readouterr().out
    points = [
        {text.split("point ")[1].split(".")[0] for text in part if "point " in text} for part in (train, heldout)
    ]
    assert not points[0] & points[1]
    assert "year | 2020" in read_corpus(hub / "data", "quant")[0]


def test_limits_and_choices(hub):
    fetch(hub, "--max_rows", 4, "--tasks", "fpb", "--roles")
    data = hub / "data"
    assert len(read_task(data, "fpb", "test")) == 4
    assert not (data / "corpora").exists()
    assert not (data / "tasks/headlines_test.jsonl").exists()
    with pytest.raises(InputError, match="max_rows: recorded 4, now None"):
        fetch(hub, "--tasks", "fpb", "--roles")


def test_interrupted_fetch_keeps_what_is_complete(hub, monkeypatch, capsys):
    script = load_script("scripts/fetch_data.py")
    monkeypatch.setattr(script, "corpus", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr("sys.argv", ["x", "--sources", str(hub / "sources.yaml"), "--data_dir", str(hub / "data")])
    with pytest.raises(KeyboardInterrupt):
        script.main()
    kept = work_folder(hub / "data") / "tasks/fpb_test.jsonl"
    before = kept.stat().st_mtime_ns
    fetch(hub)
    assert (hub / "data/tasks/fpb_test.jsonl").stat().st_mtime_ns == before
    fetch(hub)
    assert "is complete: skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda hub: change(hub, "tasks", "fpb", label="anser"), r"has no column 'anser'; it has .*answer"),
        (lambda hub: change(hub, "tasks", "fpb", lable="x"), r"sources.yaml: .*\n.*tasks.fpb.lable"),
        (
            lambda hub: write(hub / "hub/fpb", "test", [{"text": "a", "answer": "up"}]),
            r"test row 1: unknown label 'up'",
        ),
        (lambda hub: (hub / "hub/fpb/test.jsonl").unlink(), r"has none of the splits test; it has train"),
        (
            lambda hub: write(hub / "hub/speeches", "train", [{"text": "Short."}]),
            r"gave no row for macro_heldout.jsonl",
        ),
        (lambda hub: (hub / "sources.yaml").unlink(), r"sources.yaml: no such file"),
    ],
)
def test_bad_sources(hub, damage, message):
    damage(hub)
    with pytest.raises(InputError, match=message):
        fetch(hub)
    assert not (hub / "data").exists()


def test_unknown_names(hub):
    for arguments, message in (
        (("--tasks", "fbp"), "--tasks fbp: .* lists fpb, headlines. Did you mean 'fpb'"),
        (("--max_rows", 0), "give a number above 0"),
    ):
        with pytest.raises(InputError, match=message):
            fetch(hub, *arguments)


def test_gated_set_says_where_to_accept_its_terms(hub, monkeypatch):
    script = load_script("scripts/fetch_data.py")

    def gated(*_, **__):
        raise DatasetNotFoundError("Dataset 'owner/name' is a gated dataset on the Hub.")

    monkeypatch.setattr(script, "get_dataset_split_names", gated)
    source = script.Source(dataset="owner/name", text=["text"], licence="MIT")
    with pytest.raises(
        InputError, match=r"gated.*\nIf it is gated, accept its terms at https://huggingface.co/datasets/owner/name"
    ):
        list(script.stream(source, ("train",), None))
