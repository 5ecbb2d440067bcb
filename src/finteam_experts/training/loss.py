# SPDX-License-Identifier: Apache-2.0
"""A loss in which every row counts alike, however long its answer.

The mean over tokens hears a label, which is one or two tokens, less than a conversation's answer of thirty.
"""

from typing import Any

import torch
from torch import nn
from trl import SFTTrainer


def row_numbers(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The number of the row that each token belongs to, in the shape of `input_ids`; a padding-free batch has many in one."""
    ids, positions = inputs["input_ids"], inputs.get("position_ids")
    if positions is not None:
        return (positions == 0).flatten().cumsum(0).view(positions.shape) - 1
    return torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)


def mean_over_rows(logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The mean over rows of each row's mean cross-entropy: `logits` [tokens, vocabulary], `targets` and `rows` [tokens]."""
    losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    _, places, counts = rows.unique(return_inverse=True, return_counts=True)
    return (losses / counts[places]).sum() / len(counts)


def balanced_loss(trainer: SFTTrainer, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
    """TRL's loss with every row of the batch counted alike."""
    model_inputs = {key: value for key, value in inputs.items() if key != "labels"}
    if trainer.aux_loss_enabled:
        model_inputs["output_router_logits"] = True
    outputs = model(**model_inputs, use_cache=False)
    targets = inputs["labels"][:, 1:]
    labelled = targets != -100
    loss = mean_over_rows(outputs.logits[:, :-1][labelled], targets[labelled], row_numbers(inputs)[:, 1:][labelled])
    if trainer.aux_loss_enabled:
        loss = loss + trainer.router_aux_loss_coef * outputs.aux_loss
    # a mean over the micro-batch, unlike a token sum, so gradient accumulation has to divide it
    return loss / (trainer.current_gradient_accumulation_steps if num_items is not None else 1)
