# SPDX-License-Identifier: Apache-2.0
"""Fetching: local folders with the columns of the Hub's sets become a data directory without a test text in it."""

import json
import re

import pytest
import yaml
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError

from conftest import REPOSITORY, TASKS, call, load_script
from finteam_experts.data.files import read_corpus, read_task, task_file
from finteam_experts.data.hub import Source, read_sources
from finteam_experts.errors import InputError
from finteam_experts.runs import read_record, work_folder

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
            {"id": n, "query": f"Does the headline talk about price {direction}? {request}\nText: gold {split} {n} \nAnswer:",
             "answer": ("Yes", "No")[n % 2], "choices": ["Yes", "No"], "gold": n % 2, "label_type": "price_up"}
            for n in range(count)
            for direction, request in (("going up", "Your response should be Yes or No."), ("going down", "Kindly confirm."))
        ]  # fmt: skip
        write(folder / "headlines", split, headlines)
    speeches = [{"text": f"Speech {number}.\n" + f"{SPEECH}It was point {number}. " * 30} for number in range(60)]
    speeches += [
        {"text": f"{SPEECH * 3} {n} quote: {SENTENCE} Order test 4. {SPEECH * 3}"} for n in ("I", "We", "They")
    ]
    write(folder / "speeches", "train", speeches)
    reports = [
        {"pre_text": [f"Report {n}.", SPEECH, SPEECH], "table": [["year", "2020"], ["sales", str(n)]]}
        for n in range(60)
    ]
    write(folder / "reports", "train", reports)
    questions = [
        {"id": n, "text": f"What was the change in year {n}?", "answer": "0.4",
         "query": f"Please answer the question.\nContext: {SPEECH * 3} It was {n}.\nQuestion: What was it in {n}?\nAnswer:"}
        for n in range(30)
    ]  # fmt: skip
    write(folder / "finqa", "train", questions)
    table = {
        "tasks": {
            "fpb": {"dataset": str(folder / "fpb"), "text": ["text"], "label": "answer", "licence": "CC BY-NC-SA 3.0"},
            "headlines": {
                "dataset": str(folder / "headlines"), "label": "answer", "licence": "MIT",
                "question": {"column": "query", "pattern": r"^(.*?)\s*(?:Your response|Kindly)"},
                "text": [{"column": "query", "pattern": r"Text:\s*(.*?)\s*(?:Answer:|$)"}],
            },
        },
        "roles": {
            "macro": [{"dataset": str(folder / "speeches"), "text": ["text"], "licence": "Apache-2.0"}],
            "quant": [
                {"dataset": str(folder / "reports"), "text": ["pre_text", "table"], "licence": "MIT"},
                {"dataset": str(folder / "finqa"), "licence": "MIT",
                 "text": [{"column": "query", "pattern": r"Context:\s*(.*?)\s*(?:Question:|$)"}]},
            ],
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


@pytest.mark.parametrize(("name", "tasks"), [("data_sources.yaml", 2), ("data_sources_gated.yaml", 4)])
def test_the_shipped_tables_read(name, tasks):
    sources = read_sources(REPOSITORY / "scripts" / name)
    assert len(sources.tasks) == tasks
    assert set(sources.roles) == {"macro", "micro", "quant"}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_of_other_kinds_are_read_alike(hub, kind):
    fetch(hub, "--tasks", "fpb", "--roles", "--chats")
    (hub / "data").rename(hub / "expected")
    for file in (hub / "hub/fpb").glob("*.jsonl"):
        rows = Dataset.from_json(str(file), cache_dir=str(hub / "cache")).remove_columns("choices")
        getattr(rows, f"to_{kind}")(file.with_suffix(f".{kind}"))
        file.unlink()
    fetch(hub, "--tasks", "fpb", "--roles", "--chats")
    for split in ("train", "valid", "test"):
        assert (
            task_file(hub / "data", "fpb", split).read_text() == task_file(hub / "expected", "fpb", split).read_text()
        )


def test_fetched_folder_is_a_data_directory(hub, capsys):
    fetch(hub)
    data = hub / "data"
    train, valid, test = (read_task(data, TASKS["fpb"], split) for split in ("train", "valid", "test"))
    assert (len(train), len(valid), len(test)) == (12, 3, 5)  # without the repetition and the test text
    assert {row["label"] for row in train} == {"positive", "neutral", "negative"}
    questions = {row["question"] for row in read_task(data, TASKS["headlines"], "test")}
    assert questions == {f"Does the headline talk about price going {way}?" for way in ("up", "down")}
    assert read_task(data, TASKS["headlines"], "test")[0]["text"] == "gold test 0"
    assert len(read_task(data, TASKS["headlines"], "test")) == 10
    assert "CC BY-NC-SA 3.0" in (data / "README.md").read_text()
    rows = read_record(data)["results"]["rows"]
    assert rows["tasks/fpb_train.jsonl"] == 12
    printed = capsys.readouterr().out
    assert "tasks/fpb_train.jsonl, 13 rows: 1 left out, they hold a text that is scored" in printed
    assert re.search(r"corpora/macro, .*speeches: [\d,]+ texts of 63 rows, about [\d,]+ tokens", printed)


def test_corpora_are_passages_without_test_texts_and_split_by_document(hub, capsys):
    fetch(hub, "--max_characters", 1500)
    train, heldout = (read_corpus(hub / "data", "macro", heldout=part) for part in (False, True))
    assert len(train) > 60
    assert len(heldout) > 0
    assert all(200 <= len(text) <= 1500 for text in train + heldout)
    assert not any("Order test 4" in text for text in train)
    assert "left out, they hold a text that is scored (first: " in capsys.readouterr().out
    points = [
        {text.split("point ")[1].split(".")[0] for text in part if "point " in text} for part in (train, heldout)
    ]
    assert not points[0] & points[1]
    quant = read_corpus(hub / "data", "quant")
    assert "year | 2020\nsales | " in "".join(quant)  # lines stay lines
    assert sum("It was" in text and "Question" not in text for text in quant) > 10  # the context, not the question


def test_integer_labels_and_rows_without_text(hub, capsys):
    for split in ("train", "test"):
        rows = [{"text": f"{SENTENCE} {split} {n}", "label": n % 3} for n in range(9)]
        write(hub / "hub/fpb", split, [*rows, {"text": "", "label": 0}, {"text": None, "label": 0}])
    (hub / "hub/fpb/valid.jsonl").unlink()
    change(hub, "tasks", "fpb", label="label", labels={0: "negative", 1: "neutral", 2: "positive"})
    fetch(hub)
    assert [row["label"] for row in read_task(hub / "data", TASKS["fpb"], "test")[:3]] == [
        "negative",
        "neutral",
        "positive",
    ]
    assert "11 rows: 2 left out, they have no text (first: row 10" in capsys.readouterr().out
    assert not task_file(hub / "data", "fpb", "valid").exists()


def test_a_few_rows_are_not_the_first(hub):
    """Sets are often sorted by date."""
    write(hub / "hub/fpb", "test", [{"text": f"{SENTENCE} test {n}", "answer": "neutral"} for n in range(500)])
    fetch(hub, "--max_rows", 20)
    drawn = [int(row["text"].rpartition(" ")[2]) for row in read_task(hub / "data", TASKS["fpb"], "test")]
    assert max(drawn) > 100


def test_short_texts_and_few_documents_make_a_corpus(hub):
    write(hub / "hub/speeches", "train", [{"text": f"央行提高了利率，第 {n} 次。"} for n in range(4)])
    fetch(hub)
    assert len(read_corpus(hub / "data", "macro")) == 3
    assert len(read_corpus(hub / "data", "macro", heldout=True)) == 1


@pytest.mark.parametrize(
    ("instruction", "question"),
    [
        ("Does it talk about gold? Your response should be Yes or No.\nText: gold", "Does it talk about gold?"),
        ("Is gold up? Kindly confirm with 'Yes' or 'No'.\nText: x", "Is gold up?"),
        ("Is gold up? Only answer with Yes or No. Text: x", "Is gold up?"),
        ("Is gold up?\nText: gold falls. Please note.", "Is gold up?"),
        ("Is gold up? Does it answer?", "Is gold up? Does it answer?"),
        ("Examine whether gold rises. Please respond with No or Yes.", "Examine whether gold rises."),
        ("Please answer Yes or No.", ""),  # then the row asks the task's own question
    ],
)
def test_a_question_is_asked_without_its_request_for_a_form(instruction, question):
    for table, column in (("data_sources.yaml", "instruction"), ("data_sources_gated.yaml", "query")):
        source = read_sources(REPOSITORY / "scripts" / table).tasks["headlines"]
        assert source.read({column: instruction}, source.question) == question


def test_check_downloads_nothing_and_names_every_problem(hub, capsys):
    call("scripts/fetch_data.py", "--sources", hub / "sources.yaml", "--check")
    assert "corpora/macro" in capsys.readouterr().out.replace("\n", "")
    change(hub, "tasks", "headlines", text=["text"])
    change(hub, "tasks", "fpb", splits={"train": "trian"})
    with pytest.raises(
        InputError, match=r"fpb has no split 'trian'(?s:.*)headlines has no column 'text'; it has id, query"
    ):
        call("scripts/fetch_data.py", "--sources", hub / "sources.yaml", "--check")
    assert not (hub / "data").exists()


def test_a_set_with_configurations_needs_one(hub):
    folder = hub / "hub/fpb"
    (folder / "README.md").write_text(
        "---\nconfigs:\n" + "".join(
            f"- config_name: {name}\n  data_files:\n  - {{split: train, path: train.jsonl}}\n  - {{split: test, path: test.jsonl}}\n"
            for name in ("all", "half")) + "---\n")  # fmt: skip
    with pytest.raises(InputError, match=r"\['all', 'half'\](?s:.*)found config: None"):
        fetch(hub)
    change(hub, "tasks", "fpb", config="half")
    fetch(hub)
    assert len(read_task(hub / "data", TASKS["fpb"], "test")) == 5


def test_a_file_that_is_not_utf8(hub):
    (hub / "hub/fpb/test.jsonl").unlink()
    (hub / "hub/fpb/test.csv").write_bytes("text,answer\nErl\xf6se stiegen,positive\n".encode("latin1"))
    for split in ("train", "valid"):
        (hub / f"hub/fpb/{split}.jsonl").unlink()
    (hub / "hub/fpb/train.csv").write_bytes(b"text,answer\nSales rose,positive\n")
    with pytest.raises(InputError, match=r"fpb can't be read: (?s:.*)not UTF-8"):
        fetch(hub)


def test_limits_and_choices(hub):
    fetch(hub, "--max_rows", 4, "--tasks", "fpb", "--roles")
    data = hub / "data"
    assert len(read_task(data, TASKS["fpb"], "test")) == 4
    assert not (data / "corpora").exists()
    assert not (data / "tasks/headlines_test.jsonl").exists()
    with pytest.raises(InputError, match="max_rows: recorded 4, now None"):
        fetch(hub, "--tasks", "fpb", "--roles")


def test_interrupted_fetch_keeps_what_is_complete(hub, monkeypatch, capsys):
    script = load_script("scripts/fetch_data.py")
    monkeypatch.setattr(script, "fetch_role", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
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
        (lambda hub: change(hub, "tasks", "fpb", lable="x"), r"sources.yaml: tasks.fpb.lable: extra inputs"),
        (
            lambda hub: write(hub / "hub/fpb", "test", [{"text": "a", "answer": "up"}]),
            r"fpb, test of .*: unknown labels: 'up' \(1 rows\)",
        ),
        (lambda hub: change(hub, "tasks", "fpb", splits={"test": "tets"}), r"has no split 'tets'; it has train"),
        (
            lambda hub: change(hub, "tasks", "fpb", splits={"tets": "test"}),
            r"tasks.fpb.splits.tets.*input should be 'train', 'valid' or 'test'",
        ),
        (
            lambda hub: write(hub / "hub/speeches", "train", [{"text": ""}, {"text": " "}]),
            r"corpora/macro, .*speeches: its 2 rows gave nothing",
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
        (("--max_rows", 0), "--max_rows is 0; it has to be 1 or more"),
    ):
        with pytest.raises(InputError, match=message):
            fetch(hub, *arguments)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            DatasetNotFoundError("Dataset 'owner/name' is a gated dataset on the Hub."),
            "Accept its terms at https://huggingface.co",
        ),
        (DatasetNotFoundError("Dataset 'owner/name' doesn't exist."), "If it has moved, correct its id"),
        (RuntimeError("Dataset scripts are no longer supported"), "Read its Parquet copy: options"),
        (ConnectionError("no route to host"), "Run the same command again later: what is fetched stays"),
    ],
)
def test_a_set_that_cannot_be_read_says_what_to_do(monkeypatch, error, advice):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("finteam_experts.data.hub.get_dataset_split_names", fail)
    with pytest.raises(InputError, match=rf"owner/name can't be read: .*\n.*{advice}"):
        Source(dataset="owner/name", text=["text"], licence="MIT").kinds()
