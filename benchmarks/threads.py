# SPDX-License-Identifier: Apache-2.0
"""Seconds of a training step on idle cores, and while another program uses one of them.

    python benchmarks/threads.py --run_dir outputs/quickstart

Trains the sample's dense baseline for some steps in a folder of its own, in turns: idle, busy, idle, busy.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

from finteam_experts.threads import available_cores

from finteam_experts.errors import run
from training import logged_steps, run_logged

REPOSITORY = Path(__file__).parents[1]


def busy() -> None:
    while True:
        pass


def step_seconds(run_dir: Path, steps: int) -> float:
    """The median seconds of a step, without the first."""
    recipe = REPOSITORY / "recipes/sample/instruct_tune_dense.yaml"
    with tempfile.TemporaryDirectory() as folder:
        options = {"config": recipe, "run_dir": folder, "base": run_dir / "base", "data_dir": run_dir / "data",
                   "max_steps": steps, "logging_steps": 1, "disable_tqdm": "true"}  # fmt: skip
        arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        text, _ = run_logged([sys.executable, str(REPOSITORY / "recipes/instruct_tune.py"), *arguments])
    ends = [entry["train_runtime"] for entry in logged_steps(text)]
    return statistics.median(after - before for before, after in zip(ends, ends[1:], strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"), help="has base and data")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    print(f"{available_cores()} cores")
    for number in range(args.rounds):
        idle = step_seconds(args.run_dir, args.steps)
        other = multiprocessing.Process(target=busy, daemon=True)
        other.start()
        time.sleep(1)
        loaded = step_seconds(args.run_dir, args.steps)
        other.kill()
        ratio = f"{idle:.2f} s per step idle, {loaded:.2f} s with one core busy: {loaded / idle:.2f} times"
        print(f"round {number + 1}: {ratio}", flush=True)


if __name__ == "__main__":
    run(main)
