# SPDX-License-Identifier: Apache-2.0
"""Text, YAML and JSON files: read with errors that name file and line, written whole or not at all."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from finteam_experts.errors import InputError, NotFiniteError


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
        line, byte = content[: error.start].count(b"\n") + 1, content[error.start]
        advice = "Convert it: iconv -f latin1 -t utf-8"
        raise InputError(f"{path}, line {line}: not UTF-8 (byte {byte:#04x}). {advice}") from None


def has_half_characters(value: Any) -> bool:
    """Whether a text in a value of JSON or YAML holds half a character (a lone surrogate), which no tokenizer takes.

    Only an escape, \\ud800, can write one.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=str, skipkeys=True).encode()
    except UnicodeEncodeError:
        return True
    return False


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key may appear once: PyYAML would take the last one and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                problem = f"the key '{key.value}' is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping; otherwise an `InputError` names file and line."""
    try:
        content = yaml.load(read_text(path), Loader=_StrictLoader)
        json.dumps(content, default=str, skipkeys=True)  # a value that holds itself
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        hint = " YAML is indented with spaces, not tabs." if "\\t" in problem else ""
        what = problem if isinstance(error, yaml.constructor.ConstructorError) else f"not YAML: {problem}"
        if match := re.search(r"constructor for the tag '(.+)'", problem):
            what = f"the tag '{match[1]}' is not read, since it could run code. Write the value itself"
        raise InputError(f"{path}{where}: {what}.{hint}") from None
    except (
        ValueError,
        LookupError,
        AttributeError,
    ) as error:  # of a value that is tagged as, or looks like, another type
        raise InputError(f"{path}: a value can't be read: {error}. Put text in quotes.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of keys to values, found {type(content).__name__}.")
    for key, value in content.items():
        if has_half_characters(value):
            raise InputError(f"{path}: {key} holds half a character (a lone surrogate). Remove it.")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; `InputError` if it is cut off or something else."""
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        problem = f"not JSON ({error.msg}), it may be cut off. Make its folder again."
        raise InputError(f"{path}, line {error.lineno}: {problem}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write JSON; `NotFiniteError` for NaN or infinity."""
    try:
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    except ValueError:
        advice = "Look at the weights and the training log of its model."
        raise NotFiniteError(f"{path} was not written: one of its figures is NaN or infinite. {advice}") from None
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file so that `path` is either whole or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def file_hash(path: Path) -> str:
    """The first 16 hex digits of the file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def check_disk_room(folder: Path, needed_bytes: int) -> None:
    """Raise `InputError` unless the disk that holds (or will hold) `folder` has `needed_bytes` free."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise InputError(
            f"{folder} needs {needed_bytes / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free. "
            "Free some space, or name a run folder on another disk with --run_dir."
        )
