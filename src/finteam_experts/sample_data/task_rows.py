# SPDX-License-Identifier: Apache-2.0
"""Sample rows of the four tasks. Every label is computed from the row's figures; the wording is drawn after it.

Part of the rows say what happened in words, part leave it to the figures, and some words mislead (rising costs, a
shrinking loss), so that counting words gets some way but not all the way.
"""

import random
from collections.abc import Callable

from finteam_experts.data import text_key
from finteam_experts.sample_data import figures
from finteam_experts.sample_data.figures import change_percent, make_company

Row = dict[str, str]  # {"text", "label"} and, where it asks its own, "question"


def task_rows(task: str, count: int, rng: random.Random) -> list[Row]:
    """Draw `count` rows of `task`, no text twice."""
    maker = _MAKERS[task]
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = maker(rng)
        rows.setdefault(text_key(row), row)
    return list(rows.values())


def _pick(rng: random.Random, options: str) -> str:
    return rng.choice(options.split("|"))


# The verbs of a company report for a figure that went up, down or nowhere.
_UP = "rose to|increased to|climbed to|grew to|improved to|went up to|jumped to|advanced to"
_DOWN = "fell to|decreased to|dropped to|declined to|went down to|slid to|shrank to|sank to"
_FLAT = "was unchanged at|remained flat at|stayed at|was stable at|was level at"
_GOOD_WHEN_UP = "Operating profit|Net sales|Net profit|Pretax profit|Order intake|Revenue|Gross profit|EBIT|Turnover"
_GOOD_WHEN_DOWN = "The operating loss|Net debt|The net loss|Credit losses|Restructuring costs|Overdue receivables"


def _fpb(rng: random.Random) -> Row:
    """A sentence of a company report. Positive or negative where the figure moved 4 % or more, neutral within 0.5 %."""
    company = make_company(rng)
    label = rng.choice(("negative", "neutral", "positive"))
    good_when_up = rng.random() < 0.75
    direction = {"negative": -1, "neutral": 0, "positive": 1}[label] * (1 if good_when_up else -1)
    before = round(rng.uniform(8, 90), 1)
    now = round(before * (1 + direction * rng.uniform(0.05, 0.45)), 1) if direction else before
    if direction == 0 and rng.random() < 0.5:
        now = round(before * (1 + rng.choice((-1, 1)) * 0.004), 1)
    metric = _pick(rng, _GOOD_WHEN_UP if good_when_up else _GOOD_WHEN_DOWN)
    period = _pick(rng, "in the first quarter|in the second quarter|in the third quarter|in January-June|for the full year")
    unit = f"{company.currency} {now} mn"
    if rng.random() < 0.75:
        verb = _pick(rng, {1: _UP, -1: _DOWN, 0: _FLAT}[direction])
        text = f"{metric} of {company.name} {verb} {unit} {period} from {before} mn."
        if direction == 0:
            text = f"{metric} of {company.name} {verb} {unit} {period}, after {before} mn."
    else:
        text = _pick(
            rng,
            f"{metric} of {company.name} {period} was {unit}, against {before} mn a year earlier.|"
            f"{company.name}: {metric.lower()} {unit} {period} (previous year: {before} mn).|"
            f"{company.name} posted {metric.lower()} of {unit} {period}; the year-earlier figure was {before} mn.",
        )
    return {"text": text, "label": label}


_CHEERS = "breaking out|buyers all over it|what a day|longs are smiling|bulls in charge|nice momentum|told you so"
_GROANS = "getting hammered|sellers everywhere|ugly chart|bag holders crying|bears in charge|no bottom yet|stay away"
_SHRUGS = "nothing to see|boring tape|sideways again|waiting for news|no volume|dead calm|still in its range"


def _fiqasa(rng: random.Random) -> Row:
    """A post or headline about a share. The label is that of the week's return: beyond 2 % either way, or within 0.3 %."""
    company = make_company(rng)
    label = rng.choice(("negative", "neutral", "positive"))
    low, high = {"negative": (-9, -2), "neutral": (-0.3, 0.3), "positive": (2, 9)}[label]
    before = round(rng.uniform(20, 180), 2)
    now = round(before * (1 + rng.uniform(low, high) / 100), 2)
    move = change_percent(now, before)
    form = rng.random()
    if form < 0.4:
        remark = _pick(rng, {"negative": _GROANS, "neutral": _SHRUGS, "positive": _CHEERS}[label])
        text = f"${company.ticker} {now} from {before} a week ago, {remark}"
    elif form < 0.7:
        text = _pick(rng, f"${company.ticker} {move:+.1f}% this week after its results|"
                          f"{company.name} shares {move:+.1f}% on the week, closing at {now}|"
                          f"Week done for ${company.ticker}: {move:+.1f}% #{company.sector.split()[-1]}")  # fmt: skip
    elif form < 0.85:
        verb = _pick(rng, {"negative": "tumble|slide|sink|drop", "neutral": "tread water|idle|drift|stall",
                           "positive": "rally|gain|surge|jump"}[label])  # fmt: skip
        text = f"{company.name} shares {verb} to {now} as investors weigh {company.sector} {_pick(rng, 'orders|prices|outlook')}"
    else:
        text = f"${company.ticker} closed at {now}, a week ago at {before}. {_pick(rng, 'Earnings next.|Thoughts?|Still in.')}"
    return {"text": text, "label": label}


_PRICE_UP = "up at|rises to|climbs to|gains, trades at|firmer at|rallies to|higher at"
_PRICE_DOWN = "down at|falls to|slips to|loses ground, trades at|weaker at|retreats to|lower at"
_REASONS = (
    "supply worries|OPEC talks|the dollar's move|US stock data|refinery outages|weather in the Gulf|demand in Asia|"
    "profit-taking|a quiet session|pipeline news|rig counts|fresh inventories"
)


def _headlines(rng: random.Random) -> Row:
    """A headline on real crude oil prices and a yes-or-no question about the direction of the day's or month's move."""
    if rng.random() < 0.7:
        prices = figures.wti_days()
        day = rng.randrange(1, len(prices))
        before, now, when, name = prices.iloc[day - 1], prices.iloc[day], f"{prices.index[day]:%d %b %Y}", "WTI crude"
    else:
        months = figures.crude_months()
        month = months.iloc[rng.randrange(len(months))]
        before, now, when, name = month["Brent_before"], month["Brent"], f"{month.name:%B %Y}", "Brent"
    if abs(now - before) < 0.004 * before:
        return _headlines(rng)
    reason = _pick(rng, _REASONS)
    if rng.random() < 0.75:
        verb = _pick(rng, _PRICE_UP if now > before else _PRICE_DOWN)
        text = _pick(rng, f"{name} {verb} {now:.2f} dollars on {reason}, {when}|{when}: {name} {verb} {now:.2f} amid {reason}")
    else:
        text = _pick(rng, f"{name} settles at {now:.2f} after {before:.2f} on {reason}, {when}|"
                          f"{when}: {name} {now:.2f}, previous {before:.2f}; {reason} in focus")  # fmt: skip
    asks_up = rng.random() < 0.8
    question = f"Does the headline say that the price went {'up' if asks_up else 'down'}?"
    return {"text": text, "question": question, "label": "Yes" if (now > before) == asks_up else "No"}


_GOOD_NEWS = (
    "sales {x}% above estimates|full-year guidance raised by {x}%|wins an order worth {x}% of sales|"
    "margin beats forecasts by {x} points|dividend lifted {x}%|an analyst raises the target by {x}%|costs {x}% below plan"
)
_BAD_NEWS = (
    "sales {x}% below estimates|full-year guidance cut by {x}%|loses an order worth {x}% of sales|"
    "margin misses forecasts by {x} points|dividend cut {x}%|an analyst lowers the target by {x}%|costs {x}% above plan"
)


def _stock_movement(rng: random.Random) -> Row:
    """Five daily returns of a fictional share, the last evening's news, and the next day's move as the label.

    The share follows its news: the next return is 0.3 times the surprise in percent plus noise of 1 percent.
    """
    company = make_company(rng)
    surprise = rng.choice((-1, 1)) * rng.randint(1, 9)
    returns = [rng.gauss(0, 1.2) for _ in range(5)]
    next_return = 0.3 * surprise + rng.gauss(0, 1)
    news = _pick(rng, _GOOD_NEWS if surprise > 0 else _BAD_NEWS).format(x=abs(surprise))
    days = ", ".join(f"{value:+.1f}" for value in returns)
    text = _pick(rng, f"{company.name} ({company.ticker}), daily returns in %: {days}. After the close: {news}.|"
                      f"${company.ticker} last five days (%): {days}. Tonight's news: {news}.")  # fmt: skip
    return {"text": text, "label": "Rise" if next_return > 0 else "Fall"}


_MAKERS: dict[str, Callable[[random.Random], Row]] = {
    "fpb": _fpb, "fiqasa": _fiqasa, "headlines": _headlines, "stock_movement": _stock_movement,
}  # fmt: skip
