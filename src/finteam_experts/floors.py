# SPDX-License-Identifier: Apache-2.0
"""What needs no language model: the most frequent label, and a bag of words."""

from collections import Counter

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

Row = dict[str, str]
FEW_QUESTIONS = 20  # so many different questions are each a task of their own; more are asked of single rows


def majority_predictions(rows: list[Row]) -> list[str]:
    """The most frequent label of `rows` for each of them: a floor that may look at the labels."""
    label, _ = Counter(row["label"] for row in rows).most_common(1)[0]
    return [label] * len(rows)


def bag_of_words_predictions(train: list[Row], test: list[Row]) -> list[str]:
    """Logistic regression on TF-IDF of words and word pairs, one for each question where a task has a few of them."""
    questions = [row.get("question") for row in train]
    if len(set(questions)) > FEW_QUESTIONS:
        return _fit_predict(
            [row["text"] for row in train], [row["label"] for row in train], [row["text"] for row in test]
        )
    predicted = np.empty(len(test), dtype=object)
    for question in {row.get("question") for row in test}:
        own = [row for row in train if row.get("question") == question] or train
        places = [place for place, row in enumerate(test) if row.get("question") == question]
        texts = [test[place]["text"] for place in places]
        predicted[places] = _fit_predict([row["text"] for row in own], [row["label"] for row in own], texts)
    return predicted.tolist()


def _fit_predict(texts: list[str], labels: list[str], asked: list[str]) -> list[str]:
    if len(set(labels)) == 1:
        return [labels[0]] * len(asked)
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)
    )
    return model.fit(texts, labels).predict(asked).tolist()
