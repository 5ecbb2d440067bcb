# SPDX-License-Identifier: Apache-2.0
"""Sample passages by role: each states figures from `figures.py` and what follows from them."""

import random
from collections.abc import Callable, Iterator

import numpy as np

from finteam_experts.data.sample import figures
from finteam_experts.data.sample.figures import (
    Company,
    change_percent,
    make_company,
    month_side,
    pick,
    quarter_side,
    side,
)

ROLES = ("macro", "micro", "quant", "credit", "base")
Passage = dict[str, str]  # {"text", "source"}


def corpus(role: str, rows: int, heldout_rows: int, rng: random.Random) -> tuple[list[Passage], list[Passage]]:
    """Draw the train and held-out passages of one of `ROLES`; no year (macro, quant) or company (micro) is in both."""
    if role in ("credit", "base"):
        found: dict[str, Passage] = {}
        while len(found) < rows + heldout_rows:
            maker = rng.choice(_MAKERS[role])
            text = maker(rng)
            found.setdefault(text, {"text": text, "source": maker.__name__.lstrip("_")})
        return list(found.values())[:rows], list(found.values())[rows:]
    if role == "micro":
        names: set[str] = set()
        return list(_micro(rows, rng, names)), list(_micro(heldout_rows, rng, names))
    drawn = list({passage["text"]: (held, passage) for held, passage in _YEARLY[role](rng)}.values())
    rng.shuffle(drawn)
    train, heldout = ([passage for held, passage in drawn if held is wanted] for wanted in (False, True))
    return train[:rows], heldout[:heldout_rows]


def _moved(now: float, before: float, rng: random.Random, flat: float = 0.05) -> str:
    if abs(now - before) < flat:
        return pick(rng, "was little changed at|held at|stayed near")
    if now > before:
        return pick(rng, "rose to|climbed to|moved up to|increased to")
    return pick(rng, "fell to|eased to|slipped to|came down to")


def _macro(rng: random.Random) -> Iterator[tuple[bool | None, Passage]]:
    for row in figures.us_quarters().itertuples():
        when = f"the {_ordinal(row.quarter)} quarter of {row.year}"
        growth, spending, investment = row.realgdp_growth, row.realcons_growth, row.realinv_growth
        leader = "investment" if abs(investment) > abs(spending) else "consumption"
        verdict = "contracted" if growth < 0 else ("grew strongly" if growth > 1.2 else "expanded at a moderate pace")
        yield quarter_side(row), {"source": "us_activity", "text": (
            f"In {when} the US economy {verdict}: real output changed by {growth:.1f} percent from the quarter before, to "
            f"{row.realgdp:,.0f} billion dollars. Household spending moved by {spending:.1f} percent and private "
            f"investment by {investment:.1f} percent, so {leader} swung more. "
            + pick(rng, "Demand at home set the pace.|The committee would read this beside the labour market.|"
                         "Inventories and housing explain much of such a swing."))}  # fmt: skip
        stance = (
            "positive, so money was not loose" if row.realint > 0 else "negative, so policy was loose in real terms"
        )
        yield quarter_side(row), {"source": "us_prices_and_rates", "text": (
            f"Consumer prices rose at an annual rate of {row.infl:.1f} percent in {when}. The three-month Treasury bill "
            f"{_moved(row.tbilrate, row.tbilrate_before, rng)} {row.tbilrate:.1f} percent, and the unemployment rate "
            f"{_moved(row.unemp, row.unemp_before, rng)} {row.unemp:.1f} percent. The real short rate was "
            f"{row.realint:.1f} percent: {stance}.")}  # fmt: skip
    for row in figures.german_quarters().itertuples():
        yield side(row.year), {"source": "german_rates", "text": (
            f"German prices changed by {row.inflation:.1f} percent in the {_ordinal(row.quarter)} quarter of {row.year}, "
            f"while the long-term interest rate stood at {row.rate:.1f} percent. "
            + ("Savers earned more than inflation took." if row.rate > row.inflation else "Inflation ate the yield.")
            + pick(rng, " The Bundesbank watched money growth closely.| Bond investors priced the path of inflation."))}  # fmt: skip
    for row in figures.core_cpi().itertuples():
        direction = "faster" if row.yearly > row.yearly_before else "no faster"
        yield month_side(row.Index), {"source": "core_cpi", "text": (
            f"{pick(rng, 'Core inflation in the United States|The core consumer price index|Underlying US inflation')} "
            f"{_moved(row.yearly, row.yearly_before, rng)} {row.yearly:.1f} percent over twelve months in "
            f"{row.Index:%B %Y}, after {row.yearly_before:.1f} percent a month earlier. Without food and energy, prices "
            f"are rising {direction} than before, "
            + pick(rng, "which matters for the policy rate.|and wages tend to follow.|and bond yields respond."))}  # fmt: skip
    for row in figures.bond_yields().itertuples():
        mood = "Credit conditions tightened" if row.spread > row.spread_before else "Credit conditions did not tighten"
        yield month_side(row.Index), {"source": "bond_yields", "text": (
            f"{mood} in {row.Index:%B %Y}: BAA corporate bonds yielded {row.BAA:.2f} percent and AAA bonds "
            f"{row.AAA:.2f} percent, a spread of {row.spread:.2f} points after {row.spread_before:.2f} the month before. "
            + pick(rng, "Wider spreads often go before a slowdown.|The spread is a gauge of default risk.|"
                         "Lenders ask for more when they fear a recession."))}  # fmt: skip
    for row in figures.crude_months().itertuples():
        yield month_side(row.Index), {"source": "crude_oil", "text": (
            f"Brent crude {_moved(row.Brent, row.Brent_before, rng)} {row.Brent:.2f} dollars a barrel in "
            f"{row.Index:%B %Y} from {row.Brent_before:.2f}, and WTI traded at {row.WTI:.2f}. "
            + ("Dearer energy lifts headline inflation" if row.Brent > row.Brent_before else "Cheaper energy cools prices")
            + pick(rng, " and shifts income between importers and exporters.| with a lag of some months."))}  # fmt: skip


def _micro(count: int, rng: random.Random, names: set[str]) -> Iterator[Passage]:
    """`count` passages, each of a company that is not in `names` yet."""
    while count:
        company = figures.make_company(rng)
        if company.name not in names:
            names.add(company.name)
            yield _statement(company, rng)
            count -= 1


def _statement(c: Company, rng: random.Random) -> Passage:
    kind = rng.choice((_income_statement, _margins, _balance_sheet, _guidance))
    return {"source": kind.__name__.lstrip("_"), "text": kind(c, rng)}


def _income_statement(c: Company, rng: random.Random) -> str:
    return (
        f"{c.name} ({c.ticker}), a maker of {c.sector}, reported net sales of {c.currency} {c.revenue[0]} mn, against "
        f"{c.revenue[1]} mn a year earlier. Cost of sales was {c.cost_of_sales[0]} mn, which leaves a gross profit of "
        f"{c.gross_profit(0)} mn. After operating expenses of {c.operating_expenses[0]} mn the operating profit came to "
        f"{c.operating_profit(0)} mn, and net profit to {c.net_profit(0)} mn, or {c.currency} "
        f"{c.earnings_per_share(0)} a share."
    )


def _margins(c: Company, rng: random.Random) -> str:
    now, before = (100 * c.operating_profit(year) / c.revenue[year] for year in (0, 1))
    return (
        f"The operating margin of {c.name} {_moved(now, before, rng, flat=0.2)} {now:.1f} percent from {before:.1f} "
        f"percent. Sales of {c.sector} changed by {change_percent(c.revenue[0], c.revenue[1]):.1f} percent and operating "
        f"expenses by {change_percent(c.operating_expenses[0], c.operating_expenses[1]):.1f} percent. "
        + pick(rng, "Pricing held up.|Management points to mix and freight.|Volumes explain most of it.|"
                     "The company kept a close eye on overheads.")
    )  # fmt: skip


def _balance_sheet(c: Company, rng: random.Random) -> str:
    leverage = 100 * c.liabilities / c.assets
    reading = "leans on debt" if leverage > 60 else "is soundly financed"
    return (
        f"At the end of the year {c.name} had assets of {c.currency} {c.assets} mn, liabilities of {c.liabilities} mn and "
        f"so equity of {c.equity()} mn. Liabilities are {leverage:.0f} percent of assets: the company {reading}. "
        f"Interest cost {c.interest[0]} mn and tax {c.tax[0]} mn. "
        + pick(rng, "The board proposes an unchanged dividend.|No covenant is near its limit.|The next bond is due late.")
    )  # fmt: skip


def _guidance(c: Company, rng: random.Random) -> str:
    low = round(c.revenue[0] * (1 + rng.uniform(-0.08, 0.06)), 1)
    high = round(low * rng.uniform(1.02, 1.07), 1)
    outlook = "growth" if low > c.revenue[0] else ("a decline" if high < c.revenue[0] else "roughly stable sales")
    return (
        f"For the year ahead {c.name} guides to sales between {c.currency} {low} mn and {high} mn, after {c.revenue[0]} mn "
        f"in the year just closed. That points to {outlook} in {c.sector}. Operating profit was {c.operating_profit(0)} mn "
        f"after {c.operating_profit(1)} mn. "
        + pick(rng, "Orders cover four months.|The order book is the main uncertainty.|Input prices are hedged for half a year.")
    )  # fmt: skip


def _quant(rng: random.Random) -> Iterator[tuple[bool | None, Passage]]:
    stocks, tech = figures.index_days("S&P 500"), figures.index_days("NASDAQ")
    for name, days in (("S&P 500", stocks), ("NASDAQ", tech)):
        for start in range(rng.randrange(8), len(days) - 8, 8):
            window = days.iloc[start : start + 8]
            r, close = window["return"].to_numpy(), window["close"].to_numpy()
            drawdown = 100 * (close / np.maximum.accumulate(close) - 1).min()
            yield side(window.index[0].year, window.index[-1].year), {"source": "index_returns", "text": (
                f"{name}, daily returns in % from {window.index[0]:%Y-%m-%d}: {_series(r)}. Mean {r.mean():.2f}, standard "
                f"deviation {r.std(ddof=1):.2f}, maximum drawdown {drawdown:.2f}, annualised volatility "
                f"{r.std(ddof=1) * 252**0.5:.1f}. Days up: {(r > 0).sum()} of {len(r)}.")}  # fmt: skip
    both = stocks.join(tech, lsuffix="_s", rsuffix="_t")
    for start in range(0, len(both) - 6, 12):
        window = both.iloc[start : start + 6]
        x, y = window["return_s"].to_numpy(), window["return_t"].to_numpy()
        beta = np.cov(x, y)[0, 1] / x.var(ddof=1)
        yield side(window.index[0].year, window.index[-1].year), {"source": "index_beta", "text": (
            f"Regress NASDAQ on S&P 500 from {window.index[0]:%Y-%m-%d}. x = {_series(x)}; y = {_series(y)}. "
            f"beta = cov(x, y) / var(x) = {beta:.2f}, correlation = {np.corrcoef(x, y)[0, 1]:.2f}.")}  # fmt: skip
    vix = figures.vix_days()
    for start in range(0, len(vix) - 6, 6):
        window = vix.iloc[start : start + 6]
        regime = "high" if window.mean() > 20 else ("low" if window.mean() < 13 else "normal")
        yield side(window.index[0].year, window.index[-1].year), {"source": "vix", "text": (
            f"VIX closes from {window.index[0]:%Y-%m-%d}: {_series(window)}. Mean {window.mean():.2f}, range "
            f"{window.max() - window.min():.2f}; volatility regime: {regime}. Implied daily move: "
            f"{window.mean() / 252**0.5:.2f} %.")}  # fmt: skip
    factors = figures.factor_months()
    for start in range(0, len(factors) - 3, 3):
        window = factors.iloc[start : start + 3]
        year, month = window.index[0]
        market = window["Mkt-RF"]
        yield side(year, window.index[-1][0]), {"source": "factor_returns", "text": (
            f"Fama-French factors in % for three months from {year}-{month:02d}. Mkt-RF: {_series(market)}; SMB: "
            f"{_series(window['SMB'])}; HML: {_series(window['HML'])}. Sum of market excess returns "
            f"{market.sum():.2f}; {pick(rng, 'value minus growth|HML total')} {window['HML'].sum():.2f}.")}  # fmt: skip


def _series(values) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _ordinal(quarter: int) -> str:
    return ("first", "second", "third", "fourth")[quarter - 1]


_YEARLY = {"macro": _macro, "quant": _quant}


# From interest coverage (operating profit by interest), the best first: the least coverage for the grade, and the grade.
_GRADES = ((12, "AA"), (8, "A"), (5, "BBB"), (3, "BB"), (1, "B"))

_DISHES = (
    "lentil soup|an apple cake|mushroom risotto|a potato salad|vegetable curry|plum dumplings|a bean stew|onion tart"
)
_PLACES = "the old harbour|a quiet lake|the botanical garden|a village in the hills|the city museum|the long bridge"
_PEOPLE = "My neighbour|A friend from school|Her brother|The librarian|Our teacher|An old colleague|The gardener"
_PASTIMES = (
    "learns the cello|repairs bicycles|keeps bees|paints landscapes|sings in a choir|grows tomatoes|plays chess"
)
_WEATHER = "a clear sky|light rain|morning fog|a strong wind|heavy snow|warm sunshine"


def _grade(c: Company, year: int) -> str:
    coverage = c.operating_profit(year) / c.interest[year]
    return next((grade for least, grade in _GRADES if coverage >= least), "CCC")


def _rating(rng: random.Random) -> str:
    c = make_company(rng)
    now, before = _grade(c, 0), _grade(c, 1)
    verdict = f"The grade stays at {now}" if now == before else f"The grade moves from {before} to {now}"
    return (
        f"Credit opinion on {c.name}: operating profit of {c.currency} {c.operating_profit(0)} mn covers interest of "
        f"{c.interest[0]} mn {c.operating_profit(0) / c.interest[0]:.1f} times, after "
        f"{c.operating_profit(1) / c.interest[1]:.1f} times a year ago. {verdict}. "
        f"{pick(rng, 'Bondholders rank behind the banks.|Recovery in a default is put at 40 percent.|The notes are unsecured.')}"
    )


def _covenant(rng: random.Random) -> str:
    c, limit = make_company(rng), rng.choice((1.0, 1.2, 1.5, 2.0))
    leverage = c.liabilities / c.equity()
    state = "is breached" if leverage > limit else "is kept"
    return (
        f"The loan agreement of {c.name} caps debt to equity at {limit:.1f}. With liabilities of {c.currency} "
        f"{c.liabilities} mn and equity of {c.equity()} mn the ratio is {leverage:.2f}, so the covenant {state}. "
        f"{pick(rng, 'Lenders may ask for a waiver fee.|The next test date is in June.|The facility is secured on receivables.')}"
    )


def _expected_loss(rng: random.Random) -> str:
    exposure, default, loss = rng.randrange(5, 400), rng.uniform(0.1, 9), rng.choice((25, 40, 45, 60))
    return (
        f"A bank lends {make_company(rng).name} {exposure} million with a default probability of {default:.2f} percent and a "
        f"loss given default of {loss} percent. The expected loss is {exposure * default * loss / 10_000:.3f} million. "
        + pick(rng, "The provision should match it.|The margin has to pay for it.|A guarantee would reduce it.")
    )


def _recipe(rng: random.Random) -> str:
    minutes = rng.randrange(10, 90, 5)
    return (
        f"For {pick(rng, _DISHES)} you need about {minutes} minutes. {pick(rng, 'Chop|Wash and slice|Peel and grate')} "
        f"the vegetables, warm the {pick(rng, 'butter|oil|broth')} gently and stir until it smells good. "
        f"{pick(rng, 'Serve it with bread.|It tastes better the next day.|Children like it with a little sugar.')}"
    )


def _outing(rng: random.Random) -> str:
    return (
        f"We left for {pick(rng, _PLACES)} at {rng.randrange(6, 12)} in the morning under {pick(rng, _WEATHER)}. "
        f"{pick(rng, _PEOPLE)} came along and {pick(rng, 'took photographs|carried the picnic|told stories all day')}. "
        f"On the way back we {pick(rng, 'missed the bus|saw a heron|stopped for tea|sang the whole way')}."
    )


def _acquaintance(rng: random.Random) -> str:
    return (
        f"{pick(rng, _PEOPLE)} {pick(rng, _PASTIMES)} and has done so for {rng.randrange(2, 40)} years. "
        f"{pick(rng, 'It began with a gift|It began by chance|It began on a rainy holiday')}, and now there is hardly a "
        f"{pick(rng, 'weekend|evening|summer')} without it. {pick(rng, 'Would you like to try it?|Visitors are welcome.')}"
    )


_MAKERS: dict[str, tuple[Callable[[random.Random], str], ...]] = {
    "credit": (_rating, _covenant, _expected_loss),
    "base": (_recipe, _outing, _acquaintance),
}
