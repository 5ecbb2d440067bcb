# SPDX-License-Identifier: Apache-2.0
"""Rows per second of label scoring beside lm-eval's own model class, with its `auto` batch size and with a fixed one.

    python benchmarks/evaluation.py --model outputs/quickstart/dense-instruct --limit 60

All score the same tokens, each label with its end, with the same weights in one process, in turns, so that other load on the
machine hits them alike.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from accelerate import PartialState
from lm_eval.models.huggingface import HFLM

from finteam_experts.data.files import rows_to_score, tasks_of
from finteam_experts.data.tasks import render_all
from finteam_experts.errors import run
from finteam_experts.models import as_chats, load_model, load_tokenizer, local_folder
from finteam_experts.scoring import log_likelihoods


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/quickstart/dense-instruct", help="model: folder or Hub id")
    parser.add_argument("--data_dir", type=Path, default=Path("outputs/quickstart/data"))
    parser.add_argument("--limit", type=int, default=60, help="test rows per task")
    parser.add_argument("--batch_size", type=int, default=16, help="the fixed one")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()

    folder = local_folder(args.model)
    form, model = as_chats(load_tokenizer(folder), folder), load_model(folder).to(PartialState().device)
    pairs, count = [], 0
    for task in tasks_of(args.data_dir).values():
        rows = rows_to_score(args.data_dir, task, "test", args.limit)
        count += len(rows)
        asked = [(prompt, label) for prompt in render_all(task, rows, form.tokenizer) for label in task.labels]
        pairs += [(exchange.prompt, exchange.scored) for exchange in form.exchanges(asked)]

    def by_lm_eval(batch_size: int | str) -> list[tuple[float, bool]]:
        lm = HFLM(pretrained=model, tokenizer=form.tokenizer, batch_size=batch_size)
        return lm._loglikelihood_tokens([(("", ""), *pair) for pair in pairs], disable_tqdm=True)

    ways = {
        "lm-eval, auto": lambda: by_lm_eval("auto"),
        f"lm-eval, {args.batch_size}": lambda: by_lm_eval(args.batch_size),
        "ours": lambda: log_likelihoods(model, pairs),
    }
    speeds, found = {name: [] for name in ways}, {}
    for number in range(args.rounds):
        for name, score in ways.items():
            start = time.monotonic()
            found[name] = np.array(score())  # [pairs, log-likelihood and whether it is greedy]
            speeds[name].append(count / (time.monotonic() - start))
            print(f"round {number + 1}, {name}: {speeds[name][-1]:.2f} rows/s", flush=True)

    ours = speeds.pop("ours")
    for name, theirs in speeds.items():
        ratios = " and ".join(f"{own / other:.2f}" for own, other in zip(ours, theirs, strict=True))
        difference, greedy = np.abs(found["ours"] - found[name]).max(0)
        agree = "all of them" if greedy == 0 else "not all"
        print(
            f"{count} rows: {ratios} times the rows per second of {name}; log-likelihoods differ by at most {difference:.1e} "
            f"nats, and {agree} agree in whether a label is written"
        )


if __name__ == "__main__":
    run(main)
