# SPDX-License-Identifier: Apache-2.0
"""The analysts: title, description and colour of each role, from roles.yaml. Their router prompts are in moe_merge.yaml."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from finteam_experts.files import read_yaml

_SPARE_COLORS = ("#8b5cc4", "#b23a6f", "#0f8b8d", "#8a7a1f")


@dataclass(frozen=True)
class Role:
    name: str  # as in folders, YAML and JSON
    title: str
    description: str
    color: str  # hex, one that reads on white and on black
    question: str | None = None  # what the card of its adapter asks


@cache
def _known() -> dict[str, Role]:
    path = Path(__file__).with_name("roles.yaml")
    return {name: Role(name, **about) for name, about in read_yaml(path).items()}


def role_of(name: str, position: int = 0) -> Role:
    """The role called `name`; for one that only moe_merge.yaml knows, a plain title and the spare colour at `position`."""
    color = _SPARE_COLORS[position % len(_SPARE_COLORS)]
    return _known().get(name) or Role(name, f"{name.replace('_', ' ').capitalize()} analyst", "", color)


def team_card(names: list[str]) -> list[dict[str, str]]:
    """The team as JSON-ready rows, in the order of the model's experts."""
    team = [role_of(name, position) for position, name in enumerate(names)]
    return [{key: getattr(role, key) for key in ("name", "title", "description", "color")} for role in team]
