# SPDX-License-Identifier: Apache-2.0
"""Answers to held-out conversations: how likely the given answer is, and what the model writes instead."""

import re
from collections.abc import Collection
from itertools import islice, permutations

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from finteam_experts.data.conversations import Conversation
from finteam_experts.errors import InputError
from finteam_experts.evaluation.labels import LabelScoringLM, greedy_answers

MAX_NEW_TOKENS = 64  # of an answer: some sentences
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
MOST_FIGURES = 40  # of a question: more are not combined, since any figure would follow from some two of them
SCORES = {  # of one answer, and of a model their mean over answers
    "nats": "nats per token of the given answer",
    "rouge_l": "ROUGE-L",
    "bare": "bare label or empty",
    "unsupported": "with an unsupported figure",
    "read": "figures read right",
    "computed": "figures computed right",
    "repeats": "repeats itself",
    "words": "words",
}
REPEATED_WORDS = 6  # a run of so many words that comes twice
# Lin 2004, https://aclanthology.org/W04-1013: the longest common subsequence of words
_ROUGE = RougeScorer(["rougeL"], use_stemmer=True)


def score_answers(
    lm: LabelScoringLM, chats: dict[str, list[Conversation]], labels: Collection[str]
) -> dict[str, dict[str, float | int | list[str] | None]]:
    """For each role the mean of each of `SCORES` over its conversations with its standard error, and what the model wrote.

    `labels` are those of tasks: an answer that is one of them, or empty, is no answer to a question. Of the given answer's figures,
    those that the question has are to be read and the others to be computed. Right are those that the model writes too; the mean
    is over the answers that have such figures, `None` if none has.
    """
    conversations = [conversation for own in chats.values() for conversation in own]
    if not conversations:
        return {}
    # all roles at once: a step of generation takes hardly longer for many answers than for a few
    answers = greedy_answers(lm.model, lm.form, [turns for turns, _ in conversations], max_new_tokens=MAX_NEW_TOKENS)
    written, losses = iter(answers), iter(answer_losses(lm, conversations))
    names, scores = {label.lower() for label in labels} | {""}, {}
    for role, own in chats.items():
        texts = list(islice(written, len(own)))
        values = {"nats": list(islice(losses, len(own)))} | _compared(own, texts, names)
        scores[role] = {"n": len(own), "written": texts}
        for name in SCORES:
            column = np.array(values[name], dtype=float)
            error = column.std(ddof=1) / len(column) ** 0.5 if len(column) > 1 else 0.0
            scores[role] |= {name: float(column.mean()) if len(column) else None, f"{name}_stderr": float(error)}
    return scores


def _compared(conversations: list[Conversation], written: list[str], no_answers: set[str]) -> dict[str, list[float]]:
    """All of `SCORES` but the first of what the model wrote, a value an answer; fewer for figures, which not all have."""
    values: dict[str, list[float]] = {name: [] for name in SCORES if name != "nats"}
    for (turns, given), answer in zip(conversations, written, strict=True):
        question = "\n".join(turn["content"] for turn in turns)
        values["rouge_l"].append(_ROUGE.score(given, answer)["rougeL"].fmeasure)
        values["bare"].append(answer.strip().rstrip(".").lower() in no_answers)
        values["unsupported"].append(bool(unsupported_figures(question, answer)))
        values["repeats"].append(repeats_itself(answer))
        values["words"].append(len(answer.split()))
        asked, own = _figures(question), _figures(answer)
        for name, wanted in (("read", _figures(given) & asked), ("computed", _figures(given) - asked)):
            values[name] += [len(wanted & own) / len(wanted)] if wanted else []
    return values


def answer_losses(lm: LabelScoringLM, conversations: list[Conversation]) -> list[float]:
    """Nats per token of each given answer, its end included."""
    exchanges = lm.form.exchanges(conversations)
    longest, positions = max(len(exchange.ids) for exchange in exchanges), lm.model.config.max_position_embeddings
    if longest > positions:
        raise InputError(
            f"a held-out conversation is {longest} tokens, and the model has {positions} positions. Shorten it."
        )
    given = [(("", ""), exchange.prompt, exchange.answer + exchange.end) for exchange in exchanges]
    scores = lm._loglikelihood_tokens(given)
    return [-total / len(ids) for (total, _), (_, _, ids) in zip(scores, given, strict=True)]


def unsupported_figures(question: str, answer: str) -> list[str]:
    """The figures of an answer that are not in the question and do not follow from two of its figures.

    Followed are sum, difference, product, ratio, percentage, percentage change and mean, to the digits that are written.
    """
    known = {_value(text) for text in NUMBER.findall(question)}
    candidates = set(known)
    for a, b in permutations(known, 2) if len(known) <= MOST_FIGURES else ():
        candidates |= {a + b, a - b, a * b, (a + b) / 2}
        candidates |= {a / b, 100 * a / b, 100 * (a - b) / b} if b else set()
    found = []
    for text in dict.fromkeys(NUMBER.findall(answer)):
        digits = len(text.partition(".")[2])
        if not any(abs(abs(value) - _value(text)) <= 0.5000001 * 10**-digits for value in candidates):
            found.append(text)
    return found


def repeats_itself(answer: str) -> bool:
    """Whether a run of `REPEATED_WORDS` words comes twice in an answer."""
    words = re.findall(r"\w+", answer.lower())
    runs = [tuple(words[at : at + REPEATED_WORDS]) for at in range(len(words) - REPEATED_WORDS + 1)]
    return len(set(runs)) < len(runs)


def _figures(text: str) -> set[float]:
    return set(map(_value, NUMBER.findall(text)))


def _value(text: str) -> float:
    return float(text.replace(",", ""))
