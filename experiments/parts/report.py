# SPDX-License-Identifier: Apache-2.0
"""The table and the plot of the experiment, from the files that experiments/parts/run.py left.

    python experiments/parts/report.py --config experiments/parts/parts.yaml --data_dir DIR

Writes a table and a plot, under the name of the YAML. The data directory's test rows are read for the intervals, which are 95 %
and paired: over rows, and over orders and seeds where there are several. A way that was not made in all runs (orders and seeds) is
compared with the team in its own.
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
    runs: list[tuple[Results, list[list[str]]]] = []  # with the tasks of each field in the order of arrival
    for name, order in parts.orders.items():
        for seed in parts.seeds:
            found = read_results(folder / f"{name}-seed{seed}", order, parts.fields)
            if ("team", len(order)) in found:
                runs.append((found, [parts.fields[field] for field in order]))
    if not runs:
        raise InputError(f"{folder} has no results of the whole team. Run experiments/parts/run.py first.")
    scores = runs[0][0]["base", 0]["scores"]
    tasks = {name: task for name, task in tasks_of(args.data_dir).items() if name in scores}
    rows = {name: rows_to_score(args.data_dir, task, "test", parts.limit) for name, task in tasks.items()}
    last = len(parts.fields)

    def runs_of(way: str, arrivals: int) -> list[tuple[Results, list[list[str]]]]:
        return [one for one in runs if (way, arrivals) in one[0]]

    def scored(way: str, arrivals: int) -> float:
        return mean(average(own[way, arrivals], fields[: arrivals or last]) for own, fields in runs_of(way, arrivals))

    known = [way for way in (*TITLES, *(f"replay-{share:g}" for share in parts.replay)) if way != "replay"]
    places = {way: 0 if way == "base" else last for way in known}
    ways = sorted((way for way in known if runs_of(way, places[way])), key=lambda way: -scored(way, places[way]))
    lines = [
        "| way | runs | average after the last arrival | the team's in these runs | team minus it, 95 % interval | first field, last minus own arrival | rows, tokens trained on at the last arrival | parameters, for a token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way in ways:
        there, place = runs_of(way, places[way]), places[way]
        found = [own for own, _ in there]
        team, gap = mean(average(own["team", last], fields) for own, fields in there), "-"
        if way != "team":
            ours, theirs = predictions(found, "team", last), predictions(found, way, place)
            part = difference_on_rows(tasks, rows, ours, theirs, shared_seeds=True)["average"]
            gap = f"{part['difference']:+.3f} [{part['low']:+.3f}, {part['high']:+.3f}]"
        kept = "-"
        if all((way, 1) in own for own in found):
            kept = f"{mean(average(own[way, last], f[:1]) - average(own[way, 1], f[:1]) for own, f in there):+.3f}"
        cost = costs([own[way, place] for own in found])
        lines.append(
            f"| {title(way)} | {len(there)} | {scored(way, place):.3f} | {team:.3f} | {gap} | {kept} | {cost} |"
        )

    lines += [
        "",
        "| all tasks after every arrival, mean and lowest run | runs | "
        + " | ".join(f"{n}" for n in range(2, last + 1))
        + " |",
    ]
    lines += ["|---" * (last + 1) + "|"]
    for way in (way for way in ways if runs_of(way, 2)):
        there = [
            [average(own[way, n], fields[:n]) for own, fields in runs if (way, n) in own] for n in range(2, last + 1)
        ]
        cells = [f"{mean(part):.3f}, {min(part):.3f}" for part in there]
        lines.append(f"| {title(way)} | {len(there[-1])} | {' | '.join(cells)} |")

    lines += ["", "| field, its tasks after every arrival | " + " | ".join(f"{n}" for n in range(1, last + 1)) + " |"]
    lines += ["|---" * (last + 1) + "|"]
    for way in ("team", "in-turn"):
        for field in parts.fields:
            cells = []
            for n in range(1, last + 1):
                there = [own[way, n] for own, _ in runs_of(way, n)]
                there = [part for part in there if set(parts.fields[field]) <= set(part["scores"])]
                cells.append(f"{mean(average(part, [parts.fields[field]]) for part in there):.3f}" if there else "-")
            lines.append(f"| {field}, {title(way)} | {' | '.join(cells)} |")

    shown = [way for way in ("base", *LINES, "oracle") if len(runs_of(way, places[way])) == len(runs)]
    lines += ["", "| task after the last arrival | " + " | ".join(title(way) for way in shown) + " |"]
    lines += ["|---" * (len(shown) + 1) + "|"]
    for name, task in tasks.items():
        parts_of = [[own[way, places[way]] for own, _ in runs] for way in shown]
        cells = [f"{mean(part['scores'][name] for part in own):.3f}" for own in parts_of]
        lines.append(f"| {task.title} | {' | '.join(cells)} |")

    removals = [f"without-{field}" for field in parts.fields]
    there = [own for own, _ in runs if all((way, last) in own for way in removals)]
    if there:
        lines += ["", "| removed | " + " | ".join(parts.fields) + " |", "|---" * (len(parts.fields) + 1) + "|"]
        for way in ("team", *removals, "base"):
            place = 0 if way == "base" else last
            cells = [
                f"{mean(average(own[way, place], [names]) for own in there):.3f}" for names in parts.fields.values()
            ]
            name = {"team": "nobody", "base": "(the base)"}.get(way, way.removeprefix("without-"))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    args.config.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for way in (*LINES, *(f"replay-{share:g}" for share in parts.replay)):
        if not (there := len(runs_of(way, last))):
            continue
        at = [n for n in range(1, last + 1) if n == 1 or len(runs_of(way, n)) == there]
        label = title(way).strip("*") + (f" ({there} of {len(runs)} runs)" if there < len(runs) else "")
        heights = [scored(way, n) for n in at]
        axes.plot(at, heights, marker="o", linewidth=3 if way == "team" else 1.5, label=label)
    for way in ("arrow", "dare_ties", "hidden-gates"):
        if way in ways:
            axes.plot([last], [scored(way, last)], "x", label=title(way))
    axes.set(xlabel="fields that have arrived", ylabel="mean main score of their tasks", xticks=range(1, last + 1))
    axes.legend(fontsize="small")
    figure.savefig(args.config.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    run(main)
