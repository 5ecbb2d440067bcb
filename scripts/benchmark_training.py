# SPDX-License-Identifier: Apache-2.0
"""Training speed and memory of steps 1 and 3 beside plain `trl sft` of the same model, data, batch and LoRA.

    python scripts/benchmark_training.py --run_dir outputs/quickstart --recipes recipes/sample

For each step, ours and TRL's run in turn, in processes of their own, `--rounds` times. Tokens are those that are not padding;
the first logged steps are left out of the speed. GiB are what the process held at most until its last step, which is
what scripts/plan.py plans. TRL pads a batch and adapts an MoE's fused experts, as it does by default.
"""

import argparse
import ast
import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import yaml
from rich.console import Console
from rich.table import Table
from trl import ModelConfig, SFTConfig

from finteam_experts.data import read_corpus, row_limits, tuning_rows, write_rows
from finteam_experts.errors import InputError, read_yaml, run
from finteam_experts.merge_config import MERGE_FILE, read_merge_config, trained_roles
from finteam_experts.models import MLP_MODULES, as_chats, load_tokenizer
from finteam_experts.tasks import TASKS, render

LOGGING_STEPS = 5
POLL_SECONDS = 0.2
FUSED_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


class Measured(NamedTuple):
    tokens_per_second: float
    peak_gib: float
    losses: list[float]


class Step(NamedTuple):
    """A training step: its script and recipe, what it starts from, and the rows that TRL's own script reads."""

    title: str
    script: str
    recipe: Path
    model: Path
    arguments: tuple[str, ...]
    rows: list[dict[str, Any]]


def measure(command: list[str]) -> Measured:
    """Run a training and read its log; `InputError` if it fails or logs fewer than two times."""
    peak, trained = 0, False
    with tempfile.NamedTemporaryFile("w+") as output:
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if not trained:  # later steps, as a merge, hold other things
                with contextlib.suppress(psutil.NoSuchProcess):
                    peak = max(peak, process.memory_info().rss)
                trained = "'train_loss'" in Path(output.name).read_text()
            time.sleep(POLL_SECONDS)
        code, text = process.returncode, Path(output.name).read_text()
    lines = (line[line.find("{'loss'") :] for line in text.splitlines() if "{'loss'" in line)
    log = [{key: float(value) for key, value in ast.literal_eval(line).items()} for line in lines]
    if code or len(log) < 2:
        raise InputError(f"{' '.join(command)}\nended with code {code} and {len(log)} logged steps:\n{text[-3000:]}")
    first, last = log[0], log[-1]
    tokens, seconds = (last[key] - first[key] for key in ("num_tokens", "train_runtime"))
    return Measured(tokens / seconds, peak / 2**30, [entry["loss"] for entry in log])


def common(args: argparse.Namespace) -> list[str]:
    settings = {
        "max_steps": args.steps, "logging_steps": LOGGING_STEPS, "save_strategy": "no", "disable_tqdm": True,
        "include_num_input_tokens_seen": True, "lr_scheduler_type": "constant", "lr_scheduler_kwargs": "{}",
        "warmup_steps": 0,
    }  # fmt: skip
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def ours(step: Step, args: argparse.Namespace, folder: Path) -> list[str]:
    return [
        sys.executable, step.script, "--config", str(step.recipe), "--run_dir", str(folder), "--data_dir",
        str(args.data_dir), *step.arguments, *common(args),
    ]  # fmt: skip


def plain(step: Step, args: argparse.Namespace, folder: Path) -> list[str]:
    """TRL's own script with those of the recipe's settings that it knows, on the same rows."""
    write_rows(folder / "rows" / "train.jsonl", step.rows)
    known = {field.name for cls in (SFTConfig, ModelConfig) for field in dataclasses.fields(cls)}
    settings = {key: value for key, value in read_yaml(step.recipe).items() if key in known}
    settings |= {
        "model_name_or_path": str(step.model),
        "dataset_name": str(folder / "rows"),
        "output_dir": str(folder / "out"),
    }
    settings.pop("padding_free", None)
    settings.pop("lr_scheduler_kwargs", None)
    if step.model.name == "moe" and set(MLP_MODULES) <= set(settings["lora_target_modules"]):
        settings["lora_target_modules"] = [m for m in settings["lora_target_modules"] if m not in MLP_MODULES]
        settings["lora_target_parameters"] = FUSED_EXPERTS
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return [sys.executable, "-m", "trl.scripts.sft", "--config", str(path), *common(args)]


def steps(args: argparse.Namespace) -> list[Step]:
    role = trained_roles(read_merge_config(MERGE_FILE))[0]
    base, moe = args.run_dir / "base", args.run_dir / "moe"
    tokenizer = load_tokenizer(base)
    form = as_chats(tokenizer, base)
    passages = [{"text": text} for text in read_corpus(args.data_dir, role)]
    found = [
        Step("1: expert", "recipes/train_expert.py", args.recipes / "train_expert.yaml", base,
             ("--role", role, "--base", str(base)), passages)
    ]  # fmt: skip
    for title, model, name in (("3: dense", base, "dense"), ("3: team", moe, "moe")):
        recipe = args.recipes / f"instruct_tune_{name}.yaml"
        content = read_yaml(recipe)
        limits = row_limits(content.get("rows_per_task"), content.get("rows_of_task"))
        drawn = tuning_rows(
            args.data_dir,
            content.get("seed", SFTConfig.seed),
            limits,
            hold_out=content.get("hold_out_validation", False),
        )
        rows = [
            {
                "prompt": form.messages(render(TASKS[task], row, tokenizer)),
                "completion": [{"role": "assistant", "content": row["label"]}],
            }
            for task, row in drawn
        ]
        arguments = ("--base", str(base)) if model == base else ("--routing_steps", "0")
        found.append(Step(title, "recipes/instruct_tune.py", recipe, model, arguments, rows))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"), help="has base and moe")
    parser.add_argument("--data_dir", type=Path, help="data directory (default: RUN_DIR/data)")
    parser.add_argument("--recipes", type=Path, default=Path("recipes/sample"), help="folder of the three recipes")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    args.data_dir = args.data_dir or args.run_dir / "data"
    if args.steps < 2 * LOGGING_STEPS:
        raise InputError(
            f"--steps {args.steps}: {2 * LOGGING_STEPS} or more, as the first {LOGGING_STEPS} are left out."
        )

    figures: dict[str, dict[str, list[Measured]]] = {}
    for round_ in range(args.rounds):
        for step in steps(args):
            for kind, command_of in (("trl sft", plain), ("ours", ours)):
                with tempfile.TemporaryDirectory() as folder:
                    place = Path(folder)
                    for name in ("base", "moe"):
                        (place / name).symlink_to((args.run_dir / name).absolute(), target_is_directory=True)
                    measured = measure(command_of(step, args, place))
                figures.setdefault(step.title, {}).setdefault(kind, []).append(measured)
                print(
                    f"round {round_ + 1}, step {step.title}, {kind}: {measured.tokens_per_second:.0f} tokens/s",
                    flush=True,
                )

    table = Table(title=f"Training, {args.recipes}, {args.steps} steps, mean of {args.rounds} rounds")
    for column in ("step", "trl sft, tokens/s", "ours, tokens/s", "ratio", "GiB", "mean loss"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for title, by_kind in figures.items():
        theirs, own = by_kind["trl sft"], by_kind["ours"]
        speeds = [np.mean([m.tokens_per_second for m in part]) for part in (theirs, own)]
        ratios = [b.tokens_per_second / a.tokens_per_second for a, b in zip(theirs, own, strict=True)]
        table.add_row(
            title, *(f"{speed:.0f}" for speed in speeds), f"{np.mean(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
            " / ".join(f"{max(m.peak_gib for m in part):.1f}" for part in (theirs, own)),
            " / ".join(f"{np.mean([m.losses for m in part]):.4f}" for part in (theirs, own)),
        )  # fmt: skip
    Console(width=None if os.isatty(1) else 170).print(table)
    dense, team = (np.mean([m.tokens_per_second for m in figures[title]["ours"]]) for title in ("3: dense", "3: team"))
    print(f"A token of the team costs {dense / team:.2f} times one of the dense model")


if __name__ == "__main__":
    run(main)
