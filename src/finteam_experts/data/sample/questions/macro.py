# SPDX-License-Identifier: Apache-2.0
"""Questions on quarters, months and markets of the macro analyst."""

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
    return rng.choice((_growth, _prices, _policy, _bonds, _core_inflation, _oil))(rng, held)


def _when(row: Any) -> str:
    return f"the {('first', 'second', 'third', 'fourth')[row.quarter - 1]} quarter of {row.year}"


def _growth(rng: random.Random, held: bool) -> Chat:
    row = rng.choice(_quarters(held))
    output, spending, investment = row.realgdp_growth, row.realcons_growth, row.realinv_growth
    text = (
        f"In {_when(row)} real output changed by {output:.1f} percent, household spending by {spending:.1f} percent and "
        f"private investment by {investment:.1f} percent."
    )
    if rng.random() < 0.4:
        what, value = rng.choice((("household spending", spending), ("private investment", investment)))
        return chat(
            "read", f"{text}\n\nBy how much did {what} change?", f"{capital(what)} changed by {value:.1f} percent."
        )
    verb = "grew" if output > 0 else "shrank"
    leader, size = max((("investment", investment), ("household spending", spending)), key=lambda part: abs(part[1]))
    asked = pick(rng, "How did the economy do?|Did the economy grow?|What happened to output?")
    return chat(
        "computed", f"{text}\n\n{asked}",
        f"The economy {verb}: real output changed by {output:.1f} percent. {capital(leader)} moved most, by {size:.1f} percent.",
    )  # fmt: skip


def _prices(rng: random.Random, held: bool) -> Chat:
    row = rng.choice(_quarters(held))
    text = (
        f"In {_when(row)} inflation was {row.infl:.1f} percent, the three-month Treasury bill yielded {row.tbilrate:.1f} "
        f"percent and the unemployment rate was {row.unemp:.1f} percent."
    )
    if rng.random() < 0.5:
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
    row = rng.choice([row for row in _quarters(held) if abs(row.unemp - row.unemp_before) >= 0.1])
    rose, hot = row.unemp > row.unemp_before, row.infl > 3
    text = (
        f"The unemployment rate {'rose' if rose else 'fell'} to {row.unemp:.1f} % from {row.unemp_before:.1f} %, and inflation "
        f"{pick(rng, 'is|stands at|was')} {row.infl:.1f} %."
    )
    if rose:
        answer = (
            f"It has to choose: inflation of {row.infl:.1f} percent asks for a higher rate, rising unemployment for a lower one."
            if hot
            else f"It may cut its policy rate: unemployment rose to {row.unemp:.1f} percent and inflation is low."
        )
    elif hot:
        answer = f"It may raise its policy rate: inflation is {row.infl:.1f} percent and unemployment fell."
    else:
        answer = f"It can wait: unemployment fell to {row.unemp:.1f} percent and inflation is low."
    asked = pick(
        rng, "What may the central bank do?|What would you expect of the central bank?|How may monetary policy react?"
    )
    return chat("reason", f"{text}\n\n{asked}", answer)


def _bonds(rng: random.Random, held: bool) -> Chat:
    row = rng.choice(_months(held, "bonds"))
    text = (
        f"In {row.Index:%B %Y} BAA corporate bonds yielded {row.BAA:.2f} percent and AAA bonds {row.AAA:.2f} percent. The "
        f"spread was {row.spread:.2f} points after {row.spread_before:.2f} the month before."
    )
    if rng.random() < 0.4:
        grade, value = rng.choice((("BAA", row.BAA), ("AAA", row.AAA)))
        return chat("read", f"{text}\n\nWhat did {grade} bonds yield?", f"{grade} bonds yielded {value:.2f} percent.")
    now, before = round(row.spread, 2), round(row.spread_before, 2)
    answer = (
        f"Yes. The spread widened to {now:.2f} points from {before:.2f}, so lenders asked for more."
        if now > before
        else f"No. The spread went to {now:.2f} points from {before:.2f}, so lenders did not ask for more."
    )
    return chat(
        "reason", f"{text}\n\n{pick(rng, 'Did credit conditions tighten?|Did lenders become more careful?')}", answer
    )


def _core_inflation(rng: random.Random, held: bool) -> Chat:
    row = rng.choice([row for row in _months(held, "cpi") if abs(row.yearly - row.yearly_before) >= 0.1])
    now, before = f"{row.yearly:.1f}", f"{row.yearly_before:.1f}"
    text = f"Core inflation was {now} percent in {row.Index:%B %Y}, after {before} percent a month earlier."
    verb, way = ("rising", "up") if row.yearly > row.yearly_before else ("falling", "down")
    asked = pick(rng, "Is core inflation rising or falling?|Which way is core inflation going?")
    return chat(
        "read", f"{text}\n\n{asked}", f"It is {verb}: core inflation went {way} from {before} to {now} percent."
    )


def _oil(rng: random.Random, held: bool) -> Chat:
    row = rng.choice(_months(held, "oil"))
    now, before = round(row.Brent, 2), round(row.Brent_before, 2)
    text = f"Brent crude was at {now:.2f} dollars a barrel in {row.Index:%B %Y} and at {before:.2f} a month earlier."
    verb = "rose" if now > before else "fell"
    if rng.random() < 0.5:
        answer = f"Brent {verb} from {before:.2f} to {now:.2f} dollars a barrel."
        return chat(
            "read", f"{text}\n\n{pick(rng, 'What happened to the oil price?|Did Brent rise or fall?')}", answer
        )
    answer = f"Brent {verb} by {abs(now - before):.2f} dollars, from {before:.2f} to {now:.2f} dollars a barrel."
    return chat("computed", f"{text}\n\nBy how much did Brent change?", answer)
