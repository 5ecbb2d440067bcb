# SPDX-License-Identifier: Apache-2.0
"""Experts as linear layers: the same function, the same gradients, and back again without a trace."""

import copy

import pytest
import torch

from finteam_experts.models import load_model
from finteam_experts.split_experts import fuse_experts, split_experts


@pytest.fixture
def models(done_run):
    fused = load_model(done_run / "moe")
    split = copy.deepcopy(fused)
    split_experts(split)
    return fused, split


CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TOKENS = torch.arange(5, 45).view(2, 20)


def test_same_logits(models):
    fused, split = models
    for model in (split, split.train()):
        torch.testing.assert_close(model(TOKENS).logits, fused(TOKENS).logits, **CLOSE)


def test_same_gradients(models):
    fused, split = models
    for model in models:
        model.requires_grad_(True)
        model(TOKENS, labels=TOKENS).loss.backward()
    for ours, theirs in zip(split.model.layers, fused.model.layers, strict=True):
        for place, expert in enumerate(ours.mlp.experts.experts):
            gate_up = torch.cat([expert["gate_proj"].weight.grad, expert["up_proj"].weight.grad])
            torch.testing.assert_close(gate_up, theirs.mlp.experts.gate_up_proj.grad[place], **CLOSE)
            torch.testing.assert_close(
                expert["down_proj"].weight.grad, theirs.mlp.experts.down_proj.grad[place], **CLOSE
            )
        torch.testing.assert_close(ours.mlp.gate.weight.grad, theirs.mlp.gate.weight.grad, **CLOSE)


def test_splitting_takes_no_memory_and_fusing_takes_what_changed(models):
    fused, split = models
    before = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    layer = split.model.layers[1].mlp.experts
    assert layer.experts[2]["up_proj"].weight.untyped_storage().data_ptr() == (
        layer.fused[0].gate_up_proj.untyped_storage().data_ptr()
    )
    layer.experts[2]["up_proj"].weight = torch.nn.Parameter(layer.experts[2]["up_proj"].weight + 1)
    fuse_experts(split)
    after = split.state_dict()
    assert before.keys() == after.keys()
    changed = "model.layers.1.mlp.experts.gate_up_proj"
    for name in before:
        if name != changed:
            assert torch.equal(before[name], after[name]), name
    half = before[changed].shape[1] // 2
    before[changed][2, half:] += 1
    assert torch.equal(before[changed], after[changed])


def test_an_expert_that_no_token_chose_still_takes_part_in_the_backward_pass(models):
    """Else processes of one launch would wait for each other's gradients for ever."""
    _, split = models
    split.train().requires_grad_(True)
    for layer in split.model.layers:
        layer.mlp.gate.weight.data.zero_()
        layer.mlp.gate.weight.data[0] = 0  # ties: the first two of three are chosen
    split(TOKENS, labels=TOKENS).loss.backward()
    unused = split.model.layers[0].mlp.experts.experts[2]["down_proj"].weight.grad
    assert unused is not None
    assert not unused.any()
