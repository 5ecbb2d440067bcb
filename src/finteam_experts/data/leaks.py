# SPDX-License-Identifier: Apache-2.0
"""No text is both trained on and scored: an index of all scored texts of a data directory, in which every other text is looked up.

Texts are compared by `text_key`. A text holds a scored one if all of it is in there, or three quarters of it up to a cut, since
passages may be cut elsewhere than scored ones. Texts under 32 letters, such as a headline of four words, have to be equal. Scored are

- the text of a task row, whatever its question and its label. Rows of tasks are compared with each other as a whole, since the windows
  of a time series overlap by design.
- a held-out passage.
- a held-out conversation: all of its turns with its answer, or with any answer if its turns have 100 letters or more. The same answer
  to a question in other words is no leak (that is what a held-out wording measures), nor is another question on the same passage,
  since the loss is on the answer alone.
"""

import hashlib
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from finteam_experts.chats import Turns
from finteam_experts.data.conversations import conversation_of
from finteam_experts.data.files import Row, check_files, iter_rows, task_file, tasks_of, text_key
from finteam_experts.errors import InputError

RUN = 32  # bytes of a key by which a text is looked for: five or six words of English, eleven characters of Chinese
CUT = 0.75  # standing phrases of minutes and filings reach .64 of a passage that is otherwise new
OWN_TURNS = (
    100  # bytes of the key of a conversation's turns: they are a text of their own, not a question that anybody asks
)
SHOWN = 3  # texts that an error names
Parts = list[str]


class ScoredTexts:
    """The test and validation rows, held-out passages and held-out conversations of a data directory.

    Memory grows with the scored texts, not with those that are looked up. Files that are missing are passed over, so that it serves a
    directory that is being written.
    """

    def __init__(self, data_dir: Path) -> None:
        self._numbers: dict[bytes, int] = {}  # of a scored text, by the digest of its key
        self._places: list[str] = []
        self._parts: list[list[bytes]] = []  # the key of each part of it
        self._in_chats: set[int] = set()  # the texts that only a conversation can leak
        for where, whole, parts in _scored(data_dir):
            number = len(self._places)
            if whole is None:
                self._in_chats.add(number)
            elif self._numbers.setdefault(_digest(_key(whole)), number) < number:
                continue  # scored twice
            self._places.append(where)
            self._parts.append([_key(part) for part in parts])
        self._index()

    def _index(self) -> None:
        """Choose two runs by which a text is found: of its longest part, the rarest in the first and in the second half."""
        runs = [_runs(max(parts, key=len))[::RUN] for parts in self._parts]
        _, inverse, counts = np.unique(np.concatenate([*runs, _runs(b"")]), return_inverse=True, return_counts=True)
        rarity = np.split(counts[inverse], np.cumsum([len(own) for own in runs]))
        chosen = [
            (own[half[often[half].argmin()]], number)
            for number, (own, often) in enumerate(zip(runs, rarity, strict=False))
            for half in np.array_split(np.arange(len(own)), 2)
            if len(half)
        ]
        chosen.sort()
        self._anchors = np.array([run for run, _ in chosen], np.uint64)
        self._owners = [number for _, number in chosen]
        bits = max(16, len(chosen).bit_length() + 4)
        self._shift = np.uint64(64 - bits)
        self._maybe = np.zeros(1 << bits, bool)  # says of nearly every run of a text at once that it is no anchor
        self._maybe[self._anchors >> self._shift] = True

    @property
    def digest(self) -> str:
        """What tells these texts and their places from others, in any process."""
        return _digest(repr((self._places, self._parts, sorted(self._in_chats))).encode()).hex()

    def find(self, text: str) -> str | None:
        """File and line of a scored text that `text` is or holds, or `None`."""
        key = _key(text)
        return self._place_of(key) or self._held_in(key, in_chat=False)

    def find_same(self, text: str) -> str | None:
        """File and line of the scored text that the whole of `text` is, or `None`."""
        return self._place_of(_key(text))

    def find_conversation(self, turns: Turns, answer: str) -> str | None:
        """File and line of a scored text that a conversation repeats, quotes or asks about, or `None`."""
        said = [turn["content"] for turn in turns if turn["role"] != "system"] + [answer]
        asked = [turn["content"] for turn in turns if turn["role"] == "user"]
        answered = ["\n\n".join(pair) for pair in pairwise(said)]
        passages = [content.rpartition("\n\n")[0] for content in asked]
        whole = ["\n\n".join(said), *answered, *asked, *filter(str.strip, passages)]
        found = next(filter(None, map(self.find_same, whole)), None)
        return found or self._held_in(_key("\n\n".join([*(turn["content"] for turn in turns), answer])), in_chat=True)

    def _place_of(self, key: bytes) -> str | None:
        number = self._numbers.get(_digest(key))
        return None if number is None else self._places[number]

    def _held_in(self, key: bytes, *, in_chat: bool) -> str | None:
        runs = _runs(key)
        anchors = np.unique(runs[self._maybe[runs >> self._shift]])
        if not len(anchors):
            return None
        first, last = (np.searchsorted(self._anchors, anchors, side) for side in ("left", "right"))
        numbers = {number for low, high in zip(first, last, strict=True) for number in self._owners[low:high]}
        held = (n for n in sorted(numbers if in_chat else numbers - self._in_chats) if _holds(key, self._parts[n]))
        return next((self._places[number] for number in held), None)


def check_data_dir(data_dir: Path) -> ScoredTexts:
    """The scored texts of a directory, in which texts from elsewhere are looked up.

    Raises `InputError` if a text that is trained on, of any role and task of the directory, is a scored one or holds it.
    """
    check_files(data_dir)
    scored = ScoredTexts(data_dir)
    found = [f"{place}: the same text is in {where}" for where, place in _looked_up(data_dir, scored) if place]
    if found:
        more = f" ({len(found) - SHOWN:,} more)" if len(found) > SHOWN else ""
        advice = "A score on a training text means nothing: remove it from one of them."
        raise InputError(f"{'; '.join(found[:SHOWN])}{more}. {advice}")
    return scored


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


def _scored(data_dir: Path) -> Iterator[tuple[str, str | None, Parts]]:
    """Each scored text: its place, the whole of it if that alone tells that it is the same one, and its parts."""
    tasks = tasks_of(data_dir)
    rows = [task_file(data_dir, name, split) for split in ("test", "valid") for name in tasks]
    for path in (*filter(Path.is_file, rows), *_files(data_dir, "corpora", heldout=True)):
        for where, row in iter_rows(path, ("text",)):
            yield where, row["text"], [row["text"]]
    for path in _files(data_dir, "chats", heldout=True):
        for where, row in iter_rows(path, ()):
            turns, answer = conversation_of(row.get("messages"), where)
            said = [
                part for turn in turns if turn["role"] != "system" for part in re.split(r"\n\s*\n", turn["content"])
            ]
            yield where, _joined(turns, answer), [*said, answer]
            if len(_key("\n\n".join(said))) >= OWN_TURNS:
                yield where, None, said


def _looked_up(data_dir: Path, scored: ScoredTexts) -> Iterator[tuple[str, str | None]]:
    """The place of each text that is trained on, and of the scored text that it is or holds."""
    for path in _files(data_dir, "corpora", heldout=False):
        for where, row in iter_rows(path, ("text",)):
            yield where, scored.find(row["text"])
    for path in _files(data_dir, "chats", heldout=False):
        for where, row in iter_rows(path, ()):
            yield where, scored.find_conversation(*conversation_of(row.get("messages"), where))
    for name in tasks_of(data_dir):
        next(iter_rows(task_file(data_dir, name, "test"), ("text",)))  # raises for a task that can't be scored
        for where, row in iter_rows(task_file(data_dir, name, "train"), ("text",)):
            yield where, scored.find_same(row["text"])
        for where, row in iter_rows(path, ("text",)) if (path := task_file(data_dir, name, "valid")).is_file() else ():
            place = scored.find_same(row["text"])  # validation rows choose a model, so no test row may be one of them
            yield where, place if place and "_test.jsonl, line" in place else None


def _files(data_dir: Path, kind: str, *, heldout: bool) -> list[Path]:
    return [path for path in sorted((data_dir / kind).glob("*.jsonl")) if path.stem.endswith("_heldout") == heldout]


def _joined(turns: Turns, answer: str) -> str:
    return "\n\n".join([*(turn["content"] for turn in turns if turn["role"] != "system"), answer])


def _key(text: str) -> bytes:
    return text_key({"text": text}).encode()


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=16).digest()  # unlike `hash`, the same in the processes of a launch


def _runs(key: bytes) -> np.ndarray:
    """A hash of each run of `RUN` bytes of a key, from those of runs half as long."""
    runs, length, factor = np.frombuffer(key, np.uint8).astype(np.uint64), 1, 0x9E3779B97F4A7C15
    while length < RUN:
        runs = runs[:-length] * np.uint64(factor) + runs[length:]
        length, factor = 2 * length, factor * factor % 2**64
    return runs


def _holds(key: bytes, parts: list[bytes]) -> bool:
    """Whether all parts of a scored text are in `key` or, of a text of one part, `CUT` of it up to where either was cut."""
    if len(parts) > 1 or parts[0] in key:
        return all(part in key for part in parts)
    (text,) = parts
    end, start = key.find(text[:RUN]), key.find(text[-RUN:])
    cut = [key[end:]] if end >= 0 else []
    cut += [key[: start + RUN]] if start >= 0 else []
    return any(len(piece) >= CUT * len(text) and piece in text for piece in (key, *cut))
