# SPDX-License-Identifier: Apache-2.0
"""Held-out loss of a language model on plain passages."""

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def heldout_loss(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    passages: list[str],
    *,
    max_tokens: int = 192,
    batch_size: int = 8,
) -> float:
    """Mean negative log-likelihood in nats a token over the first `max_tokens` tokens of each passage.

    Its exponential is the perplexity. Every predicted token counts the same, whatever passage it is in.
    """
    was_training = model.training
    model.eval()
    encoded = [tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"] for text in passages]
    encoded = sorted((ids for ids in encoded if len(ids) > 1), key=len)  # near-equal lengths: little padding
    total, count = 0.0, 0
    for start in tqdm(range(0, len(encoded), batch_size), desc="held-out passages", leave=False):
        batch = tokenizer.pad(
            {"input_ids": encoded[start : start + batch_size]}, padding_side="right", return_tensors="pt"
        )
        batch = batch.to(model.device)
        logits = model(**batch).logits[:, :-1].flatten(0, 1).float()  # [batch * (length - 1), vocabulary]
        targets = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100).flatten()
        total += torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
        count += (targets != -100).sum().item()
    model.train(was_training)
    return total / count
