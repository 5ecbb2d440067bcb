# SPDX-License-Identifier: Apache-2.0
"""Long documents as passages for a corpus."""

import re
from collections.abc import Iterator

SHORTEST = 200  # characters of a passage, unless it is a whole document


def passages(text: str, longest: int) -> Iterator[str]:
    """A document in pieces of at most `longest` characters, cut between lines or sentences where it can be.

    Lines stay lines. A short document is one passage; of a long one, a rest below `SHORTEST` is left out.
    """
    if len(text) <= longest:
        yield text
        return
    piece = ""
    for part in re.split(r"(\n+|(?<=[.!?])[ \t]+)", text):
        for start in range(0, len(part), longest):
            cut = part[start : start + longest]
            if piece.strip() and len(piece) + len(cut) > longest:
                if len(piece.strip()) >= SHORTEST:
                    yield piece.strip()
                piece = ""
            piece += cut
    if len(piece.strip()) >= SHORTEST:
        yield piece.strip()
