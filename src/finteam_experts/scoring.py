# SPDX-License-Identifier: Apache-2.0
"""How likely a model finds token sequences as continuations of prompts: the scorer of evaluation, Space and experiments.

The Space is uploaded with this file, so it imports nothing of the package.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

HEAD_SLICE = 16384  # tokens of the vocabulary whose weights are converted to fp32 at once


class Score(NamedTuple):
    log_likelihood: float  # in nats, of all tokens of the continuation
    is_greedy: bool  # whether greedy decoding writes exactly these tokens


@dataclass
class _Sequence:
    """What is read at once: a prompt, and after it one branch for each of its continuations."""

    ids: list[int]
    positions: list[int]
    branches: list[int]  # of each token: 0 is the prompt
    places: dict[int, list[int]] = field(default_factory=dict)  # that predict each continuation's tokens


@torch.no_grad()
def log_likelihoods(
    model: torch.nn.Module,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    batch_tokens: int = 2048,
    bf16: bool = False,
    title: str | None = None,
) -> list[Score]:
    """Score each pair of a prompt and its continuation, both token ids.

    Give a label together with the token that ends it, or one that begins another always wins. A prompt is read once for all of
    its continuations. Batches hold about `batch_tokens` tokens of sequences of similar length, and the vocabulary head runs on
    the positions that predict a continuation only. With `bf16` all but the head computes in bfloat16. A progress bar needs a
    `title`.
    """
    scores: list[Score | None] = [None] * len(pairs)
    sequences = _sequences(model.config, pairs, batch_tokens)
    with tqdm(total=len(pairs), desc=title, leave=False, disable=title is None) as progress:
        for rows in batched([len(sequence.ids) for sequence in sequences], batch_tokens):
            batch = [sequences[row] for row in rows]
            wanted = [index for sequence in batch for index in sequence.places]
            places = [(row, place) for row, own in enumerate(batch) for at in own.places.values() for place in at]
            targets = torch.tensor([token for index in wanted for token in pairs[index][1]], device=model.device)
            inputs = {name: tensor.to(model.device) for name, tensor in _inputs(batch).items()}
            kept = tuple(torch.tensor(places, device=model.device).T)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16), float_head(model, kept):
                logits = model(**inputs, use_cache=False).logits[0]  # [tokens of all continuations, vocabulary]
            nats = (logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)).cpu().double()
            likeliest, lengths = (logits.argmax(-1) == targets).cpu(), [len(pairs[index][1]) for index in wanted]
            for index, own, hits in zip(wanted, nats.split(lengths), likeliest.split(lengths), strict=True):
                scores[index] = Score(own.sum().item(), bool(hits.all()))
            progress.update(len(wanted))
    return scores


@contextmanager
def float_head(model: torch.nn.Module, places: tuple[torch.Tensor, torch.Tensor] | None = None) -> Iterator[None]:
    """Within this context the model's logits are computed in fp32, whatever the type of its weights.

    In bfloat16 they come in steps of up to a quarter, and labels tie. What a model does to its logits after the head, such as a
    scale or a soft cap, is done to these. With `places`, rows and positions of hidden states ([n] each), the logits are those of
    these places alone, [1, n, vocabulary].
    """
    head = model.get_output_embeddings()
    is_plain = type(head) is torch.nn.Linear  # one with an adapter or quantised weights has to compute by itself
    held: list[torch.Tensor] = []

    def hold(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        held.append(inputs[0] if places is None else inputs[0][places][None])
        return (held[0][:, :0].to(module.weight.dtype) if is_plain else held[0],)

    def compute(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        hidden = held.pop().float()
        if not is_plain:
            return output.float()
        logits = hidden.new_empty(*hidden.shape[:-1], module.out_features)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, module.out_features, HEAD_SLICE):
                part = slice(start, start + HEAD_SLICE)
                bias = None if module.bias is None else module.bias[part].float()
                logits[..., part] = torch.nn.functional.linear(hidden, module.weight[part].float(), bias)
        return logits

    hooks = head.register_forward_pre_hook(hold), head.register_forward_hook(compute)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def stop_ids(form) -> list[int]:
    """The tokens that generation in a `ChatFormat` stops at: the one that ends its answers, and the tokenizer's own."""
    return sorted({form.stop_id, form.tokenizer.eos_token_id} - {None})


def batched(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """The indices of sequences of these lengths in batches, the shortest first, of about `batch_tokens` tokens with padding."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _sequences(config, pairs: Sequence[tuple[list[int], list[int]]], batch_tokens: int) -> list[_Sequence]:
    """What is read to score the pairs. Branches need a mask of their own, which only some attention can take."""
    longest = max((len(prompt) + len(continuation) for prompt, continuation in pairs), default=0)
    can_branch = config._attn_implementation == "sdpa" and longest <= (
        getattr(config, "sliding_window", None) or longest
    )
    sequences: list[_Sequence] = []
    open_ones: dict[tuple[int, ...], _Sequence] = {}  # by prompt
    for index, (prompt, continuation) in enumerate(pairs):
        read = continuation[:-1]  # the last token is only predicted
        own = open_ones.get(tuple(prompt))
        # a prompt shorter than the branch had better be read again: attention would cover the other branches too
        fits = own and len(own.ids) + len(read) <= batch_tokens and len(read) <= len(prompt)
        if not (fits and (can_branch or not read)):
            own = _Sequence(list(prompt), list(range(len(prompt))), [0] * len(prompt))
            open_ones[tuple(prompt)] = own
            sequences.append(own)
        start = len(own.ids)
        own.places[index] = [len(prompt) - 1, *range(start, start + len(read))]
        own.ids += read
        own.positions += range(len(prompt), len(prompt) + len(read))
        own.branches += [len(own.places)] * len(read)
    return sequences


def _inputs(batch: list[_Sequence]) -> dict[str, torch.Tensor]:
    """A model's inputs, padded on the right. Under causal attention that needs no mask: no earlier position sees it."""
    ids, positions, branches = (
        pad_sequence([torch.tensor(getattr(own, name)) for own in batch], batch_first=True, padding_value=value)
        for name, value in (("ids", 0), ("positions", 0), ("branches", -1))
    )
    if branches.max() < 2:
        return {"input_ids": ids}
    seen = (branches[:, None] == branches[:, :, None]) | (branches[:, None] == 0)  # [rows, queries, keys]
    return {"input_ids": ids, "position_ids": positions, "attention_mask": seen.tril()[:, None]}
