# SPDX-License-Identifier: Apache-2.0
"""What the runs of experiments/defaults/run.sh came to: scores and answers of dense model and team, routing, minutes.

python experiments/defaults/table.py outputs/defaults
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from finteam_experts.errors import InputError, run
from finteam_experts.evaluation.answers import SCORES
from finteam_experts.files import read_json
from finteam_experts.screen import screen

BASE, DENSE, TEAM = "base", "dense-instruct", "moe-instruct"
ANSWERS = ("bare", "repeats", "read", "computed")  # of `SCORES`


def main_scores(report: dict[str, Any], model: str) -> list[float]:
    """The main score of each task, in the report's order."""
    tasks = report["models"][model]["tasks"]
    return [tasks[task["name"]][task["main_score"]] for task in report["tasks"]]


def answered(report: dict[str, Any], model: str, score: str) -> float:
    """The mean over roles of a score of the answers, without roles whose answers have no such figures."""
    roles = report["models"][model]["answers"].values()
    return float(np.mean([own[score] for own in roles if own[score] is not None]))


def score_table(reports: dict[str, dict[str, Any]]) -> Table:
    """Main scores of base, dense model and team in each run, and the team's lead over the dense model with its interval."""
    tasks = next(iter(reports.values()))["tasks"]
    titles = ("run", "model", *(task["name"] for task in tasks), "mean", "team minus dense, 95 % interval", "nats")
    table = Table(*titles, box=box.MARKDOWN)
    for name, report in reports.items():
        for model in (BASE, DENSE, TEAM):
            scores, gap = main_scores(report, model), ""
            if model == TEAM:
                part = report["differences"][f"{TEAM} − {DENSE}"]["average"]
                gap = f"{part['difference']:+.3f} [{part['low']:+.3f}, {part['high']:+.3f}]"
            cells = (*scores, np.mean(scores))
            nats = f"{answered(report, model, 'nats'):.3f}"
            table.add_row(name, model, *(f"{cell:.3f}" for cell in cells), gap, nats)
    return table


def team_table(folder: Path, reports: dict[str, dict[str, Any]]) -> Table:
    """How far the team is from the base and from a majority class, its answers, its routing, and what the run took."""
    titles = ("run", "weakest task above base", "above majority", *(SCORES[score] for score in ANSWERS), "own analyst: text, chats, prompts", "minutes")  # fmt: skip
    table = Table(*titles, box=box.MARKDOWN)
    for name, report in reports.items():
        ours = main_scores(report, TEAM)
        majority = [report["majority"][task["name"]][task["main_score"]] for task in report["tasks"]]
        least = (np.subtract(ours, theirs).min() for theirs in (main_scores(report, BASE), majority))
        gates = read_json(folder / name / "reports/routing.json")["gates"]
        routing = (gates[kind]["summary"]["own_role_tokens"] for kind in gates if kind.startswith("tuned"))
        notes = (folder / name / "reports/quickstart.jsonl").read_text().splitlines()
        minutes = sum(json.loads(line)["seconds"] for line in notes) / 60
        shares = (f"{answered(report, TEAM, score):.2f}" for score in ANSWERS)
        table.add_row(
            name, *(f"{value:+.3f}" for value in least), *shares, ", ".join(f"{x:.3f}" for x in routing), f"{minutes:.1f}"
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    runs = sorted(path.parents[1] for path in folder.glob("*/reports/summary.html"))
    if not runs:
        raise InputError(f"{folder} has no complete run. Make some: bash experiments/defaults/run.sh {folder}")
    reports = {run_dir.name: read_json(run_dir / "reports/evaluation.json") for run_dir in runs}
    for table in (score_table(reports), team_table(folder, reports)):
        screen(220).print(table)
    differences = [np.mean(main_scores(own, TEAM)) - np.mean(main_scores(own, DENSE)) for own in reports.values()]
    print(f"team - dense: mean {np.mean(differences):+.3f}, lowest {min(differences):+.3f}")


if __name__ == "__main__":
    run(main)
