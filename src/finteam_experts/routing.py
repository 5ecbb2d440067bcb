# SPDX-License-Identifier: Apache-2.0
"""What the router of the MoE does with a text."""

import torch


@torch.no_grad()
def expert_shares(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    """The share of the gate weight that each expert gets, the mean over tokens: [layers, experts], rows sum to 1.

    The weights are those that mix the experts' outputs: softmax over all, the top k kept and renormalised. The first
    token is left out: it is an attention sink, and routes alike in every text.
    """
    router_logits = model(torch.tensor([token_ids], device=model.device), output_router_logits=True).router_logits
    layers = []
    for logits in router_logits:  # [tokens, experts]
        probabilities = logits[1:].float().softmax(-1)
        top = probabilities.topk(model.config.num_experts_per_tok, dim=-1)
        kept = torch.zeros_like(probabilities).scatter(1, top.indices, top.values)
        layers.append((kept / kept.sum(-1, keepdim=True)).mean(0))
    return torch.stack(layers)
