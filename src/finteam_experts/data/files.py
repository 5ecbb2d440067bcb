# SPDX-License-Identifier: Apache-2.0
"""The data directory: role corpora and task rows as JSON lines, read with errors that name file and line.

    corpora/{role}.jsonl, corpora/{role}_heldout.jsonl      {"text": str}
    tasks/{task}_train.jsonl, tasks/{task}_test.jsonl       {"text": str, "label": str, "question": str (optional)}
    tasks/{task}.yaml                                       an lm-eval task: labels, question, role, main score

Other columns are allowed and ignored. A task may have a TASK_valid.jsonl as well; where it has none, a tenth of its train
rows serves for validation.
"""

import hashlib
import json
import random
import unicodedata
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from finteam_experts.data.tasks import Task, Tasks, default_tasks, read_task_file
from finteam_experts.errors import InputError, is_main_process, nearest
from finteam_experts.files import has_half_characters, write_text

FEWEST_PASSAGES = 32  # of a corpus, for the router
CONTRACT = (
    "A data directory has corpora/ROLE.jsonl, corpora/ROLE_heldout.jsonl, tasks/TASK_train.jsonl and tasks/TASK_test.jsonl; "
    "scripts/make_sample_data.py writes one."
)
Row = dict[str, str]


def corpus_file(data_dir: Path, role: str, *, heldout: bool = False) -> Path:
    return data_dir / "corpora" / f"{role}{'_heldout' if heldout else ''}.jsonl"


def task_file(data_dir: Path, task: str, split: str) -> Path:
    return data_dir / "tasks" / f"{task}_{split}.jsonl"


@cache
def tasks_in(data_dir: Path) -> Tasks:
    """All tasks of a data directory: with a file of their own or, by the name of their rows, the package's."""
    folder, found = data_dir / "tasks", {}
    files = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    for path in folder.glob("*.yml"):
        raise InputError(f"{path}: task files end with .yaml. Rename it to {path.stem}.yaml.")
    for name in sorted({path.stem.rpartition("_")[0] for path in folder.glob("*_*.jsonl")} | set(files)):
        if name in files:
            found[name] = read_task_file(files[name])
        elif name in default_tasks():
            found[name] = default_tasks()[name]
        elif is_main_process():
            hint = nearest(name, default_tasks()) or f" Describe it in {folder}/{name}.yaml."
            print(f"{folder}/{name}_*.jsonl are left out: there is no task '{name}'.{hint}")
    return found


def tasks_of(data_dir: Path, chosen: Collection[str] | None = None) -> Tasks:
    """The tasks that a data directory has, or the `chosen` ones of them; `InputError` for an unknown name.

    Rows of unknown tasks are reported on the screen.
    """
    found = tasks_in(data_dir)
    for name in chosen or ():
        if name not in found:
            raise InputError(f"--tasks {name}: {data_dir} has the tasks {', '.join(found)}.{nearest(name, found)}")
    return found if chosen is None else {name: found[name] for name in chosen}


def require_tasks(data_dir: Path, chosen: Collection[str] | None = None) -> Tasks:
    """The same; `InputError` if there is none."""
    if not (found := tasks_of(data_dir, chosen)):
        raise InputError(f"{data_dir}/tasks has no TASK_train.jsonl and TASK_test.jsonl of a task. {CONTRACT}")
    return found


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

    `train` is the whole file, `valid` the rows of train that are `held_out` if there is no file for it. A row whose question
    is null or blank asks the task's. Raises `InputError` for a missing or empty file, a missing column, an unknown label or
    a question that is no text.
    """
    path, found = scored_file(data_dir, task.name, split), []
    for line, row in enumerate(read_rows(path, ("text", "label")), start=1):
        label, question = row["label"], row.get("question")
        if label not in task.labels:
            known = f"{task.name} has the labels {', '.join(task.labels)}.{nearest(label, task.labels)}"
            raise InputError(f"{path}, line {line}: unknown label '{label}'. {known}")
        if question is not None and not isinstance(question, str):
            advice = "Write text, or null for the task's own question."
            raise InputError(f"{path}, line {line}: the question is {question!r}. {advice}")
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
    if not path.is_file():
        raise InputError(f"{path} does not exist. {CONTRACT}")
    with path.open("rb") as lines:
        rows = [_read_row(line, f"{path}, line {number}", columns) for number, line in enumerate(lines, start=1)]
    if not rows:
        raise InputError(f"{path} is empty. Fill it; every role and task of the run needs its files.")
    return rows


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
            expected = f"Expected the columns {', '.join(columns)}; found {', '.join(row)}."
            raise InputError(f"{where}: no text in column '{column}'. {expected}")
    for column, value in row.items() if b"\\u" in line else ():
        if has_half_characters(value):
            raise InputError(f"{where}: column '{column}' holds half a character (a lone surrogate). Remove it.")
    return row


def text_key(row: Row) -> str:
    """What two rows share if their texts count as the same: letters and digits, in any case and Unicode form.

    A text without any, such as an emoji, is its own key.
    """
    text = unicodedata.normalize("NFKC", row["text"])
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text.casefold()))) or text.strip()
