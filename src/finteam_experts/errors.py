# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can mend, and how a script ends on one."""

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class InputError(ValueError):
    """Something the user gave is wrong. The message names the file or key, what was found, and what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known word closest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{match[0]}'?" if match else ""


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; end with a clear message and a non-zero exit code on an `InputError` or on Ctrl-C."""
    try:
        main()
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":  # every process fails alike, one of them speaks
            print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues from the last complete step or checkpoint.", file=sys.stderr)
        sys.exit(130)
