# SPDX-License-Identifier: Apache-2.0
"""The data directory: role corpora and task rows as JSON lines, read with errors that name file and line.

    corpora/{role}.jsonl, corpora/{role}_heldout.jsonl      {"text": str}
    tasks/{task}_train.jsonl, tasks/{task}_test.jsonl       {"text": str, "label": str, "question": str (optional)}

Other columns are allowed and ignored. A task may have a TASK_valid.jsonl as well; where it has none, a tenth of its train
rows serves for validation.
"""

import hashlib
import json
import os
import random
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from finteam_experts.errors import InputError, nearest
from finteam_experts.tasks import TASKS

FEWEST_PASSAGES = 32  # of a corpus, for the router


def corpus_file(data_dir: Path, role: str, *, heldout: bool = False) -> Path:
    return data_dir / "corpora" / f"{role}{'_heldout' if heldout else ''}.jsonl"


def task_file(data_dir: Path, task: str, split: str) -> Path:
    return data_dir / "tasks" / f"{task}_{split}.jsonl"


@cache
def tasks_of(data_dir: Path) -> list[str]:
    """The tasks that a data directory has rows of; `InputError` if it has none. Rows of unknown tasks are named on the screen."""
    found = {path.stem.rpartition("_")[0]: path for path in sorted((data_dir / "tasks").glob("*_*.jsonl"))}
    if not found.keys() & set(TASKS):
        raise InputError(f"{data_dir}/tasks has no TASK_train.jsonl and TASK_test.jsonl of any of {', '.join(TASKS)}.")
    for name in sorted(found.keys() - set(TASKS)) if os.environ.get("RANK", "0") == "0" else ():
        print(f"{data_dir}/tasks/{name}_*.jsonl are left out: there is no task '{name}'.{nearest(name, TASKS)}")
    return [name for name in TASKS if name in found]


def check_passages(data_dir: Path, role: str, passages: list[str]) -> None:
    """Raise `InputError` unless the role's corpus has the passages that the fit of the router needs."""
    if len(passages) < FEWEST_PASSAGES:
        raise InputError(
            f"{corpus_file(data_dir, role)} has {len(passages)} passages. The router needs {FEWEST_PASSAGES} or more of each "
            "role: add some."
        )


def read_corpus(data_dir: Path, role: str, *, heldout: bool = False) -> list[str]:
    """The passages of one role's corpus."""
    return [row["text"] for row in read_rows(corpus_file(data_dir, role, heldout=heldout), ("text",))]


def evenly_spread(passages: list[str], count: int) -> list[str]:
    """`count` of the passages, or all of fewer, evenly spread over them: a corpus may be ordered by source."""
    return [passages[place] for place in np.linspace(0, len(passages) - 1, min(count, len(passages)), dtype=int)]


def read_task(data_dir: Path, task: str, split: str) -> list[dict[str, str]]:
    """The rows of one task and split, each with `text`, `label` and, if it asks its own, `question`.

    `train` is the whole file, `valid` the rows of train that are `held_out` if there is no file for it.

    A row whose question is null or blank asks the task's. Raises `InputError` for a missing or empty file, a missing column,
    an unknown label or a question that is no text.
    """
    path = scored_file(data_dir, task, split)
    from_train = split == "valid" and path == task_file(data_dir, task, "train")
    rows = read_rows(path, ("text", "label"))
    labels = TASKS[task].labels
    found = []
    for line, row in enumerate(rows, start=1):
        if row["label"] not in labels:
            raise InputError(
                f"{path}, line {line}: unknown label '{row['label']}'. {task} has the labels {', '.join(labels)}."
                f"{nearest(row['label'], labels)}"
            )
        question = row.get("question")
        if question is not None and not isinstance(question, str):
            raise InputError(
                f"{path}, line {line}: the question is {question!r}. Write text, or null for the task's own question."
            )
        kept = {"text": row["text"], "label": row["label"]}
        found.append(kept | {"question": question} if question and question.strip() else kept)
    return [row for row in found if held_out(data_dir, task, row)] if from_train else found


def scored_file(data_dir: Path, task: str, split: str) -> Path:
    """The file that `read_task` takes the rows of a split from."""
    path = task_file(data_dir, task, split)
    return path if split != "valid" or path.is_file() else task_file(data_dir, task, "train")


def rows_to_score(data_dir: Path, task: str, split: str, limit: int | None) -> list[dict[str, str]]:
    """The task's rows of that split, or `limit` of them, the same ones each time."""
    rows = read_task(data_dir, task, split)
    return rows if limit is None else random.Random(0).sample(rows, min(limit, len(rows)))


def held_out(data_dir: Path, task: str, row: dict[str, str]) -> bool:
    """Whether a train row is one of the tenth that serves for validation. Rows with the same text go together."""
    if task_file(data_dir, task, "valid").is_file():
        return False
    return hashlib.sha256(text_key(row).encode()).digest()[0] % 10 == 0


def row_limits(per_task: int | None, of_task: dict[str, int] | None) -> dict[str, int | None]:
    """The most train rows to take of each task: `per_task`, unless `of_task` names it; `InputError` for unknown tasks."""
    own = of_task or {}
    if not isinstance(own, dict):
        raise InputError(f"rows_of_task is {own!r}; write it as {{stock_movement: 160}}.")
    for name in own:
        if name not in TASKS:
            raise InputError(f"rows_of_task: unknown task '{name}'.{nearest(str(name), TASKS)}")
    for name, limit, least in (
        ("rows_per_task", per_task, 1),
        *((f"rows_of_task, {task}", own[task], 0) for task in own),
    ):
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < least):
            raise InputError(
                f"{name} is {limit!r}; it must be a whole number from {least}, or be left out for all rows."
            )
    return {name: own.get(name, per_task) for name in TASKS}


def tuning_rows(
    data_dir: Path, seed: int, limits: dict[str, int | None], *, hold_out: bool
) -> list[tuple[str, dict[str, str]]]:
    """The train rows to tune on, each with its task, shuffled: at most `limits[task]` rows of each.

    With `hold_out`, rows that serve for validation are left out.
    """
    rng = random.Random(seed)
    rows = []
    for task in tasks_of(data_dir):
        own = read_task(data_dir, task, "train")
        if hold_out:
            own = [row for row in own if not held_out(data_dir, task, row)]
        rng.shuffle(own)
        rows += [(task, row) for row in own[: limits.get(task)]]
    if not rows:
        raise InputError("rows_of_task leaves no row to tune on. Give at least one task some.")
    rng.shuffle(rows)
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write JSON lines so that `path` is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def read_rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; an `InputError` names the line that has no text in one of `columns`."""
    if not path.is_file():
        raise InputError(
            f"{path} does not exist. A data directory has corpora/ROLE.jsonl, corpora/ROLE_heldout.jsonl, "
            "tasks/TASK_train.jsonl and tasks/TASK_test.jsonl; scripts/make_sample_data.py writes one."
        )
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{where}: not UTF-8 ({error.reason}). Convert it: iconv -f latin1 -t utf-8"
                ) from None
            except json.JSONDecodeError as error:
                raise InputError(f"{where}: not JSON ({error}). Write one JSON object a line.") from None
            for column in columns:
                value = row.get(column) if isinstance(row, dict) else None
                if not isinstance(value, str) or not value.strip():
                    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                    raise InputError(
                        f"{where}: no text in column '{column}'. Expected the columns {', '.join(columns)}; found {found}."
                    )
            for column, value in row.items():
                if isinstance(value, str) and not _is_unicode(value):
                    raise InputError(
                        f"{where}: column '{column}' holds half a character (a lone surrogate). Remove it."
                    )
            rows.append(row)
    if not rows:
        raise InputError(f"{path} is empty. Fill it; every role and task of the run needs its files.")
    return rows


def text_key(row: dict[str, str]) -> str:
    """What two rows share if their texts count as the same: letters and digits, whatever their case and Unicode form.

    A text without any, such as an emoji, is its own key.
    """
    text = unicodedata.normalize("NFKC", row["text"])
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text.casefold()))) or text.strip()


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
