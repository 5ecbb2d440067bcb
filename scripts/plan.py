# SPDX-License-Identifier: Apache-2.0
"""What the road will take on your devices, before anything is downloaded or trained: memory, hours and disk of every step.

    python scripts/plan.py --recipes recipes/llama3-8b --base meta-llama/Llama-3.1-8B-Instruct --gpus 8
    python scripts/plan.py --recipes recipes/sample --base outputs/quickstart/base --cpu --memory 8

Of the base it reads the config alone. A step that does not fit is named with the change that makes it fit, and the exit code
is 1. Memory is an estimate that recipes/README.md holds against measured runs; hours follow from `--utilisation`.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PretrainedConfig
from trl import SFTConfig

from finteam_experts import models, planning, runs
from finteam_experts.data import row_limits
from finteam_experts.errors import InputError, read_yaml, run
from finteam_experts.merge_config import MERGE_FILE, read_merge_config, roles, trained_roles
from finteam_experts.planning import Devices, Shape, Training

RECIPES = Path(__file__).parents[1] / "recipes"


class Step(NamedTuple):
    title: str
    model: Shape
    training: Training
    times: int  # how often it is taken, one after the other


def read_config(base: str) -> PretrainedConfig:
    """The config of a base that the pipeline supports; `InputError` says why it does not."""
    if Path(base).is_dir():
        config = models.read_config(Path(base))
        models.check_config(config, base)
        return config
    try:
        config = AutoConfig.from_pretrained(base)
    except GatedRepoError:
        raise InputError(
            f"{base} is gated: accept its licence at https://huggingface.co/{base}, then `hf auth login`."
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(f"--base {base}: no config could be read: {error}") from None
    models.check_config(config, base)
    return config


def lora_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe's LoRA as PEFT's settings."""
    names = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_target_modules": "target_modules",
             "lora_target_parameters": "target_parameters", "lora_modules_to_save": "modules_to_save"}  # fmt: skip
    return {name: recipe[key] for key, name in names.items() if key in recipe}


def training_of(path: Path, devices: int, *, sharded: bool, row_tokens: int, label_tokens: int, rows: int) -> Training:
    """A recipe's settings as a plan needs them."""
    recipe = {field.name: field.default for field in dataclasses.fields(SFTConfig)} | read_yaml(path)
    batch = recipe["per_device_train_batch_size"]
    accumulation = recipe["gradient_accumulation_steps"]
    if rows_per_step := recipe.get("rows_per_step"):
        if rows_per_step % (batch * devices):
            raise InputError(
                f"{path}: rows_per_step is {rows_per_step}, which {devices} devices of per_device_train_batch_size {batch} can't "
                "share equally. Plan for another number, or set one of the two."
            )
        accumulation = rows_per_step // (batch * devices)
    packed = recipe["packing"]
    tokens = recipe["max_length"] if packed else row_tokens
    steps = recipe["max_steps"]
    if steps < 0:
        limits = row_limits(recipe.get("rows_per_task"), recipe.get("rows_of_task")).values()
        rows = rows if None in limits else sum(limits)
        steps = round(recipe["num_train_epochs"] * rows / (batch * accumulation * devices))
    weight = planning.NF4 if recipe.get("load_in_4bit") else 2 if recipe.get("dtype") == "bfloat16" else planning.FLOAT
    return Training(
        sequences=batch, tokens=tokens, labelled=tokens if packed else label_tokens, accumulation=accumulation, steps=steps,
        checkpointing=recipe["gradient_checkpointing"], weight_bytes=weight,
        activation_bytes=2 if recipe["bf16"] else planning.FLOAT, sharded=sharded, lora=lora_of(recipe),
    )  # fmt: skip


def steps_of(args: argparse.Namespace, dense: PretrainedConfig) -> list[Step]:
    """Every training step of the road."""
    merge = read_merge_config(args.merge_config)
    moe = planning.moe_config(dense, len(roles(merge)), merge.experts_per_token)
    found = []
    for title, name, config, times in (
        ("1: an expert", "train_expert", dense, len(trained_roles(merge))),
        ("3: the team", "instruct_tune_moe", moe, 1),
        ("3: the dense baseline", "instruct_tune_dense", dense, 1),
    ):
        training = training_of(
            args.recipes / f"{name}.yaml", args.gpus, sharded=args.sharded and (args.shard_all or config is moe),
            row_tokens=args.row_tokens, label_tokens=args.label_tokens, rows=args.rows,
        )  # fmt: skip
        found.append(Step(title, planning.shape(config, training.lora), training, times))
    return found


def disk(dense: Shape, moe: Shape, expert: Shape, names: list[str]) -> dict[str, float]:
    """GB of every folder of a run, in the two bytes a parameter of a bfloat16 base."""
    return {
        "base": 2 * dense.total / 1e9,
        f"adapters, {len(names)}": len(names) * planning.FLOAT * expert.trainable / 1e9,
        f"experts, {len(names)}": len(names) * 2 * dense.total / 1e9,
        "moe": 2 * moe.total / 1e9,
        "moe-instruct": 2 * moe.total / 1e9,
        "dense-instruct": 2 * dense.total / 1e9,
        "checkpoints of the step in hand": 3 * 3 * planning.FLOAT * moe.trainable / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=Path, default=RECIPES / "llama3-8b", help="folder of the three recipes")
    parser.add_argument("--base", required=True, help="dense base: Hub id or folder; its config alone is read")
    parser.add_argument("--merge_config", type=Path, default=MERGE_FILE, help="the team")
    parser.add_argument("--gpus", type=int, default=1, help="devices of all machines together")
    parser.add_argument("--cpu", action="store_true", help="the devices are CPUs")
    parser.add_argument("--memory", type=float, default=80, metavar="GIB", help="of each device")
    parser.add_argument(
        "--tflops", type=float, default=989, help="bfloat16 of a device at its best; an H100's by default"
    )
    parser.add_argument("--utilisation", type=float, default=0.4, help="how much of that is reached")
    parser.add_argument(
        "--replicated", dest="sharded", action="store_false", help="the team whole on each device, without FSDP2"
    )
    parser.add_argument("--shard_all", action="store_true", help="FSDP2 for the dense steps as well")
    parser.add_argument("--rows", type=int, default=50000, help="task rows of an epoch, for recipes without max_steps")
    parser.add_argument("--row_tokens", type=int, default=100, help="tokens of a task row")
    parser.add_argument("--label_tokens", type=int, default=3, help="of them in the answer")
    parser.add_argument("--run_dir", type=Path, default=Path("outputs"), help="where the run will lie: is there room?")
    args = parser.parse_args()

    for name in ("gpus", "rows", "row_tokens", "label_tokens", "memory", "tflops", "utilisation"):
        if getattr(args, name) <= 0:
            raise InputError(f"--{name} {getattr(args, name):g}: give a number above 0.")
    if not args.recipes.is_dir():
        raise InputError(f"--recipes {args.recipes}: no such folder. {RECIPES} has some.")
    args.sharded = args.sharded and args.gpus > 1
    devices = Devices(args.gpus, args.memory, args.tflops, args.utilisation, "cpu" if args.cpu else "gpu")
    steps = steps_of(args, read_config(args.base))
    console, problems = Console(), []

    table = Table(title=f"{args.recipes}, {args.base}, {args.gpus} x {args.memory:g} GiB")
    table.add_column("")
    for step in steps:
        table.add_column(step.title, justify="right")
    rows: dict[str, list[str]] = {}
    for step in steps:
        cells = {
            "parameters": f"{step.model.total / 1e9:.3f} B", "of them in each token": f"{step.model.active / 1e9:.3f} B",
            "trained": f"{step.model.trainable / 1e6:.1f} M",
        }  # fmt: skip
        parts = planning.memory(step.model, step.training, devices)
        cells |= {f"GiB: {name}": f"{part:.2f}" for name, part in parts.items()}
        needed = sum(parts.values())
        cells["GiB a device"] = f"{needed:.1f}"
        tokens = step.training.tokens_of_run(args.gpus)
        cells["steps"] = f"{step.training.steps:,}"
        cells["tokens"] = f"{tokens / 1e6:,.1f} M"
        each = planning.flops_per_token(step.model, step.training.tokens, step.training.checkpointing)
        cells["FLOPs"] = f"{tokens * each:.1e}"
        cells["hours"] = f"{planning.hours(step.model, step.training, devices) * step.times:.2f}" + (
            f" for {step.times}" if step.times > 1 else ""
        )
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
        if not planning.fits(parts, devices):
            change = planning.what_makes_it_fit(step.model, step.training, devices)
            problems.append(
                f"step {step.title} needs {needed:.1f} GiB of the {args.memory:g} of a device, of which {planning.USABLE:.0%} can be used. "
                + (f"It fits with: {change}." if change else "No setting makes it fit: take larger devices.")
            )
    for name, cells in rows.items():
        table.add_row(name, *cells, end_section=name in ("trained", "GiB a device"))
    console.print(table)

    expert, moe, baseline = (step.model for step in steps)
    folders = disk(baseline, moe, expert, trained_roles(read_merge_config(args.merge_config)))
    room = Table(title="Disk")
    room.add_column("folder")
    room.add_column("GB", justify="right")
    for name, size in folders.items():
        room.add_row(name, f"{size:.1f}")
    needed = sum(folders.values())
    room.add_row("all", f"{needed:.1f}")
    console.print(room)
    try:
        runs.check_disk_room(args.run_dir, 1e9 * needed)
    except InputError as error:
        problems.append(str(error))
    for problem in problems:
        print(f"does not fit: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    run(main)
