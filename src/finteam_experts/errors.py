# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can mend, files read so that they are such errors, and how a script ends on any error."""

import difflib
import errno
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

ADVICE = {
    errno.ENOSPC: "The disk is full: free some space and run the same command again.",
    errno.EDQUOT: "The quota of this disk is used up: free some space and run the same command again.",
    errno.EROFS: "That file system can't be written to: name a folder elsewhere.",
    errno.EACCES: "Change its permissions, or name another folder.",
    errno.EPERM: "Change its permissions, or name another folder.",
    errno.ENOTDIR: "A part of this path is a file: name another folder.",
}


class InputError(ValueError):
    """Something the user gave is wrong. The message names the file or key, what was found, and what to do."""


class NotFiniteError(InputError):
    """A loss, gradient or score is NaN or infinite. One process of several may be alone with it, and says so itself."""


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known word closest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{match[0]}'?" if match else ""


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; an `InputError` names the line that is not, or says that there is no such file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, not a file.") from None
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}, line {line}: not UTF-8 (byte {content[error.start]:#04x}). Convert it: iconv -f latin1 -t utf-8"
        ) from None


class _StrictLoader(yaml.SafeLoader):
    """YAML of which a key can't be there twice: PyYAML would take the last one and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                problem = f"the key '{key.value}' is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping; an `InputError` names file and line where it is no such file."""
    try:
        content = yaml.load(read_text(path), Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        hint = " YAML is indented with spaces, not tabs." if "\\t" in problem else ""
        what = problem if isinstance(error, yaml.constructor.ConstructorError) else f"not YAML: {problem}"
        raise InputError(f"{path}{where}: {what}.{hint}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of keys to values, found {type(content).__name__}.")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; an `InputError` where it is cut off or is something else."""
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}), it may be cut off. Make its folder again."
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; on any error end with a sentence and a non-zero exit code.

    An `InputError` is printed as it is. For whatever else goes wrong, the exception's own sentence is printed, and the
    traceback is kept in a file.
    """
    try:
        main()
    except NotFiniteError as error:
        _end(f"error: {error}", 2)
    except InputError as error:
        _end(
            f"error: {error}" if os.environ.get("RANK", "0") == "0" else "", 2
        )  # every process fails alike, one speaks
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
    """Write the traceback of the exception in hand to a file and say where it is."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="finteam-", suffix=".log", delete=False) as file:
            file.write(traceback.format_exc())
        return f"The full traceback is in {file.name}"
    except OSError:  # not even the folder of temporary files can be written
        return traceback.format_exc()
