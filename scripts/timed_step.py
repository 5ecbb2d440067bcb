# SPDX-License-Identifier: Apache-2.0
"""Run one command of the quickstart and note its time and peak memory, for scripts/summarize.py.

python scripts/timed_step.py --run_dir outputs/quickstart --title "merge" -- python scripts/merge_moe.py
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def run_step(notes: Path, title: str, command: list[str]) -> int:
    """Run `command`; on success append its figures to `notes`. Returns its exit code."""
    print(f"\n=== {title}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    code = subprocess.call(command)
    if code == 0:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of the largest process below this one
        gib = peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB elsewhere
        note = {"title": title, "seconds": round(time.monotonic() - start, 1), "peak_gib": round(gib, 2)}
        notes.parent.mkdir(parents=True, exist_ok=True)
        with notes.open("a") as file:
            file.write(json.dumps(note) + "\n")
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--title", required=True)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    notes = args.run_dir / "reports" / "quickstart.jsonl"
    sys.exit(run_step(notes, args.title, args.command))


if __name__ == "__main__":
    main()
