# SPDX-License-Identifier: Apache-2.0
"""Tuning an MoE with every row in the expert of its task's role: the router is ignored.

Experts of one field each with shared attention are DEMix layers (Gururangan et al. 2021,
arXiv:2108.05036). The router, which has to find the expert by itself, is fitted afterwards.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from finteam_experts.merging.gates import gate_modules

EXPERT = "expert"  # the dataset's column, and what the collator makes of it


class TaskRouting:
    """Replaces what the gates of `model` choose, while it is training, by the expert of each token in `experts`."""

    def __init__(self, model: nn.Module) -> None:
        self.experts: torch.Tensor | None = None  # [tokens] of the current batch
        for gate in gate_modules(model):
            gate.register_forward_hook(self._own_expert)

    def _own_expert(self, gate: nn.Module, inputs: tuple, output: tuple[torch.Tensor, ...]) -> tuple | None:
        logits, weights, _ = output
        if not gate.training or self.experts is None:
            return None
        padding = self.experts[: len(logits) - len(self.experts)]  # the batch is padded with its leading tokens
        chosen = torch.cat([self.experts, padding])
        return logits, torch.ones_like(weights[:, :1]), chosen[:, None]


def with_experts(collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`collate`, which also gives the expert of every token, [tokens of the batch], where rows have one."""

    def collate_with_experts(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        experts = torch.tensor([row[EXPERT] for row in rows])
        tokens = batch["input_ids"].shape
        padding_free = tokens[0] == 1
        lengths = torch.tensor([len(row["input_ids"]) for row in rows]) if padding_free else tokens[1]
        return {**batch, EXPERT: experts.repeat_interleave(lengths)}

    return collate_with_experts
