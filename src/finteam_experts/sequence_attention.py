# SPDX-License-Identifier: Apache-2.0
"""Attention of a padding-free batch on a CPU: each of its sequences attends to itself.

transformers computes the attention between all tokens of such a batch and masks what lies in other sequences, unless it has
a GPU's flash attention. A batch of many short rows spends most of its attention there. It is computed in float32, whose
backward pass takes less than half as long on short sequences as bfloat16's.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_within_sequences"


def attention_within_sequences(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention; `query`, `key` and `value` are [batch, heads, tokens, head dimension].

    A batch of one row, without a mask, is cut wherever `position_ids` [1, tokens] starts again at 0.
    """
    packed = attention_mask is None and position_ids is not None and query.shape[0] == 1
    if not packed or query.shape[2] != key.shape[2] or position_ids.shape[-1] != query.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    starts = [*(position_ids[0] == 0).nonzero().flatten().tolist(), query.shape[2]]
    lengths = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    parts = zip(*(states.float().split(lengths, dim=2) for states in (query, key, value)), strict=True)
    with torch.autocast("cpu", enabled=False):
        outputs = [sdpa_attention_forward(module, *part, None, **kwargs)[0] for part in parts]
    return torch.cat(outputs, dim=1).to(query.dtype), None


def _mask(
    batch_size: int, q_length: int, kv_length: int, *, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """No mask for one row of whole sequences, transformers' own for all else."""
    if batch_size == 1 and q_length == kv_length and attention_mask is None:
        return None
    return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, attention_within_sequences)
AttentionMaskInterface.register(NAME, _mask)
