# SPDX-License-Identifier: Apache-2.0
"""The ways to work with fields that arrive one after another: how each model is made, and what it takes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, create_arrow_model

from finteam_experts import runs
from finteam_experts.merging.gates import get_gates, random_gates, set_gates
from finteam_experts.models import empty_model, load_model, parameter_counts, read_config
from parts import Order


@dataclass(frozen=True)
class Way:
    """One way to work with the fields that have arrived."""

    name: str
    arrivals: int
    rows: int  # trained on when the last field arrived
    trained: str | None  # the step that did so: a folder of the order's
    make: Callable[[], Path]
    load: Callable[[Path], torch.nn.Module] | None = None  # where it is another model than the folder's


def ways(order: Order) -> Iterator[Way]:
    """Each way, at each arrival that it is scored after."""
    fields, rows = order.order, order.parts.rows
    yield Way("base", 0, 0, None, lambda: order.base)
    for field in fields:
        trained = "joint-1/dense-instruct" if field == fields[0] else f"adapters/{field}"
        yield Way(f"expert-{field}", 1, rows, trained, partial(order.make_expert, field))
    for n in range(2, len(fields) + 1):
        yield Way("joint", n, n * rows, f"joint-{n}/dense-instruct", partial(order.make_joint, n))
        yield Way("team", n, rows, f"adapters/{fields[n - 1]}", partial(order.make_team, n))
        for share in (0.0, *order.parts.replay):
            name, seen = f"replay-{share:g}" if share else "in-turn", rows + round(share * rows * (n - 1))
            yield Way(name, n, seen, f"{name}-{n}/dense-instruct", partial(order.make_in_turn, n, share))
    last, trained = len(fields), f"adapters/{fields[-1]}"
    for field in fields:
        yield Way(f"without-{field}", last, 0, None, partial(order.make_smaller, field))
    yield Way("team-top-2", last, rows, trained, partial(order.make_team, last), top_2)
    yield Way("team-from-text", last, rows, trained, order.make_team_from_text)
    yield Way("hidden-gates", last, rows, trained, order.make_plain_merge)
    yield Way("random-gates", last, rows, trained, order.make_plain_merge, random_router)
    for method in ("linear", "ties", "dare_ties"):
        yield Way(method, last, rows, trained, partial(order.make_merged, method))
    yield Way("arrow", last, rows, trained, lambda: order.trunk, partial(arrow, order))


def top_2(folder: Path) -> torch.nn.Module:
    model = load_model(folder)
    model.config.num_experts_per_tok = 2
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 2
    return model


def random_router(folder: Path) -> torch.nn.Module:
    model = load_model(folder)
    set_gates(model, random_gates(get_gates(model).shape, seed=0))
    return model


def arrow(order: Order, trunk: Path) -> torch.nn.Module:
    """PEFT's Arrow routing over the adapters (Ostapenko et al. 2024, arXiv:2405.11157), one of them per token."""
    for field in order.order:
        order.make_expert(field)
    adapters = [str(order.folder / "adapters" / field) for field in order.order]
    model = create_arrow_model(load_model(trunk), adapters, ArrowConfig(top_k=1))
    return model.get_base_model().eval()


def cost(order: Order, way: Way, folder: Path, model: torch.nn.Module | None) -> dict[str, Any]:
    """Tokens that were trained on when the last field arrived, and the model's parameters: in all, and for a token."""
    tokens = runs.read_record(order.folder / way.trained)["results"]["train_tokens"] if way.trained else 0
    sizes = parameter_counts(model or empty_model(read_config(folder)))
    if way.name == "arrow":  # a token has the trunk and one of the adapters
        trunk = parameter_counts(empty_model(read_config(folder)))["total"]
        sizes["active"] = trunk + (sizes["total"] - trunk) // len(order.order)
    return {"tokens": tokens, "parameters": {part: sizes[part] for part in ("total", "active")}}
