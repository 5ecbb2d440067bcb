# SPDX-License-Identifier: Apache-2.0
"""Write a sample data directory: role corpora, conversations and four finance tasks, all figures real or fictional but consistent.

    python scripts/make_sample_data.py --run_dir outputs/quickstart

Beside the corpora of moe_merge.yaml's roles there are two for the examples of a larger team: credit and base.
"""

import argparse
import random
import shutil
from pathlib import Path

from finteam_experts import runs
from finteam_experts.data.conversations import chat_file
from finteam_experts.data.files import corpus_file, task_file, write_rows
from finteam_experts.data.sample import chats
from finteam_experts.data.sample.corpora import ROLES, corpus
from finteam_experts.data.sample.task_rows import MAKERS, task_rows
from finteam_experts.data.tasks import FOLDER
from finteam_experts.errors import run

PASSAGES, HELDOUT_PASSAGES = 1000, 120  # per role
CHATS, HELDOUT_CHATS = 500, 60  # per role
TRAIN_ROWS, TEST_ROWS = 400, 240  # per task


def write_data(folder: Path, seed: int) -> None:
    """Write corpora, conversations and task rows below `folder`, the same bytes for the same seed."""
    for role in ROLES:
        train, heldout = corpus(role, PASSAGES, HELDOUT_PASSAGES, random.Random(f"{seed} {role}"))
        write_rows(corpus_file(folder, role), train)
        write_rows(corpus_file(folder, role, heldout=True), heldout)
    scored = []
    for task in MAKERS:
        train, test = task_rows(task, TRAIN_ROWS, TEST_ROWS, random.Random(f"{seed} {task}"))
        write_rows(task_file(folder, task, "train"), train)
        write_rows(task_file(folder, task, "test"), test)
        shutil.copyfile(FOLDER / f"{task}.yaml", folder / "tasks" / f"{task}.yaml")
        scored += [row["text"] for row in test]
    for role in chats.ROLES:
        train, heldout = chats.chats(role, CHATS, HELDOUT_CHATS, random.Random(f"{seed} {role} chats"), scored)
        write_rows(chat_file(folder, role), train)
        write_rows(chat_file(folder, role, heldout=True), heldout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"), help="writes RUN_DIR/data")
    # most settings of the recipes were chosen on the rows of seed 0
    parser.add_argument("--seed", type=int, default=1, help="which companies, figures and rows are drawn")
    args = parser.parse_args()

    target = args.run_dir / "data"
    work = runs.begin(target, "make_sample_data", {"seed": args.seed})
    if work:
        write_data(work, args.seed)
        runs.finish(
            target, {"results": {"passages_a_role": PASSAGES, "chats_a_role": CHATS, "train_rows_a_task": TRAIN_ROWS}}
        )
        print(
            f"{target}: {PASSAGES} passages and {CHATS} conversations per role, {TRAIN_ROWS} train and {TEST_ROWS} test rows per task"
        )


if __name__ == "__main__":
    run(main)
