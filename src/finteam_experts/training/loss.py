# SPDX-License-Identifier: Apache-2.0
"""The loss of every training, from the log-probability of each label: a mean over labels, or over rows.

In a mean over labels a task's answer of one or two tokens contributes little next to a conversation's of thirty.
"""

from typing import NamedTuple

import torch
from torch import nn


class ScoredLabels(NamedTuple):
    """What a model says of the labels of a micro-batch, those that are not -100: each tensor is [labels]."""

    log_probs: torch.Tensor
    is_top: torch.Tensor  # whether the label is the most probable token
    entropy: torch.Tensor | None = None  # of the distribution it is from
    mean_log_probs: torch.Tensor | None = None  # over the vocabulary
    aux_loss: torch.Tensor | None = None  # of an MoE's router, a single number


def label_mask(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which tokens are predicted: [batch, tokens - 1], since the first one of a batch has nothing before it."""
    return inputs["labels"][:, 1:] != -100


def rows_of_labels(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The number of the row that each label belongs to: [labels]. A padding-free or packed batch has many rows in one."""
    ids, positions = inputs["input_ids"], inputs.get("position_ids")
    if positions is None:
        rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    else:
        rows = (positions == 0).flatten().cumsum(0).view_as(positions)
    return rows[:, 1:][label_mask(inputs)]


def count_rows(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """How many rows of a micro-batch have a label."""
    rows = rows_of_labels(inputs)
    return torch.tensor(len(rows.unique()), device=rows.device)


def summed_loss(
    scored: ScoredLabels, *, dft: bool = False, smoothing: float = 0.0, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum of the labels' losses or, with the number of each label's row in `rows` [labels], of each row's mean.

    `dft` weights each label by its own probability (arXiv:2508.05629). `smoothing` is the share of the target that is spread over
    the vocabulary; it needs `mean_log_probs`.
    """
    losses = -scored.log_probs
    if dft:
        losses = losses * scored.log_probs.detach().exp()
    if smoothing:
        losses = (1 - smoothing) * losses - smoothing * scored.mean_log_probs
    if rows is None:
        return losses.sum()
    _, places, counts = rows.unique(return_inverse=True, return_counts=True)
    return (losses / counts[places]).sum()


def score_labels(
    model: nn.Module, inputs: dict[str, torch.Tensor], *, smoothing: bool = False, multiple: int = 1
) -> ScoredLabels:
    """Run the vocabulary head once, and only where a row of the batch has a label.

    `inputs` are those of the model with `labels`. A padding-free batch is filled up to a `multiple` of tokens.
    """
    mask = label_mask(inputs)
    positions = mask.any(0).nonzero().flatten()
    model_inputs = {key: value for key, value in inputs.items() if key != "labels"}
    if "attention_mask" not in inputs:
        # by its leading tokens: they have no labels here, and a router's load stays that of real text
        missing = -inputs["input_ids"].shape[1] % multiple
        for key in ("input_ids", "position_ids"):
            model_inputs[key] = torch.cat([inputs[key], inputs[key][:, :missing]], dim=1)
    outputs = model(**model_inputs, use_cache=False, logits_to_keep=positions)
    logits = outputs.logits[0] if len(mask) == 1 else outputs.logits[mask[:, positions]]
    logits, targets = logits.float(), inputs["labels"][:, 1:][mask]  # [labels, vocabulary]
    log_probs = -nn.functional.cross_entropy(logits, targets, reduction="none")
    mean = logits.mean(-1) - logits.logsumexp(-1) if smoothing else None
    return ScoredLabels(log_probs, logits.argmax(-1) == targets, None, mean, getattr(outputs, "aux_loss", None))
