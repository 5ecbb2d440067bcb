# SPDX-License-Identifier: Apache-2.0
"""Attention within the sequences of a padding-free batch: what transformers' mask gives, and transformers' own elsewhere."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from finteam_experts.sequence_attention import NAME

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TOKENS = torch.arange(5, 45)[None]


@pytest.fixture(params=["base", "moe"])
def models(done_run, request):
    """The same model with transformers' attention and with ours."""
    return [
        AutoModelForCausalLM.from_pretrained(done_run / request.param, attn_implementation=name)
        for name in ("sdpa", NAME)
    ]


def batch(*lengths):
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": TOKENS[:, : positions.shape[1]], "position_ids": positions, "use_cache": False}


@pytest.mark.parametrize("lengths", [(40,), (17, 23), (1, 30, 2, 7)])
def test_packed_sequences_do_not_see_each_other(models, lengths):
    expected, ours = (model(**batch(*lengths)).logits for model in models)
    torch.testing.assert_close(ours, expected, **CLOSE)
    apart = [models[1](**batch(length)).logits for length in lengths[:1]]  # the first alone, its tokens are the same
    torch.testing.assert_close(ours[:, : lengths[0]], apart[0], **CLOSE)


def test_same_gradients(models):
    gradients = []
    for model in models:
        model(**batch(17, 23), labels=TOKENS).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, **CLOSE)


def test_padded_batches_and_generation_are_transformers_own(models):
    padded = {"input_ids": TOKENS.view(2, 20), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    padded["attention_mask"][0, :6] = 0
    expected, ours = (model(**padded).logits[:, 6:] for model in models)
    torch.testing.assert_close(ours, expected, **CLOSE)
    written = [model.generate(TOKENS[:, :9], max_new_tokens=6, do_sample=False) for model in models]
    assert torch.equal(*written)
