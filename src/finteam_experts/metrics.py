# SPDX-License-Identifier: Apache-2.0
"""Classification metrics from confusion matrices, many matrices at a time, so that a bootstrap costs milliseconds."""

import numpy as np

RESAMPLES = 2000


def confusion(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Counts [..., classes, classes], true label by predicted label, over the last axis of both arrays of class ids."""
    pairs = labels * classes + predictions
    counts = (pairs[..., None] == np.arange(classes * classes)).sum(-2)
    return counts.reshape(*counts.shape[:-1], classes, classes)


def scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy, macro-F1 and Matthews correlation of confusion matrices [..., classes, classes].

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
        "mcc": np.divide(covariance, spread, out=np.zeros_like(covariance), where=spread > 0),
    }


def scores_with_errors(labels: np.ndarray, predictions: np.ndarray, classes: int, seed: int = 0) -> dict[str, float]:
    """Each score of one set of predictions with its standard error, by bootstrap over the rows."""
    rows = np.random.default_rng(seed).integers(len(labels), size=(RESAMPLES, len(labels)))
    resampled = scores(confusion(labels[rows], predictions[rows], classes))
    result = {}
    for name, value in scores(confusion(labels, predictions, classes)).items():
        result |= {name: float(value), f"{name}_stderr": float(resampled[name].std(ddof=1))}
    return result
