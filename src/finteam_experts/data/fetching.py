# SPDX-License-Identifier: Apache-2.0
"""From datasets on the Hub to the files of a data directory: tasks, corpora and conversations, free of test text."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finteam_experts.data import hub
from finteam_experts.data.conversations import chat_file, conversation_of
from finteam_experts.data.files import Row, corpus_file, read_rows, task_file, text_key, write_rows
from finteam_experts.data.leaks import holds_test_text
from finteam_experts.data.passages import passages
from finteam_experts.data.tasks import Task
from finteam_experts.errors import InputError, nearest

HELDOUT_PERCENT = 8  # of a corpus's documents, and of conversations
CHARACTERS_PER_TOKEN = 4  # of English, roughly
Revisions = dict[str, str | None]  # the commit of each set
Found = Iterator[tuple[str, str, Row]]  # a row to keep: the document that it is part of, its text, the row itself


@dataclass(frozen=True)
class Draw:
    """Which rows are taken of each dataset and split, and how long a passage may be."""

    max_rows: int | None
    seed: int
    max_characters: int


def question_of(instruction: str, labels: Iterable[str]) -> str:
    """The question of an instruction, without the text below it and without the request for a form of answer.

    A sentence that names two of the labels, or begins like a request, asks for a form of answer.
    """
    asked = re.split(r"\s*\n?\b(?:Text|Context|Headline|News):", instruction, maxsplit=1)[0].strip()
    named = [re.compile(rf"\b{re.escape(label)}\b") for label in labels]
    request = r"(?:please|kindly|your (?:response|answer)|(?:only )?(?:answer|respond|reply))\b"

    def is_request(sentence: str) -> bool:
        return bool(re.match(request, sentence, re.IGNORECASE)) or sum(bool(n.search(sentence)) for n in named) > 1

    sentences = re.split(r"(?<=[.?!])\s+", asked)
    return " ".join(sentence for sentence in sentences if not is_request(sentence)) or asked


def task_rows(task: Task, source: hub.TaskSource, kind: str, draw: Draw, revision: str | None) -> list[Row]:
    """The rows of one task and split, without repetitions; `InputError` for a missing column or an unknown label.

    Rows without a text are left out, and counted on the screen.
    """
    name, labels, kept, empty = task.name, task.labels, {}, 0
    rows = hub.rows(source, kind, draw.max_rows, draw.seed, revision)
    for number, row in enumerate(tqdm(rows, desc=f"{name}, {kind}"), start=1):
        label, text = source.label_of(row, labels), source.text_of(row)
        if not text:
            empty += 1
            continue
        if label is None:
            found = str(row[source.label])
            advice = f"{nearest(found, labels)} Map others with labels in the table of sources."
            where = f"{source.dataset}, {kind} row {number}"
            raise InputError(f"{where}: unknown label '{found}'. {name} has the labels {', '.join(labels)}.{advice}")
        one = {"text": text, "label": label}
        if source.question:
            one["question"] = question_of(source.read(row, source.question), labels)
        kept.setdefault((text_key(one), one.get("question")), one)
    if empty:
        print(f"{name}: {empty} {kind} rows of {source.dataset} are left out: they have no text")
    return list(kept.values())


def fetch_task(work: Path, task: Task, source: hub.TaskSource, draw: Draw, revision: str | None) -> None:
    """Write the test rows of a task, its validation rows if it has some, and its train rows; no text in two of them."""
    name = task.name
    known: set[str] = set()
    for kind in ("test", "valid", "train"):
        path = task_file(work, name, kind)
        if not path.exists():
            found = task_rows(task, source, kind, draw, revision)
            kept = [row for row in found if text_key(row) not in known]
            if not found and kind == "valid":
                continue
            if len(kept) < len(found):
                left_out = (
                    f"{len(found) - len(kept)} of {len(found)} {kind} rows are left out, since their text is scored"
                )
                print(f"{name}: {left_out}. Published scores may include such rows")
            if not kept:
                advice = "Raise --max_rows, or choose another source."
                raise InputError(f"{source.dataset} gave no row for {path.name}. {advice}")
            write_rows(path, kept)
        known |= {text_key(row) for row in read_rows(path, ("text",))}


def fetch_corpus(work: Path, role: str, sources: list[hub.Source], draw: Draw, revisions: Revisions) -> None:
    """Write the train and held-out passages of a role: no document in both, and no passage with a test text."""

    def passages_of(source: hub.Source, row: Row, counts: Counter[str]) -> Found:
        document = source.text_of(row)
        counts["rows without text"] += not document
        for passage in passages(document, draw.max_characters) if document else ():
            yield document, passage, {"text": passage, "source": source.dataset}

    files = corpus_file(work, role), corpus_file(work, role, heldout=True)
    _fetch(work, files, role, "passages", sources, passages_of, draw, revisions)


def fetch_chats(work: Path, role: str, sources: list[hub.ChatSource], draw: Draw, revisions: Revisions) -> None:
    """Write the train and held-out conversations of a role: none in both, none with a test text, none that can't be used."""

    def conversations_of(source: hub.ChatSource, row: Row, counts: Counter[str]) -> Found:
        messages = source.messages_of(row)
        try:
            conversation_of(messages, source.dataset)
        except InputError:
            counts["left out, they are no conversations"] += 1
            return
        text = " ".join(turn["content"] for turn in messages)
        yield text, text, {"messages": messages, "source": source.dataset}

    files = chat_file(work, role), chat_file(work, role, heldout=True)
    _fetch(work, files, role, "conversations", sources, conversations_of, draw, revisions)


def _fetch(
    work: Path, files: tuple[Path, Path], role: str, what: str, sources: Sequence[Any],
    rows_of: Callable[[Any, Row, Counter[str]], Found], draw: Draw, revisions: Revisions,
) -> None:  # fmt: skip
    """Write the train and held-out file of a role, unless both are there: what `rows_of` makes of the rows of its sources."""
    path, heldout_path = files
    if path.exists() and heldout_path.exists():
        return
    holds, parts, seen = holds_test_text(work), ([], []), set()
    for source in sources:
        counts: Counter[str] = Counter()
        characters = 0
        stream = hub.rows(source, "train", draw.max_rows, draw.seed, revisions[source.dataset])
        for row in tqdm(stream, desc=source.dataset):
            counts["rows"] += 1
            for document, text, kept in rows_of(source, row, counts):
                key = text_key({"text": text})
                if holds(key):
                    counts[f"{what} left out, they hold a test text"] += 1
                elif key not in seen:
                    seen.add(key)
                    heldout = int(hashlib.sha256(document.encode()).hexdigest(), 16) % 100 < HELDOUT_PERCENT
                    parts[heldout].append(kept)
                    counts[what] += 1
                    characters += len(text)
        listed = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        print(f"{role}, {source.dataset}: {listed}, about {characters / CHARACTERS_PER_TOKEN:,.0f} tokens")
        if not counts[what]:
            found = f"{source.dataset} gave {role} no {what} from {counts['rows']} rows"
            raise InputError(f"{found}. Look at its columns with --check: the text may be in another one.")
    train, heldout_rows = _with_heldout(*parts)
    if not train:
        raise InputError(f"{role} has {len(heldout_rows)} {what} in all. Add a source, or raise --max_rows.")
    write_rows(heldout_path, heldout_rows)
    write_rows(path, train)


def _with_heldout(train: list[Row], heldout: list[Row]) -> tuple[list[Row], list[Row]]:
    """Both parts; of few rows, of which the hash selected none to hold out, every so many."""
    if heldout:
        return train, heldout
    held_out = train[:: 100 // HELDOUT_PERCENT]
    return [row for row in train if row not in held_out], held_out
