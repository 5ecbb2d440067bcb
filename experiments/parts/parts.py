# SPDX-License-Identifier: Apache-2.0
"""The models of the experiment: each is made by the product's own steps, and is not made again once it is complete."""

import json
import math
import shutil
import sys
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from pydantic import BaseModel, ConfigDict, Field

from finteam_experts.data.files import corpus_file, read_task, task_file, tasks_of, write_rows
from finteam_experts.data.tasks import Tasks
from finteam_experts.errors import InputError
from finteam_experts.files import read_yaml
from steps import REPOSITORY, call, options_of, step

EXPERT, DENSE = "recipes/sample/train_expert.yaml", "recipes/sample/instruct_tune_trunk.yaml"
DECAY = 0.25  # of the steps
PROMPTS = {  # for mergekit's hidden gates; those of the other roles are in moe_merge.yaml
    "credit": ["The applicant has paid every instalment on time.", "Will the borrower default on the loan?"]
}


class Parts(BaseModel):
    """The experiment as data."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    run_dir: Path
    results: Path
    accelerate_config: str
    seeds: tuple[int, ...]
    orders: dict[str, list[str]]
    fields: dict[str, list[str]]
    rows: int = Field(ge=1)
    rows_per_step: int = Field(ge=1)
    replay: tuple[float, ...]
    limit: int = Field(ge=2)
    overrides: dict[str, Any]
    expert_overrides: dict[str, Any] = {}


class Order:
    """All ways with one order of arrival and one seed. Every `make_` returns the folder of a model, complete.

    All ways begin with the same model, the base tuned on the first field. For the team that is the trunk, and its MLPs are the first
    analyst; the others branch off from it.
    """

    def __init__(self, parts: Parts, name: str, seed: int, data: Path, base: Path) -> None:
        self.parts, self.name, self.seed, self.base = parts, name, seed, base
        self.order = parts.orders[name]
        self.folder = parts.run_dir / f"{name}-seed{seed}"
        self.data = self._view(data)

    @cached_property
    def tasks(self) -> Tasks:
        return tasks_of(self.data)

    def _view(self, data: Path) -> Path:
        """The data directory of this seed: the rows that the experiment uses, and everyone's corpora."""
        view = self.folder / "data"
        if view.is_dir():
            return view
        known, work = tasks_of(data), self.folder / "data.incomplete"
        shutil.rmtree(work, ignore_errors=True)
        for field, names in self.parts.fields.items():
            for heldout in (False, True):
                _link(corpus_file(work, field, heldout=heldout), corpus_file(data, field, heldout=heldout))
            for name in names:
                if name not in known or known[name].role != field:
                    raise InputError(f"{data} has no task '{name}' of the role {field}.")
                rows = sorted(read_task(data, known[name], "train"), key=lambda row: hash_of(self.seed, row))
                write_rows(task_file(work, name, "train"), rows[: self.parts.rows // len(names)])
                _link(task_file(work, name, "test"), task_file(data, name, "test"))
                if (own := data / "tasks" / f"{name}.yaml").is_file():
                    _link(work / "tasks" / own.name, own)
        work.rename(view)
        return view

    def _launch(self, script: str, recipe: str, rows: int, overrides: dict[str, Any], *arguments: object) -> None:
        steps = max(1, rows // self.parts.rows_per_step)
        options = options_of(
            overrides
            | {"per_device_train_batch_size": self.parts.rows_per_step}
            | {"max_steps": steps, "warmup_steps": max(1, steps // 20), "save_steps": 100, "seed": self.seed}
            | {"lr_scheduler_type": "warmup_stable_decay"}
            | {"lr_scheduler_kwargs": {"num_decay_steps": math.ceil(DECAY * steps)}}
        )
        accelerate = ["accelerate", "launch", "--config_file", REPOSITORY / self.parts.accelerate_config]
        where = ["--config", REPOSITORY / recipe, "--data_dir", self.data]
        call([*accelerate, REPOSITORY / script, *where, *arguments, *options])

    def make_dense(self, fields: list[str], start: Path, again: dict[str, float], folder: Path) -> Path:
        """One model tuned from `start` on the rows of `fields`, and on shares of the rows of others."""
        limits = {task: self.parts.rows // len(self.parts.fields[f]) for f in fields for task in self.parts.fields[f]}
        for field, share in again.items():
            names = self.parts.fields[field]
            limits |= {task: math.ceil(share * self.parts.rows / len(names)) for task in names}
        rows = ["--rows_of_task", json.dumps(limits), "--tasks", *limits]
        where = ("--run_dir", folder, "--base", start, "--start_from", "base")
        arguments = (*where, "--as_trunk", "false", *rows)
        self._launch("recipes/instruct_tune.py", DENSE, sum(limits.values()), self.parts.overrides, *arguments)
        return folder / "dense-instruct"

    def make_joint(self, arrivals: int) -> Path:
        """One model tuned from the base on everything that has arrived."""
        return self.make_dense(self.order[:arrivals], self.base, {}, self.folder / f"joint-{arrivals}")

    def make_in_turn(self, arrivals: int, share: float = 0.0) -> Path:
        """One model tuned on each field when it arrives, with a share of the rows of all before."""
        start, way = self.trunk, f"replay-{share:g}" if share else "in-turn"
        for place in range(1, arrivals):
            again = dict.fromkeys(self.order[:place], share) if share else {}
            start = self.make_dense([self.order[place]], start, again, self.folder / f"{way}-{place + 1}")
        return start

    @cached_property
    def trunk(self) -> Path:
        return self.make_joint(1)

    def make_expert(self, field: str) -> Path:
        where = ("--run_dir", self.folder, "--base", self.trunk, "--role", field, "--merge_config", self.merge_file)
        learn = ("--learn_from", json.dumps({"tasks": 1}))
        rows, overrides = self.parts.rows, self.parts.overrides | self.parts.expert_overrides
        if field == self.order[0]:  # the trunk has learned its rows: one step that changes nothing makes it an expert
            rows, overrides = self.parts.rows_per_step, overrides | {"learning_rate": 1e-12}
        self._launch("recipes/train_expert.py", EXPERT, rows, overrides, *where, *learn)
        if not (self.folder / "experts" / field / "router_sums.safetensors").is_file():
            own = ("--run_dir", self.folder, "--data_dir", self.data, "--role", field)
            step("scripts/router_sums.py", *own, "--base", self.trunk)
        return self.folder / "experts" / field

    @cached_property
    def merge_file(self) -> Path:
        """The merge of the first two fields, and one that lists all of them."""
        known = read_yaml(REPOSITORY / "moe_merge.yaml")
        prompts = {Path(e["source_model"]).name: e["positive_prompts"] for e in known["experts"]} | PROMPTS
        for name, fields in (("two", self.order[:2]), ("all", self.order)):
            experts = [{"source_model": f"experts/{f}", "positive_prompts": prompts[f]} for f in fields]
            path = self.folder / f"{name}.yaml"
            path.write_text(yaml.safe_dump(known | {"experts": experts}))
        return path

    def make_team(self, arrivals: int) -> Path:
        """Our team after that many arrivals: the first two experts merged, then one more with each."""
        for field in self.order[:arrivals]:
            self.make_expert(field)
        folder = self.folder / "team"
        folder.mkdir(exist_ok=True)
        for part in ("adapters", "experts", "data"):
            _link(folder / part, self.folder / part)
        if not (folder / "moe").is_dir():
            merge = ("--merge_config", self.merge_file.with_name("two.yaml"))
            step("scripts/merge_moe.py", "--run_dir", folder, "--base", self.trunk, *merge, "--from_sums")
        name = "moe"
        for field in self.order[2:arrivals]:
            step(
                "scripts/change_team.py", "add", field, "--run_dir", folder, "--model", name, "--limit", 0, 
                "--output", f"moe-{field}",
            )  # fmt: skip
            name = f"moe-{field}"
        return folder / name

    def make_smaller(self, without: str) -> Path:
        """The whole team without one analyst."""
        team = self.make_team(len(self.order))
        output = ("--output", f"moe-without-{without}", "--limit", 0)
        step("scripts/change_team.py", "remove", without, "--run_dir", team.parent, "--model", team.name, *output)
        return team.parent / f"moe-without-{without}"

    def make_plain_merge(self, folder: str = "plain") -> Path:
        """mergekit's own MoE of all experts, whose router is that of the prompts."""
        for field in self.order:
            self.make_expert(field)
        run_dir = self.folder / folder
        run_dir.mkdir(exist_ok=True)
        for part in ("adapters", "experts", "data"):
            _link(run_dir / part, self.folder / part)
        step("scripts/merge_moe.py", "--run_dir", run_dir, "--base", self.trunk, "--merge_config", self.merge_file)
        return run_dir / "moe"

    def make_team_from_text(self) -> Path:
        """The whole team with its router fitted on everybody's text, which someone has in one place."""
        moe = self.make_plain_merge("from-text")
        step("scripts/fit_router.py", "--run_dir", moe.parent)
        return moe

    def make_merged(self, method: str) -> Path:
        """The experts merged into one dense model by mergekit."""
        experts = [self.make_expert(field) for field in self.order]
        target = self.folder / "merged" / method
        if target.is_dir():
            return target
        own = {"weight": 1.0 / len(experts)} if method == "linear" else {"weight": 1.0, "density": 0.5}
        config = {
            "merge_method": method,
            "dtype": "float32",
            "models": [{"model": str(expert.absolute()), "parameters": own} for expert in experts],
        } | ({} if method == "linear" else {"base_model": str(self.trunk.absolute())})
        target.parent.mkdir(exist_ok=True)
        (file := target.with_suffix(".yaml")).write_text(yaml.safe_dump(config))
        call([Path(sys.executable).with_name("mergekit-yaml"), file, target, "--random-seed", self.seed])
        return target


def hash_of(seed: int, row: dict) -> int:
    """A number that orders rows at random, the same on every machine."""
    return zlib.crc32(f"{seed} {json.dumps(row, sort_keys=True)}".encode())


def _link(place: Path, target: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(target.absolute())
