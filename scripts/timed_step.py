# SPDX-License-Identifier: Apache-2.0
"""Run one command of the quickstart and note its time and peak memory, or print the notes as a table.

python scripts/timed_step.py --run_dir outputs/quickstart --title "merge" -- python scripts/merge_moe.py
python scripts/timed_step.py --run_dir outputs/quickstart --summary
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table


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


def print_summary(notes: Path) -> None:
    """Print each step's figures, from the run in which it took longest: later runs only skip what is complete."""
    steps: dict[str, dict] = {}
    for note in map(json.loads, notes.read_text().splitlines()):
        steps[note["title"]] = max(steps.get(note["title"], note), note, key=lambda entry: entry["seconds"])
    table = Table("step", title="Quickstart: time and peak memory")
    for column in ("minutes", "peak GiB"):
        table.add_column(column, justify="right")
    for title, step in steps.items():
        table.add_row(title, f"{step['seconds'] / 60:.1f}", f"{step['peak_gib']:.1f}")
    table.add_section()
    minutes = sum(step["seconds"] for step in steps.values()) / 60
    table.add_row("all", f"{minutes:.1f}", f"{max(step['peak_gib'] for step in steps.values()):.1f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--title")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("command", nargs="*")
    args = parser.parse_args()
    notes = args.run_dir / "reports" / "quickstart.jsonl"
    if args.summary:
        print_summary(notes)
    else:
        sys.exit(run_step(notes, args.title, args.command))


if __name__ == "__main__":
    main()
