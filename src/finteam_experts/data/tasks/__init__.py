# SPDX-License-Identifier: Apache-2.0
"""The finance tasks: each YAML here is an lm-eval task, and the one place that says its question and labels."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from finteam_experts.data.prompts import PROMPT, task_prompt
from finteam_experts.errors import InputError, is_main_process, nearest
from finteam_experts.files import read_yaml

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
    name, about, labels = content.get("task"), content.get("metadata"), content.get("doc_to_choice")

    def check(right: bool, key: str, found: object, wanted: str) -> None:
        if not right:
            raise InputError(f"{path}: {key} is {found!r}; {wanted}")

    check(name == path.stem, "task", name, f"it must be the file's name, '{path.stem}'.")
    wanted = "it must be a mapping that gives title, role, question, main_score, max_text_tokens."
    check(isinstance(about, dict), "metadata", about, wanted)
    check(isinstance(labels, list) and len(labels) > 1, "doc_to_choice", labels, "it lists two or more labels.")
    for label in labels:
        wanted = 'a label is text: YAML reads No and Yes as something else. Put it in quotes, as ["No", "Yes"].'
        check(isinstance(label, str) and label.strip() != "", "a label of doc_to_choice", label, wanted)
    wanted = "it must not have a label twice."
    check(len({label.lower() for label in labels}) == len(labels), "doc_to_choice", labels, wanted)
    for key in ("title", "role", "question"):
        text = about.get(key)
        check(isinstance(text, str) and text.strip() != "", f"metadata.{key}", text, "it must be text.")
    score, longest = about.get("main_score"), about.get("max_text_tokens")
    wanted = f"it is one of {', '.join(MAIN_SCORES)}.{nearest(str(score), MAIN_SCORES)}"
    check(score in MAIN_SCORES, "metadata.main_score", score, wanted)
    wanted = "it must be a whole number above 0."
    check(type(longest) is int and longest > 0, "metadata.max_text_tokens", longest, wanted)
    return Task(name, about["title"], about["role"], about["question"], tuple(labels), score, longest)


class _Tasks(Mapping[str, Task]):
    """The tasks by name, read at first use, so that a wrong file ends a script with a message and not its import."""

    @cached_property
    def by_name(self) -> dict[str, Task]:
        return {path.stem: read_task_file(path) for path in sorted(FOLDER.glob("*.yaml"))}

    def __getitem__(self, name: str) -> Task:
        return self.by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)


TASKS = _Tasks()


def render(task: Task, row: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> str:
    """The user message for a task row; the answer to it is `row["label"]`."""
    return render_all(task, [row], tokenizer, report=False)[0]


def render_all(
    task: Task, rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, report: bool = True
) -> list[str]:
    """The user message of each row. Reports on the screen how many texts had to be cut."""
    asked = [
        task_prompt(row["text"], row.get("question", task.question), task.labels, task.max_text_tokens, tokenizer)
        for row in rows
    ]
    if report and (cut := sum(is_cut for _, is_cut in asked)) and is_main_process():
        how = f"cut to their first {task.max_text_tokens} tokens (max_text_tokens)"
        print(f"{task.name}: {cut} of {len(rows)} texts are {how}")
    return [prompt for prompt, _ in asked]


def prompting() -> dict[str, Any]:
    """All that decides how tasks are asked, for the record of a step that asks them."""
    return {"system": SYSTEM_PROMPT, "form": PROMPT, **{name: asdict(task) for name, task in TASKS.items()}}


def about_tasks() -> dict[str, Any]:
    """The system prompt and the tasks as JSON, for readers of a model without this package."""
    keys = ("name", "title", "role", "question", "labels", "max_text_tokens")
    cards = [{key: asdict(task)[key] for key in keys} | {"labels": list(task.labels)} for task in TASKS.values()]
    return {"system_prompt": SYSTEM_PROMPT, "tasks": cards}
