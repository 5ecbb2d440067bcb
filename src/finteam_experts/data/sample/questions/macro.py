# SPDX-License-Identifier: Apache-2.0
"""Questions on quarters, months and markets of the macro analyst.

A passage says in words which way a figure went: a small model reads that, but it can't tell which of two figures is larger.
"""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

from finteam_experts.data.sample import figures
from finteam_experts.data.sample.figures import HELDOUT_YEARS, pick
from finteam_experts.data.sample.turns import Chat, capital, chat


def _of_split(table: Any, held: bool, year: Callable[[Any], int]) -> list[Any]:
    """The rows of a yearly table that belong to one split."""
    return [row for row in table.itertuples() if (year(row) in HELDOUT_YEARS) == held]


@cache
def _quarters(held: bool) -> list[Any]:
    return _of_split(figures.us_quarters(), held, lambda row: row.year)


@cache
def _months(held: bool, name: str) -> list[Any]:
    table = {"bonds": figures.bond_yields, "cpi": figures.core_cpi, "oil": figures.crude_months}[name]()
    return _of_split(table, held, lambda row: row.Index.year)


def macro(rng: random.Random, held: bool) -> Chat:
    questions = (_growth, _prices, *3 * (_policy,), _bonds, _core_inflation, _oil)  # four decisions are to be learned
    return rng.choice(questions)(rng, held)


def _when(row: Any) -> str:
    return f"the {('first', 'second', 'third', 'fourth')[row.quarter - 1]} quarter of {row.year}"


def _went(rng: random.Random, now: float, before: float) -> str:
    """A verb for a figure that went from `before` to `now`."""
    return pick(rng, "rose|climbed|went up" if now > before else "fell|dropped|went down")


def _growth(rng: random.Random, held: bool) -> Chat:
    row = rng.choice(_quarters(held))
    output, spending, investment = (
        f"{what} {'rose' if growth > 0 else 'fell'} by {abs(growth):.1f} percent"
        for what, growth in (
            ("real output", row.realgdp_growth),
            ("household spending", row.realcons_growth),
            ("private investment", row.realinv_growth),
        )
    )
    text = f"In {_when(row)} {output}, {spending} and {investment}."
    if rng.random() < 0.4:
        what, said = rng.choice((("household spending", spending), ("private investment", investment)))
        return chat("read", f"{text}\n\nBy how much did {what} change?", f"{capital(said)}.")
    verb = "grew" if row.realgdp_growth > 0 else "shrank"
    asked = pick(rng, "How did the economy do?|Did the economy grow?|What happened to output?")
    return chat("reason", f"{text}\n\n{asked}", f"The economy {verb}: {output}, and {spending}.")


def _prices(rng: random.Random, held: bool) -> Chat:
    row = rng.choice(_quarters(held))
    text = (
        f"In {_when(row)} inflation was {row.infl:.1f} percent, the three-month Treasury bill yielded {row.tbilrate:.1f} "
        f"percent and the unemployment rate was {row.unemp:.1f} percent."
    )
    if rng.random() < 0.7:
        what, value = rng.choice(
            (
                ("the inflation rate", row.infl),
                ("the bill's yield", row.tbilrate),
                ("the unemployment rate", row.unemp),
            )
        )
        return chat("read", f"{text}\n\nWhat was {what}?", f"{capital(what)} was {value:.1f} percent.")
    bill, inflation = round(row.tbilrate, 1), round(row.infl, 1)
    sign = "positive" if bill > inflation else "not positive"
    return chat(
        "computed", f"{text}\n\n{pick(rng, 'Was the real short rate positive?|What was the real short rate?')}",
        f"The real short rate was {sign}, about {bill - inflation:.1f} percent: the bill's {bill:.1f} percent minus inflation "
        f"of {inflation:.1f} percent.",
    )  # fmt: skip


def _policy(rng: random.Random, held: bool) -> Chat:
    """One figure that asks for a lower or a higher rate, or two that ask for both."""
    row = rng.choice(
        [
            row
            for row in _quarters(held)
            if min(abs(row.unemp - row.unemp_before), abs(row.infl - row.infl_before)) >= 0.1
        ]
    )
    rose, hotter = row.unemp > row.unemp_before, row.infl > row.infl_before
    jobless = f"unemployment {_went(rng, row.unemp, row.unemp_before)} to {row.unemp:.1f}"
    prices = f"inflation {_went(rng, row.infl, row.infl_before)} to {row.infl:.1f}"
    growth = "picked up" if row.realgdp_growth > row.realgdp_growth_before else "slowed"
    beside = rng.choice(("", f", and growth {growth} to {row.realgdp_growth:.1f} %"))
    kind = rng.random()
    if kind < 0.4:
        what = rng.choice((jobless, jobless.replace("unemployment", "the unemployment rate")))
        text = f"{capital(what)} %{rng.choice(('', f' from {row.unemp_before:.1f} %'))}{beside}."
        answer = f"It may cut its policy rate: {jobless} percent." if rose else f"It can wait: {jobless} percent."
    elif kind < 0.8 or not (rose and hotter):
        text = f"{capital(prices)} %{rng.choice(('', f' from {row.infl_before:.1f} %'))}{beside}."
        answer = f"It may {'raise' if hotter else 'cut'} its policy rate: {prices} percent."
    else:
        text = f"{capital(prices)} % and {jobless} %."
        answer = "It has to choose: higher inflation asks for a higher rate, higher unemployment for a lower one."
    asked = pick(
        rng,
        "What may the central bank do?|What would you expect of the central bank?|How may monetary policy react?|"
        "How might the central bank respond?|What will the central bank do next?",
    )
    return chat("reason", f"{text}\n\n{asked}", answer)


def _bonds(rng: random.Random, held: bool) -> Chat:
    row = rng.choice([row for row in _months(held, "bonds") if abs(row.spread - row.spread_before) >= 0.01])
    now, before = f"{row.spread:.2f}", f"{row.spread_before:.2f}"
    wider = row.spread > row.spread_before
    verb = pick(rng, "widened|rose" if wider else "narrowed|fell")
    text = (
        f"In {row.Index:%B %Y} BAA corporate bonds yielded {row.BAA:.2f} percent and AAA bonds {row.AAA:.2f} percent. The "
        f"spread {verb} to {now} points from {before} the month before."
    )
    if rng.random() < 0.4:
        grade, value = rng.choice((("BAA", row.BAA), ("AAA", row.AAA)))
        return chat("read", f"{text}\n\nWhat did {grade} bonds yield?", f"{grade} bonds yielded {value:.2f} percent.")
    found, what = ("Yes", "more") if wider else ("No", "less")
    return chat(
        "reason",
        f"{text}\n\n{pick(rng, 'Did credit conditions tighten?|Did lenders become more careful?')}",
        f"{found}. The spread {verb} from {before} to {now} points, so lenders asked for {what}.",
    )


def _core_inflation(rng: random.Random, held: bool) -> Chat:
    row = rng.choice([row for row in _months(held, "cpi") if abs(row.yearly - row.yearly_before) >= 0.1])
    now, before = f"{row.yearly:.1f}", f"{row.yearly_before:.1f}"
    verb = _went(rng, row.yearly, row.yearly_before)
    text = f"Core inflation {verb} to {now} percent in {row.Index:%B %Y} from {before} percent a month earlier."
    asked = pick(rng, "Is core inflation rising or falling?|Which way is core inflation going?")
    way = "rising" if row.yearly > row.yearly_before else "falling"
    return chat("read", f"{text}\n\n{asked}", f"It is {way}: core inflation {verb} from {before} to {now} percent.")


def _oil(rng: random.Random, held: bool) -> Chat:
    row = rng.choice([row for row in _months(held, "oil") if abs(row.Brent - row.Brent_before) >= 0.05])
    now, before = round(row.Brent, 2), round(row.Brent_before, 2)
    verb = _went(rng, now, before)
    text = f"Brent crude {verb} to {now:.2f} dollars a barrel in {row.Index:%B %Y} from {before:.2f} a month earlier."
    if rng.random() < 0.7:
        asked = pick(rng, "What happened to the oil price?|Did Brent rise or fall?")
        return chat("read", f"{text}\n\n{asked}", f"Brent {verb} from {before:.2f} to {now:.2f} dollars a barrel.")
    answer = f"Brent {verb} by {abs(now - before):.2f} dollars, from {before:.2f} to {now:.2f} dollars a barrel."
    return chat("computed", f"{text}\n\nBy how much did Brent change?", answer)
