# SPDX-License-Identifier: Apache-2.0
"""Held-out loss of a language model on plain passages."""

import math

import torch
from transformers import PreTrainedTokenizerBase

from finteam_experts.errors import NotFiniteError
from finteam_experts.evaluation.batches import encode, padded_batches

LARGEST_LOSS = 100  # nats per token: a model that knows nothing of a vocabulary of a million has 14
BATCH_TOKENS = 512  # the logits of more would take more memory than a training step


def token_losses(logits: torch.Tensor, token_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats of every token but the first, [rows, tokens - 1]; 0 where it is padding.

    `logits` is [rows, tokens, vocabulary], the others [rows, tokens].
    """
    targets = token_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100)
    flat = logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(flat, targets.flatten(), reduction="none").view(targets.shape)


@torch.no_grad()
def heldout_loss(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, passages: list[str], *, max_tokens: int = 192
) -> float:
    """Mean negative log-likelihood in nats per token over the first `max_tokens` tokens of each passage.

    Its exponential is the perplexity. Every predicted token has the same weight.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    sequences = encode(tokenizer, passages, max_tokens)
    for _, batch in padded_batches(sequences, tokenizer, batch_tokens=BATCH_TOKENS, title="held-out passages"):
        batch = batch.to(model.device)
        total += token_losses(model(**batch).logits, batch["input_ids"], batch["attention_mask"]).sum().item()
        count += batch["attention_mask"][:, 1:].sum().item()
    model.train(was_training)
    if not math.isfinite(total):
        found = "the held-out loss is not finite: the model's weights are not, or they overflow"
        raise NotFiniteError(f"{found}. Look at its training log.")
    return total / count


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats per token; `NotFiniteError` for the loss of a model that has diverged."""
    if loss > LARGEST_LOSS:
        found = f"the held-out loss is {loss:.0f} nats per token: the training has diverged"
        raise NotFiniteError(f"{found}. Lower learning_rate and train again.")
    return math.exp(loss)
