# SPDX-License-Identifier: Apache-2.0
"""Tasks as data: an lm-eval task file says a task's labels, question, role and main score.

A data directory has its own as tasks/NAME.yaml. The files beside this one are the tasks of directories that have rows of
these names and no file.
"""

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from finteam_experts.data.prompts import PROMPT, plain_prompt, task_prompt
from finteam_experts.errors import InputError, is_main_process, nearest
from finteam_experts.files import read_yaml

FOLDER = Path(__file__).parent
# Given explicitly: templates fill a missing one with the base's own identity, which is wrong here, or with the date.
SYSTEM_PROMPT = "You are a financial analyst."
MAIN_SCORES = ("accuracy", "macro_f1", "weighted_f1", "mcc")
MAX_TEXT_TOKENS = 256


@dataclass(frozen=True)
class Task:
    name: str
    title: str
    role: str | None  # the analyst whose field it is, if it is one analyst's
    question: str  # for rows that do not ask their own
    labels: tuple[str, ...]
    main_score: str  # by which models are compared
    max_text_tokens: int  # longer texts are cut at the end, so that the question always fits


Tasks = dict[str, Task]  # by name


def read_task_file(path: Path) -> Task:
    """Read one task's YAML; an `InputError` names the key that is missing or wrong."""
    content = read_yaml(path)
    name, about, labels = content.get("task"), content.get("metadata"), content.get("doc_to_choice")

    def check(right: bool, key: str, found: object, wanted: str) -> None:
        if not right:
            raise InputError(f"{path}: {key} is {found!r}; {wanted}")

    check(name == path.stem, "task", name, f"it must be the file's name, '{path.stem}'.")
    wanted = "it must be a mapping with the question, and with role, title, main_score, max_text_tokens as needed."
    check(isinstance(about, dict), "metadata", about, wanted)
    check(isinstance(labels, list) and len(labels) > 1, "doc_to_choice", labels, "it lists two or more labels.")
    for label in labels:
        wanted = 'a label is text: YAML reads No and Yes as something else. Put it in quotes, as ["No", "Yes"].'
        check(isinstance(label, str) and label.strip() != "", "a label of doc_to_choice", label, wanted)
        wanted = "it must not begin or end with a space, which no answer shows."
        check(label == label.strip(), "a label of doc_to_choice", label, wanted)
    wanted = "it must not have a label twice."
    check(len({label.lower() for label in labels}) == len(labels), "doc_to_choice", labels, wanted)
    about = {"title": name, "role": None, "main_score": "macro_f1", "max_text_tokens": MAX_TEXT_TOKENS, **about}
    for key in ("title", "question", "role"):
        text = about.get(key)
        check(
            isinstance(text, str) and text.strip() != "" or (key, text) == ("role", None),
            f"metadata.{key}",
            text,
            "it must be text.",
        )
    score, longest = about["main_score"], about["max_text_tokens"]
    wanted = f"it is one of {', '.join(MAIN_SCORES)}.{nearest(str(score), MAIN_SCORES)}"
    check(score in MAIN_SCORES, "metadata.main_score", score, wanted)
    wanted = "it must be a whole number above 0."
    check(type(longest) is int and longest > 0, "metadata.max_text_tokens", longest, wanted)
    task = Task(name, about["title"], about["role"], about["question"], tuple(labels), score, longest)
    _check_words(path, task, content.get("doc_to_text"))
    return task


def _check_words(path: Path, task: Task, doc_to_text: object) -> None:
    """Raise `InputError` if lm-eval, given the file as it is, would ask in other words than the model is tuned on.

    A file that names a column instead of a template is for evaluate.py alone.
    """
    if "{{" not in str(doc_to_text):
        return
    ours = plain_prompt("TEXT", task.question, task.labels)
    try:
        theirs = jinja2.Template(str(doc_to_text)).render(text="TEXT", question=None)
    except jinja2.TemplateError as error:
        theirs = f"no template: {error}"
    if theirs != ours:
        written = plain_prompt("{{text}}", f'{{{{question|default("{task.question}", true)}}}}', task.labels)
        raise InputError(f"{path}: doc_to_text asks {theirs!r}; it has to ask {ours!r}. Write it as {written!r}.")


@cache
def default_tasks() -> Tasks:
    """The tasks of this package, by name."""
    return {path.stem: read_task_file(path) for path in sorted(FOLDER.glob("*.yaml"))}


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


def prompting(tasks: Tasks) -> dict[str, Any]:
    """All that decides how tasks are asked, for the record of a step that asks them."""
    return {"system": SYSTEM_PROMPT, "form": PROMPT, **{name: asdict(task) for name, task in tasks.items()}}


def about_tasks(tasks: Tasks) -> dict[str, Any]:
    """The system prompt and the tasks as JSON, for readers of a model without this package."""
    cards = [asdict(task) | {"labels": list(task.labels)} for task in tasks.values()]
    return {"system_prompt": SYSTEM_PROMPT, "tasks": cards}


def tasks_from(cards: list[dict[str, Any]]) -> Tasks:
    """The tasks that a model's or report's record describes, as `about_tasks` wrote them."""
    defaults = {"main_score": "macro_f1"}  # earlier records have none
    return {card["name"]: Task(**(defaults | card | {"labels": tuple(card["labels"])})) for card in cards}
