# SPDX-License-Identifier: Apache-2.0
"""Price windows in the form of the published stock-movement sets, said in far fewer tokens."""

HEADER = "date,open,high,low,close,adj-close,inc-5,inc-10,inc-15,inc-20,inc-25,inc-30"
_MOVE, _AVERAGES = 5, {5: 6, 30: 11}  # columns: adjusted close, and the averages of so many days


def compact_prices(text: str) -> str:
    """The window of `text` as a line of daily moves and one of averages, then its other lines, the newest first.

    A window of ten days is 120 numbers, which a tokenizer that splits digits turns into 600 tokens; most of them repeat one
    another. What follows the window in the published sets are dated lines of tweets, the oldest first: turned round, so that
    a cut at the end drops the oldest. A text that does not begin with the published header comes back unchanged.
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
