# SPDX-License-Identifier: Apache-2.0
"""The text that a router is fitted to: of each analyst what it is asked and what it reads, and general chat."""

import random
from pathlib import Path

from finteam_experts.chats import ChatFormat
from finteam_experts.data.conversations import GENERAL, chat_roles, read_chats
from finteam_experts.data.files import check_passages, read_corpus, read_task, tasks_of
from finteam_experts.data.tasks import render_all
from finteam_experts.evaluation.batches import encode

Sequences = list[list[int]]  # token ids

PASSAGE_TOKENS = 64  # many short pieces tell roles apart better than few long ones
CHAT_TOKENS = 192
HELD_BACK = 6  # passages per role that choose the scale and show the progress; the regression never sees them
HELD_BACK_TOKENS = 96
CHAT_SHARE = 0.8  # of a role's tokens, unless --chat_share says otherwise: the rest keeps plain text with its analyst


def role_text(
    data: Path, role: str, form: ChatFormat, tokens: int, seed: int, chat_share: float = CHAT_SHARE
) -> tuple[Sequences, Sequences]:
    """`tokens` tokens of the role for the regression, or all of fewer, and its held-back passages.

    `chat_share` of the tokens is in the chat format, as a gate that was fitted to plain text alone does not know chats: the
    questions of the role's tasks with their answers and its conversations or, for a role that has neither, passages as
    messages.
    """
    passages = read_corpus(data, role)
    check_passages(data, role, passages)
    rng = random.Random(f"{seed} {role}")
    rng.shuffle(passages)
    held_back, passages = passages[:HELD_BACK], passages[HELD_BACK:]
    chats = []
    for task in (task for task in tasks_of(data).values() if task.role == role):
        rows = read_task(data, task, "train")
        rows = rng.sample(rows, min(len(rows), tokens // 16))
        asked = zip(render_all(task, rows, form.tokenizer), (row["label"] for row in rows), strict=True)
        chats += [exchange.ids for exchange in form.exchanges(list(asked))]
    if role in chat_roles(data):
        chats += [exchange.ids for exchange in form.exchanges(read_chats(data, role)[: tokens // 16])]
    rng.shuffle(chats)
    chats = chats or form.prompts(passages[: tokens // 16])
    chats = _first_tokens([ids[:CHAT_TOKENS] for ids in chats], round(chat_share * tokens))
    rng.shuffle(passages)
    plain = encode(form.tokenizer, passages[: tokens // 4], PASSAGE_TOKENS)
    text = chats + _first_tokens(plain, tokens - sum(map(len, chats)))
    return text, encode(form.tokenizer, held_back, HELD_BACK_TOKENS)


def general_text(data: Path, form: ChatFormat, tokens: int) -> Sequences:
    """Conversations that are of no analyst, up to `tokens` tokens; none where the data has none."""
    if GENERAL not in chat_roles(data):
        return []
    return _first_tokens([e.ids[:CHAT_TOKENS] for e in form.exchanges(read_chats(data, GENERAL))], tokens)


def _first_tokens(sequences: Sequences, tokens: int) -> Sequences:
    taken: Sequences = []
    for ids in sequences:
        if tokens < 2:  # a first token alone is not used
            break
        taken.append(ids[:tokens])
        tokens -= len(taken[-1])
    return taken
