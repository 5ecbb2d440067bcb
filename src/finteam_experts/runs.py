# SPDX-License-Identifier: Apache-2.0
"""Run folders: steps that are skipped when complete, resumed when interrupted, and never mixed with another configuration.

A step builds `TARGET.incomplete` and renames it to `TARGET` at the end, so a target that exists is complete. Both hold
`finteam.json`: the step's name, the inputs it was started with and, once complete, its results. One process at a time
works on a target. The same command goes on after a process was killed at any moment.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from finteam_experts.errors import InputError
from finteam_experts.files import read_json, write_json

RECORD = "finteam.json"
_FILES = "files"  # in the record of a finished step: what its folder keeps
_UNFINISHED = "unfinished"  # in the record of a complete folder while a part of it is being replaced
_locks: dict[Path, FileLock] = {}  # held until the step or this process ends, even by SIGKILL


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
    record = read_json(path)
    for key in ("step", "inputs"):
        if key not in record:
            raise InputError(f"{path} has no '{key}', so it was not written by a step of this package.")
    return record


def begin(
    target: Path, step: str, inputs: dict[str, Any], *, overwrite: bool = False,
    has_progress: Callable[[Path], bool] | None = None,
) -> Path | None:  # fmt: skip
    """Return the folder to build `target` in, fresh or as an interrupted run left it; `None` if `target` is complete.

    Raises `InputError` if another process is at work on `target`, or if `target` or its unfinished folder was started with
    other inputs: it names each difference. An unfinished folder without progress (see `has_progress`; by default one that
    holds nothing but its record) is started again instead. With `overwrite` both are made again, and a complete `target` is
    replaced once its successor is whole.
    """
    work, now = work_folder(target), {"step": step, **inputs}
    lock(target)
    _recover(target)
    advice = "Use the recorded settings, choose another --run_dir, or delete it to run the step again."
    if target.exists():
        recorded = _inputs(target)
        if not _differences(recorded, now):
            _discard(work)
            print(f"{target} is complete: skipped")
            unlock(target)
            return None
        if not overwrite:
            check_same_inputs(target, recorded, now, advice)
    if work.exists():
        progress = (has_progress or _holds_more_than_its_record)(work)
        if not (work / RECORD).exists() and progress:
            raise InputError(
                f"{work} has no {RECORD}: it was not left by a step of this package. Delete or rename it."
            )
        if not (work / RECORD).exists() or (_differences(_inputs(work), now) and (overwrite or not progress)):
            _discard(work)
        else:
            check_same_inputs(work, _inputs(work), now, advice)
    if work.exists():
        print(f"{work} was interrupted: resuming")
    else:
        work.mkdir(parents=True)
        write_json(work / RECORD, {"step": step, "inputs": inputs})
    return work


def finish(target: Path, results: dict[str, Any], keep: Iterable[str] | None = None) -> None:
    """Record the step's `results` (and what else describes the folder) and give it its final name.

    With `keep`, files and folders of other names are deleted first: checkpoints and what else a library left.
    """
    work = work_folder(target)
    present = sorted(path.name for path in work.iterdir())
    files = present if keep is None else [name for name in present if name in {RECORD, *keep}]
    write_json(work / RECORD, {**read_record(work), **results, _FILES: files})  # from here on the step is finished
    _put_in_place(target)
    unlock(target)


def finish_report(target: Path, results: dict[str, Any]) -> None:
    """Write a step's record with its `results` to the file `target`, and remove the folder it was made in."""
    work = work_folder(target)
    write_json(target, {**read_record(work), **results})
    _discard(work)
    unlock(target)


@contextlib.contextmanager
def changed_in_place(target: Path, record: dict[str, Any], advice: str) -> Iterator[None]:
    """Replace files of a complete folder one by one. It is locked, and `require` refuses it with `advice` until that is done.

    `record` is what finteam.json says once the context ends without an error.
    """
    lock(target)
    write_json(target / RECORD, {**read_record(target), _UNFINISHED: advice})
    yield
    write_json(target / RECORD, {key: value for key, value in record.items() if key != _UNFINISHED})
    unlock(target)


def is_unfinished(record: dict[str, Any]) -> bool:
    """Whether a change of that folder was interrupted."""
    return _UNFINISHED in record


def require(folder: Path, made_by: str, *, unfinished: bool = False) -> dict[str, Any]:
    """The record of an input folder that has to be complete; `InputError` says which step makes it.

    A folder in which a part was being replaced is refused too, unless `unfinished` allows it.
    """
    if not folder.is_dir() and (work_folder(folder).exists() or _aside(folder).exists()):
        lock(folder)
        _recover(folder)
        unlock(folder)
    if not folder.is_dir():
        state = "is not finished" if work_folder(folder).exists() else "does not exist"
        raise InputError(f"{folder} {state}. Run this step first: {made_by}")
    record = read_record(folder)
    if is_unfinished(record) and not unfinished:
        raise InputError(f"{folder}: {record[_UNFINISHED]}")
    return record


def lock(target: Path) -> None:
    """Keep other processes from `target` until `unlock` or the end of this process; `InputError` if one is at work on it."""
    path = _lock_file(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    held = _locks.setdefault(path, FileLock(path))
    try:
        if not held.is_locked:
            held.acquire(timeout=0)
    except Timeout:
        _locks.pop(path)
        advice = "Wait for it to end, or name another --run_dir."
        raise InputError(f"another process is at work on {target}. {advice}") from None


def unlock(target: Path) -> None:
    if held := _locks.pop(_lock_file(target), None):
        held.release()


def check_same_inputs(what: Path | str, recorded: dict[str, Any], now: dict[str, Any], advice: str) -> None:
    """Raise `InputError` that names each difference between the inputs `what` was made with and those of now."""
    if rows := _differences(recorded, now):
        raise InputError("\n  ".join([f"{what} was made with other inputs:", *rows]) + f"\n{advice}")


def _lock_file(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock").absolute()


def _recover(target: Path) -> None:
    """Finish or undo what a killed process left half done: the renaming of a finished step, or a deletion."""
    work, aside = work_folder(target), _aside(target)
    if (work / RECORD).is_file() and _FILES in read_json(work / RECORD):
        _put_in_place(target)
    elif _exists(aside) and not target.exists():
        os.replace(aside, target)
    for leftover in (aside, aside.with_name(f"{work.name}.discarded")):
        _remove(leftover)


def _put_in_place(target: Path) -> None:
    work, aside = work_folder(target), _aside(target)
    keep = read_record(work)[_FILES]
    for path in work.iterdir():
        if path.name not in keep:
            _remove(path)
    if _exists(target):  # only after `begin(..., overwrite=True)`
        _remove(aside)
        os.replace(target, aside)  # an interrupted deletion would leave a part of it under its name
    os.replace(work, target)
    _remove(aside)


def _aside(target: Path) -> Path:
    return target.with_name(f"{target.name}.replaced")


def _discard(folder: Path) -> None:
    """Delete a folder. It is renamed first, so that it never exists in part under its own name."""
    if _exists(folder):
        aside = folder.with_name(f"{folder.name}.discarded")
        _remove(aside)
        os.replace(folder, aside)
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _holds_more_than_its_record(work: Path) -> bool:
    return any(not path.name.startswith(RECORD) for path in work.iterdir())


def _inputs(folder: Path) -> dict[str, Any]:
    record = read_record(folder)
    return {"step": record["step"], **record["inputs"]}


def _differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    recorded, now = _flat(recorded), _flat(json.loads(json.dumps(now)))  # as the record will read back
    pairs = {key: (recorded.get(key, "unset"), now.get(key, "unset")) for key in sorted(recorded | now)}
    return [f"{key}: recorded {was}, now {is_}" for key, (was, is_) in pairs.items() if was != is_]


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
