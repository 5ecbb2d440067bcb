# SPDX-License-Identifier: Apache-2.0
"""The figures behind the sample data: real series that ship inside PyPI packages, and fictional companies."""

import functools
import random
from dataclasses import dataclass

import arch.data.core_cpi
import arch.data.crude
import arch.data.default
import arch.data.frenchdata
import arch.data.nasdaq
import arch.data.sp500
import arch.data.vix
import arch.data.wti
import pandas as pd
import statsmodels.api as sm

HELDOUT_YEARS = range(3, 10_000, 8)  # every eighth year is in held-out and test rows alone


def side(*years: int) -> bool | None:
    """Whether these years are held out; `None` if only some are, so that a text with figures of all belongs to neither side."""
    held = {year in HELDOUT_YEARS for year in years}
    return held.pop() if len(held) == 1 else None


def month_side(month: pd.Timestamp) -> bool | None:
    """The side of a text that compares a month with the one before."""
    return side(month.year, month.year - (month.month == 1))


def quarter_side(row) -> bool | None:
    """The side of a text that compares a quarter, with its `year` and `quarter`, with the one before."""
    return side(row.year, row.year - (row.quarter == 1))


@functools.cache
def us_quarters() -> pd.DataFrame:
    """US macro series by quarter, 1959 to 2009: levels in billions of 2005 dollars, rates in percent."""
    data = sm.datasets.macrodata.load_pandas().data
    data[["year", "quarter"]] = data[["year", "quarter"]].astype(int)
    for column in ("realgdp", "realcons", "realinv"):
        data[f"{column}_growth"] = 100 * (data[column] / data[column].shift(1) - 1)
    for column in ("unemp", "tbilrate", "infl", "realgdp_growth"):
        data[f"{column}_before"] = data[column].shift(1)
    return data.iloc[2:]


@functools.cache
def german_quarters() -> pd.DataFrame:
    """German quarterly inflation and long rate, both in percent, 1972 to 1998."""
    data = sm.datasets.interest_inflation.load_pandas().data
    data[["year", "quarter"]] = data[["year", "quarter"]].astype(int)
    return data.assign(inflation=100 * data["Dp"], rate=100 * data["R"])


@functools.cache
def core_cpi() -> pd.DataFrame:
    """US core CPI by month with its change over twelve months in percent, 1958 to 2018."""
    data = arch.data.core_cpi.load().rename(columns={"CPILFESL": "index"})
    data["yearly"] = 100 * (data["index"] / data["index"].shift(12) - 1)
    data["yearly_before"] = data["yearly"].shift(1)
    return data.dropna()


@functools.cache
def bond_yields() -> pd.DataFrame:
    """US corporate bond yields by month in percent (AAA, BAA) and their spread, 1919 to 2018."""
    data = arch.data.default.load()
    data["spread"] = data["BAA"] - data["AAA"]
    return data.assign(spread_before=data["spread"].shift(1)).dropna()


@functools.cache
def crude_months() -> pd.DataFrame:
    """Brent and WTI crude by month in dollars a barrel, 1987 to 2020."""
    data = arch.data.crude.load()
    return data.assign(Brent_before=data["Brent"].shift(1), WTI_before=data["WTI"].shift(1)).dropna()


@functools.cache
def wti_days() -> pd.Series:
    """WTI crude by trading day in dollars a barrel, 1986 to 2019."""
    return arch.data.wti.load()["DCOILWTICO"].dropna()


@functools.cache
def index_days(name: str) -> pd.DataFrame:
    """Open, high, low, close and return in percent by trading day of `S&P 500` or `NASDAQ`, 1999 to 2018."""
    module = {"S&P 500": arch.data.sp500, "NASDAQ": arch.data.nasdaq}[name]
    days = module.load().rename(columns=str.lower)[["open", "high", "low", "close"]]
    return days.assign(**{"return": 100 * days["close"].pct_change()}).dropna()


@functools.cache
def vix_days() -> pd.Series:
    """VIX by trading day, 2014 to 2019."""
    return arch.data.vix.load()["vix"].dropna()


@functools.cache
def factor_months() -> pd.DataFrame:
    """Fama-French factors by month in percent, 1926 to 2018, indexed by (year, month)."""
    data = arch.data.frenchdata.load()
    # the package stores YYYYMM as nanoseconds since 1970
    stamps = data.index.astype("int64") if data.index.dtype.kind != "M" else data.index.as_unit("ns").asi8
    data.index = pd.MultiIndex.from_tuples([(int(s) // 100, int(s) % 100) for s in stamps])
    return data


@dataclass(frozen=True)
class Company:
    """A fictional company with two years of income statements in millions; every subtotal is the sum of its parts."""

    name: str
    ticker: str
    sector: str
    currency: str
    revenue: tuple[float, float]  # this year, last year
    cost_of_sales: tuple[float, float]
    operating_expenses: tuple[float, float]
    interest: tuple[float, float]
    tax: tuple[float, float]
    shares: float  # millions
    assets: float
    liabilities: float

    def gross_profit(self, year: int) -> float:
        return round(self.revenue[year] - self.cost_of_sales[year], 1)

    def operating_profit(self, year: int) -> float:
        return round(self.gross_profit(year) - self.operating_expenses[year], 1)

    def net_profit(self, year: int) -> float:
        return round(self.operating_profit(year) - self.interest[year] - self.tax[year], 1)

    def earnings_per_share(self, year: int) -> float:
        return round(self.net_profit(year) / self.shares, 2)

    def equity(self) -> float:
        return round(self.assets - self.liabilities, 1)


_STARTS = "Al|Bel|Bren|Cor|Dal|Dun|El|Fen|Gar|Hal|Jor|Kel|Lin|Mar|Nor|Or|Pel|Quin|Ros|Sal|Tor|Ul|Ver|Wes|Yor|Zen"
_ENDS = "dex|field|gate|len|lix|mark|nor|ran|son|stad|tek|tor|ton|van|vik|win"
_KINDS = "Group|Holdings|Industries|Systems|Foods|Energy|Logistics|Materials|Pharma|Networks|Paper|Steel|Motors|Retail|Media|Chemicals|Optics|Shipping|Power|Tools"
_SECTORS = (
    "packaging|industrial pumps|frozen food|dental equipment|truck parts|office software|paper mills|home furniture|"
    "wind turbine blades|specialty chemicals|sportswear|freight rail|insulation|chips"
)


def pick(rng: random.Random, options: str) -> str:
    """One of the options, which `|` separates."""
    return rng.choice(options.split("|"))


def make_company(rng: random.Random) -> Company:
    """Draw a fictional company; its changes from last year to this year differ in size and sign."""
    stem = pick(rng, _STARTS) + pick(rng, _ENDS)
    revenue_before = round(rng.lognormvariate(5.5, 1.2) + 20, 1)
    revenue = round(revenue_before * (1 + rng.gauss(0.02, 0.12)), 1)
    lines = []
    for share, spread in ((rng.uniform(0.45, 0.65), 0.05), (rng.uniform(0.15, 0.27), 0.1), (0.02, 0.3), (0.03, 0.3)):
        before = round(revenue_before * share, 1)
        lines.append((round(before * (revenue / revenue_before) * (1 + rng.gauss(0, spread)), 1), before))
    assets = round(revenue * rng.uniform(0.7, 1.8), 1)
    return Company(
        f"{stem} {pick(rng, _KINDS)}", (stem[:2] + stem[-2:]).upper(), pick(rng, _SECTORS),
        rng.choice(("EUR", "USD", "GBP", "CHF")), (revenue, revenue_before), *lines,
        round(rng.uniform(10, 400), 1), assets, round(assets * rng.uniform(0.3, 0.75), 1),
    )  # fmt: skip


def change_percent(now: float, before: float) -> float:
    return 100 * (now / before - 1)
