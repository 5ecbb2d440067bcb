# SPDX-License-Identifier: Apache-2.0
"""Conversations of a data directory, in TRL's conversational format, and rows of TRL's other formats as conversations.

    chats/{role}.jsonl, chats/{role}_heldout.jsonl    {"messages": [{"role": "user" | "assistant" | "system", "content": str}, ...]}

Turns alternate between user and assistant after an optional system turn, and the assistant has the last one. The loss is on
that last answer. A row may have `tools`, as in TRL: the assistant's turns before the last one may then call them, in
`tool_calls`, and turns of the role `tool` have what they return. `chats/general.jsonl` belongs to no expert, unless the team has a
generalist.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finteam_experts.chats import Conversation
from finteam_experts.data.files import iter_rows
from finteam_experts.errors import InputError

GENERAL = "general"
FORMATS = "messages, prompt and completion, or text"
# Keys of a turn beside role and content, and whose they are
KEYS = {"tool_calls": "assistant", "tool_call_id": "tool", "name": "tool"}
# Columns that change a prompt or the loss wherever they are known, but not here; others, such as a source, are ignored
UNUSED = {
    "system", "images", "image", "videos", "video", "audios", "audio", "documents", "functions", "function_call", "tool_calls",
    "chat_template_kwargs", "reasoning_content", "reasoning", "thinking", "weight", "train", "completion_mask", "assistant_masks",
}  # fmt: skip


def chat_file(data_dir: Path, role: str, *, heldout: bool = False) -> Path:
    return data_dir / "chats" / f"{role}{'_heldout' if heldout else ''}.jsonl"


def chat_roles(data_dir: Path, *, heldout: bool = False) -> list[str]:
    """The roles that the directory has conversations of, `general` among them."""
    names = sorted(path.stem for path in (data_dir / "chats").glob("*.jsonl"))
    ends = "_heldout"
    return [name.removesuffix(ends) for name in names if name.endswith(ends) == heldout]


def read_chats(data_dir: Path, role: str, *, heldout: bool = False) -> list[Conversation]:
    """The conversations of a role; an `InputError` names file and line of one that can't be used."""
    return list(iter_chats(data_dir, role, heldout=heldout))


def iter_chats(data_dir: Path, role: str, *, heldout: bool = False) -> Iterator[Conversation]:
    """The same, one at a time."""
    for where, row in iter_rows(chat_file(data_dir, role, heldout=heldout), ()):
        yield conversation_of(row.get("messages"), where, row)


def check_chat_roles(data_dir: Path, team: Iterable[str]) -> None:
    """Raise `InputError` if there are conversations of a role that the team does not have."""
    for role in chat_roles(data_dir):
        if role not in (*team, GENERAL):
            advice = f"Rename it to {GENERAL}.jsonl, or add the role to the merge."
            raise InputError(f"{chat_file(data_dir, role)}: the team has {', '.join(team)}. {advice}")


def conversation_of(messages: Any, where: str, row: dict[str, Any] | None = None) -> Conversation:
    """The turns of `messages` before its last answer, and that answer; `InputError` if it is no conversation.

    `row` has the columns beside it: `tools` go to the first turn, and columns that would not act are refused by name.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: messages is {messages!r:.80}; it is a list of turns with role and content.")
    turns = [_turn(turn, f"{where}: turn {place}") for place, turn in enumerate(messages, start=1)]
    roles = [turn["role"] for turn in turns]
    if "system" in roles[1:]:
        raise InputError(f"{where}: turn {roles.index('system', 1) + 1} is a system turn. Only the first can be one.")
    if roles[-1] != "assistant":
        raise InputError(
            f"{where}: it ends with a turn of '{roles[-1]}'. Remove what follows the assistant's last turn."
        )
    if "tool_calls" in turns[-1]:
        raise InputError(
            f"{where}: turn {len(turns)} has tool_calls, and the last turn is an answer. Remove the turn."
        )
    order = "".join("c" if "tool_calls" in turn else turn["role"][0] for turn in turns)
    if not re.fullmatch("s?(u(ct+)*a)+", order):
        raise InputError(
            f"{where}: its turns are of {', '.join(roles)}. They alternate between user and assistant, and turns of the tool "
            "follow an assistant's tool_calls."
        )
    _check_columns(row or {}, where, UNUSED)
    if _is_given(tools := (row or {}).get("tools")):
        turns[0]["tools"] = _functions(tools, f"{where}: tools")
    return Conversation((turns[:-1], turns[-1]["content"]), where)


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """A turn with the keys that act; `InputError` for one without text, or with keys that would not be used."""
    if not isinstance(turn, dict):
        raise InputError(f"{where} is {turn!r:.80}; it has role and content.")
    turn = {key: value for key, value in turn.items() if key == "content" or _is_given(value)}
    role, content = turn.get("role"), turn.get("content")
    if role not in ("system", "user", "assistant", "tool"):
        raise InputError(f"{where} has the role {role!r:.80}; it is system, user, assistant or tool.")
    for key in turn.keys() - {"role", "content"}:
        if KEYS.get(key) != role:
            raise InputError(f"{where} has {key} {turn[key]!r:.80}, which would not be used. Remove it, or the row.")
    if "tool_calls" in turn:
        turn["tool_calls"], content = _functions(turn["tool_calls"], f"{where}: tool_calls"), content or ""
    if isinstance(content, list):  # parts, as models that see images take them
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise InputError(f"{where} has the part {part!r:.80}; parts are {{'type': 'text', 'text': ...}}.")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise InputError(f"{where} has {content!r:.80} as content; it is text.")
    if not content.strip() and "tool_calls" not in turn:
        raise InputError(f"{where} is empty: its content is {content!r}. Fill or remove it.")
    return turn | {"content": content}


def _functions(tools: Any, what: str) -> list[dict[str, Any]]:
    """Functions, or calls of some, as chat templates take them; a text is JSON, as in TRL."""
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        if all(isinstance(tool.get("function", tool)["name"], str) for tool in tools):
            return tools
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise InputError(f"{what} is {tools!r:.80}; it is a list of {{'type': 'function', 'function': {{'name': ...}}}}.")


def _check_columns(row: dict[str, Any], where: str, unused: set[str]) -> None:
    for column, value in row.items():
        if column in unused and _is_given(value):
            advice = "Make it the first turn" if column == "system" else "Remove it, or the row"
            raise InputError(f"{where}: column '{column}' is {value!r:.80}, and would not be used. {advice}.")


def _is_given(value: Any) -> bool:
    """Whether a value says anything: in a dataset, rows without a key that others have hold `None` there."""
    return value is not None and value not in ("", [], {})


def trl_row(row: dict[str, Any], where: str) -> Conversation | str:
    """A row of a dataset in one of TRL's formats: a conversation, or plain text; `InputError` for other columns."""
    given = {column: value for column, value in row.items() if value is not None}
    if "messages" in given:
        return conversation_of(row["messages"], where, row)
    if "prompt" in given and "completion" in given:
        turns = []
        for column, role in (("prompt", "user"), ("completion", "assistant")):
            turns += row[column] if isinstance(row[column], list) else [{"role": role, "content": row[column]}]
        return conversation_of(turns, where, row)
    if isinstance(row.get("text"), str) and row["text"].strip():
        _check_columns(row, where, UNUSED | {"tools"})
        return row["text"]
    for column in ("text", "messages", "prompt", "completion"):
        if column in row and (column == "text" or column not in given):
            raise InputError(f"{where}: {column} is {row[column]!r:.80}. Fill it, or remove the row.")
    raise InputError(f"{where}: its columns are {', '.join(row)}. Understood are {FORMATS}, as in TRL's datasets.")
