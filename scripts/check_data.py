# SPDX-License-Identifier: Apache-2.0
"""Read a data directory and print what a run with it would train and measure, before any training.

    python scripts/check_data.py outputs/quickstart/data
    python scripts/check_data.py DIR --base ID --merge_config five.yaml

Every problem that would end a step is found here: wrong rows, unknown labels and roles, leaks between files, conversations that
can't be used. The exit code is then not 0.
"""

import argparse
import re
from collections import Counter
from pathlib import Path
from statistics import median

from finteam_experts.threads import use_available_cores  # before torch

from rich.table import Table

from finteam_experts.chats import ChatFormat
from finteam_experts.data import leaks
from finteam_experts.data.conversations import GENERAL, chat_roles, check_chat_roles, read_chats
from finteam_experts.data.files import check_passages, check_roles, read_corpus, read_task, task_file, tasks_of
from finteam_experts.data.tasks import Tasks, render_all
from finteam_experts.errors import InputError, run
from finteam_experts.merging.config import read_merge_config, roles, trained_roles
from finteam_experts.models import as_chats, load_tokenizer, local_folder
from finteam_experts.screen import screen

MANY_TIMES = 4  # the rows of a usual task: a larger one drowns it
MERGE_FILE = Path(__file__).parents[1] / "moe_merge.yaml"


def corpus_table(data: Path, names: list[str], form: ChatFormat) -> Table:
    """Passages, tokens and longest passage of each role's corpus."""
    table = Table("corpus", title="Corpora")
    for column in ("passages", "tokens", "longest", "held-out passages"):
        table.add_column(column, justify="right")
    for role in names:
        passages, heldout = read_corpus(data, role), read_corpus(data, role, heldout=True)
        check_passages(data, role, passages)
        note_special_tokens(f"corpora/{role}.jsonl", passages, form)
        lengths = list(map(len, form.tokenizer(passages)["input_ids"]))
        table.add_row(role, f"{len(passages):,}", f"{sum(lengths):,}", f"{max(lengths):,}", f"{len(heldout):,}")
    return table


def task_table(data: Path, tasks: Tasks, form: ChatFormat) -> Table:
    """Rows, tokens, labels and repetitions of each task; longer texts than the task allows are counted on the screen."""
    table = Table("task", "role", "main score", title="Tasks")
    for column in ("train", "valid", "test", "train tokens", "longest", "repeated", "contradicting"):
        table.add_column(column, justify="right")
    table.add_column("labels of train")
    for name, task in tasks.items():
        rows = {split: read_task(data, task, split) for split in ("train", "valid", "test")}
        note_special_tokens(f"tasks/{name}_train.jsonl", [row["text"] for row in rows["train"]], form)
        own = "" if task_file(data, name, "valid").is_file() else " of train"
        exchanges = form.exchanges(
            list(zip(render_all(task, rows["train"], form.tokenizer), _labels(rows["train"]), strict=True))
        )
        lengths = [len(exchange.ids) for exchange in exchanges]
        again = leaks.repetitions(rows["train"])
        labels = ", ".join(f"{label} {count}" for label, count in Counter(_labels(rows["train"])).most_common())
        counts = [f"{len(rows['train']):,}", f"{len(rows['valid']):,}{own}", f"{len(rows['test']):,}"]
        numbers = [f"{sum(lengths):,}", f"{max(lengths):,}", str(again["repeated"]), str(again["contradicting"])]
        table.add_row(name, task.role or "none", task.main_score, *counts, *numbers, labels)
    return table


def note_uneven(rows: dict[str, int]) -> None:
    """Say so if one task has many more train rows than most: rows are drawn from all of them alike."""
    largest, usual = max(rows, key=rows.get), round(median(rows.values()))
    if rows[largest] > MANY_TIMES * usual:
        print(
            f"Note: {largest} has {rows[largest]:,} train rows, half of the tasks {usual:,} or fewer. Training will see mostly "
            f"{largest}: --rows_per_task {usual} takes as many of each"
        )


def note_special_tokens(where: str, texts: list[str], form: ChatFormat) -> None:
    """Say so if texts hold special tokens of the base, as exported chats do: one would end a turn, not be read as text."""
    special = [str(token) for token in form.tokenizer.added_tokens_decoder.values() if token.special]
    pattern = re.compile("|".join(map(re.escape, special)) or r"(?!)")
    for token, count in Counter(token for text in texts for token in set(pattern.findall(text))).most_common():
        print(f"Note: {count:,} texts of {where} hold {token}, which this base takes for a special token: remove it")


def _labels(rows: list[dict[str, str]]) -> list[str]:
    return [row["label"] for row in rows]


def chat_table(data: Path, form: ChatFormat) -> Table:
    """Conversations, their turns and their tokens, of each role."""
    table = Table("conversations", title="Conversations")
    for column in ("train", "turns", "answer tokens", "tokens", "longest", "held out"):
        table.add_column(column, justify="right")
    heldout = chat_roles(data, heldout=True)
    for role in chat_roles(data):
        conversations = read_chats(data, role)
        said = [turn["content"] for own, answer in conversations for turn in (*own, {"content": answer})]
        note_special_tokens(f"chats/{role}.jsonl", said, form)
        exchanges = form.exchanges(conversations)
        turns, lengths = sum(len(own) + 1 for own, _ in conversations), [len(exchange.ids) for exchange in exchanges]
        answers = sum(len(exchange.answer) for exchange in exchanges)
        held = f"{len(read_chats(data, role, heldout=True)):,}" if role in heldout else "none"
        counts = [f"{number:,}" for number in (len(conversations), turns, answers, sum(lengths), max(lengths))]
        table.add_row(role, *counts, held)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="data directory")
    parser.add_argument("--base", help="a base, for its tokens: Hub id or folder (default: outputs/quickstart/base)")
    parser.add_argument("--merge_config", type=Path, default=MERGE_FILE, help="the team")
    args = parser.parse_args()
    if not args.data_dir.is_dir():
        raise InputError(f"{args.data_dir}: no such folder.")

    use_available_cores()
    data, team = args.data_dir, read_merge_config(args.merge_config)
    base = local_folder(args.base or "outputs/quickstart/base")
    form, console = as_chats(load_tokenizer(base), base), screen(170)
    tasks, talkers, names = tasks_of(data), chat_roles(data), trained_roles(team)
    check_roles(data, tasks, roles(team))
    check_chat_roles(data, roles(team))

    console.print(corpus_table(data, names, form))
    if tasks:
        console.print(task_table(data, tasks, form))
    if talkers:
        console.print(chat_table(data, form))
    leaks.check_corpora(data, names)
    leaks.check_tasks(data, tasks)
    leaks.check_chats(data, talkers)

    for role in names:
        if role not in talkers and role not in {task.role for task in tasks.values()}:
            print(f"Note: {role} has no task and no conversation: its expert learns from plain text alone")
    if tasks:
        note_uneven({name: len(read_task(data, task, "train")) for name, task in tasks.items()})
    if not tasks and not talkers:
        raise InputError(f"{data} has nothing to tune on: no tasks/TASK_train.jsonl and no chats/ROLE.jsonl.")
    if GENERAL in talkers and "base" not in roles(team):
        print(f"Note: chats/{GENERAL}.jsonl is of no analyst: all experts learn from it")
    print(f"{data} can be used: no text is both trained on and scored")


if __name__ == "__main__":
    run(main)
