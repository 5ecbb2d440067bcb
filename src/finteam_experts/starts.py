# SPDX-License-Identifier: Apache-2.0
"""The models that a comparison's contestants start from: a base, and teams with all that is derived from them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from finteam_experts import runs
from finteam_experts.comparison import Comparison
from finteam_experts.data import corpus_file
from finteam_experts.errors import InputError
from finteam_experts.gates import get_gates, load_gates, random_gates, set_gates
from finteam_experts.merge_config import MERGE_FILE, SHARED, read_merge_config, trained_roles
from finteam_experts.models import fingerprint, load_model, local_folder, weight_average
from finteam_experts.release import save_release

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Starts:
    """Makes the models that contestants start from. A team is a run folder of its own, in which every step is resumed."""

    def __init__(self, comparison: Comparison, data: Path, base: str | None) -> None:
        self.comparison, self.data = comparison, data
        self.roles = trained_roles(read_merge_config(MERGE_FILE))
        self._base = base

    @property
    def base(self) -> Path:
        """The dense base, made if none is named."""
        if self._base:
            return local_folder(self._base)
        folder = self.comparison.run_dir / "base"
        if not folder.exists():
            step("scripts/make_base.py", "--run_dir", self.comparison.run_dir)
        return folder

    def launch(self, recipe: Path | str, *arguments: object, overrides: dict[str, Any]) -> None:
        """Run a training recipe in the comparison's environment."""
        options = [part for key, value in overrides.items() for part in options_of(key, value)]
        command = ["accelerate", "launch", "--config_file", self.comparison.accelerate_config, recipe]
        call([*command, *arguments, "--data_dir", self.data, *options])

    def start(self, name: str) -> Path:
        """The folder a contestant starts from, complete."""
        team_name, _, part = name.partition("/")
        if team_name == "base":
            return self.base
        folder = self.comparison.run_dir / team_name
        trunk = self._train(team_name, folder)
        if part == "average" or part.startswith("moe-"):
            self._derive(folder, part)
        elif part.split("/")[0] == "trunk":
            return trunk
        runs.require(folder / part, "none: it is no folder of a team's run")
        return folder / part

    def tokens(self, name: str) -> int:
        """How many tokens of the corpora the start called `name` has seen, in all its experts together."""
        team_name, _, part = name.partition("/")
        if team_name == "base":
            return 0
        folder, team = self.comparison.run_dir / team_name, self.comparison.teams[team_name]
        made = [folder / "trunk"] if team.trunk_steps else []
        if part.split("/")[0] != "trunk":
            roles = [part.split("/")[1]] if part.startswith("experts/") else self.roles
            made += [folder / "adapters" / role for role in roles]
        return sum(runs.read_record(step_folder)["results"]["train_tokens"] for step_folder in made)

    def _train(self, name: str, folder: Path) -> Path:
        """Trunk, experts, merge and router of one team; returns what its experts branch off from."""
        team, recipe = self.comparison.teams[name], self.comparison.expert_recipe
        common = ("--config", recipe, "--run_dir", folder)
        base = self.base
        made_from = {
            **team.model_dump(),
            "base": fingerprint(base),
            "recipe": runs.file_hash(recipe),
            "corpora": {role: runs.file_hash(corpus_file(self.data, role)) for role in self.roles},
            "overrides": self.comparison.overrides,
        }
        record = folder / "team.json"  # all steps at once: each alone takes seconds to find that it is complete
        if record.exists() and json.loads(record.read_text()) == made_from:
            return folder / "trunk" if team.trunk_steps else base
        if team.trunk_steps:
            shared = ("--role", SHARED, "--max_steps", team.trunk_steps, "--lora_target_modules", *ALL_LINEAR)
            self.launch(
                "recipes/train_expert.py", *common, *shared, "--base", base, overrides=self.comparison.overrides
            )
            base = folder / "trunk"
        if team.expert_steps:
            for role in self.roles:
                own = ("--role", role, "--max_steps", team.expert_steps, "--base", base)
                self.launch("recipes/train_expert.py", *common, *own, overrides=self.comparison.overrides)
            step("scripts/merge_moe.py", "--run_dir", folder, "--base", base)
            step("scripts/fit_router.py", "--run_dir", folder, "--data_dir", self.data)
        runs.write_json(record, made_from)
        return base

    def _derive(self, folder: Path, part: str) -> None:
        """The weight average of a team's experts, or its MoE changed as the words behind `moe-` say."""
        moe = folder / "moe"
        work = runs.begin(folder / part, "compare", {"moe": fingerprint(moe)})
        if work is None:
            return
        if part == "average":
            experts = [folder / "experts" / role for role in self.roles]
            save_release(weight_average(experts), experts[0], work)
            runs.finish(folder / part, {})
            return
        record, model = runs.read_record(moe), load_model(moe)
        for word in part.split("-")[1:]:
            change, number = re.fullmatch(r"([a-z]+)([0-9.]*)", word).groups()
            if word == "hidden":
                set_gates(model, load_gates(moe, "hidden"))
            elif word == "random":
                set_gates(model, random_gates(get_gates(model).shape, seed=0))
            elif change == "scale" and number:
                set_gates(model, get_gates(model) * (float(number) / record["router"]["results"]["scale"]))
            elif change == "top" and number:
                model.config.num_experts_per_tok = int(number)
            else:
                raise InputError(
                    f"'{part}': a start may be moe-hidden, moe-random, moe-scaleX or moe-topN, found '{word}'."
                )
        save_release(model, moe, work)
        runs.finish(folder / part, {key: record[key] for key in ("team", "system_prompt", "tasks") if key in record})


def options_of(key: str, value: Any) -> list[str]:
    """A setting as command-line arguments."""
    values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else str(value)]
    return [f"--{key}", *map(str, values)]


def call(command: list[object]) -> None:
    """Run a step as a user would; ends this script where the step fails, with the step's own message above."""
    print(f"\n=== {' '.join(map(str, command))}", flush=True)
    if code := subprocess.call(list(map(str, command))):
        raise InputError(
            f"the step above ended with exit code {code}. Mend what it names and run the same command again."
        )


def step(script: str, *arguments: object) -> None:
    call([sys.executable, script, *arguments])
