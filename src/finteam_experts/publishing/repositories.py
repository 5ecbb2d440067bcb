# SPDX-License-Identifier: Apache-2.0
"""What of a run is published: one repository for each model and the Space, with the files that go into it and no others."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from finteam_experts import runs
from finteam_experts.errors import InputError
from finteam_experts.files import read_json
from finteam_experts.fingerprints import is_model, trunk_fingerprint
from finteam_experts.models import ADAPTER_FILE, COMPANION_FILES, local_folder
from finteam_experts.roles import role_of

MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", runs.RECORD, *COMPANION_FILES)
SHARDS = "model-?????-of-?????.safetensors"
FIGURES = {"moe": "routing", "moe-instruct": "evaluation"}  # a report whose plot the card shows
TITLES = {"moe": "merged team", "moe-instruct": "tuned team", "base": "dense base", "trunk": "trunk"}
PERMISSIVE = ("apache-2.0", "mit", "bsd-3-clause", "openrail", "cc-by-4.0")
# what a text file of a published repository may not hold: tokens and folders of this machine
SECRETS = re.compile(r"\bhf_[A-Za-z0-9]{20,}|(?<![\w.])/(?:home|root|Users|tmp|work|mnt|data)/[\w.-]+")


@dataclass
class Repo:
    """A repository to publish: `files` by their path in it, as a file here or as content."""

    id: str
    part: str  # of the run folder: base, trunk, adapters/ROLE, moe, moe-instruct; or space
    title: str
    files: dict[str, Path | bytes] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return "space" if self.part == "space" else "model"

    @property
    def card(self) -> str:
        """The name of its card's template."""
        return self.part.split("/")[0].removesuffix("s").replace("trunk", "base")

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Each file with its bytes."""
        for path, content in sorted(self.files.items()):
            yield path, len(content) if isinstance(content, bytes) else content.stat().st_size


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

    @property
    def team(self) -> list[dict[str, str]]:
        return runs.require(self.run_dir / "moe-instruct", "recipes/instruct_tune.py")["team"]

    @property
    def roles(self) -> list[str]:
        """The roles that have an adapter: a generalist may be the base itself."""
        names = [member["name"] for member in self.team]
        return [name for name in names if (self.run_dir / "adapters" / name).is_dir()]

    @cached_property
    def dense(self) -> str:
        """What adapters and merge are built on: the base, or a trunk that saw all corpora."""
        moe = self.run_dir / "moe"
        merged_from = runs.require(moe, "scripts/merge_moe.py")["inputs"].get("base")
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

    def repos(self, parts: list[str]) -> list[Repo]:
        """The repositories for these parts, what others refer to first."""
        made = []
        for part in parts:
            if part == "adapters":
                made += [self._adapter(role) for role in self.roles]
            elif part == "dense":
                made += [self._model(name) for name in dict.fromkeys(("base", self.dense)) if self._own(name)]
            elif part == "space":
                made.append(Repo(self.id_of("space"), "space", "Space"))
            else:
                made.append(self._model(part))
        return made

    def folder_of(self, part: str) -> Path:
        """Where the weights of a part are: in the run folder, or where they were fetched from the Hub to."""
        folder = self.run_dir / part
        return folder if folder.is_dir() else local_folder(self.id_of(part))

    def _own(self, part: str) -> bool:
        """Whether the dense model `part` is published with this run: one that has a Hub id of its own is not."""
        if part != "base" or self.base_model:
            return part != "base"
        if runs.require(self.run_dir / "base", "scripts/make_base.py, or name --base_model")["step"] != "make_base":
            raise InputError(f"{self.run_dir}/base: where is this model on the Hub? Name its id with --base_model.")
        return True

    def _model(self, part: str) -> Repo:
        folder = self.run_dir / part
        runs.require(folder, {"moe": "scripts/merge_moe.py"}.get(part, "recipes/instruct_tune.py"))
        found = [folder / name for name in MODEL_FILES if (folder / name).is_file()] + sorted(folder.glob(SHARDS))
        figure = self.run_dir / "reports" / f"{FIGURES.get(part)}.png"
        found += [figure] if figure.is_file() else []
        return Repo(self.id_of(part), part, TITLES[part], {path.name: path for path in found})

    def _adapter(self, role: str) -> Repo:
        folder = self.run_dir / "adapters" / role
        runs.require(folder, f"recipes/train_expert.py --role {role}")
        config = read_json(folder / "adapter_config.json")
        config["base_model_name_or_path"] = self.id_of(self.dense)  # PEFT keeps the folder it was trained from
        files: dict[str, Path | bytes] = {name: folder / name for name in (ADAPTER_FILE, runs.RECORD)}
        files["adapter_config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        return Repo(self.id_of(f"adapters/{role}"), f"adapters/{role}", role_of(role).title, files)


def check_licence(licence: str, data_licences: dict[str, str], base: str, name: str) -> None:
    """`InputError` if models of this licence may not be published under this name, or from this data."""
    if licence.startswith("llama3") or re.search(r"(^|/)(Meta-)?Llama-3", base):
        if not name.startswith("Llama"):
            rule = f"the licence of {base} wants models built with it to have names that begin with 'Llama'"
            raise InputError(f"--name {name}: {rule}. Choose --name Llama-{name}.")
        if not licence.startswith("llama3"):
            rule = f"a model built with {base} keeps its licence"
            raise InputError(f"--license {licence}: {rule}. Name llama3.1 or its like.")
    for source, own in data_licences.items():
        if re.search(r"\bnc\b|non-?commercial", own.lower()) and licence in PERMISSIVE:
            raise InputError(
                f"{source} is licensed {own}, and --license {licence} would allow commercial use of what was trained on it. "
                "Choose --license cc-by-nc-4.0 or its like, or train without that data."
            )


def check_texts(repos: list[Repo]) -> None:
    """`InputError` if a text file to publish holds a token or a folder of this machine."""
    for repo in repos:
        for path, content in repo.files.items():
            if path.endswith((".json", ".md", ".py", ".txt", ".jinja")) and path != "tokenizer.json":
                text = content.decode() if isinstance(content, bytes) else content.read_text()
                if found := SECRETS.search(text):
                    problem = f"holds '{found[0][:40]}', a token or a folder of this machine"
                    raise InputError(f"{repo.id}/{path} {problem}. Remove it.")


def data_licences(data: Path) -> dict[str, str]:
    """Licence by source, as the step that made the data directory recorded it; empty for a directory of your own."""
    if not (data / runs.RECORD).is_file():
        return {}
    record: dict[str, Any] = runs.read_record(data)
    if record["step"] == "make_sample_data":
        return {"sample data": "apache-2.0"}
    sources = record["inputs"]["sources"]
    groups = [*sources["roles"].values(), *sources.get("chats", {}).values()]
    listed = [*sources["tasks"].values(), *(source for group in groups for source in group)]
    return {source["dataset"]: source["licence"] for source in listed}
