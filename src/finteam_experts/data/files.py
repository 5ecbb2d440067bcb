# SPDX-License-Identifier: Apache-2.0
"""The data directory: role corpora and task rows as JSON lines, read with errors that name file and line.

    corpora/{role}.jsonl, corpora/{role}_heldout.jsonl      {"text": str}
    tasks/{task}_train.jsonl, tasks/{task}_test.jsonl       {"text": str, "label": str, "question": str (optional)}
    tasks/{task}.yaml                                       an lm-eval task: labels, question, role, main score

Other columns are allowed and ignored. A task may have a TASK_valid.jsonl as well; where it has none, a tenth of its train
rows serves for validation.
"""

import hashlib
import html
import json
import random
import re
import unicodedata
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import regex

from finteam_experts.data.tasks import Task, Tasks, default_tasks, invisible, plain, read_task_file
from finteam_experts.errors import InputError, is_main_process, nearest
from finteam_experts.files import has_half_characters, write_text

FEWEST_PASSAGES = 32  # of a corpus, for the router
CONTRACT = (
    "A data directory has corpora/ROLE.jsonl, corpora/ROLE_heldout.jsonl, tasks/TASK_train.jsonl and tasks/TASK_test.jsonl; "
    "scripts/make_sample_data.py writes one."
)
FOLDERS = ("corpora", "chats", "tasks")
Row = dict[str, str]

_FOLDERS_MEANT = {"corpus": "corpora", "chat": "chats", "task": "tasks"} | {name: name for name in FOLDERS}
_BESIDE_DATA = re.compile(
    r"\..*|.*\.(?:md|partial)|(?:README|LICEN[CS]E|NOTICE|CITATION)\b.*|(?:finteam|commits)\.json", re.IGNORECASE
)
_SPLIT = re.compile(
    r"(.+?)[-_. ](?:(train|training)|(valid|validation|val|dev)|(test|testing|eval|h[eo]ld[-_. ]?out))", re.IGNORECASE
)


def corpus_file(data_dir: Path, role: str, *, heldout: bool = False) -> Path:
    return data_dir / "corpora" / f"{role}{'_heldout' if heldout else ''}.jsonl"


def task_file(data_dir: Path, task: str, split: str) -> Path:
    return data_dir / "tasks" / f"{task}_{split}.jsonl"


def tasks_of(data_dir: Path, chosen: Collection[str] | None = None) -> Tasks:
    """The tasks of a data directory, or the `chosen` ones: with a file of their own or, by the name of their rows, the package's.

    Raises `InputError` for a directory that is not there, and for an unknown name among the chosen ones.
    """
    if not data_dir.is_dir():
        raise InputError(f"{data_dir}: no such folder. {CONTRACT}")
    for path in data_dir.glob("tasks/*.yml"):
        raise InputError(f"{path}: task files end with .yaml. Rename it to {path.stem}.yaml.")
    found = {name: task for name, task in default_tasks().items() if name in _names_of_rows(data_dir)}
    found |= {path.stem: read_task_file(path) for path in data_dir.glob("tasks/*.yaml")}
    for name in chosen or ():
        if name not in found:
            raise InputError(
                f"--tasks {name}: {data_dir} has the tasks {', '.join(sorted(found))}.{nearest(name, found)}"
            )
    return {name: found[name] for name in (sorted(found) if chosen is None else chosen)}


def _names_of_rows(data_dir: Path) -> set[str]:
    return {path.stem.rpartition("_")[0] for path in data_dir.glob("tasks/*_*.jsonl")}


def check_roles(data_dir: Path, tasks: Tasks, team: Collection[str]) -> None:
    """Raise `InputError` if a task of the directory's own is of a role that the team does not have."""
    for name, task in tasks.items():
        path = data_dir / "tasks" / f"{name}.yaml"
        if task.role and task.role not in team and path.is_file():
            advice = "Correct it, leave it out for a task of no single analyst, or add the role to the merge."
            raise InputError(f"{path}: metadata.role is '{task.role}', and the team has {', '.join(team)}. {advice}")


def check_passages(data_dir: Path, role: str, passages: list[str]) -> None:
    """Raise `InputError` unless the role's corpus has the passages that the fit of the router needs."""
    if len(passages) < FEWEST_PASSAGES:
        found = f"{corpus_file(data_dir, role)} has {len(passages)} passages"
        raise InputError(f"{found}. The router needs {FEWEST_PASSAGES} or more of each role: add some.")


def read_corpus(data_dir: Path, role: str, *, heldout: bool = False) -> list[str]:
    """The passages of one role's corpus."""
    return [row["text"] for row in read_rows(corpus_file(data_dir, role, heldout=heldout), ("text",))]


def evenly_spread(items: list[Any], count: int) -> list[Any]:
    """`count` of the items, or all of fewer, evenly spread over them: a file may be ordered by source."""
    return [items[place] for place in np.linspace(0, len(items) - 1, min(count, len(items)), dtype=int)]


def read_task(data_dir: Path, task: Task, split: str) -> list[Row]:
    """The rows of one task and split, each with `text`, `label` and, if it asks its own, `question`.

    `train` is the whole file, `valid` the rows of train that are `held_out` if there is no file for it. Labels are compared as
    `plain` writes them. A row whose question is null or blank asks the task's. Raises `InputError` for a missing or empty file, a missing column, an unknown label or
    a question that is no text.
    """
    path, found, labels = scored_file(data_dir, task.name, split), [], {plain(label): label for label in task.labels}
    for where, row in iter_rows(path, ("text", "label")):
        label, question = labels.get(plain(row["label"])), row.get("question")
        if label is None:
            known = f"{task.name} has the labels {', '.join(task.labels)}.{nearest(plain(row['label']), task.labels)}"
            raise InputError(f"{where}: unknown label '{row['label']}'{invisible(row['label'])}. {known}")
        if question is not None and not isinstance(question, str):
            raise InputError(
                f"{where}: the question is {question!r}. Write text, or null for the task's own question."
            )
        own = {"question": question} if question and question.strip() else {}
        found.append({"text": row["text"], "label": label} | own)
    from_train = split == "valid" and path == task_file(data_dir, task.name, "train")
    return [row for row in found if held_out(data_dir, task.name, row)] if from_train else found


def scored_file(data_dir: Path, task: str, split: str) -> Path:
    """The file that `read_task` takes the rows of a split from."""
    path = task_file(data_dir, task, split)
    return path if split != "valid" or path.is_file() else task_file(data_dir, task, "train")


def rows_to_score(data_dir: Path, task: Task, split: str, limit: int | None) -> list[Row]:
    """The task's rows of that split, or `limit` of them, the same ones each time."""
    rows = read_task(data_dir, task, split)
    return rows if limit is None else random.Random(0).sample(rows, min(limit, len(rows)))


def held_out(data_dir: Path, task: str, row: Row) -> bool:
    """Whether a train row is one of the tenth that serves for validation. Rows with the same text go together."""
    has_file = task_file(data_dir, task, "valid").is_file()
    return not has_file and hashlib.sha256(text_key(row).encode()).digest()[0] % 10 == 0


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write JSON lines so that `path` is whole or not there."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; an `InputError` names the line that has no text in one of `columns`."""
    return [row for _, row in iter_rows(path, columns)]


def iter_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows as `read_rows` gives them, one at a time, each with its place, "path, line N"."""
    if not path.is_file():
        raise InputError(f"{path} does not exist. {CONTRACT}")
    where = None
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            yield where, _read_row(line, where, columns)
    if where is None:
        raise InputError(f"{path} is empty. Fill it; every role and task of the run needs its files.")


def check_files(data_dir: Path) -> None:
    """Raise `InputError` for a file or folder that looks like data and that no step reads; name others on the screen."""
    notes, known = [], tasks_of(data_dir)
    for path in sorted(data_dir.iterdir()):
        if path.name in FOLDERS and path.is_dir():
            for file in sorted(path.iterdir()):
                _check_file(file)
        elif path.is_dir() and (wanted := _FOLDERS_MEANT.get(path.name.lower())):
            raise InputError(f"{path}: no step reads this folder. Rename it to {wanted}.")
        elif not _BESIDE_DATA.fullmatch(path.name):
            notes.append(f"{path} is read by no step: rows are in {', '.join(FOLDERS)}")
    for name in sorted(_names_of_rows(data_dir) - set(known)):
        hint = nearest(name, default_tasks()) or f" Describe it in {data_dir}/tasks/{name}.yaml."
        notes.append(f"{data_dir}/tasks/{name}_*.jsonl are left out: there is no task '{name}'.{hint}")
    for note in notes if is_main_process() else ():
        print(f"Note: {note}")


def _check_file(path: Path) -> None:
    """Raise `InputError` unless a step reads this file of one of the `FOLDERS`, or it is no data."""
    folder, name = path.parent.name, path.name.partition(".")[0]
    if _BESIDE_DATA.fullmatch(path.name) or (folder, path.suffix) in (("tasks", ".yaml"), ("tasks", ".yml")):
        return
    if path.suffix != ".jsonl" or path.is_dir():
        advice = f"Write its rows to {folder}/{name}.jsonl, or move it elsewhere."
        raise InputError(f"{path}: no step reads it, since rows are in files that end with .jsonl. {advice}")
    named = _SPLIT.fullmatch(path.stem)
    split = ("train", "valid", "test")[named.lastindex - 2] if named else None
    if folder == "tasks":
        wanted = f"{named[1]}_{split}" if named else "TASK_train.jsonl, TASK_valid.jsonl or TASK_test"
    else:
        wanted = named[1] + ("" if split == "train" else "_heldout") if named else path.stem
    if path.stem != wanted:
        raise InputError(f"{path}: no step reads a file of this name. Rename it to {wanted}.jsonl.")


def _read_row(line: bytes, where: str, columns: tuple[str, ...]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error.reason}). Convert it: iconv -f latin1 -t utf-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error}). Write one JSON object per line.") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: found {str(row)[:80]!r}. Write one JSON object per line.")
    for column in columns:
        value = row.get(column)
        if not isinstance(value, str) or not value.strip():
            found = f"{value!r:.80}; text is in quotes" if column in row else ", ".join(row)
            raise InputError(
                f"{where}: no text in column '{column}'. Expected the columns {', '.join(columns)}; found {found}."
            )
    for column, value in row.items() if b"\\u" in line else ():
        if has_half_characters(value):
            raise InputError(f"{where}: column '{column}' holds half a character (a lone surrogate). Remove it.")
    return row


# Kept: what is before a number, with or without a currency, and a minus behind a number or a rating.
_NUMBER = r"(?=\s*(?:[a-z]{3}\s?)?[$€£¥]?\s*\.?\d)"
_RATING = "|".join([r"(?<=\d-)", *(rf"(?<=[a-d]{{{n}}}-)(?<![^\W_][a-d]{{{n}}}-)" for n in (1, 2, 3))])
_MINUS = re.compile(rf"-(?:{_NUMBER}|(?!\w)(?:{_RATING}))")
_BRACKET, _POINT = re.compile(rf"\({_NUMBER}"), re.compile(r"\.(?<![^\W\d_]\.)(?=\d)")
_THOUSANDS = re.compile(r",(?<=\d,)(?=\d{3}(?!\d))")
_DROPPED = bytes({*range(5, 33), 0, 127, *b"!\"#&'()*,-./:;?@[\\]^_`{}"})
_BETWEEN_DIGITS = re.compile(rf"(\d)[{re.escape(_DROPPED.decode())}]+(?=\d)")
_INVISIBLE = regex.compile(r"[\p{Cf}\p{DI}]+")
_DASH = regex.compile(r"[\p{Pd}\u2212\u2043\u02d7]")
_PUNCTUATION = regex.compile(r"(?V1)(?: \p{Mn}+|[[\p{Z}\p{P}\p{C}\p{Sk}\u02b9\u02bc]--[\x00-\x7f]])+")


def text_key(row: Row) -> str:
    """A key that two rows share if their texts count as the same text.

    Case, white space, punctuation, invisible characters, HTML entities and the Unicode form don't count. Letters and symbols do, and so
    do the sign, the opening bracket and the decimal point of a number and the sign of a rating: +3.2 and -3.2, (3.2) and 3.2, 1.25 and
    12.5, BBB+ and BBB- are different, 1,250 and 1250 are not. A text of punctuation alone is its own key.
    """
    text = row["text"]
    if "&" in text:
        text = html.unescape(html.unescape(text))  # scraped text may be escaped twice
    if text.isascii():
        text = text.lower()
    else:
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold())
        text = _PUNCTUATION.sub(" ", _DASH.sub("-", text))
    # what is kept of ASCII punctuation becomes a control character for a moment, and the rest goes
    text = _MINUS.sub("\1", _THOUSANDS.sub("", text))
    text = _BETWEEN_DIGITS.sub("\\1\4", _POINT.sub("\3", _BRACKET.sub("\2", text)))
    return text.encode().translate(None, _DROPPED).decode() or row["text"].strip()
