# SPDX-License-Identifier: Apache-2.0
"""The text that a router is fitted to: of each analyst what it is asked and what it reads, and general chat."""

import random
from dataclasses import dataclass
from pathlib import Path

from finteam_experts.chats import ChatFormat, Exchange
from finteam_experts.data.conversations import GENERAL, chat_roles, read_chats
from finteam_experts.data.files import check_passages, read_corpus, read_task, tasks_of
from finteam_experts.data.tasks import render_all
from finteam_experts.errors import is_main_process
from finteam_experts.evaluation.batches import encode

Sequences = list[list[int]]  # token ids

PASSAGE_TOKENS = 64  # many short pieces tell roles apart better than few long ones
CHAT_TOKENS = 192
FIRST_TOKENS = 24  # of those: where a conversation is cut, the model still reads how it begins
ANSWER = "Yes."  # to a passage as a message, where only the message is used
HELD_BACK = 6  # passages per role that choose the scale and show the progress; the regression never sees them
HELD_BACK_TOKENS = 96
CHAT_SHARE = 0.85  # of a role's tokens, unless --chat_share says otherwise: the rest keeps plain text with its analyst
TALK_SHARE = 0.75  # of those: conversations, which differ more than the prompts of a task
GENERAL_SHARE = 1 / 8  # tokens of general chat, as a share of a role's


@dataclass(frozen=True)
class Excerpt:
    """A text as the model reads it, and which of its tokens tell whose it is.

    Those of the chat template and the system turn are the same in everyone's text: all that tells them apart is the expert that
    they went through.
    """

    ids: list[int]
    telling: list[bool]  # of each token; a first token, which is an attention sink, never is


def excerpt(ids: list[int], spans: list[int] | None = None) -> Excerpt:
    """The tokens with those of `spans` (as in `Exchange`) that are of no template, or all of them; without the first."""
    telling = [span >= 0 for span in spans] if spans else [True] * len(ids)
    return Excerpt(ids, [False, *telling[1 : len(ids)]])


def role_text(
    data: Path, role: str, form: ChatFormat, tokens: int, seed: int, chat_share: float = CHAT_SHARE
) -> tuple[list[Excerpt], Sequences]:
    """`tokens` tokens of the role for the regression, or all of fewer, and its held-back passages.

    `chat_share` of the tokens is in the chat format, as a gate that was fitted to plain text alone does not know chats: the
    role's conversations and questions of its tasks with their answers or, for a role that has neither, passages as messages.
    """
    passages = read_corpus(data, role)
    check_passages(data, role, passages)
    rng = random.Random(f"{seed} {role}")
    rng.shuffle(passages)
    held_back, passages = passages[:HELD_BACK], passages[HELD_BACK:]
    in_chats = round(chat_share * tokens)
    asked = []
    for task in (task for task in tasks_of(data).values() if task.role == role):
        rows = read_task(data, task, "train")
        rows = rng.sample(rows, min(len(rows), tokens // 16))
        asked += zip(render_all(task, rows, form.tokenizer), (row["label"] for row in rows), strict=True)
    talks = read_chats(data, role) if role in chat_roles(data) else []
    talks = rng.sample(talks, min(len(talks), tokens // 16))
    messages = [] if asked or talks else [(passage, ANSWER) for passage in passages[: tokens // 16]]
    messages = [_of_chat(own.prompt, own.spans[: len(own.prompt)]) for own in form.exchanges(messages)]
    text = _first_tokens(messages, in_chats)
    asked, talks = (form.exchanges(part) for part in (asked, talks))
    _say_what_is_cut(role, asked + talks)
    asked, talks = ([_of_chat(own.ids, own.spans) for own in part] for part in (asked, talks))
    rng.shuffle(asked)
    text += _first_tokens(asked, in_chats - _tokens(text) - min(_tokens(talks), round(TALK_SHARE * in_chats)))
    text += _first_tokens(talks, in_chats - _tokens(text))  # and what the tasks lack
    rng.shuffle(passages)
    plain = [excerpt(ids) for ids in encode(form.tokenizer, passages[: tokens // 4], PASSAGE_TOKENS)]
    text += _first_tokens(plain, tokens - _tokens(text))
    return text, encode(form.tokenizer, held_back, HELD_BACK_TOKENS)


def halves(text: list[Excerpt]) -> tuple[list[Excerpt], list[Excerpt]]:
    """Every other excerpt, and the others; one excerpt alone is in both."""
    return text[::2], text[1::2] or text


def general_text(data: Path, form: ChatFormat, tokens: int) -> list[Excerpt]:
    """Conversations that are of no analyst, up to `tokens` tokens; none where the data has none."""
    if GENERAL not in chat_roles(data):
        return []
    exchanges = form.exchanges(read_chats(data, GENERAL))
    _say_what_is_cut(GENERAL, exchanges)
    return _first_tokens([_of_chat(own.ids, own.spans) for own in exchanges], tokens)


def _of_chat(ids: list[int], spans: list[int]) -> Excerpt:
    """A conversation in `CHAT_TOKENS` tokens: its first ones, its question and answer, and as much before them as fits.

    A long answer leaves half of the room to its question and passage.
    """
    if len(ids) > CHAT_TOKENS:
        room = CHAT_TOKENS - FIRST_TOKENS
        end = len(spans) - next((place for place, span in enumerate(reversed(spans)) if span >= 0), 0)
        asked, answered = (spans.index(span) if span in spans else end for span in (1, 2))  # places in `SPANS`
        end = min(end, max(asked + room, answered + room // 2))
        kept = [*range(FIRST_TOKENS), *range(max(FIRST_TOKENS, end - room), end)]
        ids, spans = ([values[place] for place in kept] for values in (ids, spans))
    return excerpt(ids, spans)


def _say_what_is_cut(role: str, exchanges: list[Exchange]) -> None:
    if (cut := sum(len(exchange.ids) > CHAT_TOKENS for exchange in exchanges)) and is_main_process():
        print(
            f"{role}: {cut:,} of {len(exchanges):,} conversations have more than {CHAT_TOKENS} tokens. The router is fitted to their "
            "question, their answer and the end of their passage."
        )


def _tokens(text: list[Excerpt]) -> int:
    return sum(len(part.ids) for part in text)


def _first_tokens(text: list[Excerpt], tokens: int) -> list[Excerpt]:
    """The first excerpts that have so many tokens, the last one cut; each has tokens that tell whose it is."""
    taken: list[Excerpt] = []
    for part in text:
        if tokens < 2:  # a first token alone is not used
            break
        part = Excerpt(part.ids[:tokens], part.telling[:tokens])
        if any(part.telling):
            taken.append(part)
            tokens -= len(part.ids)
    return taken
