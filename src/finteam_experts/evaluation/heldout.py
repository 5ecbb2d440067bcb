# SPDX-License-Identifier: Apache-2.0
"""The loss of a language model on text that it was not trained on: passages, and answers to conversations."""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from finteam_experts.chats import Exchange
from finteam_experts.errors import NotFiniteError
from finteam_experts.evaluation.batches import encode
from finteam_experts.scoring import Score, log_likelihoods

LARGEST_LOSS = 100  # nats per token: a model that knows nothing of a vocabulary of a million has 14
BATCH_TOKENS = (
    512  # of texts of which every token is predicted: the logits of more would take more memory than a training step
)


def heldout_loss(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, passages: list[str], *, max_tokens: int = 192
) -> float:
    """Mean negative log-likelihood in nats per token over the first `max_tokens` tokens of each passage.

    Its exponential is the perplexity. Every predicted token has the same weight.
    """
    was_training = model.training
    model.eval()
    pairs = [(ids[:1], ids[1:]) for ids in encode(tokenizer, passages, max_tokens)]
    scores = log_likelihoods(model, pairs, batch_tokens=BATCH_TOKENS, title="held-out passages")
    model.train(was_training)
    _check_finite(scores, "the held-out loss")
    return -sum(score.log_likelihood for score in scores) / sum(len(tokens) for _, tokens in pairs)


def answer_scores(
    model: torch.nn.Module,
    exchanges: Sequence[Exchange],
    *,
    batch_tokens: int = 2048,
    bf16: bool = False,
    title: str = "scores",
) -> list[Score]:
    """The score of each answer with its end, as it was trained; `NotFiniteError` if one is not a number."""
    pairs = [(exchange.prompt, exchange.scored) for exchange in exchanges]
    scores = log_likelihoods(model, pairs, batch_tokens=batch_tokens, bf16=bf16, title=title)
    _check_finite(scores, "the log-likelihood of an answer")
    return scores


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats per token; `NotFiniteError` for the loss of a model that has diverged."""
    if loss > LARGEST_LOSS:
        found = f"the held-out loss is {loss:.0f} nats per token: the training has diverged"
        raise NotFiniteError(f"{found}. Lower learning_rate and train again.")
    return math.exp(loss)


def _check_finite(scores: list[Score], what: str) -> None:
    if not all(math.isfinite(score.log_likelihood) for score in scores):
        found = f"{what} is not finite: the model's weights are not, or they overflow in their type"
        raise NotFiniteError(f"{found}. Look at its training log.")
