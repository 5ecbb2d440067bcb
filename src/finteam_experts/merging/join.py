# SPDX-License-Identifier: Apache-2.0
"""The average of several dense experts: a model soup (Wortsman et al. 2022, arXiv:2203.05482)."""

import contextlib
from pathlib import Path

import torch

from finteam_experts.models import MLP_MODULES, load_model
from finteam_experts.weights import StoredTensors


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
