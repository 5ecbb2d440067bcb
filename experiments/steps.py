# SPDX-License-Identifier: Apache-2.0
"""The steps of a comparison, run as a user would, and the initial models: a base, and teams with what derives from them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from comparison import REPOSITORY, Comparison
from finteam_experts import runs
from finteam_experts.data.files import corpus_file
from finteam_experts.errors import InputError
from finteam_experts.files import file_hash, read_json, write_json
from finteam_experts.fingerprints import fingerprint
from finteam_experts.merging.config import SHARED, read_merge_config, trained_roles
from finteam_experts.merging.gates import get_gates, load_gates, random_gates, set_gates
from finteam_experts.merging.join import weight_average
from finteam_experts.merging.layout import save_model
from finteam_experts.models import load_model, local_folder

# of the merged team, with which the published results were made
FIRST_ROUTER = ("--tokens_per_role", 4000, "--chat_share", 0.25, "--ridge", 0.03)
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def options_of(settings: dict[str, Any]) -> list[str]:
    """Settings as command-line arguments."""
    found = []
    for key, value in settings.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        found += [f"--{key}", *map(str, values)]
    return found


def call(command: list[object]) -> None:
    """Run a step; `InputError` where the step fails, with the step's own message above."""
    print(f"\n=== {' '.join(map(str, command))}", flush=True)
    if code := subprocess.call(list(map(str, command))):
        raise InputError(
            f"the step above ended with exit code {code}. Fix what it names and run the same command again."
        )


def step(script: str, *arguments: object) -> None:
    call([sys.executable, REPOSITORY / script, *arguments])


class InitialModels:
    """Makes the models that a comparison starts from. A team is a run folder of its own, in which every step resumes."""

    def __init__(self, comparison: Comparison, data: Path, base: str | None) -> None:
        self.comparison, self.data, self._base = comparison, data, base
        self.roles = trained_roles(read_merge_config(REPOSITORY / "moe_merge.yaml"))

    @property
    def base(self) -> Path:
        """The dense base, made if none is named."""
        if self._base:
            return local_folder(self._base)
        folder = self.comparison.run_dir / "base"
        if not folder.exists():
            step("scripts/make_base.py", "--run_dir", self.comparison.run_dir)
        return folder

    def launch(self, script: str, recipe: str, *arguments: object, overrides: dict[str, Any]) -> None:
        """Run a training recipe in the comparison's environment."""
        accelerate = ["accelerate", "launch", "--config_file", REPOSITORY / self.comparison.accelerate_config]
        options = options_of(self.comparison.overrides | overrides)
        call(
            [
                *accelerate,
                REPOSITORY / script,
                "--config",
                REPOSITORY / recipe,
                *arguments,
                "--data_dir",
                self.data,
                *options,
            ]
        )

    def make(self, name: str) -> Path:
        """The folder of an initial model, complete."""
        team, _, part = name.partition("/")
        if team == "base":
            return self.base
        folder = self.comparison.run_dir / team
        trunk = self._train(team, folder)
        if part == "average" or part.startswith("moe-"):
            self._derive(folder, part)
        elif part.split("/")[0] == "trunk":
            return trunk
        runs.require(folder / part, "none: it is no folder of a team's run")
        return folder / part

    def tokens(self, name: str) -> int:
        """How many tokens of the corpora the initial model has seen, in all its experts together."""
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
        team, recipe, base = self.comparison.teams[name], self.comparison.expert_recipe, self.base
        made_from = {
            **team.model_dump(),
            "base": fingerprint(base),
            "recipe": file_hash(REPOSITORY / recipe),
            "corpora": {role: file_hash(corpus_file(self.data, role)) for role in self.roles},
            "overrides": self.comparison.overrides,
        }
        record = folder / "team.json"  # all steps at once: each alone takes seconds to find that it is complete
        if record.exists() and read_json(record) == made_from:
            return folder / "trunk" if team.trunk_steps else base

        def train(role: str, steps: int, *options: object) -> None:
            own = ("--run_dir", folder, "--role", role, "--max_steps", steps, "--base", base)
            self.launch("recipes/train_expert.py", recipe, *own, *options, overrides={})

        if team.trunk_steps:
            train(SHARED, team.trunk_steps, "--lora_target_modules", *ALL_LINEAR)
            base = folder / "trunk"
        if team.expert_steps:
            for role in self.roles:
                train(role, team.expert_steps)
            step("scripts/merge_moe.py", "--run_dir", folder, "--base", base, "--experts_per_token", 2)  # as published
            step("scripts/fit_router.py", "--run_dir", folder, "--data_dir", self.data, *FIRST_ROUTER)
        write_json(record, made_from)
        return base

    def _derive(self, folder: Path, part: str) -> None:
        """The weight average of a team's experts, or its MoE changed as the words behind `moe-` say."""
        moe = folder / "moe"
        work = runs.begin(folder / part, "compare", {"moe": fingerprint(moe)})
        if work is None:
            return
        if part == "average":
            experts = [folder / "experts" / role for role in self.roles]
            save_model(weight_average(experts), experts[0], work)
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
                known = "moe-hidden, moe-random, moe-scaleX or moe-topN"
                raise InputError(f"'{part}': an initial model may be {known}, found '{word}'.")
        save_model(model, moe, work)
        runs.finish(folder / part, {key: record[key] for key in ("team", "system_prompt", "tasks") if key in record})
