# SPDX-License-Identifier: Apache-2.0
"""The data directory: role corpora and task rows as JSON lines, read with errors that name file and line.

    corpora/{role}.jsonl, corpora/{role}_heldout.jsonl      {"text": str, "source": str}
    tasks/{task}_train.jsonl, tasks/{task}_test.jsonl       {"text": str, "label": str, "question": str (optional)}

Other columns are allowed and ignored. A task may have a TASK_valid.jsonl as well; where it has none, a tenth of its train
rows serves for validation.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError

from finteam_experts.errors import InputError, nearest
from finteam_experts.tasks import TASKS


def corpus_file(data_dir: Path, role: str, *, heldout: bool = False) -> Path:
    return data_dir / "corpora" / f"{role}{'_heldout' if heldout else ''}.jsonl"


def task_file(data_dir: Path, task: str, split: str) -> Path:
    return data_dir / "tasks" / f"{task}_{split}.jsonl"


def read_corpus(data_dir: Path, role: str, *, heldout: bool = False) -> list[str]:
    """The passages of one role's corpus."""
    return [row["text"] for row in read_rows(corpus_file(data_dir, role, heldout=heldout), ("text", "source"))]


def stream_corpus(files: str, column: str) -> IterableDataset:
    """The texts in `column` of JSON-lines or Parquet files, read as they are needed: nothing of them is kept.

    `files` may have wildcards, and lie on the Hub as hf://datasets/OWNER/NAME/... Raises `InputError` if no text is found there.
    """
    texts = IterableDataset.from_generator(_texts, gen_kwargs={"files": files, "column": column})
    try:
        first = next(iter(texts), None)
    except InputError:
        raise
    except (DatasetsError, FileNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(f"corpus {files}: can't be read: {error}") from None
    if first is None:
        raise InputError(f"corpus {files}: no row has text in column '{column}'.")
    return texts


def _texts(files: str, column: str) -> Iterator[dict[str, str]]:
    kind = "parquet" if files.endswith(".parquet") else "json"
    for row in load_dataset(kind, data_files=files, split="train", streaming=True):
        if column not in row:
            raise InputError(
                f"corpus {files}: no column '{column}'; it has {', '.join(row)}. Name one with corpus_column."
            )
        if row[column]:
            yield {"text": row[column]}


def evenly_spread(passages: list[str], count: int) -> list[str]:
    """`count` of the passages, or all of fewer, evenly spread over them: a corpus may be ordered by source."""
    return [passages[place] for place in np.linspace(0, len(passages) - 1, min(count, len(passages)), dtype=int)]


def read_task(data_dir: Path, task: str, split: str) -> list[dict[str, str]]:
    """The rows of one task and split, each with `text`, `label` and, if it asks its own, `question`.

    `train` is the whole file, `valid` the rows of train that are `held_out` if there is no file for it.

    Raises `InputError` for a missing or empty file, a missing column or an unknown label; for `test`, also for a row
    whose text is in train as well (compared by its lower-cased letters and digits).
    """
    path = task_file(data_dir, task, split)
    from_train = split == "valid" and not path.is_file()
    if from_train:
        path = task_file(data_dir, task, "train")
    rows = read_rows(path, ("text", "label"))
    labels = TASKS[task].labels
    for line, row in enumerate(rows, start=1):
        if row["label"] not in labels:
            raise InputError(
                f"{path}, line {line}: unknown label '{row['label']}'. {task} has the labels {', '.join(labels)}."
                f"{nearest(row['label'], labels)}"
            )
    if split == "test":
        _check_not_in_train(path, rows, data_dir, task)
    if from_train:
        rows = [row for row in rows if held_out(data_dir, task, row)]
    return [{key: row[key] for key in ("text", "label", "question") if key in row} for row in rows]


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
    for name in own:
        if name not in TASKS:
            raise InputError(f"rows_of_task: unknown task '{name}'.{nearest(name, TASKS)}")
    return {name: own.get(name, per_task) for name in TASKS}


def tuning_rows(
    data_dir: Path, seed: int, limits: dict[str, int | None], *, hold_out: bool
) -> list[tuple[str, dict[str, str]]]:
    """The train rows to tune on, each with its task, shuffled: at most `limits[task]` rows of each.

    With `hold_out`, rows that serve for validation are left out.
    """
    rng = random.Random(seed)
    rows = []
    for task in TASKS:
        own = read_task(data_dir, task, "train")
        if hold_out:
            own = [row for row in own if not held_out(data_dir, task, row)]
        rng.shuffle(own)
        rows += [(task, row) for row in own[: limits.get(task)]]
    rng.shuffle(rows)
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write JSON lines so that `path` is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def read_rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a file of JSON lines; an `InputError` names the line that has no text in one of `columns`."""
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
    train_lines = {text_key(row): line for line, row in enumerate(read_rows(train_path, ("text",)), start=1)}
    for line, row in enumerate(rows, start=1):
        if train_line := train_lines.get(text_key(row)):
            raise InputError(
                f"{path}, line {line}: the same text is in {train_path}, line {train_line}. "
                "A test row that was trained on measures nothing: remove it from one of them."
            )


def text_key(row: dict[str, str]) -> str:
    """What two rows share if their texts count as the same."""
    return "".join(filter(str.isalnum, row["text"].lower()))
