# SPDX-License-Identifier: Apache-2.0
"""The finance tasks: each YAML here is an lm-eval task, and the one place that says its question and labels."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from finteam_experts.errors import InputError, nearest, read_yaml
from finteam_experts.prompts import PROMPT, task_prompt

FOLDER = Path(__file__).parent
# Given explicitly: templates fill a missing one with the base's own identity, which is wrong here, or with the date.
SYSTEM_PROMPT = "You are a financial analyst."
MAIN_SCORES = ("accuracy", "macro_f1", "weighted_f1", "mcc")


@dataclass(frozen=True)
class Task:
    name: str
    title: str
    role: str  # the analyst whose field it is
    question: str  # for rows that do not ask their own
    labels: tuple[str, ...]
    main_score: str  # by which models are compared
    max_text_tokens: int  # longer texts are cut at the end, so that the question always fits


def read_task_file(path: Path) -> Task:
    """Read one task's YAML; an `InputError` names the key that is missing or wrong."""
    content = read_yaml(path)
    name, about = content.get("task"), content.get("metadata")
    if name != path.stem:
        raise InputError(f"{path}: task is {name!r}; it must be the file's name, '{path.stem}'.")
    if not isinstance(about, dict):
        raise InputError(
            f"{path}: no mapping called metadata. It gives title, role, question, main_score, max_text_tokens."
        )
    labels = content.get("doc_to_choice")
    if not isinstance(labels, list) or len(labels) < 2:
        raise InputError(f"{path}: doc_to_choice is {labels!r}; it lists two or more labels.")
    for label in labels:
        if not isinstance(label, str) or not label.strip():
            raise InputError(
                f"{path}: doc_to_choice has the label {label!r}, which YAML does not read as text. Put it in quotes, as "
                '["No", "Yes"].'
            )
    if len({label.lower() for label in labels}) < len(labels):
        raise InputError(f"{path}: doc_to_choice has a label twice: {', '.join(labels)}.")
    for key in ("title", "role", "question"):
        if not isinstance(about.get(key), str) or not about[key].strip():
            raise InputError(f"{path}: metadata.{key} is {about.get(key)!r}; it must be text.")
    if about.get("main_score") not in MAIN_SCORES:
        raise InputError(
            f"{path}: metadata.main_score is {about.get('main_score')!r}; it is one of {', '.join(MAIN_SCORES)}."
            f"{nearest(str(about.get('main_score')), MAIN_SCORES)}"
        )
    longest = about.get("max_text_tokens")
    if not isinstance(longest, int) or isinstance(longest, bool) or longest < 1:
        raise InputError(f"{path}: metadata.max_text_tokens is {longest!r}; it must be a whole number above 0.")
    return Task(name, about["title"], about["role"], about["question"], tuple(labels), about["main_score"], longest)


class _Tasks(Mapping[str, Task]):
    """The tasks by name. They are read when the first is asked for, so that a wrong file ends a script with a message."""

    @cached_property
    def _read(self) -> dict[str, Task]:
        return {path.stem: read_task_file(path) for path in sorted(FOLDER.glob("*.yaml"))}

    def __getitem__(self, name: str) -> Task:
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


TASKS = _Tasks()


def _prompt(task: Task, row: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    question = row.get("question", task.question)
    return task_prompt(row["text"], question, task.labels, task.max_text_tokens, tokenizer)


def render(task: Task, row: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> str:
    """The user message for a task row; the answer to it is `row["label"]`."""
    return _prompt(task, row, tokenizer)[0]


def render_all(task: Task, rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The user message of each row, and a line on the screen that says how many texts had to be cut."""
    asked = [_prompt(task, row, tokenizer) for row in rows]
    if (cut := sum(is_cut for _, is_cut in asked)) and os.environ.get("RANK", "0") == "0":
        print(
            f"{task.name}: {cut} of {len(rows)} texts are cut to their first {task.max_text_tokens} tokens (max_text_tokens)"
        )
    return [prompt for prompt, _ in asked]


def prompting() -> dict[str, Any]:
    """All that decides how tasks are asked, for the record of a step that asks them."""
    return {"system": SYSTEM_PROMPT, "form": PROMPT, **{name: asdict(task) for name, task in TASKS.items()}}


def task_cards() -> list[dict[str, Any]]:
    """The tasks as JSON-ready rows, for readers without this package."""
    keys = ("name", "title", "role", "question", "labels", "max_text_tokens")
    return [{key: asdict(task)[key] for key in keys} | {"labels": list(task.labels)} for task in TASKS.values()]
