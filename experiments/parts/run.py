# SPDX-License-Identifier: Apache-2.0
"""Fields that arrive one after another, and every way to work with them: one model, one team, adapters, merges.

    python experiments/parts/run.py --config experiments/parts/parts.yaml --data_dir DIR

Writes a file of scores for each way, arrival and seed, and makes none again; experiments/parts/report.py makes the table and the
plot. All ways start from the same model, a base that has seen none of the tasks, tuned on the first field's rows. They see a row
once when it arrives.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from finteam_experts.threads import use_available_cores  # before torch

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline

from finteam_experts.data.files import read_task, rows_to_score
from finteam_experts.data.tasks import render_all
from finteam_experts.errors import InputError, nearest, run
from finteam_experts.evaluation import metrics
from finteam_experts.evaluation.batches import padded_batches
from finteam_experts.evaluation.tasks import evaluate_model
from finteam_experts.files import read_json, read_yaml, write_json
from finteam_experts.models import as_chats, load_model, load_tokenizer, local_folder
from parts import Order, Parts
from ways import Way, cost, ways

BEHIND_CLASSIFIERS = ("adapters-tfidf", "adapters-ridge")


def behind_classifiers(order: Order, results: Path) -> None:
    """The experts behind a classifier of the prompt that chooses one of them: what it would score, from their predictions."""
    files = {field: results / f"expert-{field}-1.json" for field in order.order}
    predicted = {field: read_json(file)["predictions"] for field, file in files.items()}
    newest = read_json(files[order.order[-1]])
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
        about = {"way": way, "arrivals": len(order.order), "rows": newest["rows"], "tokens": newest["tokens"]}
        about |= {"parameters": None, "right_field": float(right)}
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
        true = metrics.true_labels(task, rows_to_score(order.data, task, "test", order.parts.limit))
        scores[name] = metrics.scores(true, np.array([int(digit) for digit in own]))[task.main_score]
    return {"scores": scores, "predictions": predictions}


def measure(order: Order, way: Way) -> dict[str, Any]:
    """Make the model, if it is not there, and score it on the fields that have arrived; a single expert and the base, on all."""
    folder = way.make()
    model = way.load(folder) if way.load else None
    fields = order.order[: way.arrivals] if way.arrivals > 1 else order.order
    tasks = {name: task for name, task in order.tasks.items() if task.role in fields}
    rows = {name: rows_to_score(order.data, task, "test", order.parts.limit) for name, task in tasks.items()}
    bf16 = bool(order.parts.overrides.get("bf16")) and way.name != "arrow"  # PEFT's can't compute in two types
    found = evaluate_model(folder, tasks, rows, {}, bf16=bf16, model=model, generate=False)
    predictions = {
        name: "".join(str(tasks[name].labels.index(label)) for label in own["predictions"])
        for name, own in found["tasks"].items()
    }
    about = {"way": way.name, "arrivals": way.arrivals, "rows": way.rows} | cost(order, way, folder, model)
    return about | scored(order, predictions) | {"routing": found.get("routing", {})}


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
            known = [way.name for way in ways(order)]
            for only in args.only or ():
                if only not in known:
                    raise InputError(f"--only {only}: no such way.{nearest(only, known)}")
            for way in ways(order):
                path = results / f"{way.name}-{way.arrivals}.json"
                wanted = way.name in (args.only or known) and way.arrivals in (args.arrivals or [way.arrivals])
                if wanted and not path.exists():
                    print(f"\n##### {name}, seed {seed}: {way.name} after {way.arrivals} arrivals", flush=True)
                    start = time.perf_counter()
                    write_json(path, measure(order, way))
                    print(f"made and scored in {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
            there = all((results / f"expert-{field}-1.json").exists() for field in order.order)
            if there and not all((results / f"{way}-{len(order.order)}.json").exists() for way in BEHIND_CLASSIFIERS):
                behind_classifiers(order, results)


if __name__ == "__main__":
    run(main)
