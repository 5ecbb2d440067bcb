# SPDX-License-Identifier: Apache-2.0
"""The table and the plot of the experiment, from the files that experiments/parts/run.py left.

    python experiments/parts/report.py --config experiments/parts/parts.yaml --data_dir DIR

Writes a table and a plot, under the name of the YAML. The data directory's test rows are read for the intervals, which are 95 %
and paired: over rows, and over orders and seeds where there are several.
"""

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from finteam_experts.data.files import rows_to_score, tasks_of
from finteam_experts.errors import InputError, run
from finteam_experts.evaluation.metrics import difference_on_rows
from finteam_experts.files import read_json, read_yaml
from parts import Parts

TITLES = {
    "joint": "one model, tuned again on everything",
    "in-turn": "one model, tuned in turn",
    "replay": "one model in turn, {share:.0%} of the earlier rows again",
    "team": "**team, one expert per token**",
    "team-top-2": "team, two experts per token",
    "team-from-text": "team, router fitted on everybody's text",
    "oracle": "each row to the expert of its field",
    "adapters-tfidf": "experts behind a classifier (TF-IDF)",
    "adapters-ridge": "experts behind a classifier (pooled states, ridge)",
    "arrow": "adapters, Arrow routing",
    "hidden-gates": "mergekit-moe, hidden gates",
    "random-gates": "mergekit-moe, random gates",
    "linear": "merged into one model: linear",
    "ties": "merged into one model: TIES",
    "dare_ties": "merged into one model: DARE-TIES",
    "base": "base, not tuned",
}
LINES = ("joint", "team", "in-turn")  # and the replays
Results = dict[tuple[str, int], dict[str, Any]]  # by way and arrivals


def read_results(folder: Path, order: list[str], fields: dict[str, list[str]]) -> Results:
    """What is there of one order and seed, with the oracle: every task by the expert of its field."""
    found = {}
    for path in folder.glob("*.json"):
        part = read_json(path)
        found[part["way"], part["arrivals"]] = part
    experts = [found.get((f"expert-{field}", 1)) for field in order]
    if all(experts):
        own = {task: expert for field, expert in zip(order, experts, strict=True) for task in fields[field]}
        kinds = ("scores", "predictions")
        oracle = {kind: {task: part[kind][task] for task, part in own.items()} for kind in kinds}
        found["oracle", len(order)] = experts[-1] | oracle | {"parameters": None}
        for way in {way for way, _ in found if way in LINES or way.startswith("replay")}:
            found[way, 1] = experts[0] | {"way": way}  # the first analyst is the trunk, with which all of them begin
    return found


def title(way: str) -> str:
    if way.startswith("replay-"):
        return TITLES["replay"].format(share=float(way.removeprefix("replay-")))
    return TITLES[way]


def average(part: dict[str, Any], fields: list[list[str]]) -> float:
    """The mean main score of the tasks of these fields."""
    return mean(part["scores"][task] for field in fields for task in field)


def costs(parts: list[dict[str, Any]]) -> str:
    """Two cells: what was trained on when the last field arrived, and the size of the model."""
    rows, tokens = (mean(part[kind] for part in parts) for kind in ("rows", "tokens"))
    if not (sizes := parts[0]["parameters"]):  # several models
        return f"{rows:,.0f}, {tokens:,.0f} | -"
    return f"{rows:,.0f}, {tokens:,.0f} | {sizes['total'] / 1e6:.0f}M, {sizes['active'] / 1e6:.0f}M"


def predictions(runs: list[Results], way: str, arrivals: int) -> dict[str, np.ndarray]:
    """By task, [runs, rows]."""
    parts = [own[way, arrivals]["predictions"] for own in runs]
    return {task: np.array([[int(digit) for digit in part[task]] for part in parts]) for task in parts[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the experiment's YAML")
    parser.add_argument("--data_dir", type=Path, required=True, help="data directory with the tasks of all fields")
    args = parser.parse_args()
    parts = Parts.model_validate(read_yaml(args.config))
    folder = args.config.parent / parts.results
    runs, orders = [], []
    for name, order in parts.orders.items():
        for seed in parts.seeds:
            if found := read_results(folder / f"{name}-seed{seed}", order, parts.fields):
                runs.append(found)
                orders.append(order)
    if not runs:
        raise InputError(f"{folder} has no results. Run experiments/parts/run.py first.")
    tasks = {name: task for name, task in tasks_of(args.data_dir).items() if name in runs[0]["base", 0]["scores"]}
    rows = {name: rows_to_score(args.data_dir, task, "test", parts.limit) for name, task in tasks.items()}
    last, every = len(orders[0]), [[parts.fields[field] for field in order] for order in orders]
    ways = [way for way in (*TITLES, *(f"replay-{share:g}" for share in parts.replay)) if way != "replay"]
    ways = [way for way in ways if all((way, 0 if way == "base" else last) in own for own in runs)]
    ours = predictions(runs, "team", last)

    lines = [
        "| way | average after the last arrival | team minus it, 95 % interval | first field, last minus own arrival | rows, tokens trained on at the last arrival | parameters, for a token |",
        "|---|---|---|---|---|---|",
    ]
    scored = {}
    for way in ways:
        place = 0 if way == "base" else last
        scored[way] = mean(average(own[way, place], fields) for own, fields in zip(runs, every, strict=True))
    for way in sorted(ways, key=lambda way: -scored[way]):
        place = 0 if way == "base" else last
        gap = "-"
        if way != "team":
            found = difference_on_rows(tasks, rows, ours, predictions(runs, way, place), shared_seeds=True)["average"]
            gap = f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
        kept = "-"
        if all((way, 1) in own for own in runs):
            kept = f"{mean(average(own[way, last], f[:1]) - average(own[way, 1], f[:1]) for own, f in zip(runs, every, strict=True)):+.3f}"
        lines.append(
            f"| {title(way)} | {scored[way]:.3f} | {gap} | {kept} | {costs([own[way, place] for own in runs])} |"
        )

    lines += ["", "| field, its tasks after every arrival | " + " | ".join(f"{n}" for n in range(1, last + 1)) + " |"]
    lines += ["|---" * (last + 1) + "|"]
    for way in ("team", "in-turn"):
        for field in parts.fields:
            cells = []
            for n in range(1, last + 1):
                there = [own[way, n] for own in runs if (way, n) in own]
                there = [part for part in there if set(parts.fields[field]) <= set(part["scores"])]
                cells.append(f"{mean(average(part, [parts.fields[field]]) for part in there):.3f}" if there else "-")
            lines.append(f"| {field}, {title(way)} | {' | '.join(cells)} |")

    shown = [way for way in ("base", *LINES, "oracle") if way in ways]
    lines += ["", "| task after the last arrival | " + " | ".join(title(way) for way in shown) + " |"]
    lines += ["|---" * (len(shown) + 1) + "|"]
    for name, task in tasks.items():
        parts_of = [[own[way, 0 if way == "base" else last] for own in runs] for way in shown]
        cells = [f"{mean(part['scores'][name] for part in own):.3f}" for own in parts_of]
        lines.append(f"| {task.title} | {' | '.join(cells)} |")

    without = [field for field in parts.fields if all((f"without-{field}", last) in own for own in runs)]
    if without:
        lines += ["", "| removed | " + " | ".join(parts.fields) + " |", "|---" * (len(parts.fields) + 1) + "|"]
        for way in ("team", *(f"without-{field}" for field in without), "base"):
            place = 0 if way == "base" else last
            cells = [
                f"{mean(average(own[way, place], [names]) for own in runs):.3f}" for names in parts.fields.values()
            ]
            name = {"team": "nobody", "base": "(the base)"}.get(way, way.removeprefix("without-"))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    args.config.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for way in (*LINES, *(f"replay-{share:g}" for share in parts.replay)):
        places = [n for n in range(1, last + 1) if all((way, n) in own for own in runs)]
        if last not in places:
            continue
        heights = [
            mean(average(own[way, n], fields[:n]) for own, fields in zip(runs, every, strict=True)) for n in places
        ]
        axes.plot(places, heights, marker="o", linewidth=3 if way == "team" else 1.5, label=title(way).strip("*"))
    for way in ("arrow", "dare_ties", "hidden-gates"):
        if way in ways:
            axes.plot([last], [scored[way]], "x", label=title(way))
    axes.set(xlabel="fields that have arrived", ylabel="mean main score of their tasks", xticks=range(1, last + 1))
    axes.legend(fontsize="small")
    figure.savefig(args.config.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    run(main)
