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
from finteam_experts.chats import ChatFormat, Exchange
from finteam_experts.data.conversations import Conversation
from finteam_experts.data.files import Row
from finteam_experts.data.tasks import Task, Tasks, render_all
from finteam_experts.errors import InputError
from finteam_experts.evaluation import metrics
from finteam_experts.evaluation.answers import first_label, greedy_answers, score_answers
from finteam_experts.evaluation.heldout import answer_scores
from finteam_experts.evaluation.routing import expert_shares
from finteam_experts.families import is_moe
from finteam_experts.models import as_chats, load_model, load_tokenizer
from finteam_experts.scoring import Score
from finteam_experts.training.experts import split_on_cpu

MAX_NEW_TOKENS = 8  # of a written answer, or as many as the longest label has
ROUTING_ROWS = 8  # prompts per task whose routing is looked at
Rows = dict[str, list[Row]]  # by task


def evaluate_model(
    folder: Path,
    tasks: Tasks,
    rows: Rows,
    chats: dict[str, list[Conversation]],
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
    exchanges = {  # of each prompt with each label
        name: form.exchanges([(prompt, label) for prompt in prompts[name] for label in task.labels])
        for name, task in tasks.items()
    }
    _check_lengths(exchanges, model.config.max_position_embeddings)
    report: dict[str, Any] = {"tasks": {}}
    for name, task in tasks.items():
        scores = answer_scores(model, exchanges[name], bf16=bf16, title=f"labels of {name}")
        by_row = [scores[at : at + len(task.labels)] for at in range(0, len(scores), len(task.labels))]
        report["tasks"][name] = result = _label_report(task, rows[name], by_row)
        if generate:
            longest = max(MAX_NEW_TOKENS, *(len(exchange.scored) for exchange in exchanges[name]))
            written = written_labels(model, form, task.labels, prompts[name], by_row, longest)
            result["generated"] = metrics.written_scores(task, rows[name], written)
    labels = {label for task in tasks.values() for label in task.labels}
    report["answers"] = score_answers(model, form, chats, labels, bf16=bf16)
    if is_moe(model.config):
        team = [member["name"] for member in runs.read_record(folder)["team"]]
        report["routing"] = {}
        for name, task in tasks.items():
            true = metrics.true_labels(task, rows[name][:ROUTING_ROWS])
            answered = [exchanges[name][row * len(task.labels) + label] for row, label in enumerate(true)]
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                shares = expert_shares(
                    model, form.tokenizer, [own.ids for own in answered], [own.spans for own in answered]
                )
            report["routing"][name] = dict(zip(team, shares.mean((0, 1)).tolist(), strict=True))
    return report | {"seconds": round(time.monotonic() - start, 1)}


def _check_lengths(exchanges: dict[str, list[Exchange]], positions: int) -> None:
    """Raise `InputError` if a task's longest prompt does not fit into the model's positions, with room for an answer."""
    for task, own in exchanges.items():
        longest = max(len(exchange.prompt) + max(MAX_NEW_TOKENS, len(exchange.scored)) for exchange in own)
        if longest > positions:
            raise InputError(
                f"{task}: its longest prompt and an answer are {longest} tokens, and the model has {positions} positions "
                "(max_position_embeddings). Lower max_text_tokens in the task's YAML."
            )


def _label_report(task: Task, rows: list[Row], scores: list[list[Score]]) -> dict[str, Any]:
    """What the scores of each row's labels come to."""
    labels, true = task.labels, metrics.true_labels(task, rows)
    table = torch.tensor([[score.log_likelihood for score in own] for own in scores], dtype=torch.double)
    predicted = table.argmax(-1).numpy()
    counts = Counter(predicted.tolist())
    return {
        "n": len(rows),
        # nats, of the true label among the task's: it moves before any prediction does
        "label_loss": torch.nn.functional.cross_entropy(table, torch.from_numpy(true)).item(),
        **metrics.scores_with_errors(true, predicted, metrics.text_units(rows)),
        "predicted": {label: counts[place] for place, label in enumerate(labels)},
        "predictions": [labels[place] for place in predicted],
    }


def written_labels(
    model: torch.nn.Module, form: ChatFormat, labels: tuple[str, ...], prompts: list[str], scores: list[list[Score]], tokens: int
) -> list[str | None]:  # fmt: skip
    """The first label in the greedy answer of so many tokens to each prompt, if it has one.

    Where a label and its end are the likeliest tokens, the label is the answer: only the other prompts are answered.
    """
    written = [next((label for label, one in zip(labels, own, strict=True) if one.is_greedy), None) for own in scores]
    rest = [row for row, label in enumerate(written) if label is None]
    answers = greedy_answers(model, form, [prompts[row] for row in rest], max_new_tokens=tokens)
    for row, answer in zip(rest, answers, strict=True):
        written[row] = first_label(answer, labels)
    return written


def majority(tasks: Tasks, rows: Rows) -> dict[str, dict[str, Any]]:
    """What always answering the most frequent label of the test rows would score."""
    result = {}
    for name, task in tasks.items():
        true = metrics.true_labels(task, rows[name])
        label, _ = Counter(true.tolist()).most_common(1)[0]
        errors = metrics.scores_with_errors(true, np.full_like(true, label), metrics.text_units(rows[name]))
        result[name] = {"label": task.labels[label], **errors}
    return result


def difference(tasks: Tasks, models: dict[str, Any], rows: Rows, ours: str, theirs: str) -> dict[str, dict[str, Any]]:
    """Differences of one model's main scores to another's, with 95 % intervals; empty if one of them is missing."""
    if not {ours, theirs} <= set(models):
        return {}
    predicted = [
        {
            name: np.array([[task.labels.index(label) for label in models[model]["tasks"][name]["predictions"]]])
            for name, task in tasks.items()
        }
        for model in (ours, theirs)
    ]
    return {f"{ours} − {theirs}": metrics.paired_difference(tasks, rows, *predicted)}
