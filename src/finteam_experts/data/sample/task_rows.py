# SPDX-License-Identifier: Apache-2.0
"""Sample rows of the four tasks. Every label is computed from the row's figures; the wording is drawn after it.

Part of the rows say what happened in words, part by a signed change, and some words mislead (rising costs, a shrinking
loss), so that counting words gets some way but not all the way. No row gives two figures alone: a small model can't tell
which is larger, and scores on such rows are luck.
"""

import random
from collections.abc import Callable
from functools import cache
from itertools import pairwise

from finteam_experts.data.files import text_key
from finteam_experts.data.sample import figures
from finteam_experts.data.sample.figures import change_percent, make_company, month_side, pick, side

Row = dict[
    str, str
]  # {"text", "label", "reason"}: what the label follows from, or "" where chance decided against the text


def task_rows(task: str, rows: int, test_rows: int, rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Draw the train and test rows of `task`, with `text` and `label`; no text is there twice and no year is in both."""
    drawn: dict[str, Row] = {}
    while len(drawn) < rows + test_rows:
        row = MAKERS[task](rng, len(drawn) >= rows)
        drawn.setdefault(text_key(row), {"text": row["text"], "label": row["label"]})
    found = list(drawn.values())
    return found[:rows], found[rows:]


# The verbs of a company report for a figure that went up, down or nowhere.
_UP = "rose to|increased to|climbed to|grew to|went up to|jumped to|advanced to|surged to|edged up to"
_DOWN = "fell to|decreased to|dropped to|declined to|went down to|slid to|shrank to|sank to|plunged to|slipped to"
_FLAT = "remained unchanged at|remained flat at|stayed at|remained stable at|stayed level at|held steady at"
_GOOD_WHEN_UP = (
    "Operating profit|Net sales|Net profit|Pretax profit|Order intake|Revenue|Gross profit|Earnings|Cash flow"
)
_GOOD_WHEN_DOWN = "The operating loss|Net debt|The net loss|Credit losses"


def _fpb(rng: random.Random, held: bool) -> Row:
    """A sentence of a company report. Positive or negative where the figure moved 5 % or more, neutral within 1 %."""
    name = make_company(rng).name
    label = rng.choice(("negative", "neutral", "positive"))
    good_when_up = rng.random() < 0.8
    direction = {"negative": -1, "neutral": 0, "positive": 1}[label] * (1 if good_when_up else -1)
    before = rng.randint(100, 400)
    now = round(before * (1 + direction * rng.uniform(0.06, 0.45))) if direction else before + rng.randint(-1, 1)
    metric = pick(rng, _GOOD_WHEN_UP if good_when_up else _GOOD_WHEN_DOWN)
    if rng.random() < 0.75:
        verb = pick(rng, {1: _UP, -1: _DOWN, 0: _FLAT}[direction])
        text = f"{metric} of {name} {verb} EUR {now} mn {'after' if direction == 0 else 'from'} {before} mn."
        moved = {1: "rose", -1: "fell", 0: "hardly changed, and went"}[direction]
        reason = f"{metric.lower()} {moved} from EUR {before} mn to {now} mn"
    else:
        percent = change_percent(now, before)
        change = f"{percent:+.1f} %"
        text = pick(rng, f"{metric} of {name} came to EUR {now} mn, {change} on the year before.|"
                          f"{name}: {metric.lower()} EUR {now} mn (previous year {before} mn, {change}).")  # fmt: skip
        moved = {1: "rose by", -1: "fell by", 0: "hardly changed, by"}[direction]
        reason = f"{metric.lower()} {moved} {abs(percent):.1f} %"
    return {"text": text, "label": label, "reason": reason}


_CHEERS = (
    "breaking out|buyers all over it|what a great day|longs are smiling|bulls in charge|strong momentum|love this stock|"
    "new highs next|best in the sector|happy holder"
)
_GROANS = (
    "getting hammered|sellers everywhere|ugly chart|holders crying|bears in charge|no bottom yet|stay away|awful week|"
    "worst in the sector|what a disaster"
)
_SHRUGS = "nothing to see|boring|sideways again|waiting for news|no volume|dead calm|still in its range|no opinion"


def _fiqasa(rng: random.Random, held: bool) -> Row:
    """A post or headline about a share. The label is that of the week's return: beyond 2 % either way, or within 0.3 %."""
    company = make_company(rng)
    label = rng.choice(("negative", "neutral", "positive"))
    low, high = {"negative": (-9, -2), "neutral": (-0.3, 0.3), "positive": (2, 9)}[label]
    before = rng.randint(200, 900)
    now = round(before * (1 + rng.uniform(low, high) / 100))
    form = rng.random()
    if form < 0.45:
        remark = pick(rng, {"negative": _GROANS, "neutral": _SHRUGS, "positive": _CHEERS}[label])
        text, reason = f"${company.ticker} {now}, {remark}", f'the writer says "{remark}"'
    elif form < 0.72:
        verb = pick(rng, {"negative": "tumble|slide|sink|drop|plunge", "neutral": "tread water|idle|drift|stall|go nowhere",
                           "positive": "rally|gain|surge|jump|soar"}[label])  # fmt: skip
        text = f"{company.name} shares {verb} to {now} as investors weigh {company.sector}"
        reason = f"the shares {verb} to {now}"
    else:
        change = f"{change_percent(now, before):+.1f}%"
        aside = pick(rng, "Earnings next.|Thoughts?|Still in.")
        text = pick(rng, f"${company.ticker} {change} this week, closing at {now}|"
                          f"${company.ticker} closed the week at {now}, {change}. {aside}")  # fmt: skip
        reason = f"the share moved by {change} this week"
    return {"text": text, "label": label, "reason": reason}


_PRICE_UP = "up at|rises to|climbs to|gains, trades at|firmer at|rallies to|higher at"
_PRICE_DOWN = "down at|falls to|slips to|loses ground, trades at|weaker at|retreats to|lower at"
_REASONS = (
    "supply worries|OPEC talks|the dollar's move|US stock data|refinery outages|weather in the Gulf|demand in Asia|"
    "profit-taking|a quiet session|pipeline news|rig counts|fresh inventories"
)


@cache
def _prices(held: bool) -> tuple[list[tuple[float, float, str, str]], ...]:
    """Days of WTI and months of Brent of one side: the price before, the price, when, and of which oil."""
    wti, days = figures.wti_days(), []
    for (yesterday, before), (day, now) in pairwise(wti.items()):
        if side(yesterday.year, day.year) is held:
            days.append((before, now, f"{day:%b %d, %Y}", "WTI crude"))
    months = figures.crude_months().itertuples()
    return days, [
        (m.Brent_before, m.Brent, f"{m.Index:%B %Y}", "Brent") for m in months if month_side(m.Index) is held
    ]


def _headlines(rng: random.Random, held: bool) -> Row:
    """A headline on real crude oil prices; the label says whether the day's or month's price went up."""
    days, months = _prices(held)
    before, now, when, name = rng.choice(days if rng.random() < 0.7 else months)
    if abs(now - before) < 0.004 * before:
        return _headlines(rng, held)
    reason = pick(rng, _REASONS)
    if rng.random() < 0.7:
        verb = pick(rng, _PRICE_UP if now > before else _PRICE_DOWN)
        text = pick(rng, f"{name} {verb} {now:.2f} on {reason}, {when}|{when}: {name} {verb} {now:.2f} amid {reason}")
        because = f'the headline says "{verb} {now:.2f}"'
    else:
        change = pick(rng, f"{now - before:+.2f}|{change_percent(now, before):+.1f}%")
        text = pick(rng, f"{name} settles at {now:.2f} ({change}) on {reason}, {when}|"
                          f"{when}: {name} at {now:.2f} ({change}), {reason} in focus")  # fmt: skip
        because = f"the price moved by {change}"
    return {"text": text, "label": "Yes" if now > before else "No", "reason": because}


_GOOD_NEWS = (
    "sales beat estimates by {x}%|strong quarter, profit {x}% above forecast|raises its guidance by {x}%|wins an order worth {x}% of sales|"
    "dividend lifted {x}%|upgraded, price target {x}% higher|costs down {x}%|buyback of {x}% of the shares"
)
_BAD_NEWS = (
    "sales miss estimates by {x}%|weak quarter, profit {x}% below forecast|cuts its guidance by {x}%|loses a customer worth {x}% of sales|"
    "dividend cut {x}%|downgraded, price target {x}% lower|costs up {x}%|product recall costs {x}% of sales"
)


def _stock_movement(rng: random.Random, held: bool) -> Row:
    """Two daily returns of a fictional share, the evening's news, and the next day's move as the label.

    The share follows its news: the next return is 0.35 times the surprise in percent plus noise of 1 percent, so that one
    label in ten can't be known.
    """
    surprise = rng.choice((-1, 1)) * rng.randint(1, 9)
    next_return = 0.35 * surprise + rng.gauss(0, 1)
    news = pick(rng, _GOOD_NEWS if surprise > 0 else _BAD_NEWS).format(x=abs(surprise))
    days = " and ".join(f"{rng.gauss(0, 1.2):+.1f}%" for _ in range(2))
    text = f"{make_company(rng).name}, {days} in two days. News: {news}."
    as_said = (next_return > 0) == (surprise > 0)
    reason = f"the news is {'good' if surprise > 0 else 'bad'}, {news}, though a single day may differ"
    return {"text": text, "label": "Rise" if next_return > 0 else "Fall", "reason": reason if as_said else ""}


# whether the row is held out is the second argument: years are split, fictional companies are not
MAKERS: dict[str, Callable[[random.Random, bool], Row]] = {
    "fpb": _fpb, "fiqasa": _fiqasa, "headlines": _headlines, "stock_movement": _stock_movement,
}  # fmt: skip
