# SPDX-License-Identifier: Apache-2.0
"""The tables and the plot of a comparison, from its result files alone."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from comparison import Comparison
from finteam_experts.data.tasks import Tasks, tasks_from

Results = dict[str, list[dict[str, Any]]]  # by model, one for each seed
SCORES = {"macro_f1": "macro-F1", "weighted_f1": "weighted F1", "mcc": "MCC", "accuracy": "accuracy"}


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main_scores(tasks: Tasks, results: list[dict[str, Any]], split: str = "test") -> dict[str, np.ndarray]:
    """The main score of each task, and their average, for each seed that was scored on that split."""
    by_task = {
        name: np.array([result[split]["tasks"][name][task.main_score] for result in results if split in result])
        for name, task in tasks.items()
    }
    return {**by_task, "average": np.mean(list(by_task.values()), axis=0)}


def _cell(values: np.ndarray) -> str:
    spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}"


def _task_header(tasks: Tasks) -> list[str]:
    return [f"{name} ({SCORES[task.main_score]})" for name, task in tasks.items()] + ["average"]


def score_table(comparison: Comparison, tasks: Tasks, found: Results, summary: dict[str, Any]) -> str:
    """Main scores of the reference predictions, of every model, and of the baselines' vote."""

    def row(name: str, by_task: dict[str, dict[str, float]]) -> list[str]:
        values = [by_task[name][task.main_score] for name, task in tasks.items()]
        return [name, *(f"{value:.3f}" for value in (*values, np.mean(values))), ""]

    rows = [row(name, by_task) for name, by_task in summary["reference"].items()]
    for model in comparison.models:
        if results := found.get(model.name):
            title = f"**{model.title}**" if model.name == comparison.team else model.title
            rows.append([title, *map(_cell, main_scores(tasks, results).values()), str(len(results))])
    if vote := summary["vote"]:
        rows.append(row(f"the {vote['models']} baseline models, voting", vote["tasks"]))
    return table(["", *_task_header(tasks), "seeds"], rows)


def cost_table(comparison: Comparison, found: Results) -> str:
    """What each model has and takes."""
    rows = []
    for model in (model for model in comparison.models if model.name in found):
        results = found[model.name]
        size, tuning = results[0]["parameters"], results[0]["tuning"] or {}
        known = [result["tuning"]["seconds"] for result in results if result["tuning"] and result["tuning"]["seconds"]]
        tuned = [f"{tuning['trainable_parameters'] / 1e6:.1f}M", f"{tuning['train_tokens']:,}"] if tuning else ["", ""]
        sizes = [f"{size[key] / 1e6:.0f}M" for key in ("total", "active")]
        minutes = f"{np.mean(known) / 60:.1f}" if known else ""
        rows.append([model.title, *sizes, tuned[0], f"{results[0]['tokens_before_tuning']:,}", tuned[1], minutes])
    columns = [
        "parameters",
        "active",
        "trained in tuning",
        "corpus tokens before",
        "tuning tokens",
        "minutes of tuning",
    ]
    return table(["", *columns], rows)


def difference_table(comparison: Comparison, tasks: Tasks, summary: dict[str, Any], names: list[str]) -> str:
    """Differences of models to each baseline, with 95 % intervals; bold where an interval excludes zero."""
    titles = {model.name: model.title for model in comparison.models}
    rows = []
    for name in names:
        for baseline, by_task in summary["differences"].get(name, {}).items():
            cells = []
            for task in (*tasks, "average"):
                part = by_task[task]
                text = f"{part['difference']:+.3f} [{part['low']:+.3f}, {part['high']:+.3f}]"
                cells.append(f"**{text}**" if part["low"] > 0 or part["high"] < 0 else text)
            rows.append([f"{titles[name]} − {titles[baseline]}", *cells])
    return table(["", *_task_header(tasks)], rows)


def perplexity_table(perplexity: dict[str, Any]) -> str:
    """Held-out perplexity of every initial model, on each role's corpus."""
    roles = list(next(iter(perplexity.values()))["nats"])
    rows = []
    for name, part in perplexity.items():
        losses = [part["nats"][role] for role in roles]
        perplexities = [f"{math.exp(loss):.2f}" for loss in losses]
        rows.append([f"`{name}`", f"{part['tokens']:,}", *perplexities, f"{np.mean(losses):.3f}"])
    return table(["initial model", "corpus tokens", *roles, "mean nats per token"], rows)


def label_table(comparison: Comparison, found: Results) -> str:
    """Accuracy, F1 and predicted labels of seed 0, and the generative score."""
    rows = []
    for model in (model for model in comparison.models if model.name in found):
        for task, result in found[model.name][0]["test"]["tasks"].items():
            scores = [f"{result[key]:.3f}" for key in ("accuracy", "macro_f1", "weighted_f1", "mcc")]
            labels = ", ".join(f"{label} {count}" for label, count in result["predicted"].items())
            written = result["generated"]
            generated = f"{written['accuracy']:.3f} / {written['weighted_f1']:.3f} / {written['without_label']}"
            rows.append([f"{model.title}, {task}", *scores, labels, generated])
    generated = "generated: accuracy / weighted F1 / without a label"
    return table(["", "accuracy", "macro-F1", "weighted F1", "MCC", "predicted labels", generated], rows)


def ablation_table(comparison: Comparison, tasks: Tasks, found: Results) -> str:
    """Main scores on validation rows of everything that was scored on them, ablations last."""
    rows = []
    for model in (*comparison.models, *comparison.ablations):
        results = [result for result in found.get(model.name, ()) if "valid" in result]
        if results:
            losses = [(result["tuning"] or {}).get("second_half_loss") for result in results]
            known = [loss for loss in losses if loss is not None]
            loss = f"{np.mean(known):.4f}" if known else ""
            rows.append([model.title, *map(_cell, main_scores(tasks, results, "valid").values()), loss])
    return table(["model", *_task_header(tasks), "loss, second half"], rows)


def render(
    comparison: Comparison, found: Results, ablations: Results, summary: dict[str, Any], perplexity: dict[str, Any]
) -> str:
    """results/README.md."""
    tasks = tasks_from(summary["tasks"])
    rows = ", ".join(f"{task} {count}" for task, count in summary["rows"].items())
    names = [model.name for model in comparison.models if model.name in found]
    parts = [
        "# Results\n\nMade by `experiments/report.py` from the JSON files of this folder. Do not edit.\n",
        f"Test rows: {rows}. ± is the standard deviation over tuning seeds. Average: mean of the main scores.\n",
        score_table(comparison, tasks, found, summary),
        "## Size and cost\n",
        cost_table(comparison, found),
        "## Differences\n\n95 % intervals by bootstrap over test rows and seeds; bold: zero is outside.\n",
        difference_table(comparison, tasks, summary, names),
    ]
    if perplexity:
        parts += ["## Held-out perplexity before tuning\n", perplexity_table(perplexity)]
    if ablations:
        about = (
            "The last column is the mean training loss of the second half of the steps, which in one epoch are rows not seen "
            "before. It is empty where it was not recorded.\n"
        )
        parts += [
            f"## Ablations, on validation rows, one seed\n\n{about}",
            ablation_table(comparison, tasks, {**found, **ablations}),
        ]
    return "\n".join([*parts, "## Labels, seed 0\n", label_table(comparison, found)])


def plot(comparison: Comparison, found: Results, summary: dict[str, Any], path: Path) -> None:
    """Draw the main scores of every model, seed by seed, with the reference scores as lines."""
    tasks = tasks_from(summary["tasks"])
    models = [model for model in comparison.models if model.name in found][::-1]
    colors = {comparison.team: "tab:blue", **dict.fromkeys(comparison.baselines, "tab:orange")}
    columns, size = (*tasks, "average"), (15, 1.5 + 0.34 * len(models))
    figure, axes = plt.subplots(1, len(columns), figsize=size, layout="constrained", sharey=True)
    for axis, column in zip(axes, columns, strict=True):
        for place, model in enumerate(models):
            values, color = main_scores(tasks, found[model.name])[column], colors.get(model.name, "tab:gray")
            axis.barh(place, values.mean(), color=color, alpha=0.5)
            axis.plot(values, [place] * len(values), "o", color=color, markersize=4)
        for (name, by_task), style in zip(summary["reference"].items(), ("dotted", "dashed", "dashdot"), strict=True):
            values = {name: by_task[name][task.main_score] for name, task in tasks.items()}
            value = values.get(column, np.mean(list(values.values())))
            axis.axvline(value, color="black", linestyle=style, linewidth=1, label=name)
        title = "average" if column == "average" else f"{tasks[column].title}\n{SCORES[tasks[column].main_score]}"
        axis.set(title=title)
        axis.locator_params(axis="x", nbins=5)
    axes[0].set_yticks(range(len(models)), [model.title for model in models])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
