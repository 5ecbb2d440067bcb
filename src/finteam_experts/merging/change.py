# SPDX-License-Identifier: Apache-2.0
"""Changing a team: an analyst is added, replaced or removed, and every other weight but the gates stays bit for bit."""

import contextlib
from pathlib import Path

import torch
from tqdm import tqdm

from finteam_experts.errors import InputError, NotFiniteError, nearest
from finteam_experts.families import family_of
from finteam_experts.fingerprints import trunk_fingerprint
from finteam_experts.merging.config import check_name
from finteam_experts.merging.layout import finish_folder
from finteam_experts.merging.sums import RouterSums
from finteam_experts.models import MLP_MODULES, check_base, read_config
from finteam_experts.weights import StoredTensors, new_writer

KINDS = ("add", "replace", "remove")
LEAST_EXPERTS = 2


def changed_team(names: list[str], kind: str, role: str) -> list[str]:
    """The names of the team after the change; `InputError` if the team can't be changed like that."""
    if kind == "add":
        check_name(role, "the analyst that joins")
        if role in names:
            raise InputError(f"the team has an analyst '{role}'. Replace that one, or choose another name.")
        return [*names, role]
    if role not in names:
        raise InputError(f"the team has no analyst '{role}', only {', '.join(names)}.{nearest(role, names)}")
    if kind == "remove" and len(names) <= LEAST_EXPERTS:
        raise InputError(
            f"the team has {len(names)} analysts, {' and '.join(names)}: without {role} it would be one dense model. "
            "Take the expert that is left, or the trunk."
        )
    return [name for name in names if name != role] if kind == "remove" else names


def check_expert(expert: Path, like: Path, trunk: str) -> None:
    """Raise `InputError` unless the dense model in `expert` branched off from the trunk of the team in `like`, or from `like`.

    `trunk` is the fingerprint of that trunk, as the team's router sums know it.
    """
    own, team = check_base(expert), read_config(like)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if getattr(own, key) != getattr(team, key):
            found = f"{key} is {getattr(own, key)} and not {getattr(team, key)}"
            raise InputError(
                f"{expert} is of another architecture than {like}: {found}. Train it from the team's trunk."
            )
    if trunk_fingerprint(expert) != trunk:
        raise InputError(
            f"{expert} has other attention, norms or embeddings than {like}: it was tuned from another model, or not in its MLPs "
            "alone. An expert of this team is trained from the team's trunk: recipes/train_expert.py --base TRUNK"
        )


def check_sums(sums: RouterSums, source: Path, like: RouterSums) -> None:
    """Raise `InputError` unless the sums in `source` are of the same layers and trunk as those of the team."""
    if sums.targets.shape != like.targets.shape:
        (layers, hidden), (own_layers, own_hidden) = like.targets.shape, sums.targets.shape
        raise InputError(
            f"{source} has sums of {own_layers} layers of {own_hidden}, and the team has {layers} layers of {hidden}. They are of "
            "another model. Compute them again: scripts/router_sums.py"
        )
    if sums.trunk != like.trunk:
        raise InputError(
            f"{source} was computed with a model of another trunk ({sums.trunk}; the team's is {like.trunk}). Compute the sums "
            "again with the expert that joins: scripts/router_sums.py"
        )


def write_changed(moe: Path, members: list[int | Path], gates: torch.Tensor, target: Path) -> None:
    """Write the team of `members` with `gates` [layers, members, hidden] to `target`, one tensor at a time.

    A member is a place in the MoE in `moe`, or the folder of a dense expert. All else is taken over from `moe`. Raises
    `NotFiniteError` if a weight of a dense expert is not finite.
    """
    config = read_config(moe)
    family = family_of(config)
    config.num_local_experts = len(members)
    config.num_experts_per_tok = min(config.num_experts_per_tok, len(members))
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(StoredTensors(moe))
        dense = {member: stack.enter_context(StoredTensors(member)) for member in members if isinstance(member, Path)}
        writer = new_writer(target)
        for name in old:
            if f".{family.block}." not in name:
                writer.save_tensor(name, old[name])
        for layer in tqdm(range(config.num_hidden_layers), desc="writing the team", leave=False):
            dtype = old[family.gate_tensor(layer)].dtype
            writer.save_tensor(family.gate_tensor(layer), gates[layer].to(dtype).contiguous())
            for place, member in enumerate(members):
                for matrix in MLP_MODULES:
                    if isinstance(member, Path):
                        name = f"model.layers.{layer}.mlp.{matrix}.weight"
                        tensor = dense[member][name].to(dtype)
                        if not tensor.isfinite().all():
                            raise NotFiniteError(f"{member}: {name} is not finite. Train the expert again.")
                    else:
                        tensor = old[family.expert_tensor(layer, member, matrix)]
                    writer.save_tensor(family.expert_tensor(layer, place, matrix), tensor)
        writer.finalize()
    finish_folder(config, moe, target)
