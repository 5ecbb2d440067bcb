# SPDX-License-Identifier: Apache-2.0
"""The user message that asks a task: its text, shortened where it is a window of prices, its question and its labels.

The Space is uploaded with this file: it imports nothing of the package.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

PROMPT = "{text}\n\n{question} Answer {labels}."

HEADER = "date,open,high,low,close,adj-close,inc-5,inc-10,inc-15,inc-20,inc-25,inc-30"
_MOVE, _AVERAGES = 5, {5: 6, 30: 11}  # columns: adjusted close, and the averages over so many days


def compact_prices(text: str) -> str:
    """A published window of prices as one line of daily moves and one of averages, then its other lines, newest first.

    A window of ten days has 120 numbers, which a tokenizer that splits digits turns into 600 tokens, most of them redundant.
    In the published sets dated tweets follow, the oldest first: they are reversed, so that a cut at the end drops the oldest.
    A text that does not begin with the published header comes back unchanged.
    """
    header, *lines = text.split("\n")
    if header.strip() != HEADER:
        return text
    days = []
    while lines and len(numbers := lines[0].split(",")) == len(HEADER.split(",")) and ":" not in numbers[0]:
        days.append(numbers)
        lines.pop(0)
    if not days:
        return text
    averages = ", ".join(f"{count} days {days[-1][column]}" for count, column in _AVERAGES.items())
    moves = ", ".join(day[_MOVE] for day in days)
    return "\n".join([f"Daily moves in %: {moves}", f"Averages against the close in %: {averages}", *reversed(lines)])


def task_prompt(
    text: str, question: str, labels: Sequence[str], max_tokens: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, bool]:
    """The user message for a text, and whether the text was cut at its end to `max_tokens`, so that the question fits."""
    text = compact_prices(text)
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    is_cut = len(places) > max_tokens
    if is_cut:
        text = text[: places[max_tokens - 1][1]]
    return plain_prompt(text, question, labels), is_cut


def plain_prompt(text: str, question: str, labels: Sequence[str]) -> str:
    """The user message for a text that is not shortened."""
    return PROMPT.format(text=text, question=question, labels=" or ".join([", ".join(labels[:-1]), labels[-1]]))
