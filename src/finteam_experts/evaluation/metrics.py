# SPDX-License-Identifier: Apache-2.0
"""Classification metrics from confusion matrices, many matrices at a time, so that a bootstrap costs milliseconds."""

import numpy as np

from finteam_experts.data.files import text_key
from finteam_experts.data.tasks import Tasks

RESAMPLES = 2000


def confusion(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Counts [..., classes, classes], true label by predicted label, over the last axis of both arrays of class ids."""
    pairs = labels * classes + predictions
    counts = (pairs[..., None] == np.arange(classes * classes)).sum(-2)
    return counts.reshape(*counts.shape[:-1], classes, classes)


def scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy, macro-F1, weighted F1 and Matthews correlation of confusion matrices [..., classes, classes].

    As in scikit-learn: the F1 of a class that is neither present nor predicted does not count, the others' mean does;
    MCC (for any number of classes: Gorodkin 2004, doi:10.1016/j.compbiolchem.2004.09.006) is 0 where it is undefined.
    """
    counts = counts.astype(float)
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    true, predicted, total = counts.sum(-1), counts.sum(-2), counts.sum((-2, -1))
    support = true + predicted
    f1 = np.divide(2 * hits, support, out=np.zeros_like(hits), where=support > 0)
    covariance = hits.sum(-1) * total - (true * predicted).sum(-1)
    spread = np.sqrt((total**2 - (predicted**2).sum(-1)) * (total**2 - (true**2).sum(-1)))
    return {
        "accuracy": hits.sum(-1) / total,
        "macro_f1": f1.sum(-1) / (support > 0).sum(-1),
        "weighted_f1": (f1 * true).sum(-1) / total,
        "mcc": np.divide(covariance, spread, out=np.zeros_like(covariance), where=spread > 0),
    }


def scores_with_errors(
    labels: np.ndarray, predictions: np.ndarray, classes: int, units: np.ndarray | None = None, seed: int = 0
) -> dict[str, float]:
    """Each score of one set of predictions with its standard error, by bootstrap over the rows.

    Rows with the same number in `units` [rows] are drawn together: a repeated text carries no more information than one.
    """
    units = np.arange(len(labels)) if units is None else np.unique(units, return_inverse=True)[1]
    weights = _draws(units, np.random.default_rng(seed))
    one_hot = np.eye(classes**2)[labels * classes + predictions]  # [rows, classes squared]
    resampled = scores((weights @ one_hot).reshape(-1, classes, classes))
    result = {}
    for name, value in scores(confusion(labels, predictions, classes)).items():
        result |= {name: float(value), f"{name}_stderr": float(resampled[name].std(ddof=1))}
    return result


def unlike_written(scored: np.ndarray, written: np.ndarray, units: np.ndarray) -> bool:
    """Whether two ways of asking a model differ in accuracy by more than three standard errors of their difference.

    `scored` and `written` [rows] say whether a row's answer is right by label scores and in the model's own words.
    """
    _, place = np.unique(units, return_inverse=True)
    difference = np.bincount(place, scored.astype(float) - written.astype(float))  # by text
    error = difference.std(ddof=1) * len(difference) ** 0.5 if len(difference) > 1 else 0.0
    return bool(abs(difference.sum()) > 3 * error)


def _draws(units: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How often each row is drawn in each bootstrap resample of the units, [resamples, rows]."""
    count = units.max() + 1
    return rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)[:, units].astype(float)


def paired_difference(
    labels: dict[str, np.ndarray],
    units: dict[str, np.ndarray],
    ours: dict[str, np.ndarray],
    theirs: dict[str, np.ndarray],
    classes: dict[str, int],
    main: dict[str, str],
    seed: int = 0,
    *,
    shared_seeds: bool = False,
) -> dict[str, dict[str, float]]:
    """How far our models' main score lies above theirs, by task and on average over tasks, with a 95 % interval.

    By task: `labels` [rows], `units` [rows] (rows with the same number are drawn together, as they share a text), `ours`
    and `theirs` [seeds, rows] class ids, `classes` their number, `main` the score. The score is the mean over the seeds.
    The interval is the percentile bootstrap (Efron 1979, doi:10.1214/aos/1176344552) over units and over seeds, in which
    both sides see the same draws of units. Seeds are drawn for each side alone, as their noise is not shared; with
    `shared_seeds`, where both sides are made of the same rows or experts in each seed, they are drawn together.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, dict[str, float]] = {}
    point, drawn = {}, {}
    ours_draw, theirs_draw = (_seed_weights(next(iter(side.values())).shape[0], rng) for side in (ours, theirs))
    if shared_seeds:
        theirs_draw = ours_draw
    for task, true in labels.items():
        _, place = np.unique(units[task], return_inverse=True)
        weights = _draws(place, rng)
        sides = []
        for predictions, seed_weights in ((ours[task], ours_draw), (theirs[task], theirs_draw)):
            one_hot = np.eye(classes[task] ** 2)[true * classes[task] + predictions]  # [seeds, rows, classes squared]
            shape = (-1, len(predictions), classes[task], classes[task])
            by_seed = scores(np.einsum("br,srk->bsk", weights, one_hot, optimize=True).reshape(shape))[main[task]]
            once = scores(one_hot.sum(1).reshape(shape))[main[task]]
            sides.append((once.mean(), (by_seed * seed_weights).sum(-1)))
        point[task] = sides[0][0] - sides[1][0]
        drawn[task] = sides[0][1] - sides[1][1]
    point["average"], drawn["average"] = np.mean(list(point.values())), np.mean(list(drawn.values()), axis=0)
    for task, value in point.items():
        low, high = np.percentile(drawn[task], (2.5, 97.5))
        found[task] = {"difference": float(value), "low": float(low), "high": float(high)}
    return found


def difference_on_rows(
    tasks: Tasks,
    rows: dict[str, list[dict[str, str]]],
    ours: dict[str, np.ndarray],
    theirs: dict[str, np.ndarray],
    *,
    shared_seeds: bool = False,
) -> dict[str, dict[str, float]]:
    """`paired_difference` on the scored `rows` of each task: `ours` and `theirs` [seeds, rows] are places in its labels."""
    return paired_difference(
        {name: np.array([task.labels.index(row["label"]) for row in rows[name]]) for name, task in tasks.items()},
        {name: text_units(own) for name, own in rows.items()},
        ours,
        theirs,
        {name: len(task.labels) for name, task in tasks.items()},
        {name: task.main_score for name, task in tasks.items()},
        shared_seeds=shared_seeds,
    )


def text_units(rows: list[dict[str, str]]) -> np.ndarray:
    """A number for each row, the same for rows of one text."""
    return np.unique([text_key(row) for row in rows], return_inverse=True)[1]


def _seed_weights(seeds: int, rng: np.random.Generator) -> np.ndarray:
    """For each resample the share of every seed in a draw of as many, [resamples, seeds]."""
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
