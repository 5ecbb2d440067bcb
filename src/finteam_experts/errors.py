# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can fix, and how a script ends on any error."""

import contextlib
import difflib
import errno
import json
import math
import operator
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

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
    """Run a script's `main`; on any error end with a sentence, the last thing on the screen, and a non-zero exit code.

    An `InputError` is printed as it is. For everything else the exception's own message is printed. Its traceback goes to a
    file if a person is watching, and before the sentence if not: a job's files may be gone with its machine.
    """
    try:
        main()
    except (
        InputError
    ) as error:  # every process fails in the same way, and one reports it, but for figures that are not finite
        _end(f"error: {error}", 2, is_reported=is_main_process() or isinstance(error, NotFiniteError))
    except KeyboardInterrupt:
        _end("Interrupted. The same command continues from the last complete step or checkpoint.", 130)
    except Exception as error:
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        what = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        full = "No space left" in str(error) or "StorageFull" in str(error)
        advice = ADVICE.get(errno.ENOSPC if full else getattr(error, "errno", None), "")
        print(f"\n{_traceback()}", file=sys.stderr)
        _end(f"error: {where}{what}. {advice}".rstrip(), 1)


def _end(message: str, code: int, *, is_reported: bool = True) -> NoReturn:
    if is_reported:
        print(f"\n{message}", file=sys.stderr)
    if file := os.environ.get(
        "TORCHELASTIC_ERROR_FILE"
    ):  # what torch's launcher of several processes reports at its end
        report = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": report}))
    sys.exit(code)


def _traceback() -> str:
    """The traceback of the current exception or, on a terminal, where it is kept."""
    if sys.stderr.isatty():
        with contextlib.suppress(OSError):  # not even the folder of temporary files may be written to
            with tempfile.NamedTemporaryFile("w", prefix="finteam-", suffix=".log", delete=False) as file:
                file.write(traceback.format_exc())
            return f"The full traceback is in {file.name}"
    return traceback.format_exc()
