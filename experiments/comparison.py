# SPDX-License-Identifier: Apache-2.0
"""A comparison as data: which models are made, tuned and scored, and the files in which their figures are kept."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finteam_experts.errors import InputError
from finteam_experts.files import read_yaml

REPOSITORY = Path(__file__).parents[1]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Team(_Strict):
    """Steps of the first training: on the corpora of all roles together, then on each role's own."""

    trunk_steps: int = Field(ge=0)
    expert_steps: int = Field(ge=0)


class Model(_Strict):
    """A model to score: `initial_model`, a folder of the comparison's run folder, tuned by `recipe` or left as it is."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    title: str
    initial_model: str
    recipe: str | None = None  # from the repository's root
    seeds: tuple[int, ...] = (0,)
    overrides: dict[str, Any] = {}
    # Each of the team's experts is tuned by itself, then they are joined or averaged
    experts: Literal["joined", "averaged"] | None = None
    router: dict[str, Any] = {}  # with it, the tuned team's router is fitted again with these options of fit_router.py
    keep: bool = False  # the tuned model, once it is scored


class Comparison(_Strict):
    run_dir: Path
    results: Path = Path("results")  # beside the YAML
    expert_recipe: str  # this and the next from the repository's root
    accelerate_config: str
    overrides: dict[str, Any]  # of every training run: where it runs, and in what precision
    limit: int | None = Field(ge=2)  # test rows per task
    validation_limit: int | None = Field(ge=2)
    heldout_passages: int = Field(ge=2)  # per role, for the perplexity of initial models
    heldout_tokens: int = Field(ge=2)  # of each passage
    team: str  # the model that the others are compared with
    baselines: tuple[str, ...]
    teams: dict[str, Team]
    models: tuple[Model, ...]
    ablations: tuple[Model, ...] = ()  # scored on validation rows alone

    def result_file(self, model: Model, seed: int) -> Path:
        folder = self.results if model in self.models else self.results / "ablations"
        return folder / f"{model.name}-seed{seed}.json"

    def read_results(self, models: tuple[Model, ...]) -> dict[str, list[dict[str, Any]]]:
        """The results that are there, by model, one for each seed."""
        found: dict[str, list[dict[str, Any]]] = {}
        for model in models:
            files = [self.result_file(model, seed) for seed in model.seeds]
            if parts := [json.loads(file.read_text()) for file in files if file.exists()]:
                found[model.name] = parts
        return found


def read_comparison(path: Path) -> Comparison:
    """Read a comparison's YAML strictly; an `InputError` names file and key."""
    try:
        comparison = Comparison.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {where}: {first['msg']}, found {first['input']!r}.") from None
    everything = (*comparison.models, *comparison.ablations)
    names = [model.name for model in everything]

    def check(right: bool, problem: str) -> None:
        if not right:
            raise InputError(f"{path}: {problem}")

    recipes = [model.recipe for model in everything if model.recipe]
    for file in (comparison.accelerate_config, comparison.expert_recipe, *recipes):
        check((REPOSITORY / file).is_file(), f"it names {file}, which is not in {REPOSITORY}.")
    for name in names:
        check(names.count(name) == 1, f"two models are called '{name}'. Rename one.")
    for name in (comparison.team, *comparison.baselines):
        check(name in names, f"'{name}' is to be compared but is no model. Known: {', '.join(names)}.")
    for model in everything:
        team, _, part = model.initial_model.partition("/")
        found, teams = f"{model.name} starts from '{model.initial_model}'", ", ".join(comparison.teams)
        check(team in ("base", *comparison.teams), f"{found}: it is base, or a folder of one of the teams {teams}.")
        can_join = not model.experts or (model.recipe and part.startswith("moe"))
        wanted = f"for experts to be {model.experts} it needs a recipe to tune each of them with, and a team's moe."
        check(bool(can_join), f"{found}, with the recipe {model.recipe}: {wanted}")
        is_tuned_team = model.recipe and part.startswith("moe") and model.experts != "averaged"
        check(
            bool(not model.router or is_tuned_team),
            f"{model.name} has options of a router: they are for a tuned team.",
        )
    return comparison.model_copy(update={"results": path.parent / comparison.results})
