# SPDX-License-Identifier: Apache-2.0
"""Sample questions on a passage, by role. Every figure of an answer is in the passage or computed from it.

A passage says in words which way a figure went: a small model reads that, but it can't tell which of two figures is larger.
"""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

from finteam_experts.data.sample import figures
from finteam_experts.data.sample.figures import change_percent, make_company, month_side, pick, quarter_side, side

Chat = dict[str, Any]  # {"messages", "kind"}


def chat(kind: str, *turns: str) -> Chat:
    """A conversation of alternating turns that the user begins."""
    speakers = ("user", "assistant")
    messages = [{"role": speakers[place % 2], "content": turn} for place, turn in enumerate(turns)]
    return {"messages": messages, "kind": kind}


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@cache
def _quarters(held: bool) -> list[Any]:
    return [row for row in figures.us_quarters().itertuples() if quarter_side(row) is held]


@cache
def _months(held: bool, name: str) -> list[Any]:
    table = {"bonds": figures.bond_yields, "cpi": figures.core_cpi, "oil": figures.crude_months}[name]()
    return [row for row in table.itertuples() if month_side(row.Index) is held]


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


_CAUSES = {
    "restructuring costs": "whether the costs really happen once and what they will save",
    "higher input costs": "whether prices can follow the costs",
    "a weak quarter in Asia": "whether demand in Asia comes back",
    "currency effects": "how the business did without them",
    "the loss of a customer": "how much of the sales are still at risk",
}


def micro(rng: random.Random, held: bool) -> Chat:
    c, kind = make_company(rng), rng.random()
    while c.operating_profit(0) < 1 or abs(change_percent(*c.revenue)) < 2:
        c = make_company(rng)
    sales, before, profit, profit_before = (
        round(value) for value in (*c.revenue, c.operating_profit(0), c.operating_profit(1))
    )
    if kind < 0.25:
        text = f"{c.name} reported net sales of {c.currency} {sales} mn, an operating profit of {profit} mn and net debt of {rng.randint(5, 300)} mn."
        what, value = rng.choice((("net sales", sales), ("operating profit", profit)))
        were = "were" if what == "net sales" else "was"
        asked = pick(rng, f"How high {were} {what}?|What does the company report as {what}?")
        return chat("read", f"{text}\n\n{asked}", f"{c.name} reported {what} of {c.currency} {value} mn.")
    if kind < 0.35:
        assets, liabilities = round(c.assets), round(c.liabilities)
        text = f"{c.name} has assets of {c.currency} {assets} mn and liabilities of {liabilities} mn."
        share = 100 * liabilities / assets
        reading = "it leans on debt" if share > 60 else "it is soundly financed"
        return chat(
            "computed", f"{text}\n\n{pick(rng, 'How is the company financed?|Does the company have much debt?')}",
            f"Liabilities are {share:.0f} percent of assets, so {reading}.",
        )  # fmt: skip
    if kind < 0.45:
        text = f"{c.name} earned an operating profit of {c.currency} {profit} mn on sales of {sales} mn."
        asked = pick(rng, "What is the operating margin?|How high is its margin?")
        return chat(
            "computed", f"{text}\n\n{asked}",
            f"The operating margin is {100 * profit / sales:.0f} percent: {c.currency} {profit} mn of {sales} mn.",
        )  # fmt: skip
    if kind < 0.75:
        cause, question = rng.choice(list(_CAUSES.items()))
        low, high = (value / 10 for value in sorted(rng.sample(range(20, 900), 2)))
        text = f"Operating profit of {c.name} fell to {c.currency} {low} mn from {high} mn after {cause}."
        asked = pick(rng, "What do investors ask?|What would you ask the management?")
        return chat(
            "reason",
            f"{text}\n\n{asked}",
            f"Operating profit fell from {c.currency} {high} mn to {low} mn. Investors ask {question}.",
        )
    verb, mood = ("rose", "positive") if sales > before else ("fell", "negative")
    text = f"Net sales of {c.name} {verb} to {c.currency} {sales} mn from {before} mn."
    if kind < 0.85:
        return chat(
            "computed", f"{text}\n\nBy how many percent did they change?",
            f"Net sales {verb} by {abs(change_percent(sales, before)):.0f} percent, from {before} to {sales} mn.",
        )  # fmt: skip
    return chat(
        "reason", f"{text}\n\n{pick(rng, 'What does this say about the company?|How did sales develop?')}",
        f"It is {mood}: net sales {verb} from {c.currency} {before} mn to {sales} mn.",
    )  # fmt: skip


@cache
def _windows(held: bool, name: str, column: str) -> list[list[str]]:
    """Windows of five days of an index, as they are written: its `close`, or its `return` in percent."""
    series = figures.index_days(name)[column]
    starts = range(0, len(series) - 5, 5)
    return [
        [f"{value:.2f}" for value in series.iloc[start : start + 5]]
        for start in starts
        if side(series.index[start].year, series.index[start + 4].year) is held
    ]


@cache
def _days(held: bool, name: str) -> list[Any]:
    """The days of an index that belong to one split, with its open, high, low and close."""
    days = figures.index_days(name).itertuples()
    return [day for day in days if side(day.Index.year) is held]


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


QUESTIONS: dict[str, Callable[[random.Random, bool], Chat]] = {"macro": macro, "micro": micro, "quant": quant}
