# SPDX-License-Identifier: Apache-2.0
"""A comparison as data: which models are made, tuned and scored, and the files in which their figures are kept."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finteam_experts.errors import InputError, read_yaml


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Team(_Strict):
    """Steps of the first training: on the corpora of all roles together, then on each role's own."""

    trunk_steps: int = Field(ge=0)
    expert_steps: int = Field(ge=0)


class Contestant(_Strict):
    """A model to score: `start`, a folder of the comparison's run folder, tuned by `recipe` or left as it is."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    title: str
    start: str
    recipe: str | None = None
    seeds: tuple[int, ...] = (0,)
    overrides: dict[str, Any] = {}
    # Each of the team's experts is tuned by itself, then they are joined or averaged
    experts: Literal["joined", "averaged"] | None = None
    router: dict[str, Any] = {}  # with it, the tuned team's router is fitted anew with these options of fit_router.py
    keep: bool = False  # the tuned model, once it is scored


class Comparison(_Strict):
    run_dir: Path
    results: Path
    accelerate_config: Path
    expert_recipe: Path
    overrides: dict[str, Any]  # of every training run: where it runs, and in what precision
    limit: int | None = Field(ge=2)  # test rows a task
    validation_limit: int | None = Field(ge=2)
    heldout_passages: int = Field(ge=2)  # a role, for the perplexity of what is tuned
    heldout_tokens: int = Field(ge=2)  # of each passage
    team: str  # the contestant that the others are compared with
    baselines: tuple[str, ...]
    teams: dict[str, Team]
    contestants: tuple[Contestant, ...]
    levers: tuple[Contestant, ...] = ()


def read_comparison(path: Path) -> Comparison:
    """Read a comparison's YAML strictly; an `InputError` names file and key."""
    try:
        comparison = Comparison.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}, found {first['input']!r}."
        ) from None
    everybody = (*comparison.contestants, *comparison.levers)
    used = [comparison.accelerate_config, comparison.expert_recipe, *(Path(c.recipe) for c in everybody if c.recipe)]
    for file in used:
        if not file.is_file():
            raise InputError(
                f"{path} names {file}, which is not here ({Path.cwd()}). Run it from the repository's root."
            )
    names = [contestant.name for contestant in everybody]
    if doubles := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{path}: two contestants are called '{doubles.pop()}'. Rename one.")
    for name in (comparison.team, *comparison.baselines):
        if name not in names:
            raise InputError(f"{path}: '{name}' is to be compared but is no contestant. Known: {', '.join(names)}.")
    for contestant in (*comparison.contestants, *comparison.levers):
        if contestant.start.split("/")[0] not in ("base", *comparison.teams):
            raise InputError(
                f"{path}: {contestant.name} starts from '{contestant.start}': a start is base, or a folder of one of the "
                f"teams {', '.join(comparison.teams)}."
            )
        if contestant.experts and not (contestant.recipe and contestant.start.partition("/")[2].startswith("moe")):
            raise InputError(
                f"{path}: {contestant.name} has experts to be {contestant.experts}: it needs a recipe to tune each of them "
                f"with, and a team's moe as start; found '{contestant.start}' and {contestant.recipe}."
            )
        is_team = contestant.recipe and "/moe" in contestant.start and contestant.experts != "averaged"
        if contestant.router and not is_team:
            raise InputError(f"{path}: {contestant.name} has options of a router: they are for a team that is tuned.")
    return comparison


def result_file(comparison: Comparison, contestant: Contestant, seed: int) -> Path:
    folder = comparison.results if contestant in comparison.contestants else comparison.results / "levers"
    return folder / f"{contestant.name}-seed{seed}.json"


def read_results(comparison: Comparison, contestants: tuple[Contestant, ...]) -> dict[str, list[dict[str, Any]]]:
    """The results that are there, by contestant, one for each seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for contestant in contestants:
        files = [result_file(comparison, contestant, seed) for seed in contestant.seeds]
        if parts := [json.loads(file.read_text()) for file in files if file.exists()]:
            found[contestant.name] = parts
    return found
