# SPDX-License-Identifier: Apache-2.0
"""An evaluation's report as tables for the screen."""

from collections.abc import Iterable
from statistics import mean
from typing import Any

from rich.table import Table

from finteam_experts.evaluation.answers import SCORES


def task_table(report: dict[str, Any], models: Iterable[str]) -> Table:
    """The main score of every task for each model with its standard error, the accuracy of what it writes, and their means."""
    table = Table("task (rows)", "main score", "majority class", *models,
                  title="Tasks: main score on held-out rows ± standard error (accuracy of the labels that are written)")  # fmt: skip
    parts = [report["models"][model]["tasks"] for model in models]
    for task in report["tasks"]:
        name, score = task["name"], task["main_score"]
        cells = [
            f"{part[name][score]:.3f} ± {part[name][f'{score}_stderr']:.3f} ({part[name]['generated']['accuracy']:.3f})"
            for part in parts
        ]
        majority = f"{report['majority'][name][score]:.3f}"
        table.add_row(f"{task['title']} ({parts[0][name]['n']})", score, majority, *cells)
    table.add_section()
    means = (mean(part[task["name"]][task["main_score"]] for task in report["tasks"]) for part in parts)
    table.add_row("mean", "", "", *(f"{value:.3f}" for value in means))
    return table


def answer_table(report: dict[str, Any], models: Iterable[str]) -> Table:
    """What the models do with held-out conversations, the mean over roles."""
    counts = [f"{own['n']} of {role}" for role, own in next(iter(report["models"].values()))["answers"].items()]
    table = Table(
        "model", *SCORES.values(), title=f"Answers to held-out conversations ({', '.join(counts)}), mean over roles"
    )
    for name in models:
        parts = report["models"][name]["answers"].values()
        columns = [[part[key] for part in parts if part[key] is not None] for key in SCORES]
        table.add_row(name, *(f"{mean(own):.2f}" if own else "-" for own in columns))
    return table
