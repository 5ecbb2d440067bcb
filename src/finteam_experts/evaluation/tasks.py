# SPDX-License-Identifier: Apache-2.0
"""One model on the tasks: label scores, written answers, routing; and what these figures say of several models."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from finteam_experts import runs
from finteam_experts.chats import ChatFormat, Turns
from finteam_experts.data.conversations import Conversation
from finteam_experts.data.files import Row
from finteam_experts.data.tasks import Task, Tasks, render_all
from finteam_experts.errors import InputError
from finteam_experts.evaluation import metrics
from finteam_experts.evaluation.answers import score_answers
from finteam_experts.evaluation.labels import LabelScoringLM, first_label, greedy_answers, run_lm_eval
from finteam_experts.evaluation.routing import expert_shares
from finteam_experts.families import is_moe
from finteam_experts.models import as_chats, load_model, load_tokenizer
from finteam_experts.training.experts import split_on_cpu

MAX_NEW_TOKENS = 8  # of a written answer
ROUTING_ROWS = 8  # prompts per task whose routing is looked at
Rows = dict[str, list[Row]]  # by task


def evaluate_model(
    folder: Path,
    tasks: Tasks,
    rows: Rows,
    chats: dict[str, list[Conversation]],
    work: Path,
    *,
    bf16: bool,
    model: torch.nn.Module | None = None,
    generate: bool = True,
) -> dict[str, Any]:
    """Score one model on the `rows` of each task and the held-out `chats` of each role; returns its part of the report.

    It is the one in `folder`, or `model` with what else that folder has: tokenizer, template, record. Without `generate` the
    report lacks what it writes to the tasks' prompts.
    """
    start = time.monotonic()
    form = as_chats(load_tokenizer(folder), folder)
    model = (model or load_model(folder)).to(PartialState().device)
    split_on_cpu(model)
    prompts = {name: render_all(task, rows[name], form.tokenizer) for name, task in tasks.items()}
    _check_prompts(form, prompts, model.config.max_position_embeddings)
    lm = LabelScoringLM(pretrained=model, form=form, bf16=bf16)
    output = run_lm_eval(lm, tasks, prompts, rows, work) if tasks else {}
    report: dict[str, Any] = {"tasks": {}}
    for name, task in tasks.items():
        samples, accuracy = output["samples"][name], output["results"][name]["acc,none"]
        report["tasks"][name] = result = _label_report(task, rows[name], samples)
        if abs(result["accuracy"] - accuracy) > 1e-9:
            raise RuntimeError(f"{name}: accuracy {result['accuracy']} differs from lm-eval's {accuracy}")
        if generate:
            result["generated"] = _generated(model, form, task, rows[name], prompts[name], samples)
    labels = {label for task in tasks.values() for label in task.labels}
    report["answers"] = score_answers(lm, chats, labels)
    if is_moe(model.config):
        team = [member["name"] for member in runs.read_record(folder)["team"]]
        report["routing"] = {}
        for name, own in rows.items():
            asked = [(prompt, row["label"]) for prompt, row in zip(prompts[name], own, strict=True)]
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                report["routing"][name] = _routing(model, form, team, asked[:ROUTING_ROWS])
    return report | {"seconds": round(time.monotonic() - start, 1)}


def _check_prompts(form: ChatFormat, prompts: dict[str, list[str]], positions: int) -> None:
    """Raise `InputError` if a task's longest prompt does not fit into the model's positions, with room for an answer."""
    for task, own in prompts.items():
        longest = max(map(len, form.prompts(own))) + MAX_NEW_TOKENS
        if longest > positions:
            raise InputError(
                f"{task}: its longest prompt and an answer are {longest} tokens, and the model has {positions} positions "
                "(max_position_embeddings). Lower max_text_tokens in the task's YAML."
            )


def true_labels(task: Task, rows: list[Row]) -> np.ndarray:
    """Each row's label as its place in the task's list."""
    return np.array([task.labels.index(row["label"]) for row in rows])


def _scored_labels(samples: list[dict[str, Any]]) -> torch.Tensor:
    """The log-likelihoods of lm-eval's samples, [rows, labels]."""
    return torch.tensor([[score for score, _ in sample["filtered_resps"]] for sample in samples], dtype=torch.double)


def _label_report(task: Task, rows: list[Row], samples: list[dict[str, Any]]) -> dict[str, Any]:
    labels, true, scored = task.labels, true_labels(task, rows), _scored_labels(samples)
    predicted = scored.argmax(-1).numpy()
    return {
        "n": len(samples),
        # nats, of the true label among the task's: it moves before any prediction does
        "label_loss": torch.nn.functional.cross_entropy(scored, torch.from_numpy(true)).item(),
        **metrics.scores_with_errors(true, predicted, len(labels), metrics.text_units(rows)),
        "predicted": {label: int((predicted == position).sum()) for position, label in enumerate(labels)},
        "predictions": [labels[position] for position in predicted],
    }


def _generated(
    model: torch.nn.Module, form: ChatFormat, task: Task, rows: list[Row], prompts: list[str], samples: list[dict]
) -> dict[str, float | bool]:
    """Accuracy and weighted F1 of the first label in the greedy answer; an answer without one is wrong.

    Where a label is the likeliest continuation, the answer begins with it: only the other rows are generated.
    `unlike_scores` is whether this accuracy differs from that of the label scores by more than three standard errors.
    """
    labels, true = task.labels, true_labels(task, rows)
    answers: list[str | None] = [
        next(
            (label for label, (_, is_greedy) in zip(labels, sample["filtered_resps"], strict=True) if is_greedy), None
        )
        for sample in samples
    ]
    rest = [row for row, answer in enumerate(answers) if answer is None]
    written = greedy_answers(model, form, [prompts[row] for row in rest], max_new_tokens=MAX_NEW_TOKENS)
    for row, answer in zip(rest, written, strict=True):
        answers[row] = first_label(answer, labels)
    predicted = np.array([len(labels) if answer is None else labels.index(answer) for answer in answers])
    scored = _scored_labels(samples).argmax(-1).numpy()
    found = metrics.scores(metrics.confusion(true, predicted, len(labels) + 1))
    return {
        "accuracy": float(found["accuracy"]),
        "weighted_f1": float(found["weighted_f1"]),
        "without_label": int((predicted == len(labels)).sum()),
        "unlike_scores": metrics.unlike_written(scored == true, predicted == true, metrics.text_units(rows)),
    }


def _routing(
    model: torch.nn.Module, form: ChatFormat, team: list[str], asked: list[tuple[Turns | str, str]]
) -> dict[str, float]:
    exchanges = form.exchanges(asked)
    shares = expert_shares(model, form.tokenizer, [own.ids for own in exchanges], [own.spans for own in exchanges])
    return dict(zip(team, shares.mean((0, 1)).tolist(), strict=True))


def majority(tasks: Tasks, rows: Rows) -> dict[str, dict[str, Any]]:
    """What always answering the most frequent label of the test rows would score."""
    result = {}
    for name, task in tasks.items():
        own, labels, true = rows[name], task.labels, true_labels(task, rows[name])
        label, _ = Counter(true.tolist()).most_common(1)[0]
        errors = metrics.scores_with_errors(true, np.full_like(true, label), len(labels), metrics.text_units(own))
        result[name] = {"label": labels[label], **errors}
    return result


def difference(tasks: Tasks, models: dict[str, Any], rows: Rows, ours: str, theirs: str) -> dict[str, dict[str, Any]]:
    """Differences of one model's main scores to another's, with 95 % intervals; empty if one of them is missing."""
    if not {ours, theirs} <= set(models):
        return {}
    predictions = {
        model: {
            name: np.array([[tasks[name].labels.index(label) for label in result["predictions"]]])
            for name, result in models[model]["tasks"].items()
        }
        for model in (ours, theirs)
    }
    return {f"{ours} − {theirs}": metrics.difference_on_rows(tasks, rows, predictions[ours], predictions[theirs])}
