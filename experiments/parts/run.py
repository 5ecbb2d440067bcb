# SPDX-License-Identifier: Apache-2.0
"""Fields that arrive one after another, and every way to work with them: one model, one team, adapters, merges.

    python experiments/parts/run.py --config experiments/parts/parts.yaml --data_dir DIR

Writes a file of scores for each way, arrival and seed, and makes none again; experiments/parts/report.py makes the table and the
plot. All ways start from the same model, a base that has seen none of the tasks, tuned on the first field's rows. They see a row
once when it arrives.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finteam_experts.threads import use_available_cores  # before torch

import numpy as np
import torch
from peft import ArrowConfig, create_arrow_model
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline

from finteam_experts.data.files import read_task, rows_to_score
from finteam_experts.data.tasks import render_all
from finteam_experts.errors import InputError, nearest, run
from finteam_experts.evaluation import metrics
from finteam_experts.evaluation.batches import padded_batches
from finteam_experts.evaluation.tasks import evaluate_model, true_labels
from finteam_experts.files import read_json, read_yaml, write_json
from finteam_experts.merging.gates import get_gates, random_gates, set_gates
from finteam_experts.models import as_chats, load_model, load_tokenizer, local_folder
from parts import Order, Parts

BEHIND_CLASSIFIERS = ("adapters-tfidf", "adapters-ridge")
GROWING = ("joint", "in-turn", "team")  # scored on the tasks of the fields that have arrived
Made = tuple[Path, torch.nn.Module | None]  # a folder, and the model if it is another than the folder's


def ways(order: Order) -> Iterator[tuple[str, int, float, Callable[[], Made]]]:
    """Each way at each arrival: its name, how many fields have arrived, the rows trained on for it, and what makes it."""
    fields, rows = order.order, order.parts.rows
    yield "base", 0, 0, lambda: (order.base, None)
    for field in fields:
        yield f"expert-{field}", 1, rows, lambda field=field: (order.make_expert(field), None)
    for arrivals in range(2, len(fields) + 1):
        yield "joint", arrivals, arrivals * rows, lambda n=arrivals: (order.make_joint(n), None)
    for share in (0.0, *order.parts.replay):
        for arrivals in range(2, len(fields) + 1):
            way = f"replay-{share:g}" if share else "in-turn"
            trained = rows * (1 + share * (arrivals - 1))
            yield way, arrivals, trained, lambda n=arrivals, share=share: (order.make_in_turn(n, share), None)
    for arrivals in range(2, len(fields) + 1):
        yield "team", arrivals, rows, lambda n=arrivals: (order.make_team(n), None)
    last = len(fields)
    yield "team-top-2", last, rows, lambda: changed(order.make_team(last), top_2)
    for field in fields:
        yield f"without-{field}", last, 0, lambda field=field: (order.make_smaller(field), None)
    yield "hidden-gates", last, rows, lambda: (order.make_plain_merge(), None)
    yield "random-gates", last, rows, lambda: changed(order.make_plain_merge(), random_router)
    for method in ("linear", "ties", "dare_ties"):
        yield method, last, rows, lambda method=method: (order.make_merged(method), None)
    yield "arrow", last, rows, lambda: arrow(order)


def changed(folder: Path, change: Callable[[torch.nn.Module], None]) -> Made:
    model = load_model(folder)
    change(model)
    return folder, model


def top_2(model: torch.nn.Module) -> None:
    model.config.num_experts_per_tok = 2
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 2


def random_router(model: torch.nn.Module) -> None:
    set_gates(model, random_gates(get_gates(model).shape, seed=0))


def arrow(order: Order) -> Made:
    """PEFT's Arrow routing over the adapters (Ostapenko et al. 2024, arXiv:2405.11157), one of them per token."""
    adapters = [str(order.folder / "adapters" / field) for field in order.order]
    model = create_arrow_model(load_model(order.trunk), adapters, ArrowConfig(top_k=1))
    return order.trunk, model.get_base_model().eval()


def behind_classifiers(order: Order, results: Path) -> None:
    """The experts behind a classifier of the prompt that chooses one of them: what it would score, from their predictions."""
    files = {field: results / f"expert-{field}-1.json" for field in order.order}
    predicted = {field: read_json(file)["predictions"] for field, file in files.items()}
    form = as_chats(load_tokenizer(order.base), order.base)
    train, test = {}, {}
    for name, task in order.tasks.items():
        train[name] = render_all(task, read_task(order.data, task, "train"), form.tokenizer)
        test[name] = render_all(task, rows_to_score(order.data, task, "test", order.parts.limit), form.tokenizer)
    texts = [text for own in train.values() for text in own]
    field_of = [order.tasks[name].role for name, own in train.items() for _ in own]
    tfidf = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(max_iter=1000)).fit(texts, field_of)
    pooled = PooledStates(order)
    ridge = RidgeClassifier().fit(pooled(texts), field_of)
    for way, choose in zip(BEHIND_CLASSIFIERS, (tfidf.predict, lambda own: ridge.predict(pooled(own))), strict=True):
        chosen = {name: list(choose(own)) for name, own in test.items()}
        found = {
            name: "".join(predicted[field][name][row] for row, field in enumerate(own)) for name, own in chosen.items()
        }
        right = np.mean([field == order.tasks[name].role for name, own in chosen.items() for field in own])
        about = {"way": way, "arrivals": len(order.order), "rows": order.parts.rows, "right_field": float(right)}
        write_json(results / f"{way}-{len(order.order)}.json", about | scored(order, found))


class PooledStates:
    """The mean over tokens of the base's last hidden states, as Any-SSR's router reads (arXiv:2503.13575)."""

    def __init__(self, order: Order) -> None:
        self.model, self.tokenizer = load_model(order.base), load_tokenizer(order.base)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> np.ndarray:
        encoded = self.tokenizer(texts, truncation=True, max_length=512)["input_ids"]
        states = np.zeros((len(texts), self.model.config.hidden_size))
        for rows, batch in padded_batches(encoded, self.tokenizer, title="pooled states"):
            hidden = self.model.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            states[rows] = ((hidden * mask).sum(1) / mask.sum(1)).double().numpy()
        return states


def scored(order: Order, predictions: dict[str, str]) -> dict[str, Any]:
    """Main scores of predictions, one digit for each row: the label's place in the task's list."""
    scores = {}
    for name, own in predictions.items():
        task = order.tasks[name]
        true = true_labels(task, rows_to_score(order.data, task, "test", order.parts.limit))
        counts = metrics.confusion(true, np.array([int(digit) for digit in own]), len(task.labels))
        scores[name] = float(metrics.scores(counts)[task.main_score])
    return {"scores": scores, "predictions": predictions}


def score(order: Order, made: Made, fields: list[str], *, bf16: bool) -> dict[str, Any]:
    """The scores of a model on the tasks of these fields."""
    folder, model = made
    tasks = {name: task for name, task in order.tasks.items() if task.role in fields}
    rows = {name: rows_to_score(order.data, task, "test", order.parts.limit) for name, task in tasks.items()}
    with tempfile.TemporaryDirectory() as work:
        found = evaluate_model(folder, tasks, rows, {}, Path(work), bf16=bf16, model=model, generate=False)
    labels = {name: task.labels for name, task in tasks.items()}
    predictions = {
        name: "".join(str(labels[name].index(label)) for label in own["predictions"])
        for name, own in found["tasks"].items()
    }
    return scored(order, predictions) | {"routing": found.get("routing", {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the experiment's YAML")
    parser.add_argument("--data_dir", type=Path, required=True, help="data directory with the tasks of all fields")
    parser.add_argument("--base", help="dense base: Hub id or folder (default: the quickstart's)")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="these ways (default: all)")
    parser.add_argument("--arrivals", nargs="+", type=int, help="after that many arrivals (default: after each)")
    args = parser.parse_args()

    parts = Parts.model_validate(read_yaml(args.config))
    base = local_folder(args.base or "outputs/quickstart/base")
    use_available_cores()
    for seed in parts.seeds:
        for name in parts.orders:
            order = Order(parts, name, seed, args.data_dir, base)
            results = args.config.parent / parts.results / f"{name}-seed{seed}"
            results.mkdir(parents=True, exist_ok=True)
            known = list(ways(order))
            for way in args.only or ():
                if way not in {known_way for known_way, *_ in known}:
                    raise InputError(
                        f"--only {way}: no such way.{nearest(way, [known_way for known_way, *_ in known])}"
                    )
            for way, arrivals, rows, make in known:
                path = results / f"{way}-{arrivals}.json"
                if path.exists() or (args.only and way not in args.only):
                    continue
                if args.arrivals and arrivals not in args.arrivals:
                    continue
                print(f"\n##### {name}, seed {seed}: {way} after {arrivals} arrivals", flush=True)
                began = time.monotonic()
                made = make()
                seconds = round(time.monotonic() - began)
                fields = order.order[:arrivals] if way in GROWING or way.startswith("replay") else order.order
                bf16 = bool(parts.overrides.get("bf16")) and way != "arrow"  # PEFT's Arrow can't compute in two types
                about = {"way": way, "arrivals": arrivals, "rows": rows, "seconds": seconds}
                write_json(path, about | score(order, made, fields, bf16=bf16))
            there = all((results / f"expert-{field}-1.json").exists() for field in order.order)
            if there and not all((results / f"{way}-{len(order.order)}.json").exists() for way in BEHIND_CLASSIFIERS):
                behind_classifiers(order, results)


if __name__ == "__main__":
    run(main)
