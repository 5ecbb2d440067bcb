# SPDX-License-Identifier: Apache-2.0
"""The screen that scripts print their tables to."""

from rich.console import Console


def screen(width: int | None = None, **options: object) -> Console:
    """A console that shows every text as it is: rich would read `[/INST]` in an answer or a label as markup, and `:x:` as an emoji.

    `width` is for output to a file; a terminal has its own.
    """
    terminal = Console().is_terminal
    return Console(width=None if terminal else width, markup=False, emoji=False, **options)
