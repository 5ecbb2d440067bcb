# SPDX-License-Identifier: Apache-2.0
"""The table and the plot of the experiment, from the files that experiments/parts/run.py left.

    python experiments/parts/report.py --config experiments/parts/parts.yaml --data_dir DIR

Writes a table and a plot, under the name of the YAML. The data directory's test rows are read for the intervals, which are 95 %
and paired: over rows, and over orders and seeds where there are several. A way that was not made in all runs (orders and seeds) is
compared with the team in its own.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from finteam_experts.data.files import Row, rows_to_score, tasks_of
from finteam_experts.data.tasks import Tasks
from finteam_experts.errors import InputError, run
from finteam_experts.evaluation.metrics import paired_difference
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
MERGES = ("linear", "ties", "dare_ties")
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


@dataclass(frozen=True)
class Run:
    """The results of one order with one seed, and the tasks of each field in the order of arrival."""

    found: Results
    fields: list[list[str]]

    def average(self, way: str, arrivals: int, fields: list[list[str]] | None = None) -> float:
        """The mean main score of the tasks of some fields, or of all that have arrived."""
        scores = self.found[way, arrivals]["scores"]
        return mean(scores[task] for field in fields or self.fields[: arrivals or None] for task in field)


class Runs:
    """All runs whose team is whole. A way that was not made in all of them is that of the others."""

    def __init__(self, parts: Parts, folder: Path) -> None:
        self.fields, self.last, self.all = parts.fields, len(parts.fields), list[Run]()
        for name, order in parts.orders.items():
            for seed in parts.seeds:
                own = f"{name}-seed{seed}"
                for place in (folder / own, *sorted(folder.glob(f"{own}-*"))):  # made again, on another processor
                    found = read_results(place, order, parts.fields)
                    if ("team", self.last) in found:
                        self.all.append(Run(found, [parts.fields[field] for field in order]))
        if not self.all:
            raise InputError(f"{folder} has no results of the whole team. Run experiments/parts/run.py first.")
        self.replays = [f"replay-{share:g}" for share in parts.replay]
        known = [way for way in (*TITLES, *self.replays) if way != "replay"]
        self.ways = sorted((way for way in known if self.of(way)), key=lambda way: -self.average(way))

    def place(self, way: str) -> int:
        """The arrivals after which a way is compared."""
        return 0 if way == "base" else self.last

    def of(self, way: str, arrivals: int | None = None) -> list[Run]:
        """The runs in which the way was made."""
        place = self.place(way) if arrivals is None else arrivals
        return [run for run in self.all if (way, place) in run.found]

    def through(self, way: str) -> list[Run]:
        """The runs in which the way was made at every arrival."""
        return [run for run in self.of(way) if all((way, n) in run.found for n in range(1, self.last + 1))]

    def average(self, way: str) -> float:
        return mean(run.average(way, self.place(way)) for run in self.of(way))

    def predictions(self, way: str, runs: list[Run]) -> dict[str, np.ndarray]:
        """By task, [runs, rows]."""
        parts = [run.found[way, self.place(way)]["predictions"] for run in runs]
        return {task: np.array([[int(digit) for digit in part[task]] for part in parts]) for task in parts[0]}


def title(way: str) -> str:
    if way.startswith("replay-"):
        return TITLES["replay"].format(share=float(way.removeprefix("replay-")))
    return TITLES[way]


def costs(parts: list[dict[str, Any]]) -> str:
    """Two cells: what was trained on when the last field arrived, and the size of the model."""
    rows, tokens = (mean(part[kind] for part in parts) for kind in ("rows", "tokens"))
    if not (sizes := parts[0]["parameters"]):  # several models
        return f"{rows:,.0f}, {tokens:,.0f} | -"
    return f"{rows:,.0f}, {tokens:,.0f} | {sizes['total'] / 1e6:.0f}M, {sizes['active'] / 1e6:.0f}M"


def table(*head: object) -> list[str]:
    """The first two lines of a table, after a blank one."""
    return ["", f"| {' | '.join(map(str, head))} |", "|---" * len(head) + "|"]


def way_table(runs: Runs, tasks: Tasks, rows: dict[str, list[Row]]) -> list[str]:
    """Every way beside the team."""
    lines = table(
        "way", "runs", "average after the last arrival", "the team's in these runs", "team minus it, 95 % interval",
        "first field, last minus own arrival", "rows, tokens trained on at the last arrival", "parameters, for a token",
    )  # fmt: skip
    for way in runs.ways:
        there, last, gap, kept = runs.of(way), runs.last, "-", "-"
        team = mean(run.average("team", last) for run in there)
        if way != "team":
            ours, theirs = runs.predictions("team", there), runs.predictions(way, there)
            part = paired_difference(tasks, rows, ours, theirs, shared_seeds=True)["average"]
            gap = f"{part['difference']:+.3f} [{part['low']:+.3f}, {part['high']:+.3f}]"
        if all((way, 1) in run.found for run in there):
            first = [run.average(way, last, run.fields[:1]) - run.average(way, 1) for run in there]
            kept = f"{mean(first):+.3f}"
        cost = costs([run.found[way, runs.place(way)] for run in there])
        cells = (title(way), len(there), f"{runs.average(way):.3f}", f"{team:.3f}", gap, kept, cost)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def arrival_table(runs: Runs) -> list[str]:
    """The mean of all tasks so far after every arrival, and that of the lowest run."""
    later = range(2, runs.last + 1)
    lines = table("all tasks after every arrival, mean and lowest run", "runs", *later)
    for way in (way for way in runs.ways if runs.through(way)):
        means = [[run.average(way, n) for run in runs.through(way)] for n in later]
        cells = " | ".join(f"{mean(own):.3f}, {min(own):.3f}" for own in means)
        lines.append(f"| {title(way)} | {len(runs.through(way))} | {cells} |")
    return lines


def field_table(runs: Runs) -> list[str]:
    """Each field after every arrival, in the runs in which it was scored by then."""
    arrivals = range(1, runs.last + 1)
    lines = table("field, its tasks after every arrival", *arrivals)
    for way in ("team", "in-turn"):
        for field, own in runs.fields.items():
            cells = []
            for n in arrivals:
                there = [run for run in runs.of(way, n) if set(own) <= set(run.found[way, n]["scores"])]
                cells.append(f"{mean(run.average(way, n, [own]) for run in there):.3f}" if there else "-")
            lines.append(f"| {field}, {title(way)} | {' | '.join(cells)} |")
    return lines


def task_table(runs: Runs, tasks: Tasks) -> list[str]:
    """Each task after the last arrival, the mean over the runs in which a way was made."""
    shown = [way for way in ("base", *LINES, "oracle") if runs.of(way)]
    lines = table("task after the last arrival", *(f"{title(way)} ({len(runs.of(way))} runs)" for way in shown))
    for name, task in tasks.items():
        cells = [mean(run.average(way, runs.place(way), [[name]]) for run in runs.of(way)) for way in shown]
        lines.append(f"| {task.title} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    return lines


def removal_table(runs: Runs) -> list[str]:
    """What each field loses when an analyst is removed, in the runs in which each of them was, if there are some."""
    removals = [f"without-{field}" for field in runs.fields]
    there = [run for run in runs.all if all((way, runs.last) in run.found for way in removals)]
    if not there:
        return []
    lines = table("removed", *runs.fields)
    for way in ("team", *removals, "base"):
        name = {"team": "nobody", "base": "(the base)"}.get(way, way.removeprefix("without-"))
        cells = [mean(run.average(way, runs.place(way), [own]) for run in there) for own in runs.fields.values()]
        lines.append(f"| {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    return lines


def plot(runs: Runs, path: Path) -> None:
    """The mean of all tasks so far after every arrival, one line a way."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    arrivals = range(1, runs.last + 1)
    for way in (way for way in (*LINES, *runs.replays) if runs.through(way)):
        there = runs.through(way)
        heights = [mean(run.average(way, n) for run in there) for n in arrivals]
        label = f"{title(way).strip('*')} ({len(there)} runs)"
        axes.plot(arrivals, heights, marker="o", linewidth=3 if way == "team" else 1.5, label=label)
    best_merge = next((way for way in runs.ways if way in MERGES), "")
    for way in ("joint", "arrow", best_merge, "hidden-gates"):
        if way in runs.ways and not runs.through(way):
            axes.plot([runs.last], [runs.average(way)], "x", label=f"{title(way)} ({len(runs.of(way))} runs)")
    axes.set(xlabel="fields that have arrived", ylabel="mean main score of their tasks", xticks=arrivals)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the experiment's YAML")
    parser.add_argument("--data_dir", type=Path, required=True, help="data directory with the tasks of all fields")
    args = parser.parse_args()
    parts = Parts.model_validate(read_yaml(args.config))
    runs = Runs(parts, args.config.parent / parts.results)
    scored = {name for names in parts.fields.values() for name in names}
    tasks = {name: task for name, task in tasks_of(args.data_dir).items() if name in scored}
    rows = {name: rows_to_score(args.data_dir, task, "test", parts.limit) for name, task in tasks.items()}
    lines = way_table(runs, tasks, rows) + arrival_table(runs) + field_table(runs) + task_table(runs, tasks)
    text = "\n".join(lines + removal_table(runs)).strip()
    args.config.with_suffix(".md").write_text(text + "\n")
    plot(runs, args.config.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    run(main)
