# SPDX-License-Identifier: Apache-2.0
"""Datasets in TRL's formats: what they stand for is recorded, what can't be used is named, and what can is trained on."""

import json
import shutil
from types import SimpleNamespace

import pytest
import yaml
from datasets import Dataset
from trl import SFTConfig

from conftest import REPOSITORY, ROLES, SHORT, call, form_of, instruct_tune, load_script, train_expert
from finteam_experts.data.conversations import chat_file
from finteam_experts.data.files import corpus_file, read_corpus, task_file, write_rows
from finteam_experts.data.leaks import check_data_dir
from finteam_experts.data.trl_datasets import DatasetArguments, stream_corpus
from finteam_experts.errors import InputError
from finteam_experts.runs import read_record
from finteam_experts.training.arguments import BaseModelConfig, parse
from finteam_experts.training.rows import reads, recorded


def messages(*contents):
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]


FORMATS = {
    "messages": [{"messages": messages(f"Question {n}?", f"Answer {n}.")} for n in range(8)],
    "prompt and completion": [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(8)],
    "conversational prompt": [{"prompt": messages(f"Q {n}?"), "completion": [{"role": "assistant", "content": "A."}]} for n in range(8)],
    "text": [{"text": f"Sales of company {n} rose by {n} percent."} for n in range(8)],
}  # fmt: skip


def write_set(folder, rows, name="train.jsonl"):
    """A dataset's folder with these rows as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def sets(tmp_path):
    """Folders of rows in two formats."""
    return SimpleNamespace(
        **{name: write_set(tmp_path / "sets" / name, FORMATS[name]) for name in ("messages", "text")}
    )


@pytest.fixture
def tuned_rows(new_run):
    """The rows that instruct_tune.py would train on, with these datasets beside an empty data directory or `data_dir`."""
    (new_run / "nothing").mkdir()

    def rows(data_dir=None, max_steps=-1, **options):
        script, form = load_script("recipes/instruct_tune.py"), form_of(new_run / "base")
        args = script.TuneArguments(data_dir=str(data_dir or new_run / "nothing"), **options)
        scored = check_data_dir(args.data)
        config = SFTConfig(str(new_run / "work"), use_cpu=True, bf16=False, max_steps=max_steps, max_length=512)
        dataset, _ = script.rows_to_tune(args, {}, scored, config, form, 512)
        return [form.tokenizer.decode(ids) for ids in dataset["input_ids"]]

    return rows


@pytest.mark.parametrize("name", FORMATS)
def test_datasets_in_trls_formats(copied_run, tmp_path, name):
    """Alone: the run folder needs no data directory."""
    write_set(tmp_path / "set", FORMATS[name])
    (copied_run / "dense-instruct").rename(copied_run / "old")
    (copied_run / "data").rename(copied_run / "elsewhere")
    instruct_tune(copied_run, "dense", "--dataset_name", tmp_path / "set", "--num_train_epochs", 1, "--max_steps", -1,
                  "--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", "{}")  # fmt: skip
    record = read_record(copied_run / "dense-instruct")
    assert record["results"]["rows_seen"] == 8
    assert str(tmp_path) not in json.dumps(record)


def test_a_stream_and_a_mixture_with_roles(copied_run, tmp_path, sets):
    (copied_run / "moe-instruct").rename(copied_run / "old")
    recipe = tmp_path / "mixture.yaml"
    recipe.write_text(f"datasets:\n- path: {sets.messages}\n- path: {sets.text}\ndataset_roles: [micro, none]\n")
    with pytest.raises(InputError, match="dataset_roles is micro, for 2 datasets"):
        call("recipes/instruct_tune.py", "--config", recipe, "--dataset_roles", "micro")
    with pytest.raises(InputError, match="set max_steps"):
        instruct_tune(copied_run, "moe", "--dataset_name", sets.messages, "--dataset_streaming", "true", "--max_steps", -1)  # fmt: skip
    full = yaml.safe_load((REPOSITORY / "recipes/sample/instruct_tune_moe.yaml").read_text())
    recipe.write_text(yaml.safe_dump(full | yaml.safe_load(recipe.read_text())))
    call("recipes/instruct_tune.py", "--config", recipe, "--run_dir", copied_run, *SHORT)
    chats = read_record(copied_run / "moe-instruct")["inputs"]["chats"]
    assert [(source["path"], source["role"]) for source in chats.values()] == [
        ("messages", "micro"),
        ("text", "general"),
    ]
    (copied_run / "moe-instruct").rename(copied_run / "mixture")
    streamed = ("--dataset_name", sets.messages, "--dataset_streaming", "true")
    with pytest.raises(InputError, match="dataset_roles names 'nobody'; it is one of macro, micro, quant, or none"):
        instruct_tune(copied_run, "moe", *streamed, "--dataset_roles", "nobody")
    instruct_tune(copied_run, "moe", *streamed, "--dataset_roles", "micro")
    chats = read_record(copied_run / "moe-instruct")["inputs"]["chats"]
    assert chats["dataset 0"]["role"] == "micro"


# --- what is recorded


NAMED = {
    "a folder": lambda folder: {"dataset_name": str(folder)},
    "a file": lambda folder: {"dataset_name": str(folder / "train.jsonl")},
    "data_files": lambda folder: {"datasets": [{"path": "json", "data_files": str(folder / "train.jsonl")}]},
    "a wildcard": lambda folder: {"datasets": [{"path": "json", "data_files": [str(folder / "*.jsonl")]}]},
    "files by split": lambda folder: {"datasets": [{"path": str(folder), "data_files": {"train": "train.jsonl"}}]},
    "data_dir": lambda folder: {"datasets": [{"path": "json", "data_dir": str(folder)}]},
    "data_dir of a folder": lambda folder: {"datasets": [{"path": str(folder.parent), "data_dir": "text"}]},
    "a part of a split": lambda folder: {"datasets": [{"path": str(folder), "split": "train[:50%]"}]},
    "a stream": lambda folder: {"dataset_name": str(folder), "dataset_streaming": True},
}


@pytest.mark.parametrize("named", NAMED)
def test_the_content_of_a_dataset_is_recorded_however_it_is_named(sets, tmp_path, named):
    (before,) = DatasetArguments(**NAMED[named](sets.text)).load(8, 0)
    write_set(sets.text, [*FORMATS["text"][:7], {"text": "Sales of company 7 fell by 7 percent."}])
    (after,) = DatasetArguments(**NAMED[named](sets.text)).load(8, 0)
    assert before.record["files"].keys() == after.record["files"].keys() == {"train.jsonl"}
    assert before.record != after.record
    assert str(tmp_path) not in json.dumps(before.record)
    assert ("fell" in str(after.rows["text"][:])) == (named != "a part of a split")


def test_a_file_of_another_split_is_no_part_of_it(sets):
    (before,) = DatasetArguments(dataset_name=str(sets.text)).load(None, 0)
    write_set(sets.text, FORMATS["text"], "test.jsonl")
    (after,) = DatasetArguments(dataset_name=str(sets.text)).load(None, 0)
    assert before.record == after.record


def test_a_hub_dataset_is_recorded_by_its_commit(sets, monkeypatch):
    builder = SimpleNamespace(repo_id="org/set", hash="c0ffee", download_and_prepare=lambda: None,
                              as_dataset=lambda split: Dataset.from_list(FORMATS["text"]))  # fmt: skip
    monkeypatch.setattr("finteam_experts.data.trl_datasets.load_dataset_builder", lambda *args, **options: builder)
    (dataset,) = DatasetArguments(dataset_name="org/set").load(None, 0)
    assert (dataset.record["path"], dataset.record["revision"]) == ("org/set", "c0ffee")


def test_a_changed_dataset_is_another_input(new_run, sets):
    instruct_tune(new_run, "dense", "--dataset_name", sets.text)
    (sets.text / "train.jsonl").write_text(json.dumps({"text": "Something else."}) + "\n")
    with pytest.raises(InputError, match=r"files.train.jsonl: recorded .*, now "):
        instruct_tune(new_run, "dense", "--dataset_name", sets.text)


def test_a_changed_stream_is_another_input(tmp_path):
    records = []
    for word in ("rose", "fell"):
        Dataset.from_dict({"text": [f"Rates {word}."] * 3}).to_parquet(tmp_path / "part-0.parquet")
        records.append(stream_corpus(f"{tmp_path}/part-*.parquet", "text", 0, lambda text: None)[1])
    assert records[0] != records[1]
    assert str(tmp_path) not in json.dumps(records)


# --- what is used, by whom


@pytest.fixture
def expert_rows(new_run):
    """The rows that train_expert.py would train a role on, and what it says that it reads."""

    def rows(role="macro", **options):
        script, form = load_script("recipes/train_expert.py"), form_of(new_run / "base")
        args = script.ExpertArguments(run_dir=str(new_run), role=role, **options)
        config = SFTConfig(
            str(new_run / "work"),
            use_cpu=True,
            bf16=False,
            max_steps=12,
            per_device_train_batch_size=8,
            max_length=512,
        )
        roles = list(ROLES) if role == "shared" else [role]
        dataset, sources = script.rows_to_learn(args, roles, check_data_dir(args.data), config, form, 512)
        texts = [form.tokenizer.decode(ids) for ids in dataset["input_ids"]]
        about = {"record": recorded(sources), "reads": reads(dataset, sources, config)}
        return SimpleNamespace(texts=texts, strata=dataset["stratum"][:], **about)

    return rows


def test_an_expert_learns_from_datasets_of_its_role_and_of_none(expert_rows, sets, capsys):
    """The role of each decides: its own part, general conversations, or none of them."""
    shares = "{corpus: 0.4, chats: 0.3, general: 0.3}"
    mixture = [{"path": str(sets.messages)}, {"path": str(sets.text)}]
    own = expert_rows(learn_from=shares, datasets=list(mixture), dataset_roles=["macro", "micro"])
    assert "text is of micro: macro does not learn from it" in capsys.readouterr().out
    assert any("Answer 3." in text for text in own.texts)
    assert not any("Sales of company" in text for text in own.texts)
    assert [source["path"] for source in own.record["chats"].values()] == ["messages"]
    assert set(own.strata) == {"texts: macro", "conversations: macro"}
    none = expert_rows(learn_from=shares, datasets=list(mixture), dataset_roles=["none", "macro"])
    assert any("Sales of company" in text for text in none.texts)
    assert "conversations: general" in none.strata


@pytest.mark.parametrize("role", ["macro", "shared"])
def test_a_dataset_without_a_role_is_of_the_one_that_is_trained(expert_rows, sets, role):
    found = expert_rows(role, dataset_name=str(sets.text))
    assert sum("Sales of company" in text for text in found.texts) >= 8
    assert any("Answer 3.<|im_end|>" in text for text in expert_rows(role, dataset_name=str(sets.messages)).texts)


def test_the_shared_trunk_of_the_corpora_reads_no_conversations_of_the_directory(new_run, expert_rows):
    write_rows(chat_file(new_run / "data", "general"), FORMATS["messages"])
    found = expert_rows("shared")
    assert set(found.strata) == {f"texts: {role}" for role in ROLES}
    assert found.record.keys() == set(ROLES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_roles": ["micro"]}, "dataset_roles says that .*messages is of micro, and this trains macro"),
        ({"learn_from": "{corpus: 1}"}, "has conversations for 'chats', and macro learns from corpus"),
        ({"learn_from": "{chats: 1}", "dataset_roles": ["none"]}, "has conversations for 'general', and macro learns"),
        ({"dataset_roles": ["none"]}, "has conversations for 'general', and macro learns from corpus"),
    ],
)
def test_a_dataset_that_an_expert_would_not_read_is_refused(expert_rows, sets, options, message):
    with pytest.raises(InputError, match=message):
        expert_rows(dataset_name=str(sets.messages), **options)


def test_a_role_that_the_data_does_not_have_and_a_stream_beside_a_dataset(new_run, sets):
    with pytest.raises(InputError, match="dataset_roles names 'makro'.* Did you mean 'macro'"):
        train_expert(new_run, "macro", "--dataset_name", sets.text, "--dataset_roles", "makro")
    with pytest.raises(InputError, match=r"corpus is .*macro\.jsonl, and .*text a dataset. Train on one of them"):
        train_expert(new_run, "macro", "--dataset_name", sets.text, "--corpus", corpus_file(new_run / "data", "macro"))


def test_the_screen_says_how_many_rows_of_each_source_are_read(new_run, expert_rows, sets, capsys):
    found = expert_rows(learn_from="{corpus: 0.25, chats: 0.5, tasks: 0.25}", dataset_name=str(sets.messages))
    assert found.reads.splitlines() == [
        "This training reads about",
        "  25 rows of the 60 of corpora/macro.jsonl",
        "  23 rows of the 28 of tasks (headlines)",
        f"  48 rows of the 8 of dataset {sets.messages}, each 6.0 times",
    ]
    train_expert(new_run, "macro", "--dataset_name", sets.text)
    assert "rows of the 8 of dataset" in capsys.readouterr().out
    train_expert(new_run, "macro", "--dataset_name", sets.text)
    assert "This training reads" not in capsys.readouterr().out  # it is complete


def test_a_streamed_dataset_is_shuffled_by_the_seed(sets):
    write_set(sets.text, [{"text": f"Day {n}."} for n in range(500)])
    stream = DatasetArguments(dataset_name=str(sets.text), dataset_streaming=True)
    first, again, other = (stream.load(50, seed)[0].rows["text"][:] for seed in (0, 0, 1))
    assert len(first) == 50
    assert first == again != other
    assert max(int(text[4:-1]) for text in first) > 400


# --- what can't be used


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": "{sets}/nothing"}, "nothing can't be read: The directory at .* doesn't contain any data"),
        ({"dataset_name": "{sets}/text", "dataset_config": "2020"}, "BuilderConfig '2020' not found. Available"),
        ({"dataset_name": "{sets}/text", "dataset_train_split": "trian"}, "Unknown split .?trian.*Should be one of"),
        ({"dataset_name": "{sets}/empty"}, "dataset .*empty is empty"),
        ({"dataset_name": "{sets}/empty", "dataset_streaming": True}, "dataset .*empty is empty"),
        ({"dataset_name": "{sets}/text", "dataset_train_split": "train[:0]"}, 'text can.t be read: .*corresponds to no data'),
        ({"dataset_name": "{sets}/broken"}, "broken can't be read: JSON parse error"),
        ({"dataset_name": "{sets}/latin"}, "latin can't be read: .*Invalid UTF8 sequence"),
        ({"dataset_name": "json"}, "dataset json is a format: name its files with data_files"),
        ({"dataset_name": "nobody/nothing"}, "dataset nobody/nothing can't be read"),
        ({"datasets": [{"path": "{sets}/text", "columns": ["txet"]}]}, "has no column 'txet'; it has text. Did you mean"),
        ({"datasets": [{"path": "{sets}/text", "data_files": "x.jsonl"}]}, "can't be read: Unable to find"),
        ({"datasets": [{"path": "json", "data_files": 3}]}, "dataset json can't be read"),
        ({"datasets": [{"path": "{sets}/text/train.jsonl", "name": "x"}]}, "train.jsonl is a file: leave out name, data_"),
        ({"datasets": [{"path": "{sets}/text", "fraction": 0}, {"path": "b", "fraction": 1}]}, "is 0; it has to be above 0"),
        ({"datasets": [{"path": "{sets}/text", "fraction": -1}]}, "fraction of dataset .*text is -1; it has to be"),
        ({"datasets": [{"path": "{sets}/text", "fraction": 1.5}]}, "is 1.5; it has to be above 0 and 1 or less"),
        ({"datasets": [{"path": "{sets}/text", "fraction": "half"}]}, "is 'half'; it has to be a number"),
        ({"datasets": [{"path": "{sets}/text", "fraction": 0.5}]}, "is 0.5: it is a share among several datasets"),
        ({"datasets": [{"path": "{sets}/text", "fraction": 0.5}, {"path": "b"}]}, "fraction is set for some"),
        (
            {"datasets": [{"path": "{sets}/text", "fraction": 0.001}, {"path": "{sets}/text", "fraction": 0.9}]},
            "fraction of dataset .*text .1. is 0.001: that is no row of it",
        ),
        ({"dataset_name": "{sets}/text", "datasets": [{"path": "b"}]}, "dataset_name and datasets are both set"),
    ],
)  # fmt: skip
def test_what_is_no_dataset_is_named(sets, options, message):
    folder = sets.text.parent
    write_set(folder / "empty", [])
    (folder / "nothing").mkdir()
    write_set(folder / "broken", [])
    (folder / "broken/train.jsonl").write_text('{"text": "Fine."}\n{"text":\n')
    write_set(folder / "latin", [])
    (folder / "latin/train.jsonl").write_bytes('{"text": "é"}\n'.encode("latin1"))
    options = json.loads(json.dumps(options).replace("{sets}", str(folder)))
    with pytest.raises(InputError, match=message):
        DatasetArguments(**options).load(8, 0)


@pytest.mark.parametrize(
    ("script", "arguments", "line", "key", "value"),
    [
        ("train_expert", "ExpertArguments", "dataset_roles: micro", "dataset_roles", ["micro"]),
        ("instruct_tune", "TuneArguments", "dataset_roles: none", "dataset_roles", ["general"]),
        ("instruct_tune", "TuneArguments", "tasks: fpb", "tasks", ["fpb"]),
    ],
)
def test_a_list_of_one_in_yaml(tmp_path, monkeypatch, script, arguments, line, key, value):
    (recipe := tmp_path / "recipe.yaml").write_text(f"use_cpu: true\ndataset_name: org/set\n{line}\n")
    monkeypatch.setattr("sys.argv", ["recipe", "--config", str(recipe)])
    args, *_ = parse((getattr(load_script(f"recipes/{script}.py"), arguments), SFTConfig, BaseModelConfig))
    assert getattr(args, key) == value


def test_one_column_of_a_mixture_may_be_a_string(sets):
    (dataset,) = DatasetArguments(datasets=[{"path": str(sets.text), "columns": "text"}]).load(None, 0)
    assert dataset.rows.column_names == ["text"]


def test_rows_that_cannot_be_used_are_left_out_counted_and_named(tuned_rows, tmp_path, capsys):
    bad = [{"messages": messages("A?", "B.", "C?")}, {"messages": messages("A?", " ")}, {"messages": None}]
    folder = write_set(tmp_path / "set", [*FORMATS["messages"][:3], *bad, *FORMATS["messages"][3:]])
    rows = tuned_rows(dataset_name=str(folder))
    assert len(rows) == 8
    printed = capsys.readouterr().out
    assert f"dataset {folder}: 3 of 11 rows are left out. The first is row 4: " in printed
    assert "ends with a turn of 'user'" in printed
    write_set(folder, FORMATS["messages"][:2] + bad)
    with pytest.raises(InputError, match="set: 3 of 5 rows can't be used. The first is row 3: it ends with a turn of"):
        tuned_rows(dataset_name=str(folder))
    write_set(folder, [{"question": "A?", "reply": "B."}])
    with pytest.raises(
        InputError, match="1 of 1 rows can't be used. The first is row 1: its columns are question, reply"
    ):
        tuned_rows(dataset_name=str(folder))


def test_a_row_that_the_template_cannot_write_is_left_out(tuned_rows, new_run, tmp_path, capsys):
    template = (
        "{% for m in messages %}{% if 'TABLE' in m.content %}{{ raise_exception('no tables') }}{% endif %}{% endfor %}"
    )
    path = new_run / "base/chat_template.jinja"
    path.write_text(template + path.read_text())
    rows = [*FORMATS["messages"], {"messages": messages("A TABLE?", "No.")}]
    assert len(tuned_rows(dataset_name=str(write_set(tmp_path / "set", rows)))) == 8
    assert "1 of 9 rows are left out. The first is row 9: " in capsys.readouterr().out
    write_rows(chat_file(new_run / "nothing", "macro"), [rows[0], rows[-1]])
    with pytest.raises(InputError, match=r"chats/macro\.jsonl, line 2: .*no tables"):  # of the data directory: refused
        tuned_rows()


def test_scored_texts_in_a_dataset_are_left_out_counted_and_named(tuned_rows, new_run, tmp_path, capsys):
    data, alone = new_run / "data", new_run / "alone"
    test_row = json.loads(task_file(data, "fpb", "test").read_text().splitlines()[0])
    heldout = read_corpus(data, "macro", heldout=True)[0]
    for path in ("tasks/fpb_test.jsonl", "tasks/fpb_train.jsonl", "corpora/macro_heldout.jsonl"):
        (alone / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data / path, alone / path)
    for leak in (
        {"text": test_row["text"]},
        {"text": heldout},
        {"prompt": test_row["text"], "completion": "positive"},
    ):
        rows = FORMATS["text"] if "text" in leak else FORMATS["prompt and completion"]
        folder = write_set(tmp_path / "set", [*rows, leak])
        assert len(tuned_rows(alone, dataset_name=str(folder))) == 8
        printed = capsys.readouterr().out
        assert "1 of 9 rows are left out. The first is row 9: it has a scored text, " in printed
        assert "line 1" in printed


def test_rows_of_a_stream_that_cannot_be_used_are_left_out_and_named(tmp_path, capsys):
    texts = ["Sales rose.", None, "A test row.", "  ", *(f"Sales of company {n} fell." for n in range(8))]
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "part.parquet")
    find = {"A test row.": "fpb_test.jsonl, line 1"}.get
    stream, _ = stream_corpus(str(tmp_path / "part.parquet"), "text", 0, find)
    assert len(list(stream)) == 9
    printed = capsys.readouterr().out
    assert "part.parquet: 1 rows are left out so far; the last one: " in printed


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": 3}, {"text": 4}], "2 of its first 2 rows have no text in column 'text'; row 1 has 3. Name another"),
        ([{"text": "A."}, {"text": ""}, {"text": None}], "2 of its first 3 rows have no text .*; row 2 has ''"),
        ([{"body": "A."}], "no column 'text'; it has body"),
        ([], "is empty"),
    ],
)
def test_a_stream_without_text_is_refused(tmp_path, rows, message):
    write_set(tmp_path, rows, "corpus.jsonl")
    with pytest.raises(InputError, match=message):
        stream_corpus(str(tmp_path / "corpus.jsonl"), "text", 0, lambda text: None)


@pytest.mark.parametrize("tune", [lambda run, *options: instruct_tune(run, "dense", *options),
                                  lambda run, *options: train_expert(run, "macro", *options)])  # fmt: skip
def test_a_data_directory_that_does_not_exist_is_refused_beside_a_dataset(new_run, sets, tune):
    with pytest.raises(InputError, match="data_dir /no/such is not a folder"):
        tune(new_run, "--dataset_name", sets.text, "--data_dir", "/no/such")
