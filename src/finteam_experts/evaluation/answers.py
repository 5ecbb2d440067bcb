# SPDX-License-Identifier: Apache-2.0
"""What a model writes: its greedy answers, the label in one, and how one to a held-out conversation compares with the given one."""

import math
import unicodedata
from collections.abc import Collection
from itertools import islice, permutations

import numpy as np
import regex
import torch
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from transformers import GenerationConfig

from finteam_experts.chats import ChatFormat, Turns
from finteam_experts.data.conversations import Conversation
from finteam_experts.errors import InputError
from finteam_experts.evaluation.batches import padded_batches
from finteam_experts.evaluation.heldout import BATCH_TOKENS, answer_scores
from finteam_experts.scoring import float_head, stop_ids

MAX_NEW_TOKENS = 64  # of an answer: some sentences
WRITTEN_BATCH = 8192  # tokens of prompts that are answered at once: each step of generation reads all weights
MOST_FIGURES = 40  # of a question: more are not combined, since any figure would follow from some two of them
MOST_DIGITS = 100  # of a figure: products of longer ones would overflow
SCORES = {  # of one answer, and of a model their mean over answers
    "nats": "nats per token of the given answer",
    "rouge_l": "ROUGE-L",
    "bare": "bare label or empty",
    "unsupported": "with an unsupported figure",
    "unsupported_by_chance": "the same if its figures were random",
    "read": "figures read right",
    "computed": "figures computed right",
    "repeats": "repeats itself",
    "words": "words",
}
# A run that comes twice is a repetition: so many words or, where a script has no spaces, characters
REPEATED_WORDS, REPEATED_CHARACTERS = 6, 10
_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_LETTER = rf"[\w--[_{_SPACELESS}]]"  # of a script with spaces
_CHARACTER = regex.compile(rf"[{_SPACELESS}]\p{{M}}*")  # counts as a word
_WORD = regex.compile(rf"(?V1){_CHARACTER.pattern}|{_LETTER}+")
_FIGURE = regex.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")  # digits of any script
_ARABIC_SEPARATORS = str.maketrans({"٫": ".", "٬": ","})


class _Words(Tokenizer):
    """ROUGE's tokens in any script; English words without their endings, as in the package's own tokenizer."""

    stemmer = PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        found = words(text) or [character for character in text if not character.isspace()]
        return [self.stemmer.stem(word) if len(word) > 3 and word.isascii() else word for word in found]


# Lin 2004, https://aclanthology.org/W04-1013: the longest common subsequence of words
_ROUGE = RougeScorer(["rougeL"], tokenizer=_Words())


@torch.no_grad()
def greedy_answers(
    model: torch.nn.Module, form: ChatFormat, prompts: list[str] | list[Turns], *, max_new_tokens: int = 8
) -> list[str]:
    """What the model writes in reply to each user message or conversation, always taking the likeliest token.

    The model's own generation_config has no say: a penalty or a forced token would make other answers of the same weights.
    """
    answers, tokenizer, own_settings = [""] * len(prompts), form.tokenizer, model.generation_config
    asked = form.prompts(prompts)
    try:
        model.generation_config = greedy_settings(form)
        for rows, batch in padded_batches(
            asked, tokenizer, batch_tokens=WRITTEN_BATCH, title="answers", padding_side="left"
        ):
            with float_head(model):
                output = model.generate(**batch.to(model.device), max_new_tokens=max_new_tokens)
            texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text
    finally:
        model.generation_config = own_settings
    return answers


def greedy_settings(form: ChatFormat) -> GenerationConfig:
    """Plain greedy decoding up to a token that ends an answer."""
    return GenerationConfig(do_sample=False, eos_token_id=stop_ids(form), pad_token_id=form.tokenizer.pad_token_id)


def first_label(answer: str, labels: Collection[str]) -> str | None:
    """The first label that a written answer has as a word, in any case; `None` if there is none.

    A "no" in "know" is none. A label may stand beside any character of a script without spaces, such as 涨 in 会上涨的.
    """
    answer, places = unicodedata.normalize("NFKC", answer), {}
    for label in labels:
        text = unicodedata.normalize("NFKC", label)
        before = "" if _CHARACTER.match(text[0]) else rf"(?<!{_LETTER})"
        after = "" if _CHARACTER.match(text[-1]) else rf"(?!{_LETTER})"
        if found := regex.search(rf"(?V1){before}{regex.escape(text)}{after}", answer, regex.IGNORECASE):
            places[label] = found.start()
    return min(places, key=lambda label: (places[label], -len(label)), default=None)


def score_answers(
    model: torch.nn.Module, form: ChatFormat, chats: dict[str, list[Conversation]], labels: Collection[str], *, bf16: bool = False
) -> dict[str, dict[str, float | int | list[str] | None]]:  # fmt: skip
    """For each role the mean of each of `SCORES` over its conversations with its standard error, and what the model wrote.

    `labels` are those of tasks: an answer that is one of them, or empty, is no answer to a question. Of the given answer's figures,
    those that the question has are to be read and the others to be computed. Right are those that the model writes too; the mean
    is over the answers that have such figures, `None` if none has.
    """
    conversations = [conversation for own in chats.values() for conversation in own]
    if not conversations:
        return {}
    # all roles at once: a step of generation takes hardly longer for many answers than for a few
    written = greedy_answers(model, form, [turns for turns, _ in conversations], max_new_tokens=MAX_NEW_TOKENS)
    losses, names = answer_losses(model, form, conversations, bf16=bf16), {_bare(label) for label in labels} | {""}
    compared = (
        (answer, {"nats": loss} | _compared("\n".join(turn["content"] for turn in turns), given, answer, names))
        for (turns, given), answer, loss in zip(conversations, written, losses, strict=True)
    )
    scores = {}
    for role, own in chats.items():
        texts, values = zip(*islice(compared, len(own)), strict=True)
        scores[role] = {"n": len(own), "written": list(texts)}
        for name in SCORES:
            column = np.array([value[name] for value in values if value[name] is not None], dtype=float)
            error = column.std(ddof=1) / len(column) ** 0.5 if len(column) > 1 else 0.0
            scores[role] |= {name: float(column.mean()) if len(column) else None, f"{name}_stderr": float(error)}
    return scores


def _compared(question: str, given: str, written: str, no_answers: set[str]) -> dict[str, float | None]:
    """All of `SCORES` but the first of what the model wrote; `None` where the given answer has no figure of that kind."""
    asked, wanted, own = (set(map(float, _figures(text))) for text in (question, given, written))
    right = {name: len(figures & own) / len(figures) if figures else None
             for name, figures in (("read", wanted & asked), ("computed", wanted - asked))}  # fmt: skip
    return right | {
        "rouge_l": _ROUGE.score(given, written)["rougeL"].fmeasure,
        "bare": _bare(written) in no_answers,
        "unsupported": bool(unsupported_figures(question, written)),
        "unsupported_by_chance": unsupported_by_chance(question, written),
        "repeats": repeats_itself(written),
        "words": sum(max(1, len(_CHARACTER.findall(word))) for word in written.split()),
    }


def answer_losses(
    model: torch.nn.Module, form: ChatFormat, conversations: list[Conversation], *, bf16: bool = False
) -> list[float]:
    """Nats per token of each given answer, its end included."""
    exchanges = form.exchanges(conversations)
    longest, positions = max(len(exchange.ids) for exchange in exchanges), model.config.max_position_embeddings
    if longest > positions:
        raise InputError(
            f"a held-out conversation is {longest} tokens, and the model has {positions} positions. Shorten it."
        )
    scores = answer_scores(model, exchanges, batch_tokens=BATCH_TOKENS, bf16=bf16, title="given answers")
    return [-own.log_likelihood / len(exchange.scored) for own, exchange in zip(scores, exchanges, strict=True)]


def unsupported_figures(question: str, answer: str) -> list[str]:
    """The figures of an answer that are not in the question and do not follow from two of its figures.

    Followed are sum, difference, product, ratio, percentage, percentage change and mean, to the digits that are written.
    """
    supported = _supported(question)
    return [
        text
        for text in dict.fromkeys(_figures(answer))
        if (scale := 10 ** len(text.partition(".")[2]))
        and not any(round(float(text) * scale) in _nearest(value * scale) for value in supported)
    ]


def unsupported_by_chance(question: str, answer: str) -> float:
    """The chance that the answer had an unsupported figure if each were a random one of as many digits, from 0 to 99.9 for 12.3.

    Where it is low, it says little that an answer has none: anything follows from many figures.
    """
    supported, all_supported = _supported(question), 1.0
    for text in dict.fromkeys(_figures(answer)):
        whole, _, decimals = text.partition(".")
        size = 10 ** len(whole + decimals)
        near = {figure for value in supported for figure in _nearest(value * 10 ** len(decimals)) if figure < size}
        all_supported *= len(near) / size
    return 1 - all_supported


def _supported(question: str) -> set[float]:
    """The figures of a question and, without their sign, those that follow from two of them."""
    known = set(map(float, _figures(question)))
    supported = set(known)
    for a, b in permutations(known, 2) if len(known) <= MOST_FIGURES else ():
        supported |= {a + b, abs(a - b), a * b, (a + b) / 2}
        supported |= {a / b, 100 * a / b, 100 * abs(a - b) / b} if b else set()
    return supported


def _nearest(value: float) -> range:
    """The whole numbers that a value can be rounded to: two where it is half-way."""
    return range(math.ceil(value - 0.5000001), math.floor(value + 0.5000001) + 1)


def repeats_itself(answer: str) -> bool:
    """Whether a run of `REPEATED_WORDS` words, or `REPEATED_CHARACTERS` where a script has no spaces, comes twice."""
    found = words(answer)
    spaceless = sum(bool(_CHARACTER.match(word)) for word in found) > len(found) / 2
    length = REPEATED_CHARACTERS if spaceless else REPEATED_WORDS
    runs = [tuple(found[at : at + length]) for at in range(len(found) - length + 1)]
    return len(set(runs)) < len(runs)


def words(text: str) -> list[str]:
    """The words of a text in lower case; of a script without spaces, the characters."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _bare(answer: str) -> str:
    return regex.sub(r"[\p{Po}\s]+$", "", unicodedata.normalize("NFKC", answer).strip()).casefold()


def _figures(text: str) -> list[str]:
    """The figures of a text without separators of thousands, as `float` reads them."""
    text = unicodedata.normalize("NFKC", text).translate(_ARABIC_SEPARATORS)
    figures = (figure.replace(",", "") for figure in _FIGURE.findall(text))
    return [figure for figure in figures if len(figure) <= MOST_DIGITS]
