# SPDX-License-Identifier: Apache-2.0
"""Tasks as data: an lm-eval task file says a task's labels, question, role and main score.

A data directory has its own as tasks/NAME.yaml. The files beside this one are the tasks of directories that have rows of
these names and no file.
"""

import unicodedata
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import regex
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from finteam_experts.data.prompts import PROMPT, plain_prompt, task_prompt
from finteam_experts.errors import InputError, is_main_process, nearest
from finteam_experts.files import read_yaml

FOLDER = Path(__file__).parent
# Given explicitly: templates fill a missing one with the base's own identity, which is wrong here, or with the date.
SYSTEM_PROMPT = "You are a financial analyst."
MAIN_SCORES = ("accuracy", "macro_f1", "weighted_f1", "mcc")
MAX_TEXT_TOKENS = 256
# What doc_to_text may be made of
PLAIN_FILTERS = ("default", "d", "trim")
PLAIN_NODES = (nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.Filter, nodes.If, nodes.CondExpr, nodes.Or,
               nodes.And, nodes.Not, nodes.Test)  # fmt: skip
_INVISIBLE = regex.compile(r"[\p{Cf}\p{Default_Ignorable_Code_Point}]")
_JOINERS = "\u200c\u200d\ufe0e\ufe0f"


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
        wanted = 'a label is text: YAML reads No, Yes, numbers and dates as something else. Put it in quotes, as ["No", "Yes"].'
        check(isinstance(label, str) and label.strip() != "", "a label of doc_to_choice", label, wanted)
        wanted = f"it must not begin or end with a space, or have characters that no answer shows{invisible(label)}."
        check(label == label.strip() and not invisible(label), "a label of doc_to_choice", label, wanted)
        wanted = "its accents are characters of their own (Unicode form NFD). Write them as most keyboards do (NFC)."
        check(unicodedata.is_normalized("NFC", label), "a label of doc_to_choice", label, wanted)
    wanted = "it must not have a label twice."
    check(len({plain(label).lower() for label in labels}) == len(labels), "doc_to_choice", labels, wanted)
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
    if not isinstance(doc_to_text, str) or ("{{" not in doc_to_text and "{%" not in doc_to_text):
        return
    ours = plain_prompt("TEXT", task.question, task.labels)
    written = plain_prompt("{{text}}", f'{{{{question|default("{task.question}", true)}}}}', task.labels)
    try:
        theirs = _render_plain(doc_to_text, text="TEXT", question=None)
    except Exception as error:  # whatever a template can raise, too deep a nesting among it
        raise InputError(f"{path}: doc_to_text can't be rendered: {error}. Write it as {written!r}.") from None
    if theirs != ours:
        raise InputError(f"{path}: doc_to_text asks {theirs!r:.200}; it has to ask {ours!r}. Write it as {written!r}.")


def _render_plain(template: str, **values: str | None) -> str:
    """Render a template that only places values, in a sandbox; `ValueError` for any other.

    The file may come from anyone: a loop, an operator or a call could run code, take for ever or fill the memory.
    """
    environment = ImmutableSandboxedEnvironment(keep_trailing_newline=True)  # as lm-eval keeps it
    for node in environment.parse(template).find_all(nodes.Node):
        name = f"{type(node).__name__} {getattr(node, 'name', '')}".strip().lower()
        if not isinstance(node, PLAIN_NODES) or (isinstance(node, nodes.Filter) and node.name not in PLAIN_FILTERS):
            raise ValueError(f"it may place text and question, and has more ({name})")
    return environment.from_string(template).render(values)


def plain(label: str) -> str:
    """A label by which two are compared: composed (NFC), without invisible characters, each white space a plain space."""
    return " ".join(unicodedata.normalize("NFC", _INVISIBLE.sub("", label)).split())


def invisible(label: str) -> str:
    """` (it has U+200B ZERO WIDTH SPACE)` for a label with characters that can't be seen or look like a space, or nothing.

    Joiners and variation selectors, which some scripts and symbols need, are none of them.
    """
    found = (char for char in dict.fromkeys(label) if char != " " and (char.isspace() or _INVISIBLE.match(char)))
    names = [f"U+{ord(char):04X} {unicodedata.name(char, '')}".rstrip() for char in found if char not in _JOINERS]
    return f" (it has {', '.join(names)})" if names else ""


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
    return {card["name"]: Task(**card | {"labels": tuple(card["labels"])}) for card in cards}
