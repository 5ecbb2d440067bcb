# SPDX-License-Identifier: Apache-2.0
"""An MoE whose experts are plain linear layers while it is trained or evaluated on a CPU.

transformers keeps the experts of a layer in two fused tensors. PEFT adapts such a tensor by adding the product of its LoRA to
it before every use, so that the backward pass computes the gradient of the whole tensor, as full tuning would. Linear layers
take a LoRA as it is meant: the forward pass adds a small product, and no gradient of a frozen weight is computed.
"""

from collections.abc import Collection

import torch
from torch import nn
from transformers import PretrainedConfig

from finteam_experts.families import family_of, is_moe

# Tokens of an expert are padded to a multiple of this. A CPU compiles a kernel for every new shape in bfloat16, and the
# router gives each expert of each layer another number of tokens at every step: a third of the time went into that.
ROWS = 32


def adapts_linear_experts(config: PretrainedConfig, target_modules: Collection[str] | None) -> bool:
    """Whether a LoRA on modules of these names is meant for an MoE's experts as linear layers."""
    return is_moe(config) and not family_of(config).matrices.keys().isdisjoint(target_modules or ())


class SplitExperts(nn.Module):
    """The experts of one layer, with the interface of the fused module, whose memory they share."""

    def __init__(self, fused: nn.Module, names: Collection[str]) -> None:
        super().__init__()
        self.act_fn = fused.act_fn
        self.gate, self.up, self.down = names
        self.experts = nn.ModuleList()
        for gate_up, down in zip(fused.gate_up_proj.data, fused.down_proj.data, strict=True):
            weights = zip(names, (*gate_up.chunk(2), down), strict=True)
            self.experts.append(nn.ModuleDict({name: _linear(weight) for name, weight in weights}))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Mix the chosen experts' outputs: `hidden_states` [tokens, hidden], the others [tokens, experts per token]."""
        mixed = torch.zeros_like(hidden_states)
        if top_k_index.shape[-1] == len(self.experts):  # nothing to gather
            for place, expert in enumerate(self.experts):
                gate = (top_k_weights * (top_k_index == place)).sum(-1, keepdim=True)
                mixed = mixed + (self._output(expert, hidden_states) * gate).to(mixed.dtype)
            return mixed
        # One gather for all experts, and one sum
        tokens, gates = [], []
        for place in range(len(self.experts)):
            token, choice = torch.where(top_k_index == place)
            missing = -len(token) % ROWS  # padded with the first token, at a weight of 0
            tokens.append(nn.functional.pad(token, (0, missing)))
            gates.append(nn.functional.pad(top_k_weights[token, choice], (0, missing)))
        index = torch.cat(tokens)
        own = hidden_states.index_select(0, index).split([len(token) for token in tokens])
        # An expert without tokens takes part all the same: every process has to use the same parameters
        outputs = torch.cat([self._output(expert, part) for expert, part in zip(self.experts, own, strict=True)])
        return mixed.index_add(0, index, outputs.to(mixed.dtype) * torch.cat(gates)[:, None].to(mixed.dtype))

    def _output(self, expert: nn.ModuleDict, hidden_states: torch.Tensor) -> torch.Tensor:
        return expert[self.down](self.act_fn(expert[self.gate](hidden_states)) * expert[self.up](hidden_states))


def _linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def split_experts(model: nn.Module) -> None:
    """Turn every layer's fused experts into linear layers called gate_proj, up_proj and down_proj, as in a dense model.

    From then on this model's config says another `model_type`: PEFT converts LoRAs of the types that transformers fuses, by
    that name, and would take those of a Qwen3-MoE's gate_proj for one of a part of the fused tensor. Saved configs say what
    their class does.
    """
    family = family_of(model.config)
    model.config.model_type = f"{family.moe_type}_split"
    for layer in model.model.layers:
        block = getattr(layer, family.moe_block)
        block.experts = SplitExperts(block.experts, family.matrices.keys())


def split_on_cpu(model: nn.Module) -> None:
    """Split the experts of an MoE that reads on a CPU, where it is twice as fast; a GPU has kernels for fused experts."""
    if is_moe(model.config) and model.device.type == "cpu":
        split_experts(model)
