# SPDX-License-Identifier: Apache-2.0
"""Conversations of a data directory, in TRL's conversational format, and rows of TRL's other formats as conversations.

    chats/{role}.jsonl, chats/{role}_heldout.jsonl    {"messages": [{"role": "user" | "assistant" | "system", "content": str}, ...]}

Turns alternate between user and assistant after an optional system turn, and the assistant has the last one. The loss is on
that last answer. `chats/general.jsonl` belongs to no analyst, unless the team has a generalist.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finteam_experts.chats import Turns
from finteam_experts.data.files import read_rows
from finteam_experts.errors import InputError

GENERAL = "general"
FORMATS = "messages, prompt and completion, or text"
Conversation = tuple[Turns, str]  # the turns up to the last answer, and the answer


def chat_file(data_dir: Path, role: str, *, heldout: bool = False) -> Path:
    return data_dir / "chats" / f"{role}{'_heldout' if heldout else ''}.jsonl"


def chat_roles(data_dir: Path, *, heldout: bool = False) -> list[str]:
    """The roles that the directory has conversations of, `general` among them."""
    names = sorted(path.stem for path in (data_dir / "chats").glob("*.jsonl"))
    ends = "_heldout"
    return [name.removesuffix(ends) for name in names if name.endswith(ends) == heldout]


def read_chats(data_dir: Path, role: str, *, heldout: bool = False) -> list[Conversation]:
    """The conversations of a role; an `InputError` names file and line of one that can't be used."""
    path = chat_file(data_dir, role, heldout=heldout)
    rows = enumerate(read_rows(path, ()), start=1)
    return [conversation_of(row.get("messages"), f"{path}, line {line}") for line, row in rows]


def check_chat_roles(data_dir: Path, team: Iterable[str]) -> None:
    """Raise `InputError` if there are conversations of a role that the team does not have."""
    for role in chat_roles(data_dir):
        if role not in (*team, GENERAL):
            advice = f"Rename it to {GENERAL}.jsonl, or add the role to the merge."
            raise InputError(f"{chat_file(data_dir, role)}: the team has {', '.join(team)}. {advice}")


def conversation_of(messages: Any, where: str) -> Conversation:
    """The turns of `messages` before its last answer, and that answer; `InputError` if it is no conversation."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: messages is {messages!r:.80}; it is a list of turns with role and content.")
    for place, turn in enumerate(messages):
        content = turn.get("content") if isinstance(turn, dict) else None
        if not isinstance(content, str) or not content.strip():
            raise InputError(f"{where}: turn {place + 1} is empty or has no text as content. Fill or remove it.")
    roles = [turn.get("role") for turn in messages]
    if "system" in roles[1:]:
        raise InputError(
            f"{where}: turn {roles.index('system', 1) + 1} is a system turn. Only the first turn can be one."
        )
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken[-1:] != ["assistant"]:
        found = spoken[-1] if spoken else "system"
        raise InputError(
            f"{where}: it ends with a turn of '{found}'. The last turn is the assistant's: remove what follows it."
        )
    if spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise InputError(
            f"{where}: its turns are of {', '.join(map(str, spoken))}. They alternate between user and assistant."
        )
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    return turns[:-1], turns[-1]["content"]


def trl_row(row: dict[str, Any], where: str) -> Conversation | str:
    """A row of a dataset in one of TRL's formats: a conversation, or plain text; `InputError` for other columns."""
    if row.get("messages") is not None:
        return conversation_of(row["messages"], where)
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is not None and completion is not None:
        for column, value in (("prompt", prompt), ("completion", completion)):
            if not isinstance(value, str | list):
                raise InputError(f"{where}: {column} is {value!r:.80}; it is text or a list of turns.")
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        answered = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        return conversation_of(asked + answered, where)
    if isinstance(row.get("text"), str) and row["text"].strip():
        return row["text"]
    raise InputError(f"{where}: its columns are {', '.join(row)}. Understood are {FORMATS}, as in TRL's datasets.")
