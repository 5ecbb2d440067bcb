# SPDX-License-Identifier: Apache-2.0
"""The gates of an MoE's router: reading and replacing them, in a model or in its folder; forcing and watching them.

A gate is one layer's linear map from a token's hidden state to one logit per expert. All gates of a model together are a
tensor [layers, experts, hidden].
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from finteam_experts.errors import InputError
from finteam_experts.families import family_in, family_of, is_moe
from finteam_experts.files import read_json
from finteam_experts.weights import StoredTensors, cast, weight_files

GATES = "gates"  # a folder of the MoE: the gates it was merged with, and those that were fitted


def gate_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The gate of every layer of an MoE, first to last."""
    name = family_of(model.config).moe_block
    return [getattr(layer, name).gate for layer in model.model.layers]


def get_gates(model: torch.nn.Module) -> torch.Tensor:
    """A copy of all gates, fp32 [layers, experts, hidden]."""
    return torch.stack([gate.weight.detach().float().cpu() for gate in gate_modules(model)])


@torch.no_grad()
def set_gates(model: torch.nn.Module, gates: torch.Tensor) -> None:
    for gate, weight in zip(gate_modules(model), gates, strict=True):
        gate.weight.copy_(weight)


def read_gates(folder: Path) -> torch.Tensor:
    """All gates of the MoE in `folder`, in fp32."""
    family, layers = family_in(folder), read_json(folder / "config.json")["num_hidden_layers"]
    with StoredTensors(folder) as stored:
        return torch.stack([stored[family.gate_tensor(layer)] for layer in range(layers)]).float()


def load_gates(moe: Path, kind: str) -> torch.Tensor:
    """The gates that were saved beside the MoE in `moe` when it was merged (`hidden`) or its router fitted (`fitted`)."""
    path = moe / GATES / f"{kind}.safetensors"
    if not path.is_file():
        raise InputError(f"{path} does not exist. Merge again: scripts/merge_moe.py --overwrite")
    return load_file(path)["gates"]


def write_gates(folder: Path, gates: torch.Tensor) -> None:
    """Replace all gates of the MoE in `folder`, file by file, everything else as it was."""
    family = family_in(folder)
    own = {family.gate_tensor(layer): gate for layer, gate in enumerate(gates)}
    for file in weight_files(folder):
        tensors = load_file(file)
        if found := own.keys() & tensors.keys():
            tensors |= {name: cast(own[name], tensors[name].dtype, f"{folder}: {name}").contiguous() for name in found}
            partial = file.with_suffix(".partial")
            save_file(tensors, partial, metadata={"format": "pt"})
            partial.replace(file)


def random_gates(shape: torch.Size, seed: int) -> torch.Tensor:
    """Gates of random directions and unit norm, as mergekit's own gates have: a control for what fitting achieves."""
    return torch.nn.functional.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@contextlib.contextmanager
def forced_expert(model: torch.nn.Module, expert: int | None) -> Iterator[None]:
    """Within this context every token goes through the expert at that place alone; with `None` nothing changes."""

    def one_expert(module, inputs, output):
        logits, weights, choice = output
        return logits, torch.ones_like(weights[:, :1]), torch.full_like(choice[:, :1], expert)

    with contextlib.ExitStack() as stack:
        for gate in gate_modules(model) if expert is not None else ():
            stack.callback(gate.register_forward_hook(one_expert).remove)
        yield


@contextlib.contextmanager
def watched_mlps(model: torch.nn.Module, see: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Within this context `see(layer, hidden states [tokens, hidden])` is called with what each layer's MLP reads.

    In an MoE that is what its gate reads; in a dense expert, what the gate would read.
    """
    with contextlib.ExitStack() as stack:
        family = family_of(model.config)
        name = family.moe_block if is_moe(model.config) else family.mlp
        for layer, block in enumerate(model.model.layers):

            def before(module, inputs, layer=layer):
                see(layer, inputs[0].flatten(0, -2))

            stack.callback(getattr(block, name).register_forward_pre_hook(before).remove)
        yield
