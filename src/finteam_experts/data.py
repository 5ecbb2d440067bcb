# SPDX-License-Identifier: Apache-2.0
"""The data directory: role corpora and task rows as JSON lines, read with errors that name file and line.

    corpora/{role}.jsonl, corpora/{role}_heldout.jsonl      {"text": str, "source": str}
    tasks/{task}_train.jsonl, tasks/{task}_test.jsonl       {"text": str, "label": str, "question": str (optional)}

Other columns are allowed and ignored.
"""

import json
from pathlib import Path

from finteam_experts.errors import InputError, nearest
from finteam_experts.tasks import TASKS


def corpus_file(data_dir: Path, role: str, *, heldout: bool = False) -> Path:
    return data_dir / "corpora" / f"{role}{'_heldout' if heldout else ''}.jsonl"


def task_file(data_dir: Path, task: str, split: str) -> Path:
    return data_dir / "tasks" / f"{task}_{split}.jsonl"


def read_corpus(data_dir: Path, role: str, *, heldout: bool = False) -> list[str]:
    """The passages of one role's corpus."""
    return [row["text"] for row in _read_rows(corpus_file(data_dir, role, heldout=heldout), ("text", "source"))]


def read_task(data_dir: Path, task: str, split: str) -> list[dict[str, str]]:
    """The rows of one task and split (`train` or `test`), each with `text`, `label` and, if it asks its own, `question`.

    Raises `InputError` for a missing or empty file, a missing column or an unknown label; for `test`, also for a row
    whose text is in train as well (compared by its lower-cased letters and digits).
    """
    path = task_file(data_dir, task, split)
    rows = _read_rows(path, ("text", "label"))
    labels = TASKS[task].labels
    for line, row in enumerate(rows, start=1):
        if row["label"] not in labels:
            raise InputError(
                f"{path}, line {line}: unknown label '{row['label']}'. {task} has the labels {', '.join(labels)}."
                f"{nearest(row['label'], labels)}"
            )
    if split == "test":
        _check_not_in_train(path, rows, data_dir, task)
    return [{key: row[key] for key in ("text", "label", "question") if key in row} for row in rows]


def _read_rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    if not path.is_file():
        raise InputError(
            f"{path} does not exist. A data directory has corpora/ROLE.jsonl, corpora/ROLE_heldout.jsonl, "
            "tasks/TASK_train.jsonl and tasks/TASK_test.jsonl; scripts/make_sample_data.py writes one."
        )
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error}). Write one JSON object a line.") from None
            for column in columns:
                value = row.get(column) if isinstance(row, dict) else None
                if not isinstance(value, str) or not value.strip():
                    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                    raise InputError(
                        f"{path}, line {number}: no text in column '{column}'. Expected the columns "
                        f"{', '.join(columns)}; found {found}."
                    )
            rows.append(row)
    if not rows:
        raise InputError(f"{path} is empty. Fill it, or leave its role or task out.")
    return rows


def _check_not_in_train(path: Path, rows: list[dict[str, str]], data_dir: Path, task: str) -> None:
    train_path = task_file(data_dir, task, "train")
    train_lines = {text_key(row): line for line, row in enumerate(_read_rows(train_path, ("text",)), start=1)}
    for line, row in enumerate(rows, start=1):
        if train_line := train_lines.get(text_key(row)):
            raise InputError(
                f"{path}, line {line}: the same text is in {train_path}, line {train_line}. "
                "A test row that was trained on measures nothing: remove it from one of them."
            )


def text_key(row: dict[str, str]) -> str:
    """What two rows share if their texts count as the same."""
    return "".join(filter(str.isalnum, row["text"].lower()))
