# SPDX-License-Identifier: Apache-2.0
"""The analysts: title, description and colour of each role. Their router prompts are in moe_merge.yaml."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Role:
    name: str  # as in folders, YAML and JSON
    title: str
    description: str
    color: str  # hex, one that reads on white and on black


_KNOWN = {
    role.name: role
    for role in (
        Role("macro", "Macro analyst", "Growth, inflation, interest rates, central banks and commodities.", "#2a78d6"),
        Role("micro", "Micro analyst", "Company reports, earnings, margins, guidance and news.", "#c2571a"),
        Role(
            "quant",
            "Quantitative analyst",
            "Prices, returns, volatility, factors and other series of figures.",
            "#3d8b40",
        ),
        Role("base", "Generalist", "Everything else: the base as it was.", "#7a7f87"),
    )
}
_SPARE_COLORS = ("#8b5cc4", "#b23a6f", "#0f8b8d", "#8a7a1f")


def role_of(name: str, position: int = 0) -> Role:
    """The role called `name`; for one that only moe_merge.yaml knows, a plain title and the spare colour at `position`."""
    color = _SPARE_COLORS[position % len(_SPARE_COLORS)]
    return _KNOWN.get(name) or Role(name, f"{name.replace('_', ' ').capitalize()} analyst", "", color)


def team_card(names: list[str]) -> list[dict[str, str]]:
    """The team as JSON-ready rows, in the order of the model's experts."""
    return [asdict(role_of(name, position)) for position, name in enumerate(names)]
