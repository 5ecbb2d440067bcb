# SPDX-License-Identifier: Apache-2.0
"""Questions on prices and returns."""

import random
from functools import cache

from finteam_experts.data.sample import figures
from finteam_experts.data.sample.figures import HELDOUT_YEARS, change_percent, pick
from finteam_experts.data.sample.turns import Chat, chat


@cache
def _windows(held: bool, name: str, column: str) -> list[dict[str, str]]:
    """Windows of five trading days of an index by weekday, as they are written: its `close`, or its `return` in percent."""
    series = figures.index_days(name)[column]
    windows = (series.iloc[start : start + 5] for start in range(0, len(series) - 5, 5))
    written = (
        {f"{day:%A}": f"{value:.2f}" for day, value in window.items()}
        for window in windows
        if (window.index[0].year in HELDOUT_YEARS) == held
    )
    return [window for window in written if len(window) == 5]  # closed exchanges can bring a weekday twice


def _by_day(values: dict[str, str]) -> str:
    return ", ".join(f"{day} {value}" for day, value in values.items())


def quant(rng: random.Random, held: bool) -> Chat:
    kind, name = rng.random(), rng.choice(("S&P 500", "NASDAQ"))
    if kind < 0.25:
        values = rng.choice(_windows(held, name, "close"))
        title = pick(rng, f"{name} closes|Closes of the week|Closing prices")
        if rng.random() < 0.5:
            day, value = rng.choice(list(values.items()))
            asked = pick(rng, f"What was the close on {day}?|Where did it close on {day}?")
            return chat("read", f"{title}: {_by_day(values)}.\n\n{asked}", f"The close on {day} was {value}.")
        word, choose = rng.choice((("highest", max), ("lowest", min)))
        text = f"{title}: {', '.join(values.values())}."
        best = choose(values.values(), key=float)
        return chat("computed", f"{text}\n\nWhat was the {word} close?", f"The {word} close was {best}.")
    if kind < 0.4:
        now, before = rng.randint(20, 400), rng.choice((20, 25, 40, 50, 80, 100, 200))
        asked = pick(rng, "What is its return?|What return is that?")
        text = f"A share went from {before} to {now}."
        return chat(
            "computed",
            f"{text}\n\n{asked}",
            f"The return is {change_percent(now, before):.0f} percent, from {before} to {now}.",
        )
    by_day = rng.choice(_windows(held, name, "return"))
    values = list(by_day.values())
    title = pick(rng, "Daily returns in %|Returns of five days in %|Returns of the week in percent")
    if kind < 0.5:
        day, value = rng.choice(list(by_day.items()))
        asked = f"What was the return on {day}?"
        return chat("read", f"{title}: {_by_day(by_day)}.\n\n{asked}", f"The return on {day} was {value} percent.")
    text = f"{title}: {', '.join(values)}."
    low, high = min(values, key=float), max(values, key=float)
    if kind < 0.6:
        word, value = rng.choice((("best", high), ("worst", low)))
        return chat("computed", f"{text}\n\nWhat was the {word} return?", f"The {word} return was {value} percent.")
    if kind < 0.75:
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
