# SPDX-License-Identifier: Apache-2.0
"""A row per run of experiments/defaults/run.sh: main scores of base, dense model and team, answers, routing, minutes.

python experiments/defaults/table.py outputs/defaults
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from finteam_experts.errors import InputError, run
from finteam_experts.files import read_json
from finteam_experts.screen import screen

BASE, DENSE, TEAM = "base", "dense-instruct", "moe-instruct"


def main_scores(report: dict[str, Any], model: str) -> dict[str, float]:
    tasks = report["models"][model]["tasks"]
    return {task["name"]: tasks[task["name"]][task["main_score"]] for task in report["tasks"]}


def figures(run_dir: Path) -> dict[str, Any]:
    """What one run came to."""
    report, routing = read_json(run_dir / "reports/evaluation.json"), read_json(run_dir / "reports/routing.json")
    notes = [json.loads(line) for line in (run_dir / "reports/quickstart.jsonl").read_text().splitlines()]
    scores = {model: main_scores(report, model) for model in (BASE, DENSE, TEAM)}
    majority = {task["name"]: report["majority"][task["name"]][task["main_score"]] for task in report["tasks"]}
    answers = {model: report["models"][model]["answers"].values() for model in (DENSE, TEAM)}
    return {
        "team": np.mean(list(scores[TEAM].values())),
        "dense": np.mean(list(scores[DENSE].values())),
        "above base": min(scores[TEAM][task] - scores[BASE][task] for task in majority),
        "above majority": min(scores[TEAM][task] - majority[task] for task in majority),
        "nats": [np.mean([part["nats"] for part in own]) for own in answers.values()],
        "bare": np.mean([part["bare"] for part in answers[TEAM]]),
        "routing": [
            routing["gates"][name]["summary"]["own_role_tokens"]
            for name in routing["gates"]
            if name.startswith("tuned")
        ],
        "minutes": sum(note["seconds"] for note in notes) / 60,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    runs = sorted(path.parents[1] for path in folder.glob("*/reports/summary.html"))
    if not runs:
        raise InputError(f"{folder} has no complete run. Make some: bash experiments/defaults/run.sh {folder}")
    titles = ("run", "team", "dense", "difference", "weakest task above base", "above majority", "nats: dense, team", "bare",
              "own analyst: text, chats, prompts", "minutes")  # fmt: skip
    table, differences = Table(*titles), []
    for run_dir in runs:
        found = figures(run_dir)
        differences.append(found["team"] - found["dense"])
        table.add_row(
            run_dir.name, f"{found['team']:.3f}", f"{found['dense']:.3f}", f"{differences[-1]:+.3f}", f"{found['above base']:+.3f}",
            f"{found['above majority']:+.3f}", ", ".join(f"{nats:.3f}" for nats in found["nats"]), f"{found['bare']:.2f}",
            ", ".join(f"{share:.3f}" for share in found["routing"]), f"{found['minutes']:.1f}",
        )  # fmt: skip
    screen(170).print(table)
    print(f"team - dense: mean {np.mean(differences):+.3f}, lowest {min(differences):+.3f}")


if __name__ == "__main__":
    run(main)
