# SPDX-License-Identifier: Apache-2.0
"""The finance tasks: each YAML here is an lm-eval task, and the one place that says its question and labels.

`render` turns a row into the prompt that training, evaluation and the Space share, below the same system prompt.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers import PreTrainedTokenizerBase

from finteam_experts.tasks.prices import compact_prices

FOLDER = Path(__file__).parent
# Given explicitly: templates fill a missing one with the base's own identity, which is wrong here, or with the date.
SYSTEM_PROMPT = "You are a financial analyst."
PROMPT = "{text}\n\n{question} Answer {labels}."


@dataclass(frozen=True)
class Task:
    name: str
    title: str
    role: str  # the analyst whose field it is
    question: str  # for rows that do not ask their own
    labels: tuple[str, ...]
    main_score: str  # by which models are compared
    max_text_tokens: int  # longer texts are cut at the end, so that the question always fits


def _load(path: Path) -> Task:
    content = yaml.safe_load(path.read_text())
    about = content["metadata"]
    return Task(
        name=content["task"],
        title=about["title"],
        role=about["role"],
        question=about["question"],
        labels=tuple(content["doc_to_choice"]),
        main_score=about["main_score"],
        max_text_tokens=about["max_text_tokens"],
    )


TASKS: dict[str, Task] = {task.name: task for task in map(_load, sorted(FOLDER.glob("*.yaml")))}


def render(task: Task, row: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> str:
    """The user message for a task row; the answer to it is `row["label"]`."""
    text = compact_prices(row["text"])
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(tokens) > task.max_text_tokens:
        text = text[: tokens[task.max_text_tokens - 1][1]]
    labels = " or ".join([", ".join(task.labels[:-1]), task.labels[-1]])
    return PROMPT.format(text=text, question=row.get("question", task.question), labels=labels)


def chat(prompt: str) -> list[dict[str, str]]:
    """The conversation that asks `prompt`, in the form of every tokenizer's chat template."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": prompt}]


def conversation(
    task: Task, row: dict[str, str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[dict[str, str]]]:
    """A train row as TRL takes it: the chat up to the answer as prompt, the answer as completion."""
    prompt = chat(render(task, row, tokenizer))
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": row["label"]}]}


def task_cards() -> list[dict[str, str | list[str]]]:
    """The tasks as JSON-ready rows, for readers without this package."""
    return [
        {
            "name": task.name,
            "title": task.title,
            "role": task.role,
            "question": task.question,
            "labels": list(task.labels),
        }
        for task in TASKS.values()
    ]
