# SPDX-License-Identifier: Apache-2.0
"""A sample conversation, built of its turns."""

from typing import Any

Chat = dict[str, Any]  # {"messages", "kind"}


def chat(kind: str, *turns: str) -> Chat:
    """A conversation of alternating turns that the user begins."""
    speakers = ("user", "assistant")
    messages = [{"role": speakers[place % 2], "content": turn} for place, turn in enumerate(turns)]
    return {"messages": messages, "kind": kind}


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
