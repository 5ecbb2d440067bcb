# SPDX-License-Identifier: Apache-2.0
"""From datasets on the Hub to the files of a data directory: tasks, corpora and conversations, free of scored text.

Rows that can't be used are left out and counted on the screen, each reason with its first row. A label that the task does not
have is an `InputError`: leaving out its rows would change what the scores mean.
"""

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finteam_experts.data.conversations import chat_file, conversation_of
from finteam_experts.data.files import Row, corpus_file, read_rows, task_file, text_key, write_rows
from finteam_experts.data.hub import ChatSource, Draw, Source, TaskSource, UnknownLabel, UnusableRow
from finteam_experts.data.leaks import ScoredTexts
from finteam_experts.data.tasks import Task
from finteam_experts.errors import InputError, nearest

HELDOUT_EVERY = 12  # of a corpus's documents, and of conversations
TEST_SHARE = 0.2  # of the train rows of a task whose set has no other labelled rows
CHARACTERS_PER_TOKEN = 4  # of English, roughly
SHORTEST = 200  # characters of a passage, unless it is a whole document


class LeftOut(dict[str, list]):
    """Rows that were left out: how many for each reason, and the first of them."""

    def add(self, row: int, reason: str, found: object) -> None:
        self.setdefault(reason, [0, f"row {row}, {found!r:.60}"])[0] += 1

    def report(self, where: str, rows: int) -> None:
        for reason, (count, first) in self.items():
            print(f"{where}, {rows:,} rows: {count:,} left out, they {reason} (first: {first})")


def passages(text: str, longest: int) -> Iterator[str]:
    """A document in pieces of at most `longest` characters, cut between lines or sentences where it can be.

    Lines stay lines. A short document is one passage; of a long one, a rest below `SHORTEST` is left out.
    """
    if len(text) <= longest:
        yield text
        return
    piece = ""
    for part in re.split(r"(\n+|(?<=[.!?؟।])[ \t]+|(?<=[。！？]))", text):
        for start in range(0, len(part), longest):
            cut = part[start : start + longest]
            if piece.strip() and len(piece) + len(cut) > longest:
                if len(piece.strip()) >= SHORTEST:
                    yield piece.strip()
                piece = ""
            piece += cut
    if len(piece.strip()) >= SHORTEST:
        yield piece.strip()


def task_rows(task: Task, source: TaskSource, split: str, draw: Draw) -> list[Row]:
    """The rows of a task from one split, without repetitions; `InputError` for a missing column or unknown labels."""
    where, number = f"{task.name}, {split} of {source.dataset}", 0
    left_out, unknown, kept = LeftOut(), Counter(), {}
    rows, classes = source.rows(split, draw)
    for number, found in enumerate(tqdm(rows, desc=f"{task.name}, {split}"), start=1):
        try:
            if not (text := source.text_of(found)):
                raise UnusableRow("have no text", found)
            row = {"text": text, "label": source.label_of(found, task.labels, classes)}
            if source.question and (asked := source.read(found, source.question)):
                row["question"] = asked
            first = kept.setdefault((text_key(row), row.get("question")), row)
            if first is not row:
                other = "" if first["label"] == row["label"] else " with another label"
                raise UnusableRow(f"repeat an earlier row{other}", text)
        except UnusableRow as error:
            left_out.add(number, *error.args)
        except UnknownLabel as error:
            unknown[str(error)] += 1
    left_out.report(where, number)
    if unknown:
        listed = ", ".join(f"{label} ({count} rows)" for label, count in unknown.most_common(5))
        label = next(iter(unknown))
        hint = nearest(label.strip("'"), task.labels)
        advice = f"Map them with labels in the table of sources; labels: {{{label}: null}} leaves such rows out."
        raise InputError(f"{where}: unknown labels: {listed}. The task has {', '.join(task.labels)}.{hint} {advice}")
    return list(kept.values())


def fetch_task(work: Path, task: Task, source: TaskSource, draw: Draw) -> None:
    """Write the test rows of a task, its validation rows if it has some, and its train rows.

    A set without labelled test rows is tested on its validation split or, if it has none, on a share of its train rows.
    """
    name = task.name
    if task_file(work, name, "train").exists():
        return
    splits = source.kinds()
    parts = {kind: task_rows(task, source, split, draw) for kind, split in splits.items()}
    if not parts.get("test") and parts.get("valid"):
        parts["test"] = parts.pop("valid")
        print(f"{name}: {source.dataset} has no labelled test split. Its {splits['valid']} rows are the test rows")
    if not parts.get("test"):
        texts = sorted(set(map(text_key, parts["train"])))
        drawn = set(random.Random(draw.seed).sample(texts, math.ceil(len(texts) * TEST_SHARE)))
        parts["test"] = [row for row in parts["train"] if text_key(row) in drawn]
        parts["train"] = [row for row in parts["train"] if text_key(row) not in drawn]
        share = f"{len(parts['test'])} of its train rows, drawn with seed {draw.seed}, are the test rows"
        print(f"{name}: {source.dataset} has no labelled test split. {share}")
    tested = set(map(text_key, parts["test"]))
    valid = [row for row in parts.get("valid", []) if text_key(row) not in tested]
    if len(valid) < len(parts.get("valid", [])):
        print(
            f"{name}: {len(parts['valid']) - len(valid)} validation rows are left out, they have the text of a test row"
        )
    for kind, rows in (("test", parts["test"]), ("valid", valid), ("train", parts["train"])):
        if rows:
            write_rows(task_file(work, name, kind), rows)
        elif kind != "valid":
            advice = "Raise --max_rows, or choose another source."
            raise InputError(f"{source.dataset} gave no row for {task_file(work, name, kind).name}. {advice}")


def fetch_role(work: Path, folder: str, role: str, sources: list[Source], draw: Draw) -> None:
    """Write the train and held-out file of a role's corpus or conversations: no document in both."""
    file = corpus_file if folder == "corpora" else chat_file
    if file(work, role).exists():
        return
    train, heldout, seen = [], [], set()
    for source in sources:
        where, number, before, characters = f"{folder}/{role}, {source.dataset}", 0, len(seen), 0
        left_out, (rows, _) = LeftOut(), source.rows(source.kinds()["train"], draw)
        for number, found in enumerate(tqdm(rows, desc=source.dataset), start=1):
            try:
                texts = _texts_of(source, found, draw)
            except UnusableRow as error:
                left_out.add(number, *error.args)
                continue
            document = hashlib.sha256(text_key({"text": " ".join(texts)}).encode()).hexdigest()
            part = train if int(document, 16) % HELDOUT_EVERY else heldout
            for text, row in texts.items():
                if (key := text_key({"text": text})) in seen:
                    left_out.add(number, "repeat an earlier text", text)
                else:
                    seen.add(key)
                    part.append(row | {"source": source.dataset})
                    characters += len(text)
        left_out.report(where, number)
        if len(seen) == before:
            advice = "Look at its columns with --check: the text may be in another one."
            raise InputError(f"{where}: its {number} rows gave nothing. {advice}")
        tokens = f"about {characters / CHARACTERS_PER_TOKEN:,.0f} tokens"
        print(f"{where}: {len(seen) - before:,} texts of {number:,} rows, {tokens}")
    if not heldout:  # few documents, of which the hash selected none
        heldout, train = train[::HELDOUT_EVERY], [row for n, row in enumerate(train) if n % HELDOUT_EVERY]
    if not train:
        raise InputError(f"{folder}/{role}.jsonl would be empty. Add a source, or raise --max_rows.")
    write_rows(file(work, role, heldout=True), heldout)
    write_rows(file(work, role), train)


def _texts_of(source: Source, row: dict[str, Any], draw: Draw) -> dict[str, Row]:
    """What a row of a set gives the data directory, by its text: the passages of a document, or a conversation."""
    if not isinstance(source, ChatSource):
        if not (document := source.text_of(row)):
            raise UnusableRow("have no text", row)
        return {passage: {"text": passage} for passage in passages(document, draw.max_characters)}
    messages = source.messages_of(row)
    try:
        turns, answer = conversation_of(messages, "it")
    except InputError as error:
        raise UnusableRow("are no conversations", str(error)) from None
    return {" ".join([*(turn["content"] for turn in turns), answer]): {"messages": messages}}


def drop_scored(work: Path) -> dict[str, int]:
    """Remove what is scored somewhere in the directory from the files that are trained on; the number of rows by file."""
    scored, counts = ScoredTexts(work), {}
    place_of = {
        "tasks": lambda row: scored.find_same(row["text"]),
        "corpora": lambda row: scored.find(row["text"]),
        "chats": lambda row: scored.find_conversation(*conversation_of(row["messages"], "")),
    }
    for path in sorted(work.glob("*/*.jsonl")):
        name = f"{path.parent.name}/{path.name}"
        kept = rows = read_rows(path, ())
        if not path.stem.endswith(("_heldout", "_test")):
            kept, left_out = [], LeftOut()
            for number, row in enumerate(rows, start=1):
                place = place_of[path.parent.name](row)
                if place and (not path.stem.endswith("_valid") or "_test.jsonl, line" in place):
                    left_out.add(number, "hold a text that is scored", place)
                else:
                    kept.append(row)
            left_out.report(name, len(rows))
            if not kept and path.stem.endswith("_valid"):
                path.unlink()
                continue
            if not kept:
                raise InputError(f"{name}: every row holds a text that is scored. Choose another source.")
            write_rows(path, kept)
        counts[name] = len(kept)
    return counts
