# SPDX-License-Identifier: Apache-2.0
"""Token sequences of different lengths as padded batches."""

from collections.abc import Iterator

from tqdm import tqdm
from transformers import BatchEncoding, PreTrainedTokenizerBase

from finteam_experts.scoring import batched


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int) -> list[list[int]]:
    """The token ids of each text, cut to `max_tokens`; texts of a single token, which predict nothing, are left out."""
    if not texts:
        return []
    encoded = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    return [ids for ids in encoded if len(ids) > 1]


def padded_batches(
    sequences: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_tokens: int = 1536,
    title: str,
    padding_side: str = "right",
) -> Iterator[tuple[list[int], BatchEncoding]]:
    """Padded batches of about `batch_tokens` tokens, each with the positions of its rows in `sequences`.

    Sequences of similar length go together, so that little is padding. A progress bar called `title` counts them.
    """
    with tqdm(total=len(sequences), desc=title, leave=False) as progress:
        for rows in batched([len(ids) for ids in sequences], batch_tokens):
            batch = {"input_ids": [sequences[row] for row in rows]}
            yield rows, tokenizer.pad(batch, padding_side=padding_side, return_tensors="pt")
            progress.update(len(rows))
