# SPDX-License-Identifier: Apache-2.0
"""Sample conversations by role: what a passage says, what follows from it, why a label is right, and the field's knowledge.

Every figure of an answer is in its passage or computed from it. A row's `kind` is `read` (the figure only has to be found),
`computed` (from several figures, or the largest of them), `reason` (a label and what it follows from) or `knowledge`.
"""

import random
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from finteam_experts.data.files import text_key
from finteam_experts.data.prompts import plain_prompt
from finteam_experts.data.sample.figures import pick
from finteam_experts.data.sample.questions import QUESTIONS, Chat, capital, chat
from finteam_experts.data.sample.task_rows import MAKERS
from finteam_experts.data.tasks import default_tasks

KNOWLEDGE = Path(__file__).parent / "knowledge"
UNSEEN_QUESTION, UNSEEN_WORDING = 10, 3  # every tenth question is held out whole, every third with one wording
_TASKS_OF = {"macro": ("headlines",), "micro": ("fpb", "fiqasa"), "quant": ("stock_movement",)}
ROLES = tuple(_TASKS_OF)


def chats(
    role: str, rows: int, heldout_rows: int, rng: random.Random, scored: Iterable[str] = ()
) -> tuple[list[Chat], list[Chat]]:
    """Draw the train and held-out conversations of a role: a third of knowledge, the rest on passages and tasks.

    No year and no passage is in both, and no passage to train on is one of the `scored` texts; of the knowledge, some questions
    and some wordings are held out.
    """
    known, unknown = knowledge(role)
    parts, taken = [], "\n".join(text_key({"text": text}) for text in scored)
    for held, own, count in ((False, known, rows), (True, unknown, heldout_rows)):
        rng.shuffle(own)
        found = {entry["messages"][0]["content"]: entry for entry in own[: count // 3]}
        makers: tuple[Callable[[], Chat], ...] = (
            lambda held=held: QUESTIONS[role](rng, held),
            lambda held=held: _reason(rng.choice(_TASKS_OF[role]), rng, held),
        )
        while len(found) < count:
            entry = makers[len(found) % 3 == 0]()
            asked = entry["messages"][0]["content"]
            if text_key({"text": asked.partition("\n\n")[0]}) not in taken:
                found.setdefault(asked, entry)
        parts.append(list(found.values()))
        taken = "\n".join(text_key({"text": asked}) for asked in found)
        rng.shuffle(parts[-1])
    return parts[0], parts[1]


@cache
def _blocks(role: str) -> list[tuple[list[str], str]]:
    """The wordings of each question of `knowledge/{role}.txt`, and its answer."""
    blocks = (KNOWLEDGE / f"{role}.txt").read_text(encoding="utf-8").split("\n\n")[1:]
    return [(asked.splitlines(), answer.strip()) for asked, _, answer in (block.partition("\n> ") for block in blocks)]


def knowledge(role: str) -> tuple[list[Chat], list[Chat]]:
    """The field's questions with their answers, to train on and held out."""
    train, heldout = [], []
    for place, (wordings, answer) in enumerate(_blocks(role)):
        for number, wording in enumerate(wordings):
            whole = place % UNSEEN_QUESTION == UNSEEN_QUESTION - 1
            unseen = whole or (number == len(wordings) - 1 and place % UNSEEN_WORDING == 0)
            (heldout if unseen else train).append(chat("knowledge", wording, answer))
    return train, heldout


def _reason(task: str, rng: random.Random, held: bool) -> Chat:
    """A task's passage with the question why: both in one turn, or the reason once the label was given."""
    row = MAKERS[task](rng, held)
    while not row["reason"]:
        row = MAKERS[task](rng, held)
    about, label, reason = default_tasks()[task], row["label"], row["reason"]
    if rng.random() < 0.5:
        why = pick(rng, "and why?|and what is the reason?|and why do you think so?")
        return chat(
            "reason", f"{row['text']}\n\n{about.question.rstrip('?')}, {why}", f"{label.capitalize()}: {reason}."
        )
    why = pick(rng, "Why?|Why is that?|What is the reason?")
    asked = plain_prompt(row["text"], about.question, about.labels)
    return chat("reason", asked, label, why, f"{capital(reason)}.")
