# SPDX-License-Identifier: Apache-2.0
"""Make the tables and the plot of a comparison from its result files.

    python experiments/report.py --config experiments/own_tasks/comparison.yaml --data_dir DIR
    python experiments/report.py --config experiments/own_tasks/comparison.yaml

With a data directory: computes reference scores and intervals, which need its labels, into results/summary.json. Then, or
without one: results/README.md with all tables, and results/comparison.png.
"""

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from comparison import REPOSITORY, Comparison, read_comparison
from finteam_experts.data.files import Row, read_task, rows_to_score, task_file, tasks_of
from finteam_experts.data.mixture import row_limits, tuning_rows
from finteam_experts.data.tasks import Tasks, about_tasks
from finteam_experts.errors import InputError, run
from finteam_experts.evaluation.metrics import difference_on_rows, majority_vote, scores_with_errors
from finteam_experts.evaluation.tasks import true_labels
from finteam_experts.files import file_hash, read_json, read_yaml, write_json, write_text
from tables import Results, plot, render

Rows = dict[str, list[Row]]  # by task
FEW_QUESTIONS = 20  # this many different questions are a task each; more are asked of single rows


def digest(found: Results) -> str:
    """Changes with any result."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def scored_rows(comparison: Comparison, data: Path, found: Results) -> tuple[Tasks, Rows]:
    """The scored tasks and their test rows; `InputError` unless the results were made with just these files."""
    names = list(next(iter(found.values()))[0]["test"]["tasks"])
    for result in (result for results in found.values() for result in results):
        for task, recorded in result["test"]["files"].items():
            path = task_file(data, task, "test")
            if recorded != file_hash(path):
                which = f"{result['name']} with seed {result['seed']} was scored on another {path.name} than that of {data}"
                raise InputError(f"{which}. Name the data directory it was made with.")
    tasks = tasks_of(data, names)
    return tasks, {name: rows_to_score(data, task, "test", comparison.limit) for name, task in tasks.items()}


def predicted_labels(task: str, results: list[dict[str, Any]]) -> np.ndarray:
    """What each result's model says of each test row, [results, rows], as places in the task's list."""
    return np.array([list(map(int, result["test"]["tasks"][task]["predictions"])) for result in results])


def bag_of_words(train: list[Row], test: list[Row]) -> list[str]:
    """Logistic regression on TF-IDF of words and word pairs, one for each question where a task has a few of them."""
    by_question = len({row.get("question") for row in train}) <= FEW_QUESTIONS
    predicted = np.empty(len(test), dtype=object)
    for question in {row.get("question") for row in test} if by_question else {None}:
        own = [row for row in train if not by_question or row.get("question") == question] or train
        places = [place for place, row in enumerate(test) if not by_question or row.get("question") == question]
        labels, texts = [row["label"] for row in own], [test[place]["text"] for place in places]
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        model = make_pipeline(words, LogisticRegression(C=10, max_iter=1000))
        fitted = model.fit([row["text"] for row in own], labels) if len(set(labels)) > 1 else None
        predicted[places] = fitted.predict(texts) if fitted else labels[0]
    return predicted.tolist()


def reference_scores(comparison: Comparison, data: Path, tasks: Tasks, rows: Rows) -> dict[str, dict[str, Any]]:
    """Scores of the majority class and of a bag of words, trained on the tuning rows of seed 0 or on all of train."""
    recipe = read_yaml(REPOSITORY / next(model.recipe for model in comparison.models if model.recipe))
    limits = row_limits(tasks, recipe.get("rows_per_task"), recipe.get("rows_of_task"))
    tuned_on = tuning_rows(data, tasks, 0, limits, hold_out=recipe.get("hold_out_validation", False))
    result: dict[str, dict[str, Any]] = {}
    for task, test in ((tasks[name], own) for name, own in rows.items()):
        label, _ = Counter(row["label"] for row in test).most_common(1)[0]
        predictions = {
            "majority": [label] * len(test),
            "bag of words, same rows": bag_of_words([row for name, row in tuned_on if name == task.name], test),
            "bag of words, all rows": bag_of_words(read_task(data, task, "train"), test),
        }
        for name, predicted in predictions.items():
            classes = np.array([task.labels.index(label) for label in predicted])
            errors = scores_with_errors(true_labels(task, test), classes, len(task.labels))
            result.setdefault(name, {})[task.name] = errors
    return result


def vote(comparison: Comparison, found: Results, tasks: Tasks, rows: Rows) -> dict[str, Any] | None:
    """Scores of all tuned baselines together: the gain of as many models side by side. `None` for fewer than 3."""
    voters = [result for name in comparison.baselines for result in found.get(name, ())]
    if len(voters) < 3:
        return None
    result: dict[str, Any] = {"models": len(voters), "tasks": {}}
    for task, own in rows.items():
        classes = len(tasks[task].labels)
        chosen = majority_vote(predicted_labels(task, voters), classes)
        result["tasks"][task] = scores_with_errors(true_labels(tasks[task], own), chosen, classes)
    return result


def differences(comparison: Comparison, found: Results, tasks: Tasks, rows: Rows) -> dict[str, dict[str, Any]]:
    """Every model's difference to each baseline, with intervals."""
    predictions = {name: {task: predicted_labels(task, results) for task in tasks} for name, results in found.items()}
    baselines = [name for name in comparison.baselines if name in found]
    return {
        name: {other: difference_on_rows(tasks, rows, own, predictions[other]) for other in baselines if other != name}
        for name, own in predictions.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the comparison's YAML")
    parser.add_argument("--data_dir", type=Path, help="the data directory that the results were made with")
    args = parser.parse_args()

    comparison = read_comparison(args.config)
    found, folder = comparison.read_results(comparison.models), comparison.results
    if not found:
        raise InputError(f"{folder} holds no result. Make some first: experiments/compare.py")
    summary_file = folder / "summary.json"
    if args.data_dir:
        tasks, rows = scored_rows(comparison, args.data_dir, found)
        summary = {
            "results": digest(found),
            "rows": {task: len(own) for task, own in rows.items()},
            "tasks": about_tasks(tasks)["tasks"],
            "reference": reference_scores(comparison, args.data_dir, tasks, rows),
            "vote": vote(comparison, found, tasks, rows),
            "differences": differences(comparison, found, tasks, rows),
        }
        write_json(summary_file, summary)
    if not summary_file.exists():
        raise InputError(
            f"{summary_file} does not exist: its intervals need the test labels. Name them with --data_dir."
        )
    summary = read_json(summary_file)
    if summary["results"] != digest(found):
        raise InputError(f"{summary_file} was made from other results. Make it again: name the data with --data_dir.")

    perplexity_file = folder / "perplexity.json"
    perplexity = read_json(perplexity_file) if perplexity_file.exists() else {}
    ablations = comparison.read_results(comparison.ablations)
    write_text(folder / "README.md", render(comparison, found, ablations, summary, perplexity))
    plot(comparison, found, summary, folder / "comparison.png")
    print(f"Written: {folder}/README.md and comparison.png")


if __name__ == "__main__":
    run(main)
