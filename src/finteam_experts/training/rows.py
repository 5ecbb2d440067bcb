# SPDX-License-Identifier: Apache-2.0
"""The rows of a tuning as tokens with labels: tasks, conversations, and datasets in TRL's formats."""

import random
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, interleave_datasets
from transformers import PretrainedConfig
from trl import SFTConfig

from finteam_experts.chats import ChatFormat, Turns
from finteam_experts.data.conversations import GENERAL, Conversation, chat_roles, read_chats
from finteam_experts.data.mixture import tuning_rows
from finteam_experts.data.tasks import Tasks, render_all
from finteam_experts.data.trl_datasets import Parts
from finteam_experts.errors import InputError, is_main_process
from finteam_experts.training.sampler import STRATUM


@dataclass(frozen=True)
class Example:
    """One row to tune on: its tokens, and the labels that the loss is on (-100: none)."""

    ids: list[int]
    labels: list[int]
    role: str | None  # the analyst whose field it is, if it is one analyst's
    stratum: str  # what `StratifiedSampler` spreads: a label of a task, the conversations or the texts of a role


def task_examples(
    data_dir: Path, tasks: Tasks, form: ChatFormat, seed: int, limits: dict[str, int | None], *, hold_out: bool
) -> list[Example]:
    """The train rows of the tasks, shuffled. The loss is on the label."""
    rows = tuning_rows(data_dir, tasks, seed, limits, hold_out=hold_out) if tasks else []
    prompts = {}
    for name in dict.fromkeys(task for task, _ in rows):
        prompts[name] = iter(render_all(tasks[name], [row for task, row in rows if task == name], form.tokenizer))
    asked: list[tuple[Turns | str, str]] = [(next(prompts[task]), row["label"]) for task, row in rows]
    pairs = zip(rows, form.exchanges(asked), strict=True)
    return [
        Example(exchange.ids, exchange.labels, tasks[task].role, f"{task}: {row['label']}")
        for (task, row), exchange in pairs
    ]


def chat_examples(data_dir: Path, form: ChatFormat, seed: int) -> list[Example]:
    """The conversations of every role, shuffled. The loss is on the last answer."""
    found = []
    for role in chat_roles(data_dir):
        found += conversation_examples(form, read_chats(data_dir, role), None if role == GENERAL else role)
    random.Random(seed).shuffle(found)
    return found


def conversation_examples(form: ChatFormat, conversations: list[Conversation], role: str | None) -> list[Example]:
    return [
        Example(exchange.ids, exchange.labels, role, f"conversations: {role}")
        for exchange in form.exchanges(conversations)
    ]


def text_examples(form: ChatFormat, texts: list[str], role: str | None, longest: int | None = None) -> list[Example]:
    """Plain texts, each ended by the tokenizer's end token, in pieces of `longest` tokens. The loss is on all of it."""
    encoded = form.tokenizer(texts)["input_ids"] if texts else []
    whole = [[*ids, form.tokenizer.eos_token_id] for ids in encoded]
    rows = [ids[at : at + longest] for ids in whole for at in range(0, len(ids), longest)] if longest else whole
    return [Example(ids, ids, role, f"texts: {role}") for ids in rows]


def dataset_examples(form: ChatFormat, parts: Parts, seed: int) -> list[Example]:
    """The rows of datasets, shuffled: the loss is on the last answer of a conversation, and on all of a plain text."""
    found = []
    for rows, role in parts:
        found += conversation_examples(form, [row for row in rows if not isinstance(row, str)], role)
        found += text_examples(form, [row for row in rows if isinstance(row, str)], role)
    return _shuffled(found, seed)


def mixed(tasks: list[Example], chats: list[Example], chat_share: float | None, seed: int) -> list[Example]:
    """Both together, shuffled, or so many of the larger part that `chat_share` of all tokens are of conversations.

    Raises `InputError` for a share without conversations or without task rows.
    """
    if chat_share is None:
        return _shuffled(tasks + chats, seed) if chats else tasks
    if not chats and chat_share > 0:
        raise InputError(
            f"chat_share is {chat_share:g}, and the data directory has no chats/ROLE.jsonl. Add some, or leave it out."
        )
    if not tasks and chat_share < 1:
        raise InputError(
            f"chat_share is {chat_share:g}, and there are no task rows beside the conversations. Leave it out."
        )
    have = {"tasks": sum(len(row.ids) for row in tasks), "chats": sum(len(row.ids) for row in chats)}
    parts = {"tasks": (tasks, 1 - chat_share), "chats": (chats, chat_share)}
    total = min(have[name] / share for name, (_, share) in parts.items() if share)
    kept = []
    for rows, share in parts.values():
        room = round(total * share)
        for row in rows:
            if room <= 0:
                break
            kept.append(row)
            room -= len(row.ids)
    return _shuffled(kept, seed)


def in_shares(parts: dict[str, list[Example]], shares: dict[str, float], longest: int, seed: int) -> Dataset:
    """The rows of all parts, drawn in these shares until each part is through; a short one starts again."""
    datasets = [as_dataset(_shuffled(rows, seed), longest) for rows in parts.values()]
    probabilities = [shares[part] / sum(shares[name] for name in parts) for part in parts]
    return interleave_datasets(datasets, probabilities, seed, stopping_strategy="all_exhausted")


def _shuffled(rows: list[Example], seed: int) -> list[Example]:
    return random.Random(seed).sample(rows, len(rows))


def as_dataset(rows: list[Example], longest: int) -> Dataset:
    """The rows as TRL takes them ready-made.

    Rows longer than `longest` would lose their answer: they are left out, and counted on the screen.
    """
    columns = [
        {"input_ids": row.ids, "labels": row.labels, STRATUM: row.stratum} for row in rows if len(row.ids) <= longest
    ]
    if not columns:
        raise InputError(
            f"none of the {len(rows)} rows has {longest} tokens or fewer: shorten them, or raise max_length."
        )
    if len(columns) < len(rows) and is_main_process():
        print(f"{len(rows) - len(columns)} of {len(rows)} rows are left out: they have more than {longest} tokens")
    return Dataset.from_list(columns)


def check_length(tokens: int | None, config: PretrainedConfig) -> None:
    """Raise `InputError` if that many tokens are more than the model has positions for."""
    if tokens and tokens > (positions := config.max_position_embeddings):
        found = f"max_length is {tokens} tokens, and the model has {positions} positions (max_position_embeddings)"
        raise InputError(f"{found}. Set it to that or less.")


def rows_of_run(training_args: SFTConfig) -> int | None:
    """How many rows a training of `max_steps` reads, in all processes; `None` if it goes by epochs."""
    steps, rows = training_args.max_steps, training_args.per_device_train_batch_size
    each = rows * training_args.gradient_accumulation_steps * PartialState().num_processes
    return steps * each if steps > 0 else None
