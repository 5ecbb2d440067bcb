# SPDX-License-Identifier: Apache-2.0
"""Everything that makes training fast on a CPU. `cpu_speedups: false` in a recipe turns it off; the results agree up to rounding.

1. A frozen linear layer and its LoRA are one function. PEFT adds the LoRA's product to the layer's output in separate steps
   over the whole output, each of which takes about as long as the frozen layer itself (LoRA: Hu et al. 2021,
   arXiv:2106.09685).
2. Each sequence of a padding-free batch attends to itself. transformers computes the attention between all tokens of the
   batch and masks the rest, unless a GPU's flash attention is there.
3. The vocabulary head runs once, and only on positions that carry a label (`loss.score_labels`). TRL 1.16 does so on GPUs;
   elsewhere it scores every position in chunks, and computes each chunk again in the backward pass.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "sdpa_within_sequences"  # the name under which transformers finds it
TOKENS = 32  # in bfloat16 a CPU compiles its kernels for every new number of tokens: batches are padded to a multiple


class _LoraLinear(torch.autograd.Function):
    """`x W' + scaling (x A') B'`, with gradients for x, A and B and none for the frozen W."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else weight.dtype
        rows, weight, a_low, b_low = x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype), a.to(dtype), b.to(dtype)
        inner = rows @ a_low.T  # [rows, rank]
        output = (rows @ weight.T).addmm_(inner, b_low.T, alpha=scaling)
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.scaling, ctx.input_dtype = scaling, x.dtype
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, inner, weight, a, b = ctx.saved_tensors
        shape, gradient = gradient.shape, gradient.reshape(-1, gradient.shape[-1])
        of_inner = (gradient @ b.to(rows.dtype)).mul_(ctx.scaling)
        of_b = (gradient.T @ inner).to(b.dtype).mul_(ctx.scaling)
        of_a = (of_inner.T @ rows).to(a.dtype)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight).addmm_(of_inner, a.to(rows.dtype))
            of_x = of_x.view(*shape[:-1], rows.shape[-1]).to(ctx.input_dtype)
        return of_x, None, of_a, of_b, None


class FusedLoraLinear(Linear):
    """PEFT's own layer, whose forward pass is one function while its only adapter is active and unmerged."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged or args or kwargs or len(self.active_adapters) != 1:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        parts = self.base_layer.weight, self.lora_A[name].weight, self.lora_B[name].weight
        return _LoraLinear.apply(x, *parts, self.scaling[name])


def fuse_lora(model: nn.Module) -> int:
    """Let the LoRA layers of `model` compute in one function, and return how many do.

    Layers with dropout, bias, a variant such as DoRA or a quantised base stay as they are.
    """
    fused = 0
    for module in model.modules():
        if type(module) is not Linear or type(module.base_layer) is not nn.Linear:
            continue
        plain = all(isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values())
        biased = [module.base_layer, *module.lora_B.values()]
        if plain and not module.lora_variant and all(layer.bias is None for layer in biased):
            module.__class__ = FusedLoraLinear
            fused += 1
    return fused


def attention_within_sequences(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention; `query`, `key` and `value` are [batch, heads, tokens, head dimension].

    A batch of one row, without a mask, is cut wherever `position_ids` [1, tokens] starts again at 0. It is computed in
    float32, whose backward pass takes less than half as long on short sequences as bfloat16's.
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


AttentionInterface.register(ATTENTION, attention_within_sequences)
AttentionMaskInterface.register(ATTENTION, _mask)
