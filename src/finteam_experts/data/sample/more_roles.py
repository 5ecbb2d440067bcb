# SPDX-License-Identifier: Apache-2.0
"""Sample passages for two roles that a team of three lacks: a credit analyst, and a generalist for everyday text."""

import random
from collections.abc import Callable

from finteam_experts.data.sample.figures import Company, make_company, pick

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


def more_passages(role: str, count: int, rng: random.Random) -> list[dict[str, str]]:
    """Draw `count` passages of `credit` or `base`, no text twice."""
    passages: dict[str, dict[str, str]] = {}
    while len(passages) < count:
        maker = rng.choice(_MAKERS[role])
        text = maker(rng)
        passages.setdefault(text, {"text": text, "source": maker.__name__.lstrip("_")})
    return list(passages.values())


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
        + pick(
            rng,
            "Bondholders rank behind the banks.|Recovery in a default is put at 40 percent.|The notes are unsecured.",
        )
    )


def _covenant(rng: random.Random) -> str:
    c, limit = make_company(rng), rng.choice((1.0, 1.2, 1.5, 2.0))
    leverage = c.liabilities / c.equity()
    state = "is breached" if leverage > limit else "is kept"
    return (
        f"The loan agreement of {c.name} caps debt to equity at {limit:.1f}. With liabilities of {c.currency} "
        f"{c.liabilities} mn and equity of {c.equity()} mn the ratio is {leverage:.2f}, so the covenant {state}. "
        + pick(
            rng,
            "Lenders may ask for a waiver fee.|The next test date is in June.|The facility is secured on receivables.",
        )
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
