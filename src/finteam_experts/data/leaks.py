# SPDX-License-Identifier: Apache-2.0
"""Checks before any work: text that is both trained on and scored, and rows that repeat each other.

Texts are compared by `text_key`, which ignores case, spacing, punctuation and Unicode form.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from finteam_experts.data.conversations import chat_file, conversation_of
from finteam_experts.data.files import Row, corpus_file, read_rows, task_file, text_key
from finteam_experts.errors import InputError

TEST_TEXT = 40  # letters and digits from the middle of a test text: a passage that has them has the text


def check_tasks(data_dir: Path, tasks: Iterable[str]) -> None:
    """Raise `InputError` if a test row's text is in train or valid, or one of valid in train; it names both lines."""
    for task in tasks:
        files = {split: task_file(data_dir, task, split) for split in ("train", "valid", "test")}
        files = {split: path for split, path in files.items() if split != "valid" or path.is_file()}
        lines = {split: _lines(path) for split, path in files.items()}
        for scored, trained in (("test", "train"), ("test", "valid"), ("valid", "train")):
            if scored in files and trained in files:
                _check_disjoint(files[scored], lines[scored], files[trained], lines[trained])


def check_chats(data_dir: Path, roles: Iterable[str]) -> None:
    """Raise `InputError` if a held-out conversation is in the train file of any of these roles; it names both lines."""
    roles = list(roles)
    trained = {role: _chat_lines(chat_file(data_dir, role)) for role in roles}
    for role in roles:
        path = chat_file(data_dir, role, heldout=True)
        for other in roles if path.is_file() else ():
            _check_disjoint(path, _chat_lines(path), chat_file(data_dir, other), trained[other])


def check_corpora(data_dir: Path, roles: Iterable[str]) -> None:
    """Raise `InputError` if a held-out passage or a test row of any task is in the corpus of one of these roles."""
    holds = holds_test_text(data_dir)
    for role in roles:
        path, heldout_path = corpus_file(data_dir, role), corpus_file(data_dir, role, heldout=True)
        passages = _lines(path)
        _check_disjoint(heldout_path, _lines(heldout_path), path, passages)
        for key, line in passages.items():
            if found := holds(key):
                raise InputError(
                    f"{path}, line {line}: it holds the text of a test row, {found}. A score on training text means nothing: "
                    "remove the passage, or the row."
                )


def holds_test_text(data_dir: Path) -> Callable[[str], str | None]:
    """A function of a passage's `text_key` that tells the file and line of the test row that it holds, if any."""
    whole: dict[str, str] = {}
    parts: dict[str, str] = {}
    for path in sorted((data_dir / "tasks").glob("*_test.jsonl")):
        for key, line in _lines(path).items():
            whole[key] = place = f"{path}, line {line}"
            at = (len(key) - TEST_TEXT) // 2  # price tables share their beginning
            if at >= 0:
                parts[key[at : at + TEST_TEXT]] = place

    def found_in(key: str) -> str | None:
        if key in whole or not parts:
            return whole.get(key)
        windows = (key[at : at + TEST_TEXT] for at in range(len(key) - TEST_TEXT + 1))
        return next((parts[window] for window in windows if window in parts), None)

    return found_in


def repetitions(rows: list[Row]) -> dict[str, int]:
    """How many task rows ask again what one before them asked: with the same label, and with another."""
    labels: dict[Any, str] = {}
    repeated = contradicting = 0
    for row in rows:
        first = labels.setdefault((text_key(row), row.get("question")), row["label"])
        contradicting += first != row["label"]
        repeated += 1
    repeated -= len(labels) + contradicting
    return {"repeated": repeated, "contradicting": contradicting}


def _chat_lines(path: Path) -> dict[str, int]:
    """The first line of each conversation in a file, by the key of all its turns."""
    lines: dict[str, int] = {}
    for line, row in enumerate(read_rows(path, ()), start=1):
        turns, answer = conversation_of(row.get("messages"), f"{path}, line {line}")
        lines.setdefault(text_key({"text": " ".join([*(turn["content"] for turn in turns), answer])}), line)
    return lines


def _lines(path: Path) -> dict[str, int]:
    """The first line of each text in a file of JSON lines, by key."""
    lines: dict[str, int] = {}
    for line, row in enumerate(read_rows(path, ("text",)), start=1):
        lines.setdefault(text_key(row), line)
    return lines


def _check_disjoint(path: Path, lines: dict[str, int], trained_path: Path, trained: dict[str, int]) -> None:
    for key, line in lines.items():
        if key in trained:
            raise InputError(
                f"{path}, line {line}: the same text is in {trained_path}, line {trained[key]}. "
                "A score on a training row means nothing: remove it from one of them."
            )
