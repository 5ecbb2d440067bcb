# SPDX-License-Identifier: Apache-2.0
"""A frozen linear layer and its LoRA as one function, for training on a CPU.

PEFT adds the LoRA's product to the layer's output in steps of their own: a product, a scaling, a sum and their casts, each
over the whole output. On a CPU each of these takes about as long as the frozen layer itself. Here the products are added
where the output lies, forward and backward (LoRA: Hu et al. 2021, arXiv:2106.09685).
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn


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
            of_x = (
                (gradient @ weight)
                .addmm_(of_inner, a.to(rows.dtype))
                .view(*shape[:-1], rows.shape[-1])
                .to(ctx.input_dtype)
            )
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
