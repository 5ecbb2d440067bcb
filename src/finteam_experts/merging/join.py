# SPDX-License-Identifier: Apache-2.0
"""Several dense experts as one model: side by side in an MoE, or averaged.

Side by side with all else averaged is the mixing of Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv:2403.07816); the
average of all weights is a model soup (Wortsman et al. 2022, arXiv:2203.05482).
"""

import contextlib
from pathlib import Path

import torch
from tqdm import tqdm

from finteam_experts.errors import InputError, NotFiniteError
from finteam_experts.families import family_in
from finteam_experts.merging.layout import finish_folder
from finteam_experts.models import MLP_MODULES, load_model, read_config
from finteam_experts.weights import StoredTensors, new_writer


def join(folders: list[Path], gates: torch.Tensor | None, like: Path, target: Path) -> None:
    """Write the joined model to `target`: the experts' MLPs side by side with `gates` [layers, experts, hidden], or averaged.

    `like` is a model of the result's architecture; its config and companions are taken over. Raises `InputError` if the
    experts do not have the same tensors or one of them is not finite.
    """
    family = family_in(like)
    with contextlib.ExitStack() as stack:
        experts = [stack.enter_context(StoredTensors(folder)) for folder in folders]
        names = list(experts[0])
        for expert in experts[1:]:
            if different := sorted(set(expert) ^ set(names)):
                raise InputError(f"the experts have different tensors: {different[0]} is not in all.")
        writer = new_writer(target)
        for name in tqdm(names, desc="joining", leave=False):
            own = [expert[name] for expert in experts]
            if not all(tensor.isfinite().all() for tensor in own):
                raise NotFiniteError(f"{name} of an expert is not finite: look at the experts' training logs.")
            if gates is None or ".mlp." not in name:
                writer.save_tensor(name, torch.stack([tensor.float() for tensor in own]).mean(0).to(own[0].dtype))
                continue
            _, _, layer, _, matrix, _ = name.split(".")  # model.layers.N.mlp.gate_proj.weight
            for place, tensor in enumerate(own):
                writer.save_tensor(family.expert_tensor(layer, place, matrix), tensor)
            if matrix == MLP_MODULES[0]:
                writer.save_tensor(family.gate_tensor(layer), gates[int(layer)].to(own[0].dtype).contiguous())
        writer.finalize()
    finish_folder(read_config(like), like, target)


@torch.no_grad()
def weight_average(folders: list[Path]) -> torch.nn.Module:
    """The dense model whose MLPs are the mean of the experts' (they have all else from the base)."""
    model = load_model(folders[0])
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(StoredTensors(folder)) for folder in folders[1:]]
        for name, tensor in model.state_dict().items():
            if any(f".mlp.{module}." in name for module in MLP_MODULES):
                tensor.copy_(sum((other[name] for other in others), tensor) / len(folders))
    return model
