# SPDX-License-Identifier: Apache-2.0
"""STEP 4. Evaluate every model of a run on the tasks of its data, with lm-eval, in the chat format of training.

    python scripts/evaluate.py --run_dir outputs/quickstart

A row's answer is the label with the highest log-likelihood. The report also has `generated`, the measure of many published
tables: the first label in the text that the model writes. Writes RUN_DIR/reports/evaluation.json and evaluation.png.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from finteam_experts.threads import use_available_cores  # before torch

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from finteam_experts import files, runs
from finteam_experts.data import leaks
from finteam_experts.data.files import rows_to_score, scored_file, tasks_of
from finteam_experts.data.tasks import TASKS, prompting
from finteam_experts.errors import InputError, NotFiniteError, run
from finteam_experts.evaluation.tasks import difference, evaluate_model, majority
from finteam_experts.fingerprints import fingerprint
from finteam_experts.models import local_folder

TEAM, DENSE = "moe-instruct", "dense-instruct"
MODELS = ("base", DENSE, "moe", TEAM)


def print_table(report: dict[str, Any]) -> None:
    """Print one row per model: accuracy, macro-F1 and MCC of each task, accuracy with its standard error."""
    counts = {task: part["n"] for task, part in next(iter(report["models"].values()))["tasks"].items()}
    table = Table("model", title="Evaluation: accuracy ± standard error / macro-F1 / MCC, rows in brackets")
    for task, n in counts.items():
        table.add_column(f"{task} ({n})", justify="right")
    rows = {"(majority class)": report["majority"]} | {name: part["tasks"] for name, part in report["models"].items()}
    for name, tasks in rows.items():
        cells = [
            f"{t['accuracy']:.3f} ± {t['accuracy_stderr']:.3f} / {t['macro_f1']:.3f} / {t['mcc']:.3f}"
            for t in tasks.values()
        ]
        table.add_row(name, *cells)
    Console(width=None if os.isatty(1) else 170).print(table)
    for name, part in report["differences"].items():
        cells = [f"{task} {d['difference']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" for task, d in part.items()]
        print(f"{name}, main scores with 95 % intervals: {'; '.join(cells)}")
    for name, part in report["models"].items():
        unlike = [
            f"{task} {result['accuracy']:.3f} and {result['generated']['accuracy']:.3f} "
            f"({result['generated']['without_label']} of {result['n']} answers have no label)"
            for task, result in part["tasks"].items()
            if result["generated"]["unlike_scores"]
        ]
        if unlike:
            advice = "This is expected of a model that was not tuned; for a tuned one, check its chat template."
            found = "accuracy by label scores differs from accuracy of the written answers"
            print(f"Note: {name}: {found}: {'; '.join(unlike)}. {advice}")
    for task, counts in report["rows"].items():
        if any(counts.values()):
            found = f"{counts['repeated']} rows repeat another one, {counts['contradicting']} do so with another label"
            print(f"Note: {task}: {found}. Errors count a text once")
    for name, part in report["models"].items():
        for task, shares in part.get("routing", {}).items():
            print(f"{name}, {task}, share of the gate: {', '.join(f'{role} {x:.0%}' for role, x in shares.items())}")


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw macro-F1 (for every task) of every model with its standard error, and the majority class as a line."""
    tasks, models = list(report["majority"]), report["models"]
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(models)
    for position, (name, part) in enumerate(models.items()):
        left = [place + (position - (len(models) - 1) / 2) * width for place in range(len(tasks))]
        heights, errors = ([part["tasks"][task][key] for task in tasks] for key in ("macro_f1", "macro_f1_stderr"))
        axes.bar(left, heights, width * 0.92, yerr=errors, label=name, error_kw={"elinewidth": 1})
    for position, task in enumerate(tasks):
        score, label = report["majority"][task]["macro_f1"], None if position else "majority class"
        axes.hlines(score, position - 0.45, position + 0.45, "black", "dashed", linewidth=1, label=label)
    axes.set_xticks(range(len(tasks)), [TASKS[task].title for task in tasks])
    axes.set(ylabel="macro-F1, ± standard error", ylim=(0, 1), title="The models of this run on the test rows")
    axes.legend(ncols=5, fontsize="small", loc="upper center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--data_dir", type=Path, help="data directory (default: RUN_DIR/data)")
    parser.add_argument("--base", help="dense base: Hub id or folder (default: RUN_DIR/base)")
    parser.add_argument("--models", nargs="+", default=MODELS, help="base, or folders of the run")
    parser.add_argument("--split", choices=("test", "valid"), default="test")
    parser.add_argument("--limit", type=int, help="rows per task (default: all)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, for a CPU or GPU with units for it")
    parser.add_argument("--name", default="evaluation", help="writes RUN_DIR/reports/NAME.json and NAME.png")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 2:
        raise InputError(f"--limit {args.limit}: a standard error needs two rows or more.")

    use_available_cores()
    data, target = args.data_dir or args.run_dir / "data", args.run_dir / "reports" / f"{args.name}.json"
    tasks = tasks_of(data)
    leaks.check_tasks(data, tasks)
    rows = {task: rows_to_score(data, task, args.split, args.limit) for task in tasks}
    folders = {name: args.run_dir / name for name in args.models}
    if "base" in folders:
        folders["base"] = local_folder(args.base or str(args.run_dir / "base"))
    for folder in (folder for name, folder in folders.items() if name != "base"):
        runs.require(folder, "scripts/merge_moe.py or recipes/instruct_tune.py, as the name says")
    inputs = {
        "models": {name: fingerprint(folder) for name, folder in folders.items()},
        "tasks": {task: files.file_hash(scored_file(data, task, args.split)) for task in tasks},
        "asked": prompting(),
        "split": args.split,
        "limit": args.limit,
        "bf16": args.bf16,
    }
    work = runs.begin(target, "evaluate", inputs)
    if work is None:
        return

    for name, folder in folders.items():
        part = work / f"{name}.json"
        if part.exists():
            print(f"{name}: scores are complete: skipped")
            continue
        print(f"Evaluating {name}")
        try:
            files.write_json(part, evaluate_model(folder, rows, work, bf16=args.bf16))
        except NotFiniteError as error:
            raise NotFiniteError(f"{folder}: {error}") from None

    models = {name: files.read_json(work / f"{name}.json") for name in folders}
    report = {
        "majority": majority(rows),
        "rows": {task: leaks.repetitions(own) for task, own in rows.items()},
        "models": models,
        "differences": difference(models, rows, TEAM, DENSE),
    }
    plot(report, target.with_suffix(".png"))
    runs.finish_report(target, report)
    print_table(report)
    print(f"Written to {target} and {target.with_suffix('.png')}")


if __name__ == "__main__":
    run(main)
