# SPDX-License-Identifier: Apache-2.0
"""The tables and the plot of a comparison, from its result files alone."""

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from finteam_experts.comparison import Comparison
from finteam_experts.tasks import TASKS

Results = dict[str, list[dict[str, Any]]]
SCORES = {"macro_f1": "macro-F1", "mcc": "MCC"}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main_scores(results: list[dict[str, Any]], split: str = "test") -> dict[str, np.ndarray]:
    """The main score of each task, and their average, for each seed that was scored on that split."""
    by_task = {
        name: np.array([result[split]["tasks"][name][task.main_score] for result in results if split in result])
        for name, task in TASKS.items()
    }
    return {**by_task, "average": np.mean(list(by_task.values()), axis=0)}


def _cell(values: np.ndarray) -> str:
    spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}"


def _task_header() -> list[str]:
    return [f"{name} ({SCORES[task.main_score]})" for name, task in TASKS.items()]


def score_table(comparison: Comparison, found: Results, summary: dict[str, Any]) -> str:
    """Main score of every contestant and floor, and of the baselines' vote."""

    def row(name: str, by_task: dict[str, dict[str, float]]) -> list[str]:
        values = [by_task[task][TASKS[task].main_score] for task in TASKS]
        return [name, *(f"{value:.3f}" for value in values), f"{np.mean(values):.3f}", ""]

    rows = [row(name, by_task) for name, by_task in summary["floors"].items()]
    for contestant in comparison.contestants:
        if results := found.get(contestant.name):
            title = f"**{contestant.title}**" if contestant.name == comparison.team else contestant.title
            rows.append([title, *map(_cell, main_scores(results).values()), str(len(results))])
    if vote := summary["vote"]:
        rows.append(row(f"the {vote['models']} baseline models, voting", vote["tasks"]))
    return table(["", *_task_header(), "average", "seeds"], rows)


def cost_table(comparison: Comparison, found: Results) -> str:
    """What each contestant has and takes."""
    rows = []
    for contestant in comparison.contestants:
        if not (results := found.get(contestant.name)):
            continue
        size, tuning = results[0]["parameters"], results[0]["tuning"] or {}
        seconds = [result["tuning"]["seconds"] for result in results if result["tuning"]]
        known = [value for value in seconds if value is not None]
        rows.append(
            [
                contestant.title,
                *(f"{size[key] / 1e6:.0f}M" for key in ("total", "active")),
                f"{tuning['trainable_parameters'] / 1e6:.1f}M" if tuning else "",
                f"{results[0]['tokens_before_tuning']:,}",
                f"{tuning['train_tokens']:,}" if tuning else "",
                f"{np.mean(known) / 60:.1f}" if known else "",
            ]
        )
    header = [
        "",
        "parameters",
        "active",
        "trained in tuning",
        "corpus tokens before",
        "tuning tokens",
        "minutes of tuning",
    ]
    return table(header, rows)


def difference_table(comparison: Comparison, summary: dict[str, Any], names: list[str]) -> str:
    """How far contestants lie above each baseline, with 95 % intervals; bold where an interval excludes zero."""
    titles = {contestant.name: contestant.title for contestant in comparison.contestants}
    rows = []
    for name in names:
        for baseline, by_task in summary["differences"].get(name, {}).items():
            cells = []
            for task in (*TASKS, "average"):
                part = by_task[task]
                text = f"{part['difference']:+.3f} [{part['low']:+.3f}, {part['high']:+.3f}]"
                cells.append(f"**{text}**" if part["low"] > 0 or part["high"] < 0 else text)
            rows.append([f"{titles[name]} − {titles[baseline]}", *cells])
    return table(["", *_task_header(), "average"], rows)


def perplexity_table(comparison: Comparison, perplexity: dict[str, Any]) -> str:
    """Held-out perplexity of everything that contestants start from, on each role's corpus."""
    roles = list(next(iter(perplexity.values()))["nats"])
    rows = []
    for name, part in perplexity.items():
        losses = [part["nats"][role] for role in roles]
        rows.append(
            [
                f"`{name}`",
                f"{part['tokens']:,}",
                *(f"{math.exp(loss):.2f}" for loss in losses),
                f"{np.mean(losses):.3f}",
            ]
        )
    return table(["start", "corpus tokens", *roles, "mean nats a token"], rows)


def label_table(comparison: Comparison, found: Results) -> str:
    """Accuracy, F1 and predicted labels of seed 0, and the generative score."""
    rows = []
    for contestant in comparison.contestants:
        for task in TASKS if contestant.name in found else ():
            result = found[contestant.name][0]["test"]["tasks"][task]
            generated = result["generated"]
            rows.append(
                [
                    f"{contestant.title}, {task}",
                    *(f"{result[key]:.3f}" for key in ("accuracy", "macro_f1", "weighted_f1", "mcc")),
                    ", ".join(f"{label} {count}" for label, count in result["predicted"].items()),
                    f"{generated['accuracy']:.3f} / {generated['weighted_f1']:.3f} / {generated['without_label']}",
                ]
            )
    header = [
        "",
        "accuracy",
        "macro-F1",
        "weighted F1",
        "MCC",
        "predicted labels",
        "generated: accuracy / weighted F1 / without a label",
    ]
    return table(header, rows)


def lever_table(comparison: Comparison, found: Results) -> str:
    """Main scores on validation rows of everything that was scored on them, levers last."""
    rows = []
    for contestant in (*comparison.contestants, *comparison.levers):
        results = [result for result in found.get(contestant.name, ()) if "valid" in result]
        if results:
            losses = [(result["tuning"] or {}).get("second_half_loss") for result in results]
            known = [loss for loss in losses if loss is not None]
            loss = f"{np.mean(known):.4f}" if known else ""
            rows.append([contestant.title, *map(_cell, main_scores(results, "valid").values()), loss])
    return table(["tried", *_task_header(), "average", "loss, second half"], rows)


def render_short(comparison: Comparison, found: Results, summary: dict[str, Any]) -> str:
    """The comparison's part of the repository's README."""
    return "\n".join(
        [
            "",
            score_table(comparison, found, summary),
            difference_table(comparison, summary, [comparison.team]),
            f"![scores]({comparison.results}/comparison.png)",
            "",
        ]
    )


def render_all(
    comparison: Comparison, found: Results, levers: Results, summary: dict[str, Any], perplexity: dict[str, Any]
) -> str:
    """RESULTS/README.md."""
    rows = ", ".join(f"{task} {count}" for task, count in summary["rows"].items())
    parts = [
        "# Results\n\nMade by `scripts/report_results.py` from the JSON files of this folder. Do not edit.\n",
        f"Test rows: {rows}. ± is the standard deviation over tuning seeds. Average: mean of the four main scores.\n",
        score_table(comparison, found, summary),
        "## What each has and takes\n",
        cost_table(comparison, found),
        "## Differences\n\n95 % intervals by bootstrap over test rows and seeds; bold: zero is outside.\n",
        difference_table(comparison, summary, [c.name for c in comparison.contestants if c.name in found]),
    ]
    if perplexity:
        parts += ["## Held-out perplexity before tuning\n", perplexity_table(comparison, perplexity)]
    if levers:
        about = (
            "## Levers, on validation rows, one seed\n\nLast column: the mean training loss of the second half of the steps. "
            "In one epoch these are rows not seen before. Where it is missing it was not recorded.\n"
        )
        parts += [about, lever_table(comparison, {**found, **levers})]
    parts += ["## Labels, seed 0\n", label_table(comparison, found)]
    return "\n".join(parts)


def plot(comparison: Comparison, found: Results, summary: dict[str, Any], path: Path) -> None:
    """Draw the main scores of every contestant, seed by seed, with the floors as lines."""
    contestants = [contestant for contestant in comparison.contestants if contestant.name in found]
    columns = (*TASKS, "average")
    figure, axes = plt.subplots(
        1, len(columns), figsize=(15, 1.5 + 0.34 * len(contestants)), layout="constrained", sharey=True
    )
    for axis, column in zip(axes, columns, strict=True):
        for place, contestant in enumerate(reversed(contestants)):
            values = main_scores(found[contestant.name])[column]
            color = (
                "tab:blue"
                if contestant.name == comparison.team
                else "tab:orange"
                if contestant.name in comparison.baselines
                else "tab:gray"
            )
            axis.barh(place, values.mean(), color=color, alpha=0.5)
            axis.plot(values, [place] * len(values), "o", color=color, markersize=4)
        for name, style in zip(summary["floors"], ("dotted", "dashed", "dashdot"), strict=True):
            by_task = summary["floors"][name]
            values = [by_task[task][TASKS[task].main_score] for task in TASKS]
            value = dict(zip(columns, [*values, np.mean(values)], strict=True))[column]
            axis.axvline(value, color="black", linestyle=style, linewidth=1, label=name)
        title = "average" if column == "average" else f"{TASKS[column].title}\n{SCORES[TASKS[column].main_score]}"
        axis.set(title=title)
        axis.locator_params(axis="x", nbins=5)
    axes[0].set_yticks(range(len(contestants)), [contestant.title for contestant in reversed(contestants)])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
