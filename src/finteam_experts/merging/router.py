# SPDX-License-Identifier: Apache-2.0
"""Fitting the router: each layer's gate by ridge regression of roles on the hidden states that the gate reads.

The fit is a linear classifier in closed form (ridge regression: Hoerl and Kennard 1970, doi:10.1080/00401706.1970.10488634)
from running sums over one pass. That experts trained apart need a router fitted to them is the finding of
Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv 2403.07816), which trains it; gates from hidden states are mergekit's
(Goddard et al. 2024, arXiv 2403.13257); the mixture is Mixtral's (Jiang et al. 2024, arXiv 2401.04088).
"""

import math
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from finteam_experts.errors import InputError, NotFiniteError
from finteam_experts.evaluation.batches import padded_batches
from finteam_experts.evaluation.routing import measure_routing
from finteam_experts.merging.gates import forced_experts, gate_modules, set_gates, watched_gates

Sequences = list[list[int]]  # token ids

SMALLEST_SCALE, FIRST_SCALE, LARGEST_SCALE = 0.5, 8.0, 64.0
LEAST_GAIN = 5e-4


class GateRegression:
    """Ridge regression of one-hot experts on gate inputs, one for each layer, no bias: a Mixtral gate has none.

    Holds X'X [layers, hidden, hidden] and X'Y [layers, hidden, experts] in fp32, for any number of tokens.
    """

    def __init__(self, layers: int, experts: int, hidden: int, device: torch.device | str = "cpu") -> None:
        self.experts = experts
        self.inputs = torch.zeros(layers, hidden, hidden, device=device)
        self.targets = torch.zeros(layers, hidden, experts, device=device)

    def add(self, layer: int, hidden_states: torch.Tensor, experts: torch.Tensor) -> None:
        """Add tokens to one layer: `hidden_states` [tokens, hidden] and the index of each one's expert [tokens].

        The index after the last expert's is that of general text, which no expert is to get for itself.

        Raises `InputError` if a hidden state is not finite.
        """
        x = hidden_states.float()
        if not x.isfinite().all():
            raise InputError(
                f"the hidden states that the gate of layer {layer} reads are not finite. An expert or the base has NaN or "
                "overflows in its dtype: look at the adapters' training log, or load it in bfloat16 or float32."
            )
        self.inputs[layer].addmm_(x.T, x)
        self.targets[layer].addmm_(
            x.T, torch.nn.functional.one_hot(experts, self.experts + 1)[:, : self.experts].to(x)
        )

    def solve(self, ridge: float) -> torch.Tensor:
        """The gates, fp32 [layers, experts, hidden]; `ridge` is the penalty as a share of the mean diagonal of X'X."""
        gates = []
        for xx, xy in zip(self.inputs, self.targets, strict=True):  # one by one: a batched solve fails on some CPUs
            xx = xx.double()
            penalty = ridge * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
            gates.append(torch.cholesky_solve(xy.double(), torch.linalg.cholesky(xx + penalty)).T.float())
        return torch.stack(gates)


def choose_scale(loss_at: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The gate scale with a low held-out loss, and the loss of every scale that was tried.

    Only differences of logits matter to a softmax, so the scale is how sharply the gate mixes: at 0 the chosen experts
    count alike, at infinity the first one alone. From `FIRST_SCALE` it is doubled while that lowers the loss by at least
    `LEAST_GAIN` of it (a sharper gate gets smaller gradients in tuning), or halved while that lowers it at all.
    """
    tried: dict[float, float] = {}

    def gain(now: float, then: float) -> float:
        for scale in (now, then):
            tried[scale] = tried[scale] if scale in tried else loss_at(scale)
        return 1 - tried[then] / tried[now]

    scale = FIRST_SCALE
    while scale < LARGEST_SCALE and gain(scale, 2 * scale) >= LEAST_GAIN:
        scale *= 2
    if scale == FIRST_SCALE:
        while scale > SMALLEST_SCALE and gain(scale, scale / 2) > 0:
            scale /= 2
    return scale, tried


def calibrate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: list[Sequences],
    held_back: list[Sequences],
    ridge: float,
    general: Sequences = (),
    seed: int = 0,
) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """One pass over the calibration text of each role, in the order of the experts.

    Every sequence goes through its own role's expert alone, as it will once the router is right; `general` ones, which are no
    role's, through one after the other. Returns the gates, and
    the curve of their quality: the share of held-back tokens that they send to their own expert, by tokens read.
    """
    sums = GateRegression(len(gate_modules(model)), len(text), model.config.hidden_size, model.device)
    unseen = _gate_inputs(model, tokenizer, held_back)
    sequences = [(ids, role) for role, own in enumerate([*text, general]) for ids in own]
    random.Random(seed).shuffle(sequences)
    curve, seen, tokens, seconds = [], 0, 0, 0.0
    while seen < len(sequences):
        start = time.monotonic()
        part = sequences[seen : max(2 * seen, 2 * len(text))]  # as many again as before: a curve with few points
        for rows, batch in padded_batches([ids for ids, _ in part], tokenizer, title="calibrating"):
            _forward(model, batch, torch.tensor([part[row][1] for row in rows]), len(text), sums.add)
        seen, tokens = seen + len(part), tokens + sum(len(ids) for ids, _ in part)
        gates = sums.solve(ridge)
        seconds += time.monotonic() - start  # without the time that the curve itself takes
        right = [((x @ gate.T).argmax(-1) == y).float().mean() for gate, (x, y) in zip(gates, unseen, strict=True)]
        share = torch.stack(right).mean().item()
        curve.append({"tokens": tokens, "seconds": round(seconds, 1), "own_role_tokens": round(share, 4)})
        print(
            f"{tokens:7d} tokens, {seconds:5.1f} s: {share:.3f} of held-back tokens get their own role's expert first"
        )
    return gates, curve


def fit(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: list[Sequences],
    held_back: list[Sequences],
    ridge: float,
    scale: float | None = None,
    general: Sequences = (),
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Fit the gates and, unless it is given, choose their scale by the loss on the held-back text; leaves them in `model`.

    Returns the gates [layers, experts, hidden] and the figures of the fit.
    """
    start = time.monotonic()
    gates, curve = calibrate(model, tokenizer, text, held_back, ridge, general)

    def loss_at(scale: float) -> float:
        set_gates(model, scale * gates)
        loss = sum(measure_routing(model, tokenizer, held_back).loss()) / len(held_back)
        if not math.isfinite(loss):
            raise NotFiniteError("the loss of the held-back text is not finite: look at the experts' training logs.")
        print(f"gate scale {scale:g}: {loss:.4f} nats per token of the held-back text, mean over roles")
        return loss

    if scale is None and model.config.num_experts_per_tok == 1:
        scale = FIRST_SCALE  # one expert alone has the whole weight, whatever the scale
    scale, tried = choose_scale(loss_at) if scale is None else (scale, {scale: loss_at(scale)})
    set_gates(model, scale * gates)
    seconds = round(time.monotonic() - start, 1)
    return scale * gates, {"scale": scale, "loss_at_scale": tried, "curve": curve, "seconds": seconds}


def _gate_inputs(model, tokenizer, text: list[Sequences]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each gate reads: for every layer the hidden states [tokens, hidden] and the tokens' roles [tokens]."""
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in gate_modules(model)]
    roles = [role for role, own in enumerate(text) for _ in own]
    for rows, batch in padded_batches([ids for own in text for ids in own], tokenizer, title="held-back text"):
        experts = torch.tensor([roles[row] for row in rows])
        _forward(model, batch, experts, len(text), lambda layer, x, y: seen[layer].append((x.float(), y)))
    return [(torch.cat([x for x, _ in part]), torch.cat([y for _, y in part])) for part in seen]


@torch.no_grad()
def _forward(
    model, batch, experts: torch.Tensor, count: int, see: Callable[[int, torch.Tensor, torch.Tensor], None]
) -> None:
    """Run a batch, each row through its own expert of `count`; `see(layer, hidden states, experts)` gets all tokens but the first."""
    batch = batch.to(model.device)
    kept = batch["attention_mask"].bool()
    kept[:, 0] = False  # an attention sink, with a norm a hundred times the others'
    kept = kept.flatten()
    own = experts.to(model.device).repeat_interleave(batch["input_ids"].shape[1])[kept]
    turns = torch.where(experts < count, experts, torch.arange(len(experts)) % count)
    with forced_experts(model, turns), watched_gates(model, lambda layer, x: see(layer, x[kept], own)):
        model.model(**batch)
