# SPDX-License-Identifier: Apache-2.0
"""A LoRA layer as one function: PEFT's own outputs and gradients, and PEFT's own layer where it has more to do."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from finteam_experts.fused_lora import FusedLoraLinear, fuse_lora
from finteam_experts.models import load_model

TOKENS = torch.arange(5, 45).view(2, 20)
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(base, **settings):
    """The toy base with a LoRA that changes something already."""
    torch.manual_seed(0)
    model = get_peft_model(load_model(base), LoraConfig(r=4, target_modules=EVERYWHERE, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def loss_and_gradients(model, bf16):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_outputs_and_gradients_are_pefts(toy_base, rank_stabilised):
    expected = adapted(toy_base, use_rslora=rank_stabilised)
    fused = copy.deepcopy(expected)
    assert fuse_lora(fused) == 2 * len(EVERYWHERE)  # two layers
    (loss, gradients), (own_loss, own) = loss_and_gradients(expected, False), loss_and_gradients(fused, False)
    torch.testing.assert_close(own_loss, loss, rtol=1e-5, atol=0)
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        assert (own[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_in_bfloat16_it_is_as_close_to_float32_as_peft_is(toy_base):
    exact, theirs = adapted(toy_base), adapted(toy_base)
    ours = copy.deepcopy(theirs)
    fuse_lora(ours)
    gradients = [loss_and_gradients(model, bf16)[1] for model, bf16 in ((exact, False), (theirs, True), (ours, True))]
    flat = [torch.cat([own[name].flatten() for name in sorted(own)]) for own in gradients]
    of_peft, of_ours = ((part - flat[0]).norm() / flat[0].norm() for part in flat[1:])
    assert 0 < of_ours <= 1.25 * of_peft < 0.1


def test_without_its_adapter_and_merged_the_layer_is_pefts(toy_base):
    expected = adapted(toy_base).eval()
    fused = copy.deepcopy(expected)
    fuse_lora(fused)
    with expected.disable_adapter(), fused.disable_adapter():
        assert torch.equal(fused(TOKENS).logits, expected(TOKENS).logits)
    assert torch.equal(fused.merge_and_unload()(TOKENS).logits, expected.merge_and_unload()(TOKENS).logits)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_layers_that_do_more_are_left_alone(toy_base, settings):
    model = adapted(toy_base, **settings)
    assert fuse_lora(model) == 0
    assert not any(isinstance(module, FusedLoraLinear) for module in model.modules())
