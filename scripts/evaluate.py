# SPDX-License-Identifier: Apache-2.0
"""STEP 4. Evaluate every model of a run on the tasks of its data, with lm-eval, in the chat format of training.

    python scripts/evaluate.py --run_dir outputs/quickstart

A row's answer is the label with the highest log-likelihood. Beside it, marked `generated`, stands what published tables
often use: the first label in the text that the model writes. Writes RUN_DIR/reports/evaluation.json and evaluation.png.
"""

import argparse
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from finteam_experts.threads import use_available_cores  # before torch

import matplotlib.pyplot as plt
import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from finteam_experts import leaks, runs
from finteam_experts.chats import ChatFormat
from finteam_experts.data import rows_to_score, scored_file, tasks_of
from finteam_experts.errors import InputError, NotFiniteError, read_json, run
from finteam_experts.metrics import (
    confusion,
    difference_on_rows,
    scores,
    scores_with_errors,
    text_units,
    unlike_written,
)
from finteam_experts.models import as_chats, fingerprint, load_model, load_tokenizer, local_folder
from finteam_experts.routing import expert_shares
from finteam_experts.scoring import LabelScoringLM, first_label, greedy_answers, run_lm_eval
from finteam_experts.split_experts import split_experts
from finteam_experts.tasks import TASKS, prompting, render_all

TEAM, DENSE = "moe-instruct", "dense-instruct"
MODELS = ("base", DENSE, "moe", TEAM)
MAX_NEW_TOKENS = 8  # of a written answer
ROUTING_ROWS = 8  # prompts a task whose routing is looked at


def evaluate_model(folder: Path, rows: dict[str, list[dict[str, str]]], work: Path, *, bf16: bool) -> dict[str, Any]:
    """Score one model on `rows` of each task; returns its part of the report."""
    start = time.monotonic()
    form = as_chats(load_tokenizer(folder), folder)
    model = load_model(folder).to(PartialState().device)
    if model.config.model_type == "mixtral" and model.device.type == "cpu":
        split_experts(model)  # twice as fast there; a GPU has kernels for fused experts
    prompts = {task: render_all(TASKS[task], rows[task], form.tokenizer) for task in rows}
    check_prompts(form, prompts, model.config.max_position_embeddings)
    lm = LabelScoringLM(pretrained=model, form=form, bf16=bf16)
    output = run_lm_eval(lm, prompts, {task: [row["label"] for row in rows[task]] for task in rows}, work)
    report: dict[str, Any] = {
        "tasks": {task: _task_report(task, rows[task], output["samples"][task]) for task in rows}
    }
    for task, result in report["tasks"].items():
        if abs(result["accuracy"] - output["results"][task]["acc,none"]) > 1e-9:
            raise RuntimeError(
                f"{task}: accuracy {result['accuracy']} differs from lm-eval's {output['results'][task]}"
            )
        result["generated"] = _generated(model, form, task, rows[task], prompts[task], output["samples"][task])
    if model.config.model_type == "mixtral":
        team = [member["name"] for member in runs.read_record(folder)["team"]]
        report["routing"] = {task: _routing(model, form, team, prompts[task][:ROUTING_ROWS]) for task in rows}
    report["seconds"] = round(time.monotonic() - start, 1)
    return report


def check_prompts(form: ChatFormat, prompts: dict[str, list[str]], positions: int) -> None:
    """Raise `InputError` if a task's longest prompt does not fit into the model's positions, with room for an answer."""
    for task, own in prompts.items():
        longest = max(map(len, form.prompts(own))) + MAX_NEW_TOKENS
        if longest > positions:
            raise InputError(
                f"{task}: its longest prompt and an answer are {longest} tokens, and the model has {positions} positions "
                "(max_position_embeddings). Lower max_text_tokens in the task's YAML."
            )


def _task_report(task: str, rows: list[dict[str, str]], samples: list[dict[str, Any]]) -> dict[str, Any]:
    labels = TASKS[task].labels
    scored = torch.tensor([[score for score, _ in sample["filtered_resps"]] for sample in samples], dtype=torch.double)
    predicted = scored.argmax(-1).numpy()
    true = np.array([labels.index(sample["doc"]["label"]) for sample in samples])
    return {
        "n": len(samples),
        # nats, of the true label among the task's: it moves before any prediction does
        "label_loss": torch.nn.functional.cross_entropy(scored, torch.from_numpy(true)).item(),
        **scores_with_errors(true, predicted, len(labels), text_units(rows)),
        "predicted": {label: int((predicted == position).sum()) for position, label in enumerate(labels)},
        "predictions": [labels[position] for position in predicted],
    }


def _generated(
    model: torch.nn.Module,
    form: ChatFormat,
    task: str,
    rows: list[dict[str, str]],
    prompts: list[str],
    samples: list[dict],
) -> dict[str, float | bool]:
    """Accuracy and weighted F1 of the first label in the greedy answer; an answer without one is wrong.

    Where a label is the likeliest continuation, the answer begins with it: only the other rows are generated.
    `unlike_scores` is whether this accuracy is another than that of the label scores, beyond three standard errors.
    """
    labels = TASKS[task].labels
    answers: list[str | None] = [None] * len(samples)
    for row, sample in enumerate(samples):
        greedy = [label for label, (_, is_greedy) in zip(labels, sample["filtered_resps"], strict=True) if is_greedy]
        answers[row] = next(iter(greedy), None)
    rest = [row for row, answer in enumerate(answers) if answer is None]
    for row, answer in zip(
        rest, greedy_answers(model, form, [prompts[row] for row in rest], max_new_tokens=MAX_NEW_TOKENS), strict=True
    ):
        answers[row] = first_label(answer, labels)
    true = np.array([labels.index(sample["doc"]["label"]) for sample in samples])
    predicted = np.array([len(labels) if answer is None else labels.index(answer) for answer in answers])
    scored = np.array([np.argmax([score for score, _ in sample["filtered_resps"]]) for sample in samples])
    found = scores(confusion(true, predicted, len(labels) + 1))
    return {
        "accuracy": float(found["accuracy"]),
        "weighted_f1": float(found["weighted_f1"]),
        "without_label": int((predicted == len(labels)).sum()),
        "unlike_scores": unlike_written(scored == true, predicted == true, text_units(rows)),
    }


def _routing(model, form: ChatFormat, team: list[str], prompts: list[str]) -> dict[str, float]:
    shares = np.mean([expert_shares(model, ids).mean(0).tolist() for ids in form.prompts(prompts)], axis=0)
    return dict(zip(team, map(float, shares), strict=True))


def majority(rows: dict[str, list[dict[str, str]]]) -> dict[str, dict[str, Any]]:
    """What always answering the most frequent label of the test rows would score."""
    result = {}
    for task, task_rows in rows.items():
        labels = TASKS[task].labels
        true = np.array([labels.index(row["label"]) for row in task_rows])
        label, _ = Counter(true.tolist()).most_common(1)[0]
        errors = scores_with_errors(true, np.full_like(true, label), len(labels), text_units(task_rows))
        result[task] = {"label": labels[label], **errors}
    return result


def differences(models: dict[str, Any], rows: dict[str, list[dict[str, str]]]) -> dict[str, dict[str, Any]]:
    """How far the tuned team lies above the dense model tuned on the same rows, with 95 % intervals."""
    if not {TEAM, DENSE} <= set(models):
        return {}
    predictions = {
        name: {
            task: np.array([[TASKS[task].labels.index(label) for label in result["predictions"]]])
            for task, result in models[name]["tasks"].items()
        }
        for name in (TEAM, DENSE)
    }
    return {f"{TEAM} − {DENSE}": difference_on_rows(rows, predictions[TEAM], predictions[DENSE])}


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
            print(
                f"Note: {name}: accuracy by label scores differs from accuracy of the written answers: {'; '.join(unlike)}. This is "
                "expected of a model that was not tuned; for a tuned one, check its chat template."
            )
    for task, counts in report["rows"].items():
        if any(counts.values()):
            print(
                f"Note: {task}: {counts['repeated']} rows repeat another one, {counts['contradicting']} do so with another label. "
                "Errors count a text once"
            )
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
    parser.add_argument("--split", choices=("test", "valid"), default="test")
    parser.add_argument("--limit", type=int, help="rows a task (default: all)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, for a CPU or GPU with units for it")
    parser.add_argument("--name", default="evaluation", help="writes RUN_DIR/reports/NAME.json and NAME.png")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 2:
        raise InputError(f"--limit {args.limit}: a standard error needs two rows or more.")

    use_available_cores()
    data = args.data_dir or args.run_dir / "data"
    tasks = tasks_of(data)
    leaks.check_tasks(data, tasks)
    rows = {task: rows_to_score(data, task, args.split, args.limit) for task in tasks}
    folders = {name: args.run_dir / name for name in args.models}
    if "base" in folders:
        folders["base"] = local_folder(args.base or str(args.run_dir / "base"))
    for name, folder in folders.items():
        if name != "base":
            runs.require(folder, "scripts/merge_moe.py or recipes/instruct_tune.py, as the name says")

    target = args.run_dir / "reports" / f"{args.name}.json"
    inputs = {
        "models": {name: fingerprint(folder) for name, folder in folders.items()},
        "tasks": {task: runs.file_hash(scored_file(data, task, args.split)) for task in tasks},
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
            runs.write_json(part, evaluate_model(folder, rows, work, bf16=args.bf16))
        except NotFiniteError as error:
            raise NotFiniteError(f"{folder}: {error}") from None
    models = {name: read_json(work / f"{name}.json") for name in folders}
    counts = {task: leaks.repetitions(own) for task, own in rows.items()}
    report = {"majority": majority(rows), "rows": counts, "models": models, "differences": differences(models, rows)}
    plot(report, target.with_suffix(".png"))
    runs.finish_report(target, report)
    print_table(report)
    print(f"Written to {target} and {target.with_suffix('.png')}")


if __name__ == "__main__":
    run(main)
