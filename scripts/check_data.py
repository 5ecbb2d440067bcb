# SPDX-License-Identifier: Apache-2.0
"""Read a data directory and print what a run with it would train and measure, before any training.

    python scripts/check_data.py outputs/quickstart/data
    python scripts/check_data.py DIR --base ID --merge_config five.yaml

Every problem that would end a step is found here: wrong rows, unknown labels, roles and files, texts that are both trained on and
scored, rows that don't fit into the base. The exit code is then not 0. Without a base everything but tokens is checked.
"""

import argparse
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from finteam_experts.threads import use_available_cores  # before torch

from rich.table import Table

from finteam_experts.chats import ChatFormat, Conversation
from finteam_experts.data import files, leaks
from finteam_experts.data.conversations import GENERAL, chat_file, chat_roles, check_chat_roles, read_chats
from finteam_experts.data.tasks import Task, render_all
from finteam_experts.errors import InputError, run
from finteam_experts.merging.config import read_merge_config, roles, trained_roles
from finteam_experts.models import as_chats, load_tokenizer, local_folder, read_config
from finteam_experts.screen import screen

MANY_TIMES = 4  # the rows of a usual task: a larger one drowns it
ROOM = 8  # tokens for the answer to a task's prompt, as evaluate.py gives it
MERGE_FILE, BASE_FOLDER = Path(__file__).parents[1] / "moe_merge.yaml", Path("outputs/quickstart/base")


@dataclass(frozen=True)
class Base:
    """What turns texts into tokens, and how many of them it reads at once."""

    form: ChatFormat
    positions: int

    def lengths(self, where: str, rows: list[tuple], *, scored: bool) -> list[int]:
        """The tokens of each row with its answer. Rows to train on that are too long for the base are counted on the screen.

        Raises `InputError` for a row that the chat template can't write, or if a row to score is too long, or all rows to train
        on are. `where` is a file and what it counts.
        """
        named = [Conversation(row, f"{where} {number}") for number, row in enumerate(rows, start=1)]
        lengths = [max(len(row.ids), len(row.prompt) + ROOM * scored) for row in self.form.exchanges(named)]
        long = [row for row, length in enumerate(lengths, start=1) if length > self.positions]
        most = f"more than {self.positions} tokens, the base's positions (max_position_embeddings)"
        if long and (scored or len(long) == len(lengths)):
            raise InputError(
                f"{where} {long[0]}: with its answer it has {lengths[long[0] - 1]} tokens, {most}. Shorten it."
            )
        if long:
            print(f"Note: {where} {long[0]} and {len(long) - 1:,} others have {most}: no training takes them")
        return lengths

    def note_special_tokens(self, where: str, texts: list[str]) -> None:
        """Say so if texts hold special tokens of the base: one would not be read as text."""
        special = [str(token) for token in self.form.tokenizer.added_tokens_decoder.values() if token.special]
        pattern = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        for token, count in Counter(token for text in texts for token in set(pattern.findall(text))).most_common():
            print(
                f"Note: {count:,} texts of {where} hold {token}, which this base takes for a special token: remove it"
            )


def print_table(title: str, columns: str, rows: list[tuple[str | int, ...]]) -> None:
    """Print rows of words and numbers."""
    table = Table(title=title)
    for column, cell in zip(columns.split(", "), rows[0], strict=True):
        table.add_column(column, justify="right" if isinstance(cell, int) else "left")
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else cell for cell in row))
    screen(170).print(table)


def corpus_row(data: Path, role: str, base: Base | None) -> tuple[str | int, ...]:
    """Passages of a role's corpus, their tokens and the longest, and held-out passages."""
    passages, heldout = files.read_corpus(data, role), files.read_corpus(data, role, heldout=True)
    files.check_passages(data, role, passages)
    if not base:
        return role, len(passages), "", "", len(heldout)
    base.note_special_tokens(f"corpora/{role}.jsonl", passages)
    lengths, held = ([len(ids) for ids in base.form.tokenizer(own)["input_ids"]] for own in (passages, heldout))
    if max(held) < 2:
        found = f"{files.corpus_file(data, role, heldout=True)}: its passages are of one token or none"
        raise InputError(f"{found}, of which there is no loss. Add longer ones.")
    return role, len(passages), sum(lengths), max(lengths), len(heldout)


def task_row(data: Path, task: Task, base: Base | None) -> tuple[str | int, ...]:
    """Rows, tokens, repetitions and labels of a task; longer texts than the task allows are counted on the screen."""
    rows, lengths = {split: files.read_task(data, task, split) for split in ("train", "valid", "test")}, {}
    from_train = "" if files.task_file(data, task.name, "valid").is_file() else " of train"
    for split, own in rows.items() if base else ():
        if split != "valid" or not from_train:
            base.note_special_tokens(f"tasks/{task.name}_{split}.jsonl", [row["text"] for row in own])
        longest = max(task.labels, key=len)  # any label may be the answer that is scored
        labels = [longest if split != "train" else row["label"] for row in own]
        asked = list(zip(render_all(task, own, base.form.tokenizer), labels, strict=True))
        counted = "validation row" if split == "valid" and from_train else "line"
        where = f"{files.scored_file(data, task.name, split)}, {counted}"
        lengths[split] = base.lengths(where, asked, scored=split != "train")
    train, again = rows["train"], leaks.repetitions(rows["train"])
    labels = ", ".join(f"{label} {count}" for label, count in Counter(row["label"] for row in train).most_common())
    counts = (len(train), f"{len(rows['valid']):,}{from_train}", len(rows["test"]))
    tokens = (sum(lengths["train"]), max(lengths["train"])) if base else ("", "")
    about = (task.name, task.role or "none", task.main_score)
    return *about, *counts, *tokens, again["repeated"], again["contradicting"], labels


def chat_row(data: Path, role: str, base: Base | None) -> tuple[str | int, ...]:
    """Conversations of a role, their turns, their tokens and the longest, and held-out conversations."""
    found, tokens = {False: [], True: []}, ("", "")
    for held in (held for held in found if role in chat_roles(data, heldout=held)):
        path, found[held] = chat_file(data, role, heldout=held), read_chats(data, role, heldout=held)
        if base:
            said = [text for turns, answer in found[held] for text in (*(turn["content"] for turn in turns), answer)]
            base.note_special_tokens(f"chats/{path.name}", said)
            lengths = base.lengths(f"{path}, line", found[held], scored=held)
            tokens = tokens if held else (sum(lengths), max(lengths))
    return role, len(found[False]), sum(len(turns) + 1 for turns, _ in found[False]), *tokens, len(found[True])


def note_uneven(rows: dict[str, int]) -> None:
    """Say so if one task has many more train rows than most: rows are drawn from all of them alike."""
    largest, usual = max(rows, key=rows.get), round(median(rows.values()))
    if rows[largest] > MANY_TIMES * usual:
        print(
            f"Note: {largest} has {rows[largest]:,} train rows, half of the tasks {usual:,} or fewer. Training will see mostly "
            f"{largest}: --rows_per_task {usual} takes as many of each"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="data directory")
    parser.add_argument(
        "--base", help=f"Hub id or folder of a base, for its tokens (default: {BASE_FOLDER}, if it is there)"
    )
    parser.add_argument("--merge_config", type=Path, default=MERGE_FILE, help="the team")
    args = parser.parse_args()

    use_available_cores()
    data, team, base = args.data_dir, read_merge_config(args.merge_config), None
    tasks, talkers = files.tasks_of(data), chat_roles(data)
    if args.base or BASE_FOLDER.is_dir():
        folder = local_folder(args.base or str(BASE_FOLDER))
        base = Base(as_chats(load_tokenizer(folder), folder), read_config(folder).max_position_embeddings)
    leaks.check_data_dir(data)
    files.check_roles(data, tasks, roles(team))
    check_chat_roles(data, roles(team))

    columns = "corpus, passages, tokens, longest, held-out passages"
    print_table("Corpora", columns, [corpus_row(data, role, base) for role in roles(team)])
    if tasks:
        columns = "task, role, main score, train, valid, test, train tokens, longest, repeated, contradicting, labels of train"
        print_table("Tasks", columns, [task_row(data, task, base) for task in tasks.values()])
    if talks := dict.fromkeys(talkers + chat_roles(data, heldout=True)):
        columns = "role, train, turns, tokens, longest, held out"
        print_table("Conversations", columns, [chat_row(data, role, base) for role in talks])
    if not tasks and not talkers:
        raise InputError(f"{data} has nothing to tune on: no tasks/TASK_train.jsonl and no chats/ROLE.jsonl.")
    if not tasks and not chat_roles(data, heldout=True):
        raise InputError(f"{data} has nothing to evaluate: no tasks/TASK_test.jsonl and no chats/ROLE_heldout.jsonl.")

    for role in trained_roles(team):
        if role not in talkers and role not in {task.role for task in tasks.values()}:
            print(f"Note: {role} has no task and no conversation: its expert learns from plain text alone")
    if tasks:
        note_uneven({name: len(files.read_task(data, task, "train")) for name, task in tasks.items()})
    if GENERAL in talkers and "base" not in roles(team):
        print(f"Note: chats/{GENERAL}.jsonl is of no analyst: all experts learn from it")
    if base is None:
        print(f"Note: {BASE_FOLDER} is not there and no --base was named: tokens weren't counted, nor lengths checked")
    print(f"{data} can be used: no text is both trained on and scored")


if __name__ == "__main__":
    run(main)
