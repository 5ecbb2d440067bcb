# SPDX-License-Identifier: Apache-2.0
"""A sentence instead of a traceback: whatever is wrong with a file, a setting or a disk, and what is done about it."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from conftest import REPOSITORY, TASKS, call, instruct_tune, shell, train_expert
from finteam_experts import errors
from finteam_experts.data.files import corpus_file, read_corpus, read_task, task_file
from finteam_experts.data.tasks import FOLDER, read_task_file
from finteam_experts.errors import InputError
from finteam_experts.files import read_yaml
from finteam_experts.runs import RECORD, read_record, require


@pytest.fixture
def data(tmp_path, toy_data):
    return shutil.copytree(toy_data, tmp_path / "data")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "Erlöse"}'.encode("latin1"), r"macro\.jsonl, line 61: not UTF-8 .*iconv"),
        (b'{"text": "half \\ud83d a character"}', r"line 61: column 'text' holds half a character"),
        (b'{"text": "x"} {"text": "y"}', r"line 61: not JSON"),
        (b'{"text": 7}', r"line 61: no text in column 'text'"),
        (b"", r"line 61: not JSON"),
    ],
)
def test_lines_of_data(data, line, message):
    with corpus_file(data, "macro").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(InputError, match=message):
        read_corpus(data, "macro")


def test_other_columns_are_text_too(data):
    with task_file(data, "fpb", "train").open("ab") as file:
        file.write(b'{"text": "x", "label": "neutral", "question": "\\udc00?"}\n')
    with pytest.raises(InputError, match="line 29: column 'question' holds half a character"):
        read_task(data, TASKS["fpb"], "train")


def test_held_out_passages_of_one_token_are_refused_before_the_training(new_run):
    corpus_file(new_run / "data", "macro", heldout=True).write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(InputError, match=r"macro_heldout.jsonl: its first 2 passages are of one token or none"):
        train_expert(new_run, "macro")
    assert not (new_run / "adapters").exists()


def test_too_few_passages_for_the_router_are_known_at_once(new_run):
    lines = corpus_file(new_run / "data", "macro").read_text().splitlines(keepends=True)
    corpus_file(new_run / "data", "macro").write_text("".join(lines[:31]))
    with pytest.raises(InputError, match="macro.jsonl has 31 passages. The router needs 32 or more"):
        train_expert(new_run, "macro")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([["a", "b"]] * 3, "3 of its first 3 rows have no text in column 'text'; row 1 has \\['a', 'b'\\]"),
        ([1.5] * 3, "have no text in column 'text'; row 1 has 1.5"),
        ([None] * 3, "have no text in column 'text'; row 1 has None"),
    ],
)
def test_columns_of_a_streamed_corpus(new_run, tmp_path, values, message):
    Dataset.from_dict({"text": values, "n": range(3)}).to_parquet(tmp_path / "part.parquet")
    with pytest.raises(InputError, match=message):
        train_expert(new_run, "macro", "--corpus", tmp_path / "part.parquet")
    with pytest.raises(InputError, match="no column 'body'; it has text, n"):
        train_expert(new_run, "macro", "--corpus", tmp_path / "part.parquet", "--corpus_column", "body")
    with pytest.raises(InputError, match=r"corpus .*none-\*.parquet can't be read"):
        train_expert(new_run, "macro", "--corpus", tmp_path / "none-*.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("doc_to_choice: [negative, neutral, positive]", "doc_to_choice: [No, Yes]"),
            "a label of doc_to_choice is False; a label is text",
        ),
        (
            ("doc_to_choice: [negative, neutral, positive]", "doc_to_choice: [1, 2]"),
            "a label of doc_to_choice is 1",
        ),
        (("doc_to_choice: [negative, neutral, positive]", "doc_to_choice: [up, Up]"), "a label twice"),
        (("doc_to_choice: [negative, neutral, positive]", "doc_to_choice: [up]"), "two or more labels"),
        (
            ("doc_to_choice: [negative, neutral, positive]", 'doc_to_choice: [up, " down"]'),
            "' down'; it must not begin",
        ),
        (("  role: micro\n", "  role: 1\n"), "metadata.role is 1"),
        (("main_score: macro_f1", "main_score: f1"), "metadata.main_score is 'f1'; it is one of"),
        (("max_text_tokens: 256", "max_text_tokens: many"), "metadata.max_text_tokens is 'many'"),
        (("task: fpb", "task: fbp"), "task is 'fbp'; it must be the file's name, 'fpb'"),
        (("metadata:", "metadata: {"), "line 1[0-9]: not YAML"),
        (("metadata:", "meta:"), "metadata is None; it must be a mapping"),
    ],
)
def test_a_wrong_task_file(tmp_path, change, message):
    path = tmp_path / "fpb.yaml"
    text = (FOLDER / "fpb.yaml").read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(InputError, match=rf"fpb.yaml.*{message}"):
        read_task_file(path)


def test_a_directory_with_some_of_the_tasks(new_run, capsys):
    for task in ("fiqasa", "stock_movement", "headlines"):
        for split in ("train", "test"):
            task_file(new_run / "data", task, split).unlink()
    (new_run / "data/tasks/fbp_train.jsonl").write_text("{}\n")
    instruct_tune(new_run, "dense")
    call("scripts/evaluate.py", "--run_dir", new_run, "--models", "dense-instruct")
    report = json.loads((new_run / "reports/evaluation.json").read_text())
    assert list(report["models"]["dense-instruct"]["tasks"]) == ["fpb"]
    assert "fbp_*.jsonl are left out: there is no task 'fbp'. Did you mean 'fpb'" in capsys.readouterr().out


def test_a_directory_without_tasks(new_run):
    shutil.rmtree(new_run / "data/tasks")
    with pytest.raises(InputError, match="has nothing to tune on: no tasks/TASK_train.jsonl and no chats/ROLE.jsonl"):
        instruct_tune(new_run, "dense")
    task_file(new_run / "data", "fpb", "train").parent.mkdir()
    task_file(new_run / "data", "fpb", "train").write_text('{"text": "x", "label": "neutral"}\n')
    with pytest.raises(InputError, match="fpb_test.jsonl does not exist"):
        instruct_tune(new_run, "dense")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"step": "merge_mo', "finteam.json, line 1: not JSON .*cut off"),
        ("[]", "finteam.json: expected a JSON object, found list"),
        ("{}", "finteam.json has no 'step'"),
    ],
)
def test_a_broken_record(tmp_path, content, message):
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / RECORD).write_text(content)
    with pytest.raises(InputError, match=message):
        require(tmp_path / "moe", "nothing")


def test_an_adapter_that_is_cut_off(copied_run):
    path = copied_run / "adapters/micro/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match="adapters/micro/adapter_model.safetensors can't be read .*cut off"):
        call("scripts/merge_moe.py", "--run_dir", copied_run)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("x is 3."), 2, "error: x is 3."),
        (
            OSError(errno.ENOSPC, "No space left on device", "checkpoint-8/optimizer.pt"),
            1,
            "checkpoint-8/optimizer.pt: No space left on device. The disk is full",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "run/base"),
            1,
            "run/base: Permission denied. Change its permissions",
        ),
        (
            RuntimeError("WandbCallback requires wandb. Run `pip install wandb`."),
            1,
            "RuntimeError: WandbCallback requires wandb",
        ),
        (KeyboardInterrupt(), 130, "Interrupted. The same command continues"),
    ],
)
def test_how_a_script_ends(capsys, error, code, message):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        errors.run(main)
    assert ended.value.code == code
    printed = capsys.readouterr().err
    assert message in printed.splitlines()[-1]
    assert ("Traceback" in printed) == (code == 1)  # into the log of a job, whose files may be gone with its machine


def test_on_a_terminal_a_traceback_is_kept_in_a_file(capsys, monkeypatch):
    def main():
        raise RuntimeError("something broke")

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(SystemExit):
        errors.run(main)
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1] == "error: RuntimeError: something broke."
    log = Path(re.search(r"The full traceback is in (\S+)", printed)[1])
    assert "Traceback" in log.read_text()
    assert "Traceback" not in printed
    log.unlink()


LAUNCHED = (
    "recipes/instruct_tune.py",
    "--config",
    "recipes/sample/instruct_tune_moe.yaml",
    "--run_dir",
    "no-such-folder",
)


def test_the_sentence_is_the_last_line_below_accelerate():
    ended = shell("accelerate", "launch", "--quiet", *LAUNCHED)
    assert ended.returncode != 0
    assert ended.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in ended.stderr


def test_the_launcher_of_several_processes_ends_with_the_sentence_too():
    ended = shell(
        "accelerate", "launch", "--config_file", "recipes/accelerate/multi_gpu.yaml", "--num_processes", 2,
        "--mixed_precision", "no", *LAUNCHED, env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert ended.returncode != 0
    *_, last, border = ended.stderr.splitlines()
    assert last.startswith("  traceback : error: "), ended.stderr[-3000:]
    assert set(border) == {"="}


def test_a_missing_tracker_ends_with_its_own_sentence(new_run):
    ended = shell(
        sys.executable, "recipes/train_expert.py", "--config", "recipes/sample/train_expert.yaml", "--run_dir", new_run, "--role",
        "macro", "--max_steps", 2, "--report_to", "wandb",
    )  # fmt: skip
    assert ended.returncode != 0
    assert "pip install wandb" in ended.stderr.splitlines()[-1]
    train_expert(new_run, "macro")  # it blocks nothing


def test_a_published_adapter_names_no_folder_of_this_machine(new_run, tmp_path):
    Dataset.from_dict({"text": read_corpus(new_run / "data", "macro")}).to_parquet(tmp_path / "mine.parquet")
    train_expert(new_run, "macro", "--corpus", tmp_path / "mine.parquet")
    assert str(tmp_path) not in (new_run / "adapters/macro" / RECORD).read_text()
    assert read_record(new_run / "adapters/macro")["inputs"]["corpus"]["files"] == "mine.parquet"


def test_cards_and_space_are_found_from_any_folder(done_run, tmp_path):
    ended = subprocess.run(
        [sys.executable, REPOSITORY / "scripts/publish.py", "--run_dir", done_run, "--namespace", "me", "--dry_run", "--parts", "moe", "space"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "Nothing was uploaded" in ended.stdout


@pytest.mark.parametrize(
    ("model", "message"), [("nowhere", "there is no such folder here"), ("base", "no finteam.json")]
)
def test_a_space_without_a_team(done_run, model, message):
    environment = os.environ | {"MODEL_ID": str(done_run / model), "HF_HUB_OFFLINE": "1"}
    ended = shell(sys.executable, "space/app.py", env=environment)
    assert ended.returncode != 0
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_yaml_value_that_holds_itself(tmp_path):
    (path := tmp_path / "loop.yaml").write_text("a: &x [*x]\n")
    with pytest.raises(InputError, match="loop.yaml: a value can't be read: Circular"):
        read_yaml(path)
