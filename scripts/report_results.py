# SPDX-License-Identifier: Apache-2.0
"""Make the tables and plots of a comparison from its result files.

    python scripts/report_results.py --config recipes/smollm2-135m/comparison.yaml --data_dir DIR
    python scripts/report_results.py --config recipes/smollm2-135m/comparison.yaml

With a data directory: computes floors and intervals, which need its labels, into RESULTS/summary.json. Then, or without
one: RESULTS/README.md with all tables, RESULTS/comparison.png, and the comparison's part of this repository's README.md.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from finteam_experts import runs
from finteam_experts.comparison import Comparison, read_comparison, read_results
from finteam_experts.comparison_tables import plot, render_all, render_short
from finteam_experts.data import read_task, row_limits, rows_to_score, task_file, tuning_rows
from finteam_experts.errors import InputError, run
from finteam_experts.floors import bag_of_words_predictions, majority_predictions
from finteam_experts.metrics import difference_on_rows, majority_vote, scores_with_errors
from finteam_experts.tasks import TASKS

README = Path("README.md")
END = "<!-- end of the comparison -->"


def begin(config: Path) -> str:
    """The line of the README below which the tables of that comparison lie, down to `END`."""
    return f"<!-- {config}: made by scripts/report_results.py -->\n"


def digest(found: dict[str, list[dict[str, Any]]]) -> str:
    """Changes with any result."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def labels_of(comparison: Comparison, data: Path, found: dict[str, list[dict]]) -> dict[str, list[dict[str, str]]]:
    """The scored test rows; `InputError` unless the results were made with just these files."""
    for results in found.values():
        for result in results:
            for task, recorded in result["test"]["files"].items():
                path = task_file(data, task, "test")
                if recorded != runs.file_hash(path):
                    raise InputError(
                        f"{result['name']} with seed {result['seed']} was scored on another {path.name} than that of {data}. "
                        "Name the data directory it was made with."
                    )
    return {task: rows_to_score(data, task, "test", comparison.limit) for task in TASKS}


def true_labels(task: str, rows: list[dict[str, str]]) -> np.ndarray:
    """Each row's label as its place in the task's list."""
    return np.array([TASKS[task].labels.index(row["label"]) for row in rows])


def predicted_labels(task: str, results: list[dict[str, Any]]) -> np.ndarray:
    """What each result's model says of each test row, [results, rows], as places in the task's list."""
    return np.array([list(map(int, result["test"]["tasks"][task]["predictions"])) for result in results])


def floors(comparison: Comparison, data: Path, rows: dict[str, list[dict[str, str]]]) -> dict[str, dict[str, Any]]:
    """Scores of the majority class and of a bag of words, trained on the tuning rows of seed 0 or on all of train."""
    recipe = yaml.safe_load(Path(next(c.recipe for c in comparison.contestants if c.recipe)).read_text())
    limits = row_limits(recipe.get("rows_per_task"), recipe.get("rows_of_task"))
    tuned_on = tuning_rows(data, 0, limits, hold_out=recipe.get("hold_out_validation", False))
    result: dict[str, dict[str, Any]] = {"majority": {}, "bag of words, same rows": {}, "bag of words, all rows": {}}
    for task, test in rows.items():
        labels = TASKS[task].labels
        same = [row for name, row in tuned_on if name == task]
        predictions = {
            "majority": majority_predictions(test),
            "bag of words, same rows": bag_of_words_predictions(same, test),
            "bag of words, all rows": bag_of_words_predictions(read_task(data, task, "train"), test),
        }
        for name, predicted in predictions.items():
            classes = np.array([labels.index(label) for label in predicted])
            result[name][task] = scores_with_errors(true_labels(task, test), classes, len(labels))
    return result


def vote(
    comparison: Comparison, found: dict[str, list[dict]], rows: dict[str, list[dict[str, str]]]
) -> dict[str, Any] | None:
    """Scores of all tuned baselines together: what as many models that run side by side would gain. `None` for fewer than 3."""
    voters = [result for name in comparison.baselines for result in found.get(name, ())]
    if len(voters) < 3:
        return None
    result: dict[str, Any] = {"models": len(voters), "tasks": {}}
    for task, own in rows.items():
        classes = len(TASKS[task].labels)
        chosen = majority_vote(predicted_labels(task, voters), classes)
        result["tasks"][task] = scores_with_errors(true_labels(task, own), chosen, classes)
    return result


def differences(
    comparison: Comparison, found: dict[str, list[dict]], rows: dict[str, list[dict[str, str]]]
) -> dict[str, dict[str, Any]]:
    """Every contestant's difference to each baseline, with intervals."""
    predictions = {name: {task: predicted_labels(task, results) for task in TASKS} for name, results in found.items()}
    return {
        name: {
            baseline: difference_on_rows(rows, own, predictions[baseline])
            for baseline in comparison.baselines
            if baseline in found and baseline != name
        }
        for name, own in predictions.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the comparison's YAML")
    parser.add_argument("--data_dir", type=Path, help="the data directory that the results were made with")
    args = parser.parse_args()

    comparison = read_comparison(args.config)
    found = read_results(comparison, comparison.contestants)
    levers = read_results(comparison, comparison.levers)
    if not found:
        raise InputError(f"{comparison.results} holds no result. Make some first: scripts/compare.py")
    summary_file = comparison.results / "summary.json"
    if args.data_dir:
        rows = labels_of(comparison, args.data_dir, found)
        summary = {
            "results": digest(found),
            "rows": {task: len(own) for task, own in rows.items()},
            "floors": floors(comparison, args.data_dir, rows),
            "vote": vote(comparison, found, rows),
            "differences": differences(comparison, found, rows),
        }
        runs.write_json(summary_file, summary)
    if not summary_file.exists():
        raise InputError(
            f"{summary_file} does not exist: its intervals need the test labels. Name them with --data_dir."
        )
    summary = json.loads(summary_file.read_text())
    if summary["results"] != digest(found):
        raise InputError(f"{summary_file} was made from other results. Make it anew: name the data with --data_dir.")
    perplexity_file = comparison.results / "perplexity.json"
    perplexity = json.loads(perplexity_file.read_text()) if perplexity_file.exists() else {}
    (comparison.results / "README.md").write_text(render_all(comparison, found, levers, summary, perplexity))
    plot(comparison, found, summary, comparison.results / "comparison.png")
    before, mark, rest = README.read_text().partition(begin(args.config))
    if mark:  # a comparison without it has its tables in the results folder alone
        README.write_text(before + mark + render_short(comparison, found, summary) + END + rest.partition(END)[2])
    print(f"Written: {comparison.results}/README.md, comparison.png{f' and the tables in {README}' if mark else ''}")


if __name__ == "__main__":
    run(main)
