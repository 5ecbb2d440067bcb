# SPDX-License-Identifier: Apache-2.0
"""Rows per second of the evaluation beside lm-eval's own model class, with its `auto` batch size and with a fixed one.

    python benchmarks/evaluation.py --model outputs/quickstart/dense-instruct --limit 60

All score the same rows of the tasks with the same weights in one process, in turns, so that other load on the machine hits
them alike.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from accelerate import PartialState
from lm_eval.models.huggingface import HFLM

from finteam_experts.data.files import require_tasks, rows_to_score
from finteam_experts.data.tasks import render_all
from finteam_experts.errors import run
from finteam_experts.evaluation.labels import LabelScoringLM, run_lm_eval
from finteam_experts.models import as_chats, load_model, load_tokenizer, local_folder


def label_scores(output: dict) -> np.ndarray:
    """Every label's log-likelihood minus that of its row's first label, in the order of tasks, rows and labels.

    lm-eval also counts the white space at a prompt's end, which is the same for all labels of a row.
    """
    rows = [sample["filtered_resps"] for samples in output["samples"].values() for sample in samples]
    return np.array([score - row[0][0] for row in rows for score, _ in row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/quickstart/dense-instruct", help="model: folder or Hub id")
    parser.add_argument("--data_dir", type=Path, default=Path("outputs/quickstart/data"))
    parser.add_argument("--limit", type=int, default=60, help="test rows per task")
    parser.add_argument("--batch_size", type=int, default=16, help="the fixed one")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()

    folder = local_folder(args.model)
    model, tokenizer = load_model(folder).to(PartialState().device), load_tokenizer(folder)
    tasks = require_tasks(args.data_dir)
    rows = {name: rows_to_score(args.data_dir, task, "test", args.limit) for name, task in tasks.items()}
    prompts = {name: render_all(task, rows[name], tokenizer) for name, task in tasks.items()}
    count = sum(map(len, rows.values()))
    ways = {
        "lm-eval, auto": lambda: HFLM(pretrained=model, tokenizer=tokenizer, batch_size="auto"),
        f"lm-eval, {args.batch_size}": lambda: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size),
        "ours": lambda: LabelScoringLM(pretrained=model, form=as_chats(tokenizer, folder)),
    }
    speeds, found = {name: [] for name in ways}, {}
    with tempfile.TemporaryDirectory() as work:
        for number in range(args.rounds):
            for name, make in ways.items():
                start = time.monotonic()
                found[name] = run_lm_eval(make(), tasks, prompts, rows, Path(work))
                speeds[name].append(count / (time.monotonic() - start))
                print(f"round {number + 1}, {name}: {speeds[name][-1]:.2f} rows/s", flush=True)

    ours = speeds.pop("ours")
    for name, theirs in speeds.items():
        ratios = " and ".join(f"{own / other:.2f}" for own, other in zip(ours, theirs, strict=True))
        difference = np.abs(label_scores(found["ours"]) - label_scores(found[name])).max()
        agree = f"log-likelihoods relative to a row's first label differ by at most {difference:.1e} nats"
        print(f"{count} rows: {ratios} times the rows per second of {name}; {agree}")
    for task in rows:
        accuracies = ", ".join(f"{name} {output['results'][task]['acc,none']:.4f}" for name, output in found.items())
        print(f"{task}: accuracy {accuracies}")


if __name__ == "__main__":
    run(main)
