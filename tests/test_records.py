# SPDX-License-Identifier: Apache-2.0
"""A step is skipped only if all that shaped its result is unchanged, and nothing that a killed process leaves stops it."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import REPOSITORY, TASKS, call, fit_router, instruct_tune, train_expert
from finteam_experts import runs
from finteam_experts.data.files import corpus_file, task_file
from finteam_experts.data.tasks import FOLDER
from finteam_experts.errors import InputError, NotFiniteError
from finteam_experts.files import write_json
from finteam_experts.fingerprints import PARTS, fingerprint
from finteam_experts.training.arguments import BaseModelConfig, settings


def merge(run_dir, *arguments):
    call("scripts/merge_moe.py", "--run_dir", run_dir, *arguments)


def evaluate(run_dir, *arguments):
    call("scripts/evaluate.py", "--run_dir", run_dir, *arguments)


def edit(path, old, new):
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))


def edit_config(run_dir):
    config = json.loads((run_dir / "base/config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5e5
    (run_dir / "base/config.json").write_text(json.dumps(config))


def edit_tokenizer(run_dir):
    edit(run_dir / "base/tokenizer_config.json", '"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"')


def edit_template(run_dir):
    edit(run_dir / "base/chat_template.jinja", "<|im_start|>", "<|endoftext|>")


def edit_last_rows(run_dir):
    """All of the embeddings but the first row."""
    path = run_dir / "base/model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][-1] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def edit_generation(run_dir):
    (run_dir / "base/generation_config.json").write_text('{"repetition_penalty": 1.3}')


STEPS = {
    "expert": lambda run_dir: train_expert(run_dir, "macro"),
    "merge": merge,
    "dense": lambda run_dir: instruct_tune(run_dir, "dense"),
}


@pytest.mark.parametrize(
    ("change", "part", "steps"),
    [
        (edit_config, "config", ("expert", "merge", "dense")),
        (edit_tokenizer, "tokenizer", ("expert", "merge", "dense")),
        (edit_template, "chat_template", ("merge", "dense")),  # an expert learns plain text alone
        (edit_last_rows, "weights", ("expert", "merge", "dense")),
        (edit_generation, "generation_config", ("merge", "dense")),
    ],
)
def test_a_changed_base_is_noticed(copied_run, change, part, steps):
    change(copied_run)
    for step in steps:
        with pytest.raises(InputError, match=rf"\b{part}: recorded|another base .*'{part}'"):
            STEPS[step](copied_run)


def test_a_changed_expert_of_a_team_is_noticed(copied_run):
    """The third of the fused experts alone: the same team is not complete any more."""
    path = copied_run / "moe/model.safetensors"
    before = fingerprint(copied_run / "moe")
    tensors = load_file(path)
    tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"] *= 2
    save_file(tensors, path, metadata={"format": "pt"})
    now = fingerprint(copied_run / "moe")
    assert {part for part in PARTS if now[part] != before[part]} == {"weights"}
    with pytest.raises(InputError, match="model.weights: recorded"):
        instruct_tune(copied_run, "moe")
    with pytest.raises(InputError, match="gives 'quant' another expert than the weights at its place"):
        fit_router(copied_run)


@pytest.fixture
def other_question(copied_run):
    """fpb asks something else."""
    text = (FOLDER / "fpb.yaml").read_text().replace("What does this mean for the company?", "Is this news good?")
    (copied_run / "data/tasks/fpb.yaml").write_text(text)


def test_another_question_is_noticed(copied_run, other_question):
    changed = "asked.fpb.question: recorded What does this mean for the company[?], now Is this news good[?]"
    for step in (
        lambda: instruct_tune(copied_run, "dense"),
        lambda: evaluate(copied_run),
        lambda: fit_router(copied_run),
    ):
        with pytest.raises(InputError, match=changed):
            step()


def test_the_split_that_is_scored_is_recorded(copied_run):
    valid = ("--split", "valid", "--models", "base", "--name", "valid")
    for task in TASKS:
        rows = [{"text": f"Validation {task} {n}.", "label": TASKS[task].labels[0]} for n in range(4)]
        task_file(copied_run / "data", task, "valid").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(copied_run, *valid)
    edit(task_file(copied_run / "data", "fpb", "valid"), "Validation fpb 0.", "Another one.")
    with pytest.raises(InputError, match="tasks.fpb: recorded"):
        evaluate(copied_run, *valid)
    task_file(copied_run / "data", "fpb", "valid").unlink()
    with pytest.raises(InputError, match="tasks.fpb: recorded"):
        evaluate(copied_run, *valid)


def test_the_passages_of_the_perplexity_are_recorded(copied_run):
    with corpus_file(copied_run / "data", "macro", heldout=True).open("a") as file:
        file.write('{"text": "Rates rose by a quarter of a point."}\n')
    with pytest.raises(InputError, match="heldout.macro: recorded"):
        train_expert(copied_run, "macro")


def test_all_of_the_merge_file_is_recorded(copied_run, tmp_path):
    path = tmp_path / "negative.yaml"
    path.write_text((REPOSITORY / "moe_merge.yaml").read_text() + '    negative_prompts: ["Bees."]\n')
    with pytest.raises(InputError, match="merge.experts: recorded"):
        merge(copied_run, "--merge_config", path)


def test_an_explicit_null_is_not_the_default():
    from trl import SFTConfig

    options = {"output_dir": "x", "use_cpu": True, "bf16": False, "report_to": "none"}
    default, null = (settings(SFTConfig(**options, **more), BaseModelConfig()) for more in ({}, {"max_length": None}))
    assert "max_length" not in default
    assert null["max_length"] is None


def test_precision_that_comes_from_accelerate_is_recorded(monkeypatch):
    from trl import SFTConfig

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    args = SFTConfig(output_dir="x", use_cpu=True, bf16=False, report_to="none")
    assert settings(args)["mixed_precision"] == "bf16"


def test_figures_that_are_not_finite_are_not_written(tmp_path):
    with pytest.raises(NotFiniteError, match="report.json was not written: one of its figures is NaN"):
        write_json(tmp_path / "report.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


# --- one process a folder, and no way to be stuck

HOLD = "from pathlib import Path; import sys, time; from finteam_experts import runs; runs.lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def test_a_second_process_is_refused_while_the_first_is_at_work(copied_run):
    shutil.rmtree(copied_run / "adapters/macro")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, copied_run / "adapters/macro"], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(InputError, match="another process is at work on .*adapters/macro. Wait for it to end"):
            train_expert(copied_run, "macro")
        assert not (copied_run / "adapters/macro.incomplete").exists()
    finally:
        holder.kill()  # the lock goes with its process
        holder.wait()
    train_expert(copied_run, "macro")
    assert (copied_run / "adapters/macro").is_dir()


def test_a_complete_folder_wins_over_a_stray_unfinished_one(copied_run, capsys):
    stray = copied_run / "adapters/macro.incomplete"
    (stray / "checkpoint-2").mkdir(parents=True)
    train_expert(copied_run, "macro")
    assert "macro is complete: skipped" in capsys.readouterr().out
    assert not stray.exists()


@pytest.mark.parametrize("moment", ["recorded", "renamed", "put in place"])
def test_a_kill_while_a_folder_is_replaced_loses_nothing(tmp_path, moment):
    """Neither the complete folder nor its finished successor, whatever the moment."""
    target = tmp_path / "step"
    for number in (1, 2):
        work = runs.begin(target, "a step", {"number": number}, overwrite=True)
        (work / "weights").write_text(str(number))
        (work / "checkpoint").mkdir()
        if number == 1:
            runs.finish(target, {"results": 1}, keep=("weights",))
    assert (target / "weights").read_text() == "1"
    record = runs.read_record(work)
    write_json(work / runs.RECORD, {**record, "results": 2, "files": ["finteam.json", "weights"]})
    if moment != "recorded":
        target.rename(tmp_path / "step.replaced")
    if moment == "put in place":
        work.rename(target)
    runs.unlock(target)
    assert runs.require(target, "nothing")["results"] == (1 if moment == "recorded" else 2)
    assert runs.begin(target, "a step", {"number": 2}, overwrite=True) is None
    assert (target / "weights").read_text() == "2"
    assert sorted(path.name for path in target.iterdir()) == ["finteam.json", "weights"] or moment == "put in place"
    assert not [path for path in tmp_path.iterdir() if path.name not in ("step", ".step.lock")]


def test_a_symlinked_folder_can_be_replaced(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_json(elsewhere / runs.RECORD, {"step": "a step", "inputs": {"number": 1}})
    (tmp_path / "step").symlink_to(elsewhere)
    runs.begin(tmp_path / "step", "a step", {"number": 2}, overwrite=True)
    runs.finish(tmp_path / "step", {})
    assert not (tmp_path / "step").is_symlink()
    assert elsewhere.is_dir()


def test_the_router_of_a_tuned_team_is_replaced_in_place(copied_run, monkeypatch):
    """A refit that is cut off leaves the tuned team where it is, and the same command mends it."""
    before = load_file(copied_run / "moe-instruct/model.safetensors")
    refit = ("--model", "moe-instruct", "--chat_share", "0.5", "--scale", "4")
    with monkeypatch.context() as patched:
        patched.setattr("finteam_experts.merging.gates.save_file", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit_router(copied_run, *refit)
    runs.unlock(copied_run / "moe-instruct")
    assert (copied_run / "moe-instruct").is_dir()
    with pytest.raises(InputError, match="Run again: scripts/fit_router.py --model moe-instruct"):
        evaluate(copied_run, "--name", "again")
    fit_router(copied_run, *refit)
    after = load_file(copied_run / "moe-instruct/model.safetensors")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if name.endswith(".gate.weight")}
    evaluate(copied_run, "--name", "again")


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(
    ("complete", "steps"),
    [("done_run", []), ("qwen3_run", ["--steps", "merge", "router", "team"])],
    ids=["llama", "qwen3"],
)
def test_a_step_that_is_killed_ends_as_if_it_had_not_been(request, complete, steps):
    run_dir = request.getfixturevalue(complete)
    drill = [sys.executable, REPOSITORY / "tests/kill_drill.py", run_dir, "--kills", "4", *steps]
    ended = subprocess.run(drill, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("4 ended as if not killed") == (len(steps) - 1 if steps else 8)
