# SPDX-License-Identifier: Apache-2.0
"""What of a run is published: one repository for each model and the Space, with the files that go into it and no others."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from finteam_experts import runs
from finteam_experts.errors import InputError
from finteam_experts.files import read_json
from finteam_experts.fingerprints import is_model, trunk_fingerprint
from finteam_experts.merging.moe import adapter_in_team
from finteam_experts.models import ADAPTER_FILE, COMPANION_FILES, local_folder

PARTS = ("dense", "adapters", "moe", "moe-instruct", "space")  # in the order in which they refer to each other
MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", runs.RECORD, *COMPANION_FILES)
SHARDS = "model-?????-of-?????.safetensors"
FIGURES = {"moe": "routing", "moe-instruct": "evaluation"}  # a report whose plot the card shows
PERMISSIVE = ("apache-2.0", "mit", "bsd-3-clause", "openrail", "cc-by-4.0")
TEXTS = (".json", ".md", ".py", ".txt", ".jinja")


@dataclass
class Repo:
    """A repository to publish: `files` by their path in it, as a file here or as content."""

    id: str
    part: str  # of the run folder: base, trunk, adapters/ROLE, moe, moe-instruct; or space
    files: dict[str, Path | bytes] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return "space" if self.part == "space" else "model"

    @property
    def card(self) -> str:
        """The name of its card's template."""
        return self.part.split("/")[0].removesuffix("s").replace("trunk", "base")


@dataclass(frozen=True)
class PublishedRun:
    """One run under the names that it gets on the Hub."""

    run_dir: Path
    namespace: str
    name: str
    base_model: str | None  # Hub id of the dense base, if it is there

    def id_of(self, part: str) -> str:
        """The repository of a part of the run folder."""
        if part == "base" and self.base_model:
            return self.base_model
        suffix = {"moe-instruct": "", "space": "", "moe": "-merged", "base": "-base", "trunk": "-trunk"}
        role = part.removeprefix("adapters/")
        return f"{self.namespace}/{self.name}{suffix.get(part, f'-{role}-lora')}"

    @cached_property
    def team(self) -> list[dict[str, str]]:
        return runs.require(self.run_dir / "moe-instruct", "recipes/instruct_tune.py")["team"]

    @cached_property
    def merge(self) -> dict[str, Any]:
        """The record of the merged team."""
        return runs.require(self.run_dir / "moe", "scripts/merge_moe.py")

    @cached_property
    def roles(self) -> list[str]:
        """The roles whose adapter is here: a generalist is the base itself, and an expert may have come from elsewhere."""
        roles = []
        for name in (member["name"] for member in self.team):
            folder = self.run_dir / "adapters" / name
            if adapter_in_team(self.run_dir, name):
                roles.append(name)
            elif folder.is_dir():
                print(f"{folder} is not what the expert in {self.run_dir}/moe was made from: it is left out")
        return roles

    @cached_property
    def dense(self) -> str:
        """What adapters and merge are built on: the base, or a trunk that saw all corpora."""
        merged_from, moe = self.merge["inputs"].get("base"), self.run_dir / "moe"
        for part in ("trunk", "base"):
            folder = self.run_dir / part
            # a team that was changed does not say, but has the attention of its trunk
            if folder.is_dir() and (
                is_model(folder, merged_from) if merged_from else trunk_fingerprint(folder) == trunk_fingerprint(moe)
            ):
                return part
        if self.base_model:  # it was named with --base and is not in the run folder
            return "base"
        raise InputError(
            f"{self.run_dir}: the team was merged from a base that is neither its folder base nor trunk. Name that base's Hub id "
            "with --base_model."
        )

    def folder_of(self, part: str) -> Path:
        """Where the weights of a part are: in the run folder, or where they were fetched from the Hub to."""
        folder = self.run_dir / part
        return folder if folder.is_dir() else local_folder(self.id_of(part))

    def repos(self, parts: list[str]) -> list[Repo]:
        """The repositories for these parts, what others refer to first."""
        chosen: list[str] = []
        for part in (part for part in PARTS if part in parts):
            if part == "dense":
                chosen += [name for name in dict.fromkeys(("base", self.dense)) if self._is_ours(name)]
            else:
                chosen += [f"adapters/{role}" for role in self.roles] if part == "adapters" else [part]
        return [Repo(self.id_of(part), part, self._files(part)) for part in chosen]

    def _is_ours(self, part: str) -> bool:
        """Whether the dense model `part` is published with this run: one that has a Hub id of its own is not."""
        if part != "base":
            return True
        if self.base_model:
            return False
        if runs.require(self.run_dir / "base", "scripts/make_base.py, or name --base_model")["step"] != "make_base":
            raise InputError(f"{self.run_dir}/base: where is this model on the Hub? Name its id with --base_model.")
        return True

    def _files(self, part: str) -> dict[str, Path | bytes]:
        """The files of a model's repository; a Space's are none of the run's."""
        if part == "space":
            return {}
        folder, makers = self.run_dir / part, {"moe": "scripts/merge_moe.py", "adapters": "recipes/train_expert.py"}
        runs.require(folder, makers.get(part.split("/")[0], "recipes/instruct_tune.py"))
        if part.startswith("adapters/"):
            config = read_json(folder / "adapter_config.json")
            config["base_model_name_or_path"] = self.id_of(self.dense)  # PEFT keeps the folder it was trained from
            files = {name: folder / name for name in (ADAPTER_FILE, runs.RECORD)}
            return files | {"adapter_config.json": (json.dumps(config, indent=2) + "\n").encode()}
        figure = self.run_dir / "reports" / f"{FIGURES.get(part)}.png"
        files = [*(folder / name for name in MODEL_FILES), *sorted(folder.glob(SHARDS)), figure]
        return {file.name: file for file in files if file.is_file()}


def check_licence(licence: str, data_licences: dict[str, str], base: str, name: str) -> None:
    """`InputError` if models of this licence may not be published under this name, or from this data."""
    if licence.startswith("llama3") or "llama-3" in base.lower():
        if not name.startswith("Llama"):
            rule = f"the licence of {base} wants models built with it to have names that begin with 'Llama'"
            raise InputError(f"--name {name}: {rule}. Choose --name Llama-{name}.")
        if not licence.startswith("llama3"):
            rule = f"a model built with {base} keeps its licence"
            raise InputError(f"--license {licence}: {rule}. Name llama3.1 or its like.")
    for source, terms in data_licences.items():
        words = terms.lower().replace("-", " ").split()
        if ("nc" in words or "noncommercial" in "".join(words)) and licence in PERMISSIVE:
            raise InputError(
                f"{source} is licensed {terms}, and --license {licence} would allow commercial use of what was trained on it. "
                "Choose --license cc-by-nc-4.0 or its like, or train without that data."
            )


def check_texts(repos: list[Repo], *folders: Path) -> None:
    """`InputError` if a text file to publish holds the token, or the path of the home folder or one of `folders`."""
    private = {get_token(): "your token", str(Path.home()): "your home folder"}
    private |= {str(folder.resolve()): "a folder of this machine" for folder in folders}
    for repo in repos:
        for path, content in repo.files.items():
            if path.endswith(TEXTS) and path != "tokenizer.json":
                text = content.decode() if isinstance(content, bytes) else content.read_text()
                for secret, name in private.items():
                    if secret and f"{secret}" in text:
                        raise InputError(f"{repo.id}/{path} names {name}. Remove it.")


def data_licences(data: Path) -> dict[str, str]:
    """Licence by source, as the step that made the data directory recorded it; empty for a directory of your own."""
    if not (data / runs.RECORD).is_file():
        return {}
    record = runs.read_record(data)
    if record["step"] == "make_sample_data":
        return {"sample data": "apache-2.0"}
    sources = record["inputs"]["sources"]
    by_role = [*sources["roles"].values(), *sources["chats"].values()]
    listed = [*sources["tasks"].values(), *(source for group in by_role for source in group)]
    return {source["dataset"]: source["licence"] for source in listed}
