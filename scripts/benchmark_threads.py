# SPDX-License-Identifier: Apache-2.0
"""Seconds of a training step on idle cores, and while another program uses one of them.

    python scripts/benchmark_threads.py --run_dir outputs/quickstart

Trains the sample's dense baseline for some steps in a folder of its own, in turns: idle, busy, idle, busy.
"""

import argparse
import ast
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from finteam_experts.threads import available_cores

from finteam_experts.errors import InputError, run

RECIPE = Path(__file__).parents[1] / "recipes"


def busy() -> None:
    while True:
        pass


def step_seconds(run_dir: Path, steps: int) -> float:
    """The median seconds of a step, without the first."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, RECIPE / "instruct_tune.py", "--config", RECIPE / "sample/instruct_tune_dense.yaml", "--run_dir", folder,
            "--base", run_dir / "base", "--data_dir", run_dir / "data", "--max_steps", steps, "--logging_steps", 1,
            "--disable_tqdm", "true",
        ]  # fmt: skip
        ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if ended.returncode:
        raise InputError(f"the training failed: {ended.stderr[-2000:]}")
    logs = [ast.literal_eval(line) for line in re.findall(r"^\{'loss'.*\}$", ended.stdout, flags=re.M)]
    ends = [float(log["train_runtime"]) for log in logs]
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
        print(
            f"round {number + 1}: {idle:.2f} s a step idle, {loaded:.2f} s with one core busy: {loaded / idle:.2f} times",
            flush=True,
        )


if __name__ == "__main__":
    run(main)
