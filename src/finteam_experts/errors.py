# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can fix, and how a script ends on any error."""

import difflib
import errno
import math
import operator
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable

_FULL = "free some space and run the same command again."
ADVICE = {
    errno.ENOSPC: f"The disk is full: {_FULL}",
    errno.EDQUOT: f"The quota of this disk is used up: {_FULL}",
    errno.EROFS: "That file system can't be written to: name a folder elsewhere.",
    errno.EACCES: "Change its permissions, or name another folder.",
    errno.EPERM: "Change its permissions, or name another folder.",
    errno.ENOTDIR: "A part of this path is a file: name another folder.",
}


class InputError(ValueError):
    """Something the user gave is wrong. The message names the file or key, what was found, and what to do."""


class NotFiniteError(InputError):
    """A loss, gradient or score is NaN or infinite. It may happen in one process of several, so that one reports it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known word closest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{match[0]}'?" if match else ""


def check_number(
    name: str, value: float | None, *, least: float | None = None, above: float | None = None,
    most: float | None = None, below: float | None = None,
) -> None:  # fmt: skip
    """Raise `InputError` unless the setting `name` is a finite number within these bounds; `None` is no value."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} is {value!r}; it has to be a number.")
    bounds = ((least, "{} or more", operator.ge), (above, "above {}", operator.gt),
              (most, "{} or less", operator.le), (below, "below {}", operator.lt))  # fmt: skip
    given = [(bound, text, holds) for bound, text, holds in bounds if bound is not None]
    finite = isinstance(value, int) or math.isfinite(value)  # an int may be too large for a float
    if not finite or not all(holds(value, bound) for bound, _, holds in given):
        wanted = " and ".join(text.format(bound) for bound, text, _ in given) or "finite"
        raise InputError(f"{name} is {value}; it has to be {wanted}.")


def is_main_process() -> bool:
    """Whether this is the process of a launch that talks to the user."""
    return os.environ.get("RANK", "0") == "0"


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; on any error end with a sentence and a non-zero exit code.

    An `InputError` is printed as it is. For everything else the exception's own message is printed, and the traceback is
    kept in a file.
    """
    try:
        main()
    except NotFiniteError as error:
        _end(f"error: {error}", 2)
    except InputError as error:  # every process fails in the same way: one reports it
        _end(f"error: {error}" if is_main_process() else "", 2)
    except KeyboardInterrupt:
        _end("Interrupted. The same command continues from the last complete step or checkpoint.", 130)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        advice = f" {ADVICE[error.errno]}" if error.errno in ADVICE else ""
        _end(f"error: {where}{error.strerror or error or type(error).__name__}.{advice}\n{_traceback_file()}", 1)
    except Exception as error:
        advice = f"{ADVICE[errno.ENOSPC]}\n" if "No space left" in str(error) or "StorageFull" in str(error) else ""
        _end(f"error: {type(error).__name__}: {error}\n{advice}{_traceback_file()}", 1)


def _end(message: str, code: int) -> None:
    if message:
        print(f"\n{message}", file=sys.stderr)
    sys.exit(code)


def _traceback_file() -> str:
    """Write the traceback of the current exception to a file and say where it is."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="finteam-", suffix=".log", delete=False) as file:
            file.write(traceback.format_exc())
        return f"The full traceback is in {file.name}"
    except OSError:  # not even the folder of temporary files can be written
        return traceback.format_exc()
