# SPDX-License-Identifier: Apache-2.0
"""Several processes of one launch: the weights of one process with the same rows a step, whoever resumes whose checkpoint."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import pytest
import torch
from safetensors.torch import load_file

from conftest import REPOSITORY, SHORT, instruct_tune, train_expert
from finteam_experts.models import load_model
from finteam_experts.runs import read_record

# float32 sums in another order, through four steps of Adam, which divides small gradients by small numbers
CLOSE = {"rtol": 0, "atol": 2e-4}
LEARNED = 1e-2  # what the same steps change: fifty times as much
FAST = ("--learning_rate", 1e-2, "--warmup_steps", 0, "--lr_scheduler_type", "constant")

pytestmark = pytest.mark.slow


def launch(processes, recipe, yaml, *arguments, instead=None):
    """Start a recipe in so many processes, with the environment that torchrun gives them, and end all when one fails.

    `instead` is the source of a script that changes something and then runs the recipe.
    """
    script = REPOSITORY / "recipes" / recipe
    if instead:
        changed = arguments[1] / "changed.py"  # beside the run folder's contents
        changed.write_text(instead.format(script=script))
        script = changed
    words = (sys.executable, script, "--config", f"recipes/sample/{yaml}.yaml", *arguments, *SHORT, *FAST)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    with contextlib.ExitStack() as stack:
        outputs = [[stack.enter_context(tempfile.TemporaryFile("w+")) for _ in "oe"] for _ in range(processes)]
        started = [
            subprocess.Popen(
                list(map(str, words)), cwd=REPOSITORY, stdout=out, stderr=err,
                env=os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)},
            )
            for rank, (out, err) in enumerate(outputs)
        ]  # fmt: skip
        deadline = time.monotonic() + 200
        while any(process.poll() is None for process in started):
            if time.monotonic() > deadline or any(process.returncode for process in started):
                time.sleep(1)  # for the others to fail by themselves
                for process in started:
                    process.kill()
            time.sleep(0.1)
        codes = [process.wait() for process in started]
        texts = []
        for files in zip(*outputs, strict=True):
            for file in files:
                file.seek(0)
            texts.append("".join(file.read() for file in files))
    return subprocess.CompletedProcess(words, next(filter(None, codes), 0), *texts)


# All processes die once the checkpoint of step 2 is complete.
CUT_OFF = """
import os, runpy
from finteam_experts.training.checkpoints import CompleteCheckpoints
marked = CompleteCheckpoints.on_save
def on_save(self, args, state, control, **kwargs):
    marked(self, args, state, control, **kwargs)
    if state.global_step == 2:
        training.PartialState().wait_for_everyone()
        os._exit(9)
CompleteCheckpoints.on_save = on_save
runpy.run_path("{script}", run_name="__main__")
"""


# accelerate shards models on accelerators only: here the CPUs pass for some. Fails unless the parameters are in pieces.
AS_FSDP2 = """
import os, runpy
os.environ |= {{
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}}
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from finteam_experts.training.checkpoints import CompleteCheckpoints
made, marked = AcceleratorState.__init__, CompleteCheckpoints.on_save
def as_accelerators(self, *args, **kwargs):
    if not AcceleratorState._shared_state:
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    made(self, *args, **kwargs)
def on_save(self, args, state, control, **kwargs):
    assert all(isinstance(parameter, DTensor) for parameter in kwargs["model"].parameters())
    marked(self, args, state, control, **kwargs)
AcceleratorState.__init__, CompleteCheckpoints.on_save = as_accelerators, on_save
runpy.run_path("{script}", run_name="__main__")
"""


@pytest.fixture(params=["done_run", "qwen3_run"], ids=["llama", "qwen3"])
def team_run(request, tmp_path):
    """A copy of a run whose team is complete, in each family."""
    return shutil.copytree(request.getfixturevalue(request.param), tmp_path / "run")


def assert_same_training(one, other, before):
    """The weights of two trainings are close to each other, and far from those they began with."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], **CLOSE)
    assert max((one[name] - before[name]).abs().max() for name in one if name in before) > LEARNED


def test_expert_of_two_processes_equals_that_of_one(new_run, tmp_path):
    other = shutil.copytree(new_run, tmp_path / "other")
    rows = ("--rows_per_step", 4, "--max_length", 256)
    train_expert(new_run, "macro", *rows, *FAST, "--per_device_train_batch_size", 4)
    ended = launch(2, "train_expert.py", "train_expert", "--run_dir", other, "--role", "macro", *rows,
                   "--per_device_train_batch_size", 2)  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    one, two = (load_file(run / "adapters/macro/adapter_model.safetensors") for run in (new_run, other))
    untrained = {name: torch.zeros_like(tensor) for name, tensor in one.items() if "lora_B" in name}
    assert_same_training(one, two, untrained)


@pytest.mark.parametrize("what", ["moe", "dense"])
def test_model_tuned_by_two_processes_equals_that_of_one(team_run, tmp_path, what):
    target = f"{what}-instruct"  # without the auxiliary loss: it is a mean of each process's own tokens
    shutil.rmtree(team_run / target, ignore_errors=True)
    other = shutil.copytree(team_run, tmp_path / "other")
    instruct_tune(
        team_run,
        what,
        *FAST,
        "--router_aux_loss_coef",
        "0",
        "--rows_per_step",
        4,
        "--per_device_train_batch_size",
        4,
    )
    ended = launch(2, "instruct_tune.py", f"instruct_tune_{what}", "--run_dir", other, "--router_aux_loss_coef", "0", "--rows_per_step", 4,
                   "--per_device_train_batch_size", 2)  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    start = "moe" if what == "moe" else "base"
    before, one, two = (
        load_model(folder).state_dict() for folder in (team_run / start, team_run / target, other / target)
    )
    assert_same_training(one, two, before)
    one, two = (read_record(run / target)["results"] for run in (team_run, other))
    assert (one["rows_seen"], one["train_tokens"]) == (two["rows_seen"], two["train_tokens"])


def test_team_in_pieces_on_two_processes_equals_that_of_one(team_run, tmp_path):
    """FSDP2 with a LoRA on fused experts and a trained router: the same weights, saved as one process reads them."""
    shutil.rmtree(team_run / "moe-instruct")
    config = team_run / "moe/config.json"  # with one expert per token a router gets no gradient
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_experts_per_tok": 2}))
    other = shutil.copytree(team_run, tmp_path / "other")
    common = (
        "--router_aux_loss_coef",
        0,  # it is a mean of each process's tokens, so no two numbers of processes have the same
        "--rows_per_step",
        4,
        "--lora_modules_to_save",
        "gate",
        "--routing_steps",
        0,
        "--model_init_kwargs",
        "{}",
    )
    instruct_tune(team_run, "moe", *FAST, *common, "--per_device_train_batch_size", 4)
    ended = launch(2, "instruct_tune.py", "instruct_tune_moe", "--run_dir", other, *common,
                   "--per_device_train_batch_size", 2, instead=AS_FSDP2)  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    before, one, two = (
        load_model(folder).state_dict()
        for folder in (team_run / "moe", team_run / "moe-instruct", other / "moe-instruct")
    )
    assert_same_training(one, two, before)
    gate = "model.layers.0.mlp.gate.weight"
    assert not torch.equal(one[gate], before[gate])


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_resumes(new_run, tmp_path, before, after):
    straight = shutil.copytree(new_run, tmp_path / "straight")
    rows = ("--role", "macro", "--rows_per_step", 4, "--per_device_train_batch_size", 2, "--max_length", 256)
    train_expert(straight, *rows[1:], *FAST)
    cut_off = launch(before, "train_expert.py", "train_expert", "--run_dir", new_run, *rows, instead=CUT_OFF)
    assert cut_off.returncode != 0
    assert not (new_run / "adapters/macro").exists()
    ended = launch(after, "train_expert.py", "train_expert", "--run_dir", new_run, *rows)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "Resuming from step 2" in ended.stdout
    one, two = (load_file(run / "adapters/macro/adapter_model.safetensors") for run in (straight, new_run))
    assert_same_training(
        one, two, {name: torch.zeros_like(tensor) for name, tensor in one.items() if "lora_B" in name}
    )


def test_a_batch_that_the_processes_cannot_share_is_refused_once(new_run):
    ended = launch(2, "train_expert.py", "train_expert", "--run_dir", new_run, "--role", "macro", "--rows_per_step", 5)
    assert ended.returncode != 0
    assert ended.stderr.count("rows_per_step is 5, which 2 processes") == 1
    assert not (new_run / "adapters").exists()
