# SPDX-License-Identifier: Apache-2.0
"""Kill every step of a run at random moments and give the same command again: it has to end as if it had not been killed.

    python tests/kill_drill.py RUN_DIR --kills 20

RUN_DIR is a complete run of toy models; each step is repeated in copies of it. Steps are forked from one process that has
imported everything, so that the kills fall into their work and not into imports.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import lm_eval  # noqa: F401 (imported once, for all forks)
import matplotlib.pyplot  # noqa: F401
import mergekit.moe.mixtral  # noqa: F401
import peft  # noqa: F401

from conftest import REPOSITORY, SHORT, load_script
from finteam_experts import errors

LEFTOVERS = (".incomplete", ".replaced", ".discarded", ".partial")


def recipe(name: str) -> list[str]:
    return ["--config", str(REPOSITORY / f"recipes/sample/{name}.yaml"), *SHORT, "--save_steps", "1"]


# For each step: its script, its arguments besides --run_dir, and the folders it writes
STEPS = {
    "expert": ("recipes/train_expert.py", [*recipe("train_expert"), "--role", "macro"], ["adapters/macro"]),
    "merge": ("scripts/merge_moe.py", [], ["experts", "moe"]),
    "router": ("scripts/fit_router.py", ["--tokens_per_role", "1500", "--seed", "1", "--overwrite"], []),
    "routing report": ("scripts/report_routing.py", [], ["reports"]),
    "team": ("recipes/instruct_tune.py", [*recipe("instruct_tune_moe"), "--routing_steps", "0"], ["moe-instruct"]),
    "dense": ("recipes/instruct_tune.py", recipe("instruct_tune_dense"), ["dense-instruct"]),
    "router of the tuned team": ("scripts/fit_router.py", ["--model", "moe-instruct", "--tokens_per_role", "1500", "--scale", "4"], []),
    "evaluation": ("scripts/evaluate.py", [], ["reports"]),
}  # fmt: skip


def fork(path: str, arguments: list[str], log: Path) -> int:
    """Start a script's `main` in a child of this process; returns its process id."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [path, *arguments]
    try:
        errors.run(load_script(path).main)
    except SystemExit as ended:
        os._exit(ended.code or 0)
    os._exit(0)


def run(path: str, arguments: list[str], log: Path, kill_after: float | None = None) -> tuple[int, float]:
    """The exit code, -9 if it was killed after that many seconds, and how long it took."""
    start, child = time.monotonic(), fork(path, arguments, log)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - start
        if done:
            return os.waitstatus_to_exitcode(status), seconds
        if kill_after is not None and seconds > kill_after:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGKILL, seconds
        time.sleep(0.002)


def weights(run_dir: Path) -> dict[str, str]:
    """The hash of every file of weights in a run's complete folders."""
    files = sorted(run_dir.rglob("*.safetensors"))
    return {str(file.relative_to(run_dir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def drill(name: str, source: Path, folder: Path, kills: int, rng: random.Random) -> list[str]:
    """Kill one step so many times; returns what went wrong."""
    path, arguments, makes = STEPS[name]
    wrong, killed = [], 0

    def copy() -> list[str]:
        shutil.rmtree(folder / "run", ignore_errors=True)
        shutil.copytree(source, folder / "run")
        for part in makes:
            shutil.rmtree(folder / "run" / part)
        return ["--run_dir", str(folder / "run"), *arguments]

    code, seconds = run(path, copy(), folder / "log")
    if code:
        return [f"{name} fails by itself: {(folder / 'log').read_text()[-1000:]}"]
    expected = weights(folder / "run")
    for _ in range(kills):
        command = copy()
        killed += run(path, command, folder / "log", kill_after=rng.uniform(0.02, seconds))[0] == -signal.SIGKILL
        code, _ = run(path, command, folder / "log")
        left = [file.name for file in (folder / "run").rglob("*") if file.name.endswith(LEFTOVERS)]
        if code or left or weights(folder / "run") != expected:
            wrong.append(f"{name}: exit code {code}, left {left}: {(folder / 'log').read_text()[-300:]}")
    print(
        f"{name}: {seconds:.1f} s, killed {killed} of {kills} times, {kills - len(wrong)} ended as if not killed",
        flush=True,
    )
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--kills", type=int, default=20, help="of each step")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="which (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        wrong = [
            problem for name in args.steps for problem in drill(name, args.run_dir, Path(folder), args.kills, rng)
        ]
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
