# SPDX-License-Identifier: Apache-2.0
"""Conversations that go from one field to another: who is right after a question of another field?

    python experiments/parts/two_fields.py --config experiments/parts/parts.yaml --data_dir DIR

Adapters behind a switch keep the analyst of the first question, or read the whole conversation again with another one. A team goes
on where it is. Reads the models of experiments/parts/run.py; a run without them is left out, unless it has results already.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, permutations
from pathlib import Path
from statistics import mean

from finteam_experts.threads import use_available_cores  # before torch

import numpy as np

from finteam_experts.chats import Turns
from finteam_experts.data.files import rows_to_score
from finteam_experts.data.tasks import render_all
from finteam_experts.errors import InputError, run
from finteam_experts.evaluation.heldout import answer_scores
from finteam_experts.files import read_json, read_yaml, write_json
from finteam_experts.models import as_chats, load_model, load_tokenizer, local_folder
from finteam_experts.training.experts import split_on_cpu
from parts import Order, Parts

TITLES = {
    "joint": "one model, tuned again on everything",
    "in-turn": "one model, tuned in turn",
    "second expert": "the expert of the second question, which reads everything again",
    "team": "**team**",
    "first expert": "the expert of the first question",
}


@dataclass(frozen=True)
class Conversation:
    """A question of one field with its answer, and a question of another."""

    fields: tuple[str, str]
    turns: Turns
    label: str
    labels: tuple[str, ...]


def conversations(order: Order, count: int) -> Iterator[Conversation]:
    """`count` conversations of every ordered pair of fields, from the test rows of their tasks."""
    tokenizer, asked = load_tokenizer(order.base), {}
    for field in order.order:
        by_task = []
        for name in order.parts.fields[field]:
            task = order.tasks[name]
            rows = rows_to_score(order.data, task, "test", order.parts.limit)
            prompts = render_all(task, rows, tokenizer)
            by_task.append([(prompt, row["label"], task.labels) for prompt, row in zip(prompts, rows, strict=True)])
        asked[field] = list(chain(*zip(*by_task, strict=False)))[:count]  # one of each task, in turn
    for first, second in permutations(order.order, 2):
        for (before, answer, _), (question, label, labels) in zip(asked[first], asked[second], strict=True):
            said = ("user", before), ("assistant", answer), ("user", question)
            turns = [{"role": role, "content": text} for role, text in said]
            yield Conversation((first, second), turns, label, labels)


def answers(folder: Path, asked: list[Conversation], *, bf16: bool) -> list[bool]:
    """Whether the likeliest label of each second question is the true one."""
    form, model = as_chats(load_tokenizer(folder), folder), load_model(folder)
    split_on_cpu(model)
    exchanges = form.exchanges([(own.turns, label) for own in asked for label in own.labels])
    scores = iter(answer_scores(model, exchanges, bf16=bf16))
    return [max(own.labels, key={label: next(scores) for label in own.labels}.get) == own.label for own in asked]


def measure(order: Order, count: int) -> dict[str, list[bool]]:
    """By way, whether each second question is answered right."""
    asked, last = list(conversations(order, count)), len(order.order)
    bf16 = bool(order.parts.overrides.get("bf16"))
    folders = {
        "joint": order.make_joint(last),
        "in-turn": order.make_in_turn(last),
        "team": order.make_team(last),
    }
    found = {way: answers(folder, asked, bf16=bf16) for way, folder in folders.items()}
    found |= {"first expert": [False] * len(asked), "second expert": [False] * len(asked)}
    for field in order.order:
        places = [place for place, conversation in enumerate(asked) if field in conversation.fields]
        own = answers(order.make_expert(field), [asked[place] for place in places], bf16=bf16)
        for place, right in zip(places, own, strict=True):
            found["first expert" if asked[place].fields[0] == field else "second expert"][place] = right
    return found


def gaps_by_question(found: dict[str, list[bool]], way: str, order: list[str]) -> np.ndarray:
    """Team minus `way` for each second question, [questions]: the mean over the fields that it is asked after."""
    seconds = np.array([order.index(second) for _, second in permutations(order, 2)])
    gaps = np.subtract(found["team"], found[way], dtype=float).reshape(len(seconds), -1)  # [pairs of fields, count]
    return np.concatenate([gaps[seconds == field].mean(0) for field in range(len(order))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the experiment's YAML")
    parser.add_argument("--data_dir", type=Path, required=True, help="data directory with the tasks of all fields")
    parser.add_argument("--base", help="dense base: Hub id or folder (default: the quickstart's)")
    parser.add_argument("--count", type=int, default=30, help="conversations of each pair of fields (default: 30)")
    args = parser.parse_args()
    parts = Parts.model_validate(read_yaml(args.config))
    base = local_folder(args.base or "outputs/quickstart/base")
    use_available_cores()
    runs = []
    for seed in parts.seeds:
        for name in parts.orders:
            path = args.config.parent / parts.results / "two_fields" / f"{name}-seed{seed}.json"
            if not path.exists() and not (parts.run_dir / f"{name}-seed{seed}" / "team").is_dir():
                print(f"{name}, seed {seed}: {parts.run_dir} has no team of it, left out")
                continue
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, measure(Order(parts, name, seed, args.data_dir, base), args.count))
            runs.append((parts.orders[name], read_json(path)))
    if not runs:
        raise InputError(f"{parts.run_dir} has no team. Run experiments/parts/run.py first.")
    print(
        f"Right answers to second questions, mean of {len(runs)} runs, and team minus it, 95 % interval over questions:"
    )
    for way, title in TITLES.items():
        right = mean(mean(found[way]) for _, found in runs)
        gaps = np.concatenate([gaps_by_question(found, way, order) for order, found in runs])
        half = 1.96 * gaps.std(ddof=1) / gaps.size**0.5
        print(f"| {title} | {right:.3f} | {gaps.mean():+.3f} [{gaps.mean() - half:+.3f}, {gaps.mean() + half:+.3f}] |")


if __name__ == "__main__":
    run(main)
