# SPDX-License-Identifier: Apache-2.0
"""The tables of experiments/real_data/run.sh: tasks, conversations and routing, of the team and of one model with the same steps.

    python experiments/real_data/table.py outputs/real_data

Writes results/seedN.json of every complete run, without any text of the data, and results/README.md. Intervals are 95 %, by
bootstrap over rows and seeds for tasks, and over conversations for answers.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from finteam_experts.threads import use_available_cores  # before torch

import numpy as np
from scipy.stats import bootstrap

from finteam_experts.data.conversations import GENERAL, chat_roles, read_chats
from finteam_experts.data.files import evenly_spread, rows_to_score, tasks_of
from finteam_experts.data.tasks import Tasks
from finteam_experts.errors import InputError, run
from finteam_experts.evaluation.answers import answer_losses
from finteam_experts.evaluation.metrics import paired_difference
from finteam_experts.evaluation.tasks import majority
from finteam_experts.files import read_json, write_json
from finteam_experts.models import as_chats, load_model, load_tokenizer

DENSE = "dense-instruct"
MODELS = {
    "base": "base",
    "trunk": "trunk",
    DENSE: "one model: the trunk, tuned on",
    "moe": "team of experts",
    "moe-instruct": "... tuned as a whole",
}
PAIRS = (("moe", DENSE), ("moe-instruct", DENSE), ("moe", "trunk"))
WRITTEN = {"bare": "bare labels", "repeats": "repeat themselves", "read": "figures read right", "computed": "computed right", "words": "words"}  # fmt: skip
CONVERSATIONS = 40  # held-out ones of a role
RESULTS = Path(__file__).parent / "results"


def collect(run_dir: Path, data: Path, base: Path, tasks: Tasks) -> dict[str, Any]:
    """What a complete run came to: main scores, predictions as digits, and nats of each held-out answer."""
    report, routing = read_json(run_dir / "reports/evaluation.json"), read_json(run_dir / "reports/routing.json")
    found: dict[str, Any] = {
        "limit": report["inputs"]["limit"],
        "routing": {name: routing["gates"][f"tuned{name}"]["summary"] for name in ("", ", conversations", ", task prompts")},
        "models": {},
    }  # fmt: skip
    for name in MODELS:
        part, folder = report["models"][name], base if name == "base" else run_dir / name
        model, form = load_model(folder), as_chats(load_tokenizer(folder), folder)
        nats = {
            role: [
                round(loss, 4)
                for loss in answer_losses(
                    model, form, evenly_spread(read_chats(data, role, heldout=True), CONVERSATIONS)
                )
            ]
            for role in chat_roles(data, heldout=True)
        }
        found["models"][name] = {
            "scores": {task: part["tasks"][task][about.main_score] for task, about in tasks.items()},
            "predictions": {
                task: "".join(str(about.labels.index(label)) for label in part["tasks"][task]["predictions"])
                for task, about in tasks.items()
            },
            "answers": {
                role: {key: value for key, value in own.items() if key != "written"}
                for role, own in part["answers"].items()
            },
            "nats": nats,
        }
    return found


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def task_table(runs: list[dict[str, Any]], tasks: Tasks, rows: dict[str, list]) -> str:
    """Main score of every task and model, mean over seeds."""
    known = majority(tasks, rows)
    columns = [{name: known[name][task.main_score] for name, task in tasks.items()}]
    for model in MODELS:
        columns.append({name: mean(own["models"][model]["scores"][name] for own in runs) for name in tasks})
    lines = [
        [f"{task.title} ({task.main_score})", *(f"{column[name]:.3f}" for column in columns)]
        for name, task in tasks.items()
    ]
    lines.append(["average", *(f"{mean(column.values()):.3f}" for column in columns)])
    return table(["task", "majority class", *MODELS.values()], lines)


def difference_table(runs: list[dict[str, Any]], tasks: Tasks, rows: dict[str, list]) -> str:
    """The main scores of one model minus those of another, for each of `PAIRS`."""

    def digits(model: str) -> dict[str, np.ndarray]:
        parts = [own["models"][model]["predictions"] for own in runs]
        return {name: np.array([[int(digit) for digit in part[name]] for part in parts]) for name in tasks}

    found = [paired_difference(tasks, rows, digits(ours), digits(other), shared_seeds=True) for ours, other in PAIRS]
    lines = []
    for name, title in ({name: task.title for name, task in tasks.items()} | {"average": "average"}).items():
        gaps = [part[name] for part in found]
        lines.append([title, *(f"{gap['difference']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" for gap in gaps)])
    return table(["task", *(f"{MODELS[ours]} minus {MODELS[other]}" for ours, other in PAIRS)], lines)


def answer_table(runs: list[dict[str, Any]], roles: list[str]) -> str:
    """Nats per token of the answers given to these roles' conversations, and what the models write, mean over seeds."""

    def losses(model: str) -> np.ndarray:
        each = [[own["models"][model]["nats"][role] for role in roles] for own in runs]
        return np.mean([np.concatenate(part) for part in each], axis=0)

    lines, dense = [], losses(DENSE)
    for model, title in MODELS.items():
        own, gap = losses(model), "-"
        if model != DENSE:
            low, high = bootstrap((own - dense,), np.mean, rng=0, method="percentile").confidence_interval
            gap = f"{(own - dense).mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        parts = [each["models"][model]["answers"][role] for each in runs for role in roles]
        known = ([part[key] for part in parts if part[key] is not None] for key in WRITTEN)
        lines.append(
            [title, f"{own.mean():.3f}", gap, *(f"{mean(values):.2f}" if values else "-" for values in known)]
        )
    header = [
        f"{len(dense)} conversations: {', '.join(roles)}",
        "nats per token",
        "minus one model",
        *WRITTEN.values(),
    ]
    return table(header, lines)


def routing_table(runs: list[dict[str, Any]]) -> str:
    """How many tokens go to their own analyst."""
    titles = {"": "held-out text", ", conversations": "conversations", ", task prompts": "task prompts"}
    lines = []
    for name, title in titles.items():
        parts = [own["routing"][name] for own in runs]
        shares = [mean(part[key] for part in parts) for key in ("own_role_tokens", "own_role_passages")]
        lines.append([title, *(f"{share:.3f}" for share in shares), str(max(part["dead_experts"] for part in parts))])
    return table(["", "tokens of their own analyst", "texts most of whose tokens are", "dead experts"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where run.sh put its runs")
    parser.add_argument("--base", type=Path, default=Path("outputs/quickstart/base"), help="the base that it had")
    args = parser.parse_args()
    data = args.folder / "data"
    if not data.is_dir():
        raise InputError(f"{data} does not exist. Make it and the runs: bash experiments/real_data/run.sh")

    use_available_cores()
    tasks = tasks_of(data)
    for run_dir in sorted(path.parents[1] for path in args.folder.glob("seed*/reports/routing.json")):
        if not (path := RESULTS / f"{run_dir.name}.json").exists():
            write_json(path, collect(run_dir, data, args.base, tasks))
    files = sorted(RESULTS.glob("seed*.json"))
    if not files:
        raise InputError(f"{args.folder} has no complete run. Make some: bash experiments/real_data/run.sh")
    runs = [read_json(path) for path in files]
    rows = {name: rows_to_score(data, task, "test", runs[0]["limit"]) for name, task in tasks.items()}
    parts = [
        f"# Results\n\nMade by `experiments/real_data/table.py` from {', '.join(f'`{path.name}`' for path in files)}. Do not edit.\n",
        f"## Tasks\n\nMain scores, at most {runs[0]['limit']} test rows per task.\n",
        task_table(runs, tasks, rows),
        difference_table(runs, tasks, rows),
        "## Conversations\n",
        answer_table(runs, [role for role in chat_roles(data, heldout=True) if role != GENERAL]),
        answer_table(runs, [GENERAL]),
        "## Routing\n",
        routing_table(runs),
    ]
    text = "\n".join(parts)
    (RESULTS / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    run(main)
