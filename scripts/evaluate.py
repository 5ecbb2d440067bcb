# SPDX-License-Identifier: Apache-2.0
"""STEP 4. Evaluate every model of a run on the four tasks, with lm-eval, in the chat format of training.

    python scripts/evaluate.py --run_dir outputs/quickstart

A row's answer is the label with the highest log-likelihood. Writes RUN_DIR/reports/evaluation.json and evaluation.png.
"""

import argparse
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lm_eval
import matplotlib.pyplot as plt
import numpy as np
import yaml
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from finteam_experts import runs
from finteam_experts.data import read_task, task_file
from finteam_experts.errors import InputError, run
from finteam_experts.metrics import scores_with_errors
from finteam_experts.models import fingerprint, load_model, load_tokenizer, local_folder
from finteam_experts.routing import expert_shares
from finteam_experts.scoring import LabelScoringLM
from finteam_experts.tasks import FOLDER, SYSTEM_PROMPT, TASKS, chat, render

MODELS = ("base", "dense-instruct", "moe", "moe-instruct")
ROUTING_ROWS = 8  # prompts a task whose routing is looked at


def test_rows(data: Path, task: str, limit: int | None) -> list[dict[str, str]]:
    """The task's test rows, or `limit` of them, the same ones each time."""
    rows = read_task(data, task, "test")
    return rows if limit is None else random.Random(0).sample(rows, min(limit, len(rows)))


def evaluate_model(
    folder: Path, tokenizer: PreTrainedTokenizerBase, rows: dict[str, list[dict[str, str]]], work: Path
) -> dict[str, Any]:
    """Score one model on `rows` of each task; returns its part of the report."""
    start = time.monotonic()
    model = load_model(folder).to(PartialState().device)
    prompts = {task: [render(TASKS[task], row, tokenizer) for row in rows[task]] for task in rows}
    tasks = [_lm_eval_task(task, prompts[task], rows[task], work) for task in rows]
    output = lm_eval.simple_evaluate(
        LabelScoringLM(pretrained=model, tokenizer=tokenizer),
        tasks=tasks,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        apply_chat_template=True,
        system_instruction=SYSTEM_PROMPT,
        bootstrap_iters=0,  # errors are computed below, for all metrics alike
    )
    report: dict[str, Any] = {"tasks": {task: _task_report(task, output["samples"][task]) for task in rows}}
    for task, result in report["tasks"].items():
        if abs(result["accuracy"] - output["results"][task]["acc,none"]) > 1e-9:
            raise RuntimeError(
                f"{task}: accuracy {result['accuracy']} differs from lm-eval's {output['results'][task]}"
            )
    if model.config.model_type == "mixtral":
        team = [member["name"] for member in runs.read_record(folder)["team"]]
        report["routing"] = {task: _routing(model, tokenizer, team, prompts[task][:ROUTING_ROWS]) for task in rows}
    report["seconds"] = round(time.monotonic() - start, 1)
    return report


def _lm_eval_task(task: str, prompts: list[str], rows: list[dict[str, str]], work: Path) -> dict[str, Any]:
    path = work.absolute() / f"{task}.jsonl"
    rendered = [{"prompt": prompt, "label": row["label"]} for prompt, row in zip(prompts, rows, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rendered))
    return yaml.safe_load((FOLDER / f"{task}.yaml").read_text()) | {
        "dataset_kwargs": {"data_files": {"test": str(path)}}
    }


def _task_report(task: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    labels = TASKS[task].labels
    predicted = np.array([np.argmax([score for score, _ in sample["filtered_resps"]]) for sample in samples])
    true = np.array([labels.index(sample["doc"]["label"]) for sample in samples])
    return {
        "n": len(samples),
        **scores_with_errors(true, predicted, len(labels)),
        "predicted": {label: int((predicted == position).sum()) for position, label in enumerate(labels)},
        "predictions": [labels[position] for position in predicted],
    }


def _routing(model, tokenizer: PreTrainedTokenizerBase, team: list[str], prompts: list[str]) -> dict[str, float]:
    encoded = tokenizer.apply_chat_template([chat(prompt) for prompt in prompts], add_generation_prompt=True)[
        "input_ids"
    ]
    shares = np.mean([expert_shares(model, ids).mean(0).tolist() for ids in encoded], axis=0)
    return dict(zip(team, map(float, shares), strict=True))


def majority(rows: dict[str, list[dict[str, str]]]) -> dict[str, dict[str, Any]]:
    """What always answering the most frequent label of the test rows would score."""
    result = {}
    for task, task_rows in rows.items():
        labels = TASKS[task].labels
        true = np.array([labels.index(row["label"]) for row in task_rows])
        label, _ = Counter(true.tolist()).most_common(1)[0]
        result[task] = {"label": labels[label], **scores_with_errors(true, np.full_like(true, label), len(labels))}
    return result


def print_table(report: dict[str, Any]) -> None:
    """Print one row a model: accuracy, macro-F1 and MCC of each task, accuracy with its standard error."""
    table = Table(title="Evaluation: accuracy ± standard error / macro-F1 / MCC, rows in brackets")
    table.add_column("model")
    for task in report["majority"]:
        n = next(iter(report["models"].values()))["tasks"][task]["n"]
        table.add_column(f"{task} ({n})", justify="right")
    rows = {"(majority class)": report["majority"]} | {name: part["tasks"] for name, part in report["models"].items()}
    for name, tasks in rows.items():
        cells = [
            f"{t['accuracy']:.3f} ± {t['accuracy_stderr']:.3f} / {t['macro_f1']:.3f} / {t['mcc']:.3f}"
            for t in tasks.values()
        ]
        table.add_row(name, *cells)
    Console(width=None if os.isatty(1) else 170).print(table)
    for name, part in report["models"].items():
        for task, shares in part.get("routing", {}).items():
            print(
                f"{name}, {task}: "
                + ", ".join(f"{role} {share:.0%}" for role, share in shares.items())
                + " of the gate"
            )


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw macro-F1 (for every task) of every model with its standard error, and the majority class as a line."""
    tasks, models = list(report["majority"]), report["models"]
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(models)
    for position, (name, part) in enumerate(models.items()):
        left = np.arange(len(tasks)) + (position - (len(models) - 1) / 2) * width
        heights, errors = ([part["tasks"][task][key] for task in tasks] for key in ("macro_f1", "macro_f1_stderr"))
        axes.bar(left, heights, width * 0.92, yerr=errors, label=name, error_kw={"elinewidth": 1})
    for position, task in enumerate(tasks):
        floor = report["majority"][task]["macro_f1"]
        label = "majority class" if position == 0 else None
        axes.hlines(floor, position - 0.45, position + 0.45, "black", "dashed", linewidth=1, label=label)
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
    parser.add_argument("--limit", type=int, help="test rows a task (default: all)")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 2:
        raise InputError(f"--limit {args.limit}: a standard error needs two rows or more.")

    data = args.data_dir or args.run_dir / "data"
    rows = {task: test_rows(data, task, args.limit) for task in TASKS}
    folders = {name: args.run_dir / name for name in args.models}
    if "base" in folders:
        folders["base"] = local_folder(args.base or str(args.run_dir / "base"))
    for name, folder in folders.items():
        if name != "base":
            runs.require(folder, "scripts/merge_moe.py or recipes/instruct_tune.py, as the name says")

    target = args.run_dir / "reports" / "evaluation.json"
    inputs = {
        "models": {name: fingerprint(folder) for name, folder in folders.items()},
        "tasks": {task: runs.file_hash(task_file(data, task, "test")) for task in TASKS},
        "limit": args.limit,
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
        runs.write_json(part, evaluate_model(folder, load_tokenizer(folder), rows, work))
    models = {name: json.loads((work / f"{name}.json").read_text()) for name in folders}
    report = {"majority": majority(rows), "models": models}
    plot(report, target.with_suffix(".png"))
    runs.finish_report(target, report)
    print_table(report)
    print(f"Written to {target} and {target.with_suffix('.png')}")


if __name__ == "__main__":
    run(main)
