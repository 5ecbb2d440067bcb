# SPDX-License-Identifier: Apache-2.0
"""Run folders: steps that are skipped when complete, resumed when cut off, and never mixed with another configuration.

A step builds `TARGET.incomplete` and renames it to `TARGET` at the end, so a target that exists is complete. Both carry
`finteam.json`: the step's name, the inputs it was started with, and, once complete, its results.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finteam_experts.errors import InputError

RECORD = "finteam.json"


def work_folder(target: Path) -> Path:
    """Where the step that makes `target` keeps what is not complete yet."""
    return target.with_name(target.name + ".incomplete")


def read_record(target: Path) -> dict[str, Any]:
    """The record of a step's folder, complete or not, or of a report, which is its own; `InputError` where it has none."""
    path = target if target.is_file() else target / RECORD
    if not path.is_file():
        raise InputError(
            f"{target} has no {RECORD}, so it was not written by a step of this package. Name another folder."
        )
    return json.loads(path.read_text())


def begin(target: Path, step: str, inputs: dict[str, Any], *, overwrite: bool = False) -> Path | None:
    """Return the folder to build `target` in, fresh or as an interrupted run left it; `None` if `target` is complete.

    Raises `InputError` if `target`, or its unfinished folder, was started with other inputs: it names each difference.
    With `overwrite` such a `target` is made anew instead, and replaced when that is complete.
    """
    inputs = json.loads(json.dumps(inputs))  # as the record will read back
    work = work_folder(target)
    now = {"step": step, **inputs}
    outdated = []
    for folder in (target, work):
        if folder.exists():
            record = read_record(folder)
            recorded = {"step": record["step"], **record["inputs"]}
            if overwrite and _differences(recorded, now):
                outdated.append(folder)
            else:
                advice = "Use the recorded settings, choose another --run_dir, or delete that folder to make it anew."
                check_same_inputs(folder, recorded, now, advice)
    if target.exists() and target not in outdated:
        shutil.rmtree(work, ignore_errors=True)
        print(f"{target} is complete: skipped")
        return None
    if work in outdated:
        shutil.rmtree(work)
    if work.exists():
        print(f"{work} was cut off: resuming")
    else:
        work.mkdir(parents=True)
        write_json(work / RECORD, {"step": step, "inputs": inputs})
    return work


def finish(target: Path, results: dict[str, Any]) -> None:
    """Record the step's `results` (and what else describes the folder) and give it its final name."""
    work = work_folder(target)
    write_json(work / RECORD, {**read_record(work), **results})
    if target.exists():  # only after `begin(..., overwrite=True)`
        shutil.rmtree(target)
    os.replace(work, target)


@contextlib.contextmanager
def changed_in_place(target: Path) -> Iterator[Path]:
    """Change a complete folder: it is incomplete meanwhile, and stays so if that fails."""
    work = work_folder(target)
    os.replace(target, work)
    yield work
    os.replace(work, target)


def finish_report(target: Path, results: dict[str, Any]) -> None:
    """Write a step's record with its `results` to the file `target`, and remove the folder it was made in."""
    work = work_folder(target)
    write_json(target, {**read_record(work), **results})
    shutil.rmtree(work)


def require(folder: Path, made_by: str) -> dict[str, Any]:
    """The record of an input folder that has to be complete; `InputError` says which step makes it."""
    if not folder.is_dir():
        state = "is not finished" if work_folder(folder).exists() else "does not exist"
        raise InputError(f"{folder} {state}. Run this step first: {made_by}")
    return read_record(folder)


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


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that `path` is either whole or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def remove_all_but(folder: Path, keep: Iterable[str]) -> None:
    """Delete checkpoints and whatever else a library left in `folder` besides the files in `keep`."""
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_same_inputs(what: Path | str, recorded: dict[str, Any], now: dict[str, Any], advice: str) -> None:
    """Raise `InputError` that names each difference between the inputs `what` was made with and those of now."""
    if rows := _differences(recorded, now):
        raise InputError("\n  ".join([f"{what} was made with other inputs:", *rows]) + f"\n{advice}")


def _differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    recorded, now = _flat(recorded), _flat(now)
    pairs = {key: (recorded.get(key, "unset"), now.get(key, "unset")) for key in sorted(recorded | now)}
    return [f"{key}: recorded {was}, now {is_}" for key, (was, is_) in pairs.items() if was != is_]


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
