# SPDX-License-Identifier: Apache-2.0
"""Training speed and memory of steps 1 and 3 beside plain `trl sft` of the same model, data, batch and LoRA.

    python benchmarks/training.py --run_dir outputs/quickstart --recipes recipes/sample

For each step, ours and TRL's run in turn, in processes of their own, `--rounds` times. Tokens are those that are not padding;
the first logged steps are left out of the speed. GiB are what the process held at most until its last step, which is
what scripts/plan.py plans. TRL pads a batch and adapts an MoE's fused experts, as it does by default.
"""

import argparse
import ast
import contextlib
import dataclasses
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import yaml
from rich.table import Table
from trl import ModelConfig, SFTConfig

from finteam_experts.data.files import read_corpus, tasks_of, write_rows
from finteam_experts.data.mixture import row_limits, tuning_rows
from finteam_experts.data.tasks import render
from finteam_experts.errors import InputError, run
from finteam_experts.files import read_yaml
from finteam_experts.merging.config import read_merge_config, trained_roles
from finteam_experts.models import MLP_MODULES, as_chats, load_tokenizer
from finteam_experts.screen import screen

REPOSITORY = Path(__file__).parents[1]
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


def run_logged(command: list[str]) -> tuple[str, float]:
    """Run a training; its output, and its peak memory in GiB until its last step. `InputError` if it fails."""
    peak, trained = 0, False
    with tempfile.NamedTemporaryFile("w+") as output:
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if not trained:  # later steps, as a merge, hold other things
                with contextlib.suppress(psutil.NoSuchProcess):
                    peak = max(peak, process.memory_info().rss)
                trained = "'train_loss'" in Path(output.name).read_text()
            time.sleep(POLL_SECONDS)
        text = Path(output.name).read_text()
    if process.returncode:
        raise InputError(f"{' '.join(command)}\nended with code {process.returncode}:\n{text[-3000:]}")
    return text, peak / 2**30


def logged_steps(text: str) -> list[dict[str, float]]:
    """The entries of a training's log that hold a step's loss."""
    lines = (line[line.find("{'loss'") :] for line in text.splitlines() if "{'loss'" in line)
    return [{key: float(value) for key, value in ast.literal_eval(line).items()} for line in lines]


def measure(command: list[str]) -> Measured:
    """Run a training and read its log."""
    text, peak = run_logged(command)
    log = logged_steps(text)
    tokens, seconds = (log[-1][key] - log[0][key] for key in ("num_tokens", "train_runtime"))
    return Measured(tokens / seconds, peak, [entry["loss"] for entry in log])


def common(args: argparse.Namespace) -> list[str]:
    settings = {
        "max_steps": args.steps, "logging_steps": LOGGING_STEPS, "save_strategy": "no", "disable_tqdm": True,
        "include_num_input_tokens_seen": True, "lr_scheduler_type": "constant", "lr_scheduler_kwargs": "{}",
        "warmup_steps": 0,
    }  # fmt: skip
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def ours(step: Step, args: argparse.Namespace, folder: Path) -> list[str]:
    where = ["--config", str(step.recipe), "--run_dir", str(folder), "--data_dir", str(args.data_dir)]
    return [sys.executable, str(REPOSITORY / step.script), *where, *step.arguments, *common(args)]


def plain(step: Step, args: argparse.Namespace, folder: Path) -> list[str]:
    """TRL's own script with those of the recipe's settings that it knows, on the same rows."""
    write_rows(folder / "rows" / "train.jsonl", step.rows)
    known = {field.name for cls in (SFTConfig, ModelConfig) for field in dataclasses.fields(cls)}
    left_out = {"padding_free", "lr_scheduler_kwargs"}
    settings = {key: value for key, value in read_yaml(step.recipe).items() if key in known - left_out}
    places = {"dataset_name": folder / "rows", "output_dir": folder / "out", "model_name_or_path": step.model}
    settings |= {key: str(place) for key, place in places.items()}
    targets = settings["lora_target_modules"]
    if step.model.name == "moe" and set(MLP_MODULES) <= set(targets):
        settings["lora_target_modules"] = [module for module in targets if module not in MLP_MODULES]
        settings["lora_target_parameters"] = FUSED_EXPERTS
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return [sys.executable, "-m", "trl.scripts.sft", "--config", str(path), *common(args)]


def steps(args: argparse.Namespace) -> list[Step]:
    role = trained_roles(read_merge_config(REPOSITORY / "moe_merge.yaml"))[0]
    base, moe = args.run_dir / "base", args.run_dir / "moe"
    tokenizer, tasks = load_tokenizer(base), tasks_of(args.data_dir)
    form = as_chats(tokenizer, base)
    passages = [{"text": text} for text in read_corpus(args.data_dir, role)]
    arguments = ("--role", role, "--base", str(base))
    found = [
        Step("1: expert", "recipes/train_expert.py", args.recipes / "train_expert.yaml", base, arguments, passages)
    ]
    for title, model, name in (("3: dense", base, "dense"), ("3: team", moe, "moe")):
        recipe = args.recipes / f"instruct_tune_{name}.yaml"
        content = read_yaml(recipe)
        limits = row_limits(tasks, content.get("rows_per_task"), content.get("rows_of_task"))
        hold_out = content.get("hold_out_validation", False)
        drawn = tuning_rows(args.data_dir, tasks, content.get("seed", SFTConfig.seed), limits, hold_out=hold_out)
        rows = [
            {
                "prompt": form.messages(render(tasks[task], row, tokenizer)),
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
    parser.add_argument(
        "--recipes", type=Path, default=REPOSITORY / "recipes/sample", help="folder of the three recipes"
    )
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
                    for name in ("base", "moe"):
                        (Path(folder) / name).symlink_to((args.run_dir / name).absolute(), target_is_directory=True)
                    measured = measure(command_of(step, args, Path(folder)))
                figures.setdefault(step.title, {}).setdefault(kind, []).append(measured)
                speed = f"{measured.tokens_per_second:.0f} tokens/s"
                print(f"round {round_ + 1}, step {step.title}, {kind}: {speed}", flush=True)

    table = Table("step", title=f"Training, {args.recipes}, {args.steps} steps, mean of {args.rounds} rounds")
    for column in ("trl sft, tokens/s", "ours, tokens/s", "ratio", "GiB", "mean loss"):
        table.add_column(column, justify="right")
    for title, by_kind in figures.items():
        both = [by_kind["trl sft"], by_kind["ours"]]
        speeds = [f"{np.mean([m.tokens_per_second for m in part]):.0f}" for part in both]
        ratios = [own.tokens_per_second / other.tokens_per_second for other, own in zip(*both, strict=True)]
        ratio = f"{np.mean(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        memory = " / ".join(f"{max(m.peak_gib for m in part):.1f}" for part in both)
        table.add_row(title, *speeds, ratio, memory, " / ".join(f"{np.mean([m.losses for m in p]):.4f}" for p in both))
    screen(170).print(table)
    dense, team = (np.mean([m.tokens_per_second for m in figures[title]["ours"]]) for title in ("3: dense", "3: team"))
    print(f"The team costs {dense / team:.2f} times as much per token as the dense model")


if __name__ == "__main__":
    run(main)
