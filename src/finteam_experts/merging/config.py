# SPDX-License-Identifier: Apache-2.0
"""moe_merge.yaml: mergekit's own MoE configuration, read strictly. The roles of the team are its experts, in order.

python -m finteam_experts.merging.config moe_merge.yaml      # prints the roles that have an expert to train
"""

import re
import sys
from pathlib import Path

from mergekit.moe.config import Expert, MoEMergeConfig
from pydantic import ValidationError

from finteam_experts.data.conversations import GENERAL
from finteam_experts.data.files import corpus_file
from finteam_experts.errors import InputError, nearest, run
from finteam_experts.files import read_yaml
from finteam_experts.weights import DTYPES

SHARED = "shared"  # not a role: the trunk that is trained on the corpora of all roles
BASE = "base"  # the run folder's dense base
NO_ROLES = {SHARED: "that is the trunk", GENERAL: f"chats/{GENERAL}.jsonl is of no analyst"}
GATE_MODES = ("hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random")
# mergekit's keys that are refused, and why
UNUSED = {
    "architecture": "it follows from the base.",
    "shared_experts": "a team has none.",
    "noise_scale": "each expert is merged as it was trained, and checked against that.",
    "residual_scale": "each expert is merged as it was trained, and checked against that.",
}


def read_merge_config(path: Path) -> MoEMergeConfig:
    """Read and check the merge. mergekit itself ignores unknown keys and unknown gate modes, so both are errors here."""
    content = read_yaml(path)
    _check_keys(path, content, MoEMergeConfig, "")
    experts = content.get("experts") or []
    if not isinstance(experts, list):
        raise InputError(f"{path}: experts must be a list, found {type(experts).__name__}.")
    for position, expert in enumerate(experts):
        _check_keys(path, expert, Expert, f"experts[{position}].")
    try:
        config = MoEMergeConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {key}: {first['msg'].lower()}, found {str(first['input'])[:80]!r}.") from None
    except (ValueError, TypeError, RuntimeError) as error:  # of mergekit's own validators
        raise InputError(f"{path}: {error}") from None
    for key, known in (("gate_mode", GATE_MODES), ("dtype", DTYPES)):
        value = getattr(config, key)
        if value not in (None, *known):
            raise InputError(f"{path}: {key} '{value}' is unknown. Known: {', '.join(known)}.{nearest(value, known)}")
    if str(config.base_model) != BASE:
        raise InputError(
            f"{path}: base_model is '{config.base_model}'. It has to be '{BASE}', the run folder's: training and merge take "
            "another one with --base."
        )
    _check_team(path, config)
    return config


def roles(config: MoEMergeConfig) -> list[str]:
    """The role of each expert: the last part of its `source_model`, as in experts/macro."""
    return [Path(expert.source_model.model.path).name for expert in config.experts]


def trained_roles(config: MoEMergeConfig) -> list[str]:
    """The roles whose experts are trained: all but a generalist, whose `source_model` is the base itself."""
    names = zip(roles(config), config.experts, strict=True)
    return [role for role, expert in names if expert.source_model != config.base_model]


def check_name(role: str, where: str) -> None:
    """Raise `InputError` unless an analyst can have this name, of which folders and files are made."""
    if role in NO_ROLES:
        raise InputError(f"{where}: no analyst can be called '{role}': {NO_ROLES[role]}. Choose another name.")
    if not re.fullmatch(r"[^\W_][\w-]*", role) or role.endswith("_heldout"):
        wanted = "It is of letters, digits, _ and -, begins with a letter or digit, and does not end with _heldout."
        raise InputError(f"{where}: no analyst can be called '{role}'. {wanted}")


def roles_to_train(role: str | None, path: Path, data_dir: Path) -> list[str]:
    """The roles whose corpora are trained on: `role` itself or, for `shared`, all that the merge at `path` trains.

    Raises `InputError` for a role that the merge does not train, unless `data_dir` has its corpora: an analyst may join a finished
    team.
    """
    known = trained_roles(read_merge_config(path))
    if role == SHARED:
        return known
    joins = role not in (None, BASE) and corpus_file(data_dir, role, heldout=True).is_file()
    if role not in known and not joins:
        where = f"{path} lists {', '.join(known)}, and {data_dir} has no corpora of another role to train"
        raise InputError(f"unknown role '{role}': {where}.{nearest(role or '', known)}")
    check_name(role, "--role")
    return [role]


def _check_keys(path: Path, content: object, model: type, prefix: str) -> None:
    """Raise `InputError` for keys that mergekit would ignore, and for those that this merge has no use for."""
    if not isinstance(content, dict):
        what = prefix.rstrip(".") or "the file"
        raise InputError(f"{path}: {what} must be a mapping, found {type(content).__name__}.")
    for key in content:
        if key not in model.model_fields:
            raise InputError(f"{path}: unknown key '{prefix}{key}'.{nearest(str(key), model.model_fields)}")
        if key in UNUSED and content[key] is not None:
            raise InputError(f"{path}: '{prefix}{key}' can't be set here: {UNUSED[key]} Remove it.")


def _check_team(path: Path, config: MoEMergeConfig) -> None:
    names = roles(config)
    for name in names:
        check_name(name, str(path))
    if len(set(names)) < max(len(names), 2):
        raise InputError(f"{path}: the experts must be two or more different roles; found {', '.join(names)}.")
    if not 1 <= config.experts_per_token <= len(names):
        raise InputError(f"{path}: experts_per_token is {config.experts_per_token}; it must be 1 to {len(names)}.")
    prompts: dict[tuple[str, ...], str] = {}
    for name, expert in zip(names, config.experts, strict=True):
        own = tuple(expert.positive_prompts or ())
        if str(expert.source_model) not in (f"experts/{name}", BASE):
            raise InputError(
                f"{path}: source_model is '{expert.source_model}'. An expert is experts/ROLE, which recipes/train_expert.py "
                f"and the merge make in the run folder, or '{BASE}' for a generalist."
            )
        if not own:
            raise InputError(f"{path}: expert '{name}' has no positive_prompts. Add some that it should answer.")
        if own in prompts:
            raise InputError(
                f"{path}: experts '{prompts[own]}' and '{name}' have the same positive_prompts; tell them apart."
            )
        prompts[own] = name


if __name__ == "__main__":
    run(lambda: print(*trained_roles(read_merge_config(Path(sys.argv[1])))))
