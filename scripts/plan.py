# SPDX-License-Identifier: Apache-2.0
"""Estimate memory, hours and disk of every step on your devices, before anything is downloaded or trained.

    python scripts/plan.py --recipes recipes/llama3-8b --base meta-llama/Llama-3.1-8B-Instruct --gpus 8
    python scripts/plan.py --recipes recipes/sample --base outputs/quickstart/base --cpu --memory 8

It reads the base's config alone. A step that does not fit is named with the change that makes it fit, and the exit code
is 1. docs/at-size.md compares its estimates with measured runs; hours follow from `--utilisation`.
"""

import argparse
import dataclasses
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from rich.table import Table
from transformers import AutoConfig, PretrainedConfig
from trl import SFTConfig

from finteam_experts import families, models
from finteam_experts.data.mixture import row_limits
from finteam_experts.data.tasks import default_tasks
from finteam_experts.errors import InputError, check_number, run
from finteam_experts.files import check_disk_room
from finteam_experts.merging.config import read_merge_config, roles, trained_roles
from finteam_experts.screen import screen
from finteam_experts.training import planning
from finteam_experts.training.arguments import BaseModelConfig, RunArguments, TaskRowArguments, read_recipe
from finteam_experts.training.planning import Devices, Shape, Training

RECIPES = Path(__file__).parents[1] / "recipes"
MERGE_FILE = Path(__file__).parents[1] / "moe_merge.yaml"
# TRL's settings of a LoRA, and PEFT's
LORA = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_target_modules": "target_modules",
        "lora_target_parameters": "target_parameters", "lora_modules_to_save": "modules_to_save"}  # fmt: skip


class Step(NamedTuple):
    title: str
    model: Shape
    training: Training
    times: int  # how often it is taken, one after the other


def read_config(base: str) -> PretrainedConfig:
    """The config of a base that the pipeline supports; `InputError` says why it does not."""
    try:
        config = models.read_config(Path(base)) if Path(base).is_dir() else AutoConfig.from_pretrained(base)
    except InputError:
        raise
    except GatedRepoError:
        advice = f"accept its licence at https://huggingface.co/{base}, then `hf auth login`."
        raise InputError(f"{base} is gated: {advice}") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(f"--base {base}: no config could be read: {error}") from None
    families.check_config(config, base)
    return config


def training_of(path: Path, args: argparse.Namespace, *, sharded: bool) -> Training:
    """A recipe's settings as a plan needs them."""
    read = read_recipe(path, (RunArguments, TaskRowArguments, SFTConfig, BaseModelConfig), other_keys=True)
    recipe = {field.name: field.default for field in dataclasses.fields(SFTConfig)} | read
    check_number(f"{path}: steps_per_task", recipe.get("steps_per_task"), least=1)
    batch, accumulation = recipe["per_device_train_batch_size"], recipe["gradient_accumulation_steps"]
    if rows_per_step := recipe.get("rows_per_step"):
        if rows_per_step % (batch * args.gpus):
            raise InputError(
                f"{path}: rows_per_step is {rows_per_step}, which {args.gpus} devices of per_device_train_batch_size {batch} "
                "can't share equally. Plan for another number, or set one of the two."
            )
        accumulation = rows_per_step // (batch * args.gpus)
    packed, steps = recipe["packing"] and not read.get("learn_from"), recipe["max_steps"]
    if packed and recipe["max_length"] is None:
        raise InputError(f"{path}: packing is true and max_length null. Packed rows need a length: set max_length.")
    tokens = recipe["max_length"] if packed else args.row_tokens
    if steps < 0 and (each := recipe.get("steps_per_task")):
        steps = round(each * len(default_tasks()) / len(trained_roles(read_merge_config(args.merge_config))))
    elif recipe.get("match_steps"):
        steps = 0  # `steps_of` adds up those of the other trainings
    elif steps < 0:
        limits = row_limits(default_tasks(), recipe.get("rows_per_task"), recipe.get("rows_of_task")).values()
        rows = args.rows if None in limits else sum(limits)
        steps = round(recipe["num_train_epochs"] * rows / (batch * accumulation * args.gpus))
    weight = planning.NF4 if recipe.get("load_in_4bit") else 2 if recipe.get("dtype") == "bfloat16" else planning.FLOAT
    return Training(
        sequences=batch, tokens=tokens, labelled=tokens if packed else args.label_tokens, accumulation=accumulation, steps=steps,
        checkpointing=recipe["gradient_checkpointing"], weight_bytes=weight, sharded=sharded,
        whole_logits=args.cpu or recipe["label_smoothing_factor"] > 0, activation_bytes=2 if recipe["bf16"] else planning.FLOAT,
        lora={name: recipe[key] for key, name in LORA.items() if key in recipe},
    )  # fmt: skip


def steps_of(args: argparse.Namespace, dense: PretrainedConfig) -> list[Step]:
    """Every training step of the pipeline."""
    merge = read_merge_config(args.merge_config)
    moe = families.family_of(dense).moe_config(dense, len(roles(merge)), merge.experts_per_token)
    found = []
    for title, name, config, times in (
        ("1: the trunk", "instruct_tune_trunk", dense, 1),
        ("1: an expert", "train_expert", dense, len(trained_roles(merge))),
        ("3: the team", "instruct_tune_moe", moe, 1),
        ("3: the dense baseline", "instruct_tune_dense", dense, 1),
    ):
        recipe = args.recipes / f"{name}.yaml"
        if name == "instruct_tune_trunk" and not recipe.exists():
            continue  # experts branch off from the base
        sharded = args.sharded and args.gpus > 1 and (args.shard_all or config is moe)
        training = training_of(recipe, args, sharded=sharded)
        if training.steps == 0:  # of the team's own trainings, without the trunk's
            rows = sum(step.training.rows_of_run() * step.times for step in found if "trunk" not in step.title)
            training = replace(training, steps=math.ceil(rows / replace(training, steps=1).rows_of_run()))
        found.append(Step(title, planning.shape(config, training.lora), training, times))
    return found


def columns_of(step: Step, devices: Devices, parts: dict[str, float]) -> dict[str, str]:
    """The figures of one step, by name."""
    tokens = step.training.tokens_of_run(devices.count)
    each = planning.flops_per_token(step.model, step.training.tokens, step.training.checkpointing)
    hours = planning.hours(step.model, step.training, devices) * step.times
    return {
        "parameters": f"{step.model.total / 1e9:.3f} B",
        "active per token": f"{step.model.active / 1e9:.3f} B",
        "trained": f"{step.model.trainable / 1e6:.1f} M",
        **{f"GiB: {name}": f"{part:.2f}" for name, part in parts.items()},
        "GiB per device": f"{sum(parts.values()):.1f}",
        "steps": f"{step.training.steps:,}",
        "tokens": f"{tokens / 1e6:,.1f} M",
        "FLOPs": f"{tokens * each:.1e}",
        "hours": f"{hours:.2f}" + (f" for {step.times}" if step.times > 1 else ""),
    }


def print_steps(title: str, steps: list[Step], devices: Devices) -> list[str]:
    """Print the figures of every step; returns what does not fit, with the change that makes it fit."""
    problems, rows = [], {}
    table = Table("", title=title)
    for step in steps:
        table.add_column(step.title, justify="right")
        parts = planning.memory(step.model, step.training, devices)
        for name, cell in columns_of(step, devices, parts).items():
            rows.setdefault(name, []).append(cell)
        if not planning.fits(parts, devices):
            change = planning.what_makes_it_fit(step.model, step.training, devices)
            room = f"{devices.memory_gib:g} of a device, of which {planning.USABLE:.0%} can be used"
            advice = f"It fits with: {change}." if change else "No setting makes it fit: take larger devices."
            problems.append(f"step {step.title} needs {sum(parts.values()):.1f} GiB of the {room}. {advice}")
    for name, cells in rows.items():
        table.add_row(name, *cells, end_section=name in ("trained", "GiB per device"))
    screen().print(table)
    return problems


def print_disk(steps: list[Step]) -> float:
    """Print the GB of every folder of a run, in the two bytes per parameter of a bfloat16 base; returns their sum."""
    *trunk, expert, moe, dense = (step.model for step in steps)
    count = steps[-3].times
    folders = {
        "base": 2 * dense.total,
        **({"trunk": 2 * dense.total} if trunk else {}),
        f"adapters, {count}": count * planning.FLOAT * expert.trainable,
        f"experts, {count}": count * 2 * dense.total,
        "moe": 2 * moe.total,
        "moe-instruct": 2 * moe.total,
        "dense-instruct": 2 * dense.total,
        "checkpoints of the current step": 3 * 3 * planning.FLOAT * moe.trainable,
    }
    needed = sum(folders.values()) / 1e9
    table = Table("folder", title="Disk")
    table.add_column("GB", justify="right")
    for name, size in folders.items():
        table.add_row(name, f"{size / 1e9:.1f}")
    table.add_row("all", f"{needed:.1f}")
    screen().print(table)
    return needed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipes", type=Path, default=RECIPES / "llama3-8b", help="folder of the three recipes")
    add("--base", required=True, help="dense base: Hub id or folder; its config alone is read")
    add("--merge_config", type=Path, default=MERGE_FILE, help="the team")
    add("--gpus", type=int, default=1, help="devices of all machines together")
    add("--cpu", action="store_true", help="the devices are CPUs")
    add("--memory", type=float, default=80, metavar="GIB", help="of each device")
    add("--tflops", type=float, default=989, help="bfloat16 of a device at its best; an H100's by default")
    add("--utilisation", type=float, default=0.4, help="how much of that is reached")
    add("--replicated", dest="sharded", action="store_false", help="the team whole on each device, without FSDP2")
    add("--shard_all", action="store_true", help="FSDP2 for the dense steps as well")
    add("--rows", type=int, default=50000, help="task rows of an epoch, for recipes without max_steps")
    add("--row_tokens", type=int, default=100, help="tokens of a task row")
    add("--label_tokens", type=int, default=3, help="of them in the answer")
    add("--run_dir", type=Path, default=Path("outputs"), help="where the run will be: is there room?")
    args = parser.parse_args()
    for name in ("gpus", "rows", "row_tokens", "label_tokens", "memory", "tflops", "utilisation"):
        check_number(f"--{name}", getattr(args, name), above=0)
    if not args.recipes.is_dir():
        raise InputError(f"--recipes {args.recipes}: no such folder. {RECIPES} has some.")

    devices = Devices(args.gpus, args.memory, args.tflops, args.utilisation, "cpu" if args.cpu else "gpu")
    steps = steps_of(args, read_config(args.base))
    problems = print_steps(f"{args.recipes}, {args.base}, {args.gpus} x {args.memory:g} GiB", steps, devices)
    needed = print_disk(steps)
    try:
        check_disk_room(args.run_dir, 1e9 * needed)
    except InputError as error:
        problems.append(str(error))
    for problem in problems:
        print(f"does not fit: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    run(main)
