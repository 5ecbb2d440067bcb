# SPDX-License-Identifier: Apache-2.0
"""Classification metrics, their standard errors, and differences between models with intervals."""

from collections.abc import Callable
from functools import partial

import numpy as np
from scipy.sparse import csr_array
from scipy.stats import bootstrap
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from finteam_experts.data.files import Row, text_key
from finteam_experts.data.tasks import Task, Tasks

RESAMPLES = 2000
METRICS = {
    "accuracy": accuracy_score,
    "macro_f1": partial(f1_score, average="macro", zero_division=0),
    "weighted_f1": partial(f1_score, average="weighted", zero_division=0),
    "mcc": matthews_corrcoef,
}


def scores(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Each of `METRICS` of predicted class ids."""
    return {name: float(metric(true, predicted)) for name, metric in METRICS.items()}


def scores_with_errors(true: np.ndarray, predicted: np.ndarray, units: np.ndarray | None = None) -> dict[str, float]:
    """Each score of one set of predictions with its standard error, by bootstrap over the rows.

    Rows with the same number in `units` [rows] are drawn together: a repeated text carries no more information than one.
    """
    units = np.arange(len(true)) if units is None else np.unique(units, return_inverse=True)[1]
    resampled = resampled_scores(true, predicted, units)
    found = _bootstrap([units.max() + 1], lambda weights: list(resampled(weights).values()))
    errors = {f"{name}_stderr": float(error) for name, error in zip(METRICS, found.standard_error, strict=True)}
    return scores(true, predicted) | errors


def paired_difference(
    tasks: Tasks,
    rows: dict[str, list[Row]],
    ours: dict[str, np.ndarray],
    theirs: dict[str, np.ndarray],
    *,
    shared_seeds: bool = False,
) -> dict[str, dict[str, float]]:
    """How far our models' main score lies above theirs, by task and on average over tasks, with a 95 % interval.

    `ours` and `theirs` are places in each task's labels, [seeds, rows]; the score is the mean over the seeds. The interval is the
    percentile bootstrap (Efron 1979, doi:10.1214/aos/1176344552) over texts and over seeds, in which both sides see the same
    draws of texts. Seeds are drawn for each side alone, as their noise is not shared; with `shared_seeds`, where both sides are
    made of the same rows or experts in each seed, they are drawn together.
    """
    counts, gaps, resampled = [], [], []
    for name, task in tasks.items():
        true, units, sides = true_labels(task, rows[name]), text_units(rows[name]), (ours[name], theirs[name])
        counts.append(units.max() + 1)
        means = [np.mean([METRICS[task.main_score](true, own) for own in side]) for side in sides]
        gaps.append(means[0] - means[1])
        resampled.append([[resampled_scores(true, own, units) for own in side] for side in sides])
    seeds = [len(next(iter(side.values()))) for side in ((ours,) if shared_seeds else (ours, theirs))]

    def statistic(*weights: np.ndarray) -> list[np.ndarray]:
        shares = [own / own.sum(-1, keepdims=True) for own in weights[len(tasks) :]]  # [draws, seeds]
        found = []
        for task, own, sides in zip(tasks.values(), weights, resampled, strict=False):
            by_seed = [np.stack([of(own)[task.main_score] for of in side], -1) for side in sides]
            found.append((by_seed[0] * shares[0]).sum(-1) - (by_seed[1] * shares[-1]).sum(-1))
        return [*found, np.mean(found, axis=0)]

    interval = _bootstrap([*counts, *seeds], statistic).confidence_interval
    found = zip([*tasks, "average"], [*gaps, np.mean(gaps)], interval.low, interval.high, strict=True)
    return {name: {"difference": float(gap), "low": float(low), "high": float(high)} for name, gap, low, high in found}


def written_scores(task: Task, rows: list[Row], written: list[str | None]) -> dict[str, float | int]:
    """Accuracy and weighted F1 of written labels; an answer without one is wrong."""
    labels = [*task.labels, None]
    found = scores(true_labels(task, rows), np.array([labels.index(label) for label in written]))
    return {name: found[name] for name in ("accuracy", "weighted_f1")} | {"without_label": written.count(None)}


def true_labels(task: Task, rows: list[Row]) -> np.ndarray:
    """Each row's label as its place in the task's list."""
    return np.array([task.labels.index(row["label"]) for row in rows])


def text_units(rows: list[Row]) -> np.ndarray:
    """A number for each row, the same for rows of one text."""
    return np.unique([text_key(row) for row in rows], return_inverse=True)[1]


def resampled_scores(
    true: np.ndarray, predicted: np.ndarray, units: np.ndarray
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """`scores` as a function of how often each unit is drawn, [draws, units]; scikit-learn would take six seconds for 1000."""
    classes, hits = max(true.max(), predicted.max()) + 1, true == predicted

    def counted(own: np.ndarray, of: np.ndarray) -> csr_array:
        return csr_array((np.ones(len(own)), (own, of)), shape=(units.max() + 1, classes))

    parts = counted(units, true), counted(units, predicted), counted(units[hits], true[hits])

    def resampled(weights: np.ndarray) -> dict[str, np.ndarray]:
        support, claimed, right = (weights @ part for part in parts)  # [draws, classes]
        total, both = support.sum(-1), support + claimed
        f1 = np.divide(2 * right, both, out=np.zeros_like(right), where=both > 0)
        covariance = right.sum(-1) * total - (support * claimed).sum(-1)
        spread = np.sqrt((total**2 - (claimed**2).sum(-1)) * (total**2 - (support**2).sum(-1)))
        return {
            "accuracy": right.sum(-1) / total,
            "macro_f1": f1.sum(-1) / (both > 0).sum(-1),
            "weighted_f1": (f1 * support).sum(-1) / total,
            "mcc": np.divide(covariance, spread, out=np.zeros_like(covariance), where=spread > 0),
        }

    return resampled


def _bootstrap(counts: list[int], statistic: Callable[..., list[np.ndarray]]):
    """scipy's bootstrap of a function of how often each of so many things is drawn, [draws, count] for each of `counts`."""

    def of_indices(*draws: np.ndarray, axis: int) -> np.ndarray:
        lines = np.arange(len(draws[0]))[:, None]
        drawn = [
            np.bincount((own + lines * n).ravel(), minlength=len(lines) * n)
            for own, n in zip(draws, counts, strict=True)
        ]
        return np.stack(statistic(*(own.reshape(len(lines), -1) for own in drawn)))

    samples = [np.resize(np.arange(count), max(count, 2)) for count in counts]  # scipy draws from two or more
    batch = max(1, 2**22 // max(counts))
    return bootstrap(
        samples, of_indices, n_resamples=RESAMPLES, batch=batch, vectorized=True, method="percentile", rng=0
    )
