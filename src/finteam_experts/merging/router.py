# SPDX-License-Identifier: Apache-2.0
"""Fitting the router: each layer's gate by ridge regression of roles on the hidden states that the gate reads.

The fit is a linear classifier in closed form, from the sums of `merging.sums`. That experts trained apart need a router
fitted to them is the finding of Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv 2403.07816), which trains it; gates from
hidden states are mergekit's (Goddard et al. 2024, arXiv 2403.13257); the mixture is Mixtral's (Jiang et al. 2024, arXiv
2401.04088).
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from finteam_experts.data.calibration import Excerpt, Sequences, halves
from finteam_experts.errors import NotFiniteError
from finteam_experts.evaluation.routing import measure_routing
from finteam_experts.merging.gates import set_gates
from finteam_experts.merging.sums import GENERAL_WEIGHT, RouterSums, compute_sums, mean_of, solve_gates

SMALLEST_SCALE, FIRST_SCALE, LARGEST_SCALE = 0.5, 8.0, 64.0
LEAST_GAIN = 5e-4


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


def team_sums(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: list[list[Excerpt]],
    general: list[Excerpt],
    ridge: float,
    *,
    trunk: str,
    experts: list[str],
) -> list[RouterSums]:
    """The sums of each expert's `text` in an MoE: of one half through the expert itself, of the other as gates fitted to the first
    route it.

    `trunk` and `experts` are the fingerprints that the sums are to name. The second half shows the gates what becomes of tokens that they send elsewhere, as dataset aggregation does for a policy
    (Ross et al. 2011, arXiv:1011.0686). Leaves those first gates in `model`.
    """
    first, second = zip(*map(halves, text), strict=True)
    alone, together = halves(general)
    own = [
        compute_sums(model, tokenizer, texts, alone, trunk=trunk, belongs_to=experts[place], expert=place)
        for place, texts in enumerate(first)
    ]
    set_gates(model, FIRST_SCALE * solve_gates(own, ridge))
    routed = [
        compute_sums(model, tokenizer, texts, trunk=trunk, belongs_to=of)
        for texts, of in zip(second, experts, strict=True)
    ]
    if general:  # its route is the same for every analyst's sums
        nobodys = GENERAL_WEIGHT * compute_sums(model, tokenizer, together, trunk=trunk, belongs_to="").inputs
        routed = [replace(sums, inputs=sums.inputs + nobodys) for sums in routed]
    return [mean_of(*parts) for parts in zip(own, routed, strict=True)]


def fit(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    team: list[RouterSums],
    held_back: list[Sequences],
    ridge: float,
    scale: float | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Fit the gates to the sums of each expert and choose their scale, unless it is given; leaves them in `model`.

    The scale is chosen by the loss of the experts' `held_back` text, which the sums have not seen. Returns the gates [layers,
    experts, hidden] and the figures of the fit.
    """
    start = time.monotonic()
    gates = solve_gates(team, ridge).to(model.device)

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
    share = measure_routing(model, tokenizer, held_back, losses=False).summary()["own_role_tokens"]
    print(f"{share:.3f} of the held-back text's tokens get their own role's expert first")
    seconds = round(time.monotonic() - start, 1)
    figures = {"scale": scale, "loss_at_scale": tried, "own_role_tokens": round(share, 4), "seconds": seconds}
    return scale * gates, figures
