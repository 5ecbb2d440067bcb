# SPDX-License-Identifier: Apache-2.0
"""Questions on prices and returns."""

import random
from functools import cache
from typing import Any

from finteam_experts.data.sample import figures
from finteam_experts.data.sample.figures import HELDOUT_YEARS, change_percent, pick
from finteam_experts.data.sample.turns import Chat, chat


@cache
def _windows(held: bool, name: str, column: str) -> list[list[str]]:
    """Windows of five days of an index, as they are written: its `close`, or its `return` in percent."""
    series = figures.index_days(name)[column]
    starts = range(0, len(series) - 5, 5)
    return [
        [f"{value:.2f}" for value in series.iloc[start : start + 5]]
        for start in starts
        if (series.index[start].year in HELDOUT_YEARS) == held
    ]


@cache
def _days(held: bool, name: str) -> list[Any]:
    """The days of an index that belong to one split, with its open, high, low and close."""
    days = figures.index_days(name).itertuples()
    return [day for day in days if (day.Index.year in HELDOUT_YEARS) == held]


def quant(rng: random.Random, held: bool) -> Chat:
    kind, name = rng.random(), rng.choice(("S&P 500", "NASDAQ"))
    if kind < 0.25:
        return _one_day(rng, held, name)
    if kind < 0.35:
        values = rng.choice(_windows(held, name, "close"))
        text = f"{pick(rng, f'{name} closes|Closes of the week|Closing prices')}: {', '.join(values)}."
        word, choose = rng.choice((("highest", max), ("lowest", min)))
        best = choose(values, key=float)
        return chat("computed", f"{text}\n\nWhat was the {word} close?", f"The {word} close was {best}.")
    if kind < 0.45:
        now, before = rng.randint(20, 400), rng.choice((20, 25, 40, 50, 80, 100, 200))
        asked = pick(rng, "What is its return?|What return is that?")
        text = f"A share went from {before} to {now}."
        return chat(
            "computed",
            f"{text}\n\n{asked}",
            f"The return is {change_percent(now, before):.0f} percent, from {before} to {now}.",
        )
    values = rng.choice(_windows(held, name, "return"))
    text = f"{pick(rng, 'Daily returns in %|Returns of five days in %|Returns of the week in percent')}: {', '.join(values)}."
    low, high = min(values, key=float), max(values, key=float)
    if kind < 0.6:
        word, value = rng.choice((("best", high), ("worst", low)))
        return chat("computed", f"{text}\n\nWhat was the {word} return?", f"The {word} return was {value} percent.")
    if kind < 0.7:
        count = sum(float(value) > 0 for value in values)
        return chat(
            "computed", f"{text}\n\nOn how many days did it rise?", f"It rose on {count} of {len(values)} days."
        )
    spread = float(high) - float(low)
    mood = "volatile" if spread > 3 else ("calm" if spread < 1.5 else "moderately volatile")
    asked = pick(rng, "How volatile is this share?|Is this share volatile?|What do these returns say about risk?")
    return chat(
        "reason", f"{text}\n\n{asked}", f"The share is {mood}: its daily returns range from {low} to {high} percent."
    )


def _one_day(rng: random.Random, held: bool, name: str) -> Chat:
    day = rng.choice(_days(held, name))
    text = (
        f"On {day.Index.day} {day.Index:%B %Y} the {name} opened at {day.open:.2f}, rose as high as {day.high:.2f}, fell as low as "
        f"{day.low:.2f} and closed at {day.close:.2f}."
    )
    what, value = rng.choice((("open", day.open), ("high", day.high), ("low", day.low), ("close", day.close)))
    return chat("read", f"{text}\n\nWhat was the day's {what}?", f"The day's {what} was {value:.2f}.")
