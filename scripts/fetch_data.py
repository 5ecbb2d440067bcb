# SPDX-License-Identifier: Apache-2.0
"""STEP 0 with real data. Fetch tasks and role corpora from the Hub into a data directory, free of test text.

    hf auth login
    python scripts/fetch_data.py --data_dir outputs/hub-data --max_rows 5000

What is fetched from where, with its licence: scripts/data_sources.yaml. Rows are streamed, so that --max_rows bounds the
download. A file that is complete is not fetched again.
"""

import argparse
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from datasets import get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from finteam_experts import runs
from finteam_experts.data import corpus_file, read_rows, task_file, text_key, write_rows
from finteam_experts.errors import InputError, nearest, run
from finteam_experts.tasks import TASKS

SOURCES = Path(__file__).parent / "data_sources.yaml"
SPLITS = {"train": ("train", "valid", "validation"), "test": ("test",)}
SHORTEST, LONGEST = 200, 1500  # characters of a passage
HELDOUT_PERCENT = 8  # of a corpus's documents
TEST_TEXT = 40  # letters and digits from the middle of a test text: a passage that holds them is dropped


class Source(BaseModel):
    """Where text comes from: data_sources.yaml says what each field means."""

    model_config = ConfigDict(extra="forbid")
    dataset: str
    text: list[str]
    licence: str
    options: dict[str, Any] = {}


class TaskSource(Source):
    label: str
    question: str | None = None


class Sources(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tasks: dict[str, TaskSource]
    roles: dict[str, list[Source]]


def read_sources(path: Path) -> Sources:
    """Read the table of sources; `InputError` for a wrong key or an unknown task."""
    if not path.is_file():
        raise InputError(f"--sources {path}: no such file.")
    try:
        sources = Sources.model_validate(yaml.safe_load(path.read_text()))
    except (ValidationError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {error}") from None
    for name in sources.tasks:
        if name not in TASKS:
            raise InputError(f"{path}: unknown task '{name}'. Known: {', '.join(TASKS)}.{nearest(name, TASKS)}")
    return sources


def stream(source: Source, splits: Iterable[str], max_rows: int | None) -> Iterator[dict[str, Any]]:
    """At most `max_rows` rows of those of `splits` that the dataset has; `InputError` if it can't be read."""
    try:
        found = get_dataset_split_names(source.dataset, **source.options)
        wanted = [split for split in splits if split in found]
        if not wanted:
            raise InputError(
                f"{source.dataset} has none of the splits {', '.join(splits)}; it has {', '.join(found)}."
            )
        count = 0
        for split in wanted:
            for row in load_dataset(source.dataset, split=split, streaming=True, **source.options):
                if count == max_rows:
                    return
                yield row
                count += 1
    except (DatasetNotFoundError, HfHubHTTPError, ConnectionError, FileNotFoundError) as error:
        raise InputError(
            f"{source.dataset} can't be read: {error}\nIf it is gated, accept its terms at "
            f"https://huggingface.co/datasets/{source.dataset} and log in with 'hf auth login'. If it has moved, correct "
            "scripts/data_sources.yaml, or leave it out with --tasks or --roles."
        ) from None


def task_rows(name: str, source: TaskSource, split: str, max_rows: int | None) -> list[dict[str, str]]:
    """The rows of one task and split, without repetitions; `InputError` for a missing column or an unknown label."""
    labels = {label.lower(): label for label in TASKS[name].labels}
    rows = {}
    for number, row in enumerate(tqdm(stream(source, SPLITS[split], max_rows), desc=f"{name}, {split}"), start=1):
        found = str(_column(source, row, source.label)).strip()
        if found.lower() not in labels:
            raise InputError(
                f"{source.dataset}, {split} row {number}: unknown label '{found}'. {name} has the labels "
                f"{', '.join(TASKS[name].labels)}.{nearest(found, TASKS[name].labels)}"
            )
        kept = {"text": _text(source, row), "label": labels[found.lower()]}
        if source.question:
            kept["question"] = _question(str(_column(source, row, source.question)))
        rows.setdefault((text_key(kept), kept.get("question")), kept)
    return list(rows.values())


def _question(instruction: str) -> str:
    """The question of an instruction, without the text below it and the request for a form of answer."""
    question = re.split(r"\s*\n?\b(?:Text|Context):", instruction, maxsplit=1)[0]
    return re.sub(r"\s*Please (?:answer|respond)\b[^.]*\.", "", question).strip()


def _column(source: Source, row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise InputError(f"{source.dataset} has no column '{name}'; it has {', '.join(row)}.")
    return row[name]


def _text(source: Source, row: dict[str, Any]) -> str:
    return "\n\n".join(filter(None, (_flat(_column(source, row, name)) for name in source.text)))


def _flat(value: Any) -> str:
    """Text of a column that may be a list of sentences, or a table as a list of rows."""
    if isinstance(value, list):
        return "\n".join(" | ".join(map(str, part)) if isinstance(part, list) else str(part) for part in value).strip()
    return str(value or "").strip()


def passages(text: str) -> Iterator[str]:
    """The text in pieces of `SHORTEST` to `LONGEST` characters, cut between lines or sentences where it can be."""
    piece = ""
    for part in re.split(r"(?<=[.!?])\s+|\s*\n+\s*", text):
        for start in range(0, len(part), LONGEST):
            cut = part[start : start + LONGEST]
            if piece and len(piece) + len(cut) >= LONGEST:
                if len(piece) >= SHORTEST:
                    yield piece
                piece = ""
            piece = f"{piece} {cut}".strip()
    if len(piece) >= SHORTEST:
        yield piece


def corpus(
    sources: list[Source], test_keys: list[str], max_rows: int | None
) -> tuple[list[dict[str, str]], list[dict[str, str]], int]:
    """Train and held-out passages of a role, no document in both, and how many were dropped for their test text."""
    # from the middle: price tables share their first line
    middles = [(len(key) - TEST_TEXT) // 2 for key in test_keys]
    test_parts = {key[at : at + TEST_TEXT] for key, at in zip(test_keys, middles, strict=True) if at >= 0}
    parts: tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]] = ({}, {})
    dropped = 0
    for source in sources:
        for row in tqdm(stream(source, SPLITS["train"], max_rows), desc=source.dataset):
            text = _text(source, row)
            heldout = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 < HELDOUT_PERCENT
            for passage in passages(text):
                kept = {"text": passage, "source": source.dataset}
                key = text_key(kept)
                if any(key[at : at + TEST_TEXT] in test_parts for at in range(len(key) - TEST_TEXT + 1)):
                    dropped += 1
                elif key not in parts[0] and key not in parts[1]:
                    parts[heldout][key] = kept
    return list(parts[0].values()), list(parts[1].values()), dropped


def keep_rows(path: Path, rows: list[dict[str, str]], source: str) -> None:
    """Write the rows; `InputError` if there are none."""
    if not rows:
        raise InputError(f"{source} gave no row for {path.name}. Raise --max_rows, or choose another source.")
    write_rows(path, rows)


def fetch_task(work: Path, name: str, source: TaskSource, max_rows: int | None) -> None:
    """Write the test rows of a task, and the train rows whose text is in no test row."""
    test_path, train_path = (task_file(work, name, split) for split in ("test", "train"))
    if not test_path.exists():
        keep_rows(test_path, task_rows(name, source, "test", max_rows), source.dataset)
    if not train_path.exists():
        in_test = {text_key(row) for row in read_rows(test_path, ("text",))}
        rows = task_rows(name, source, "train", max_rows)
        kept = [row for row in rows if text_key(row) not in in_test]
        if len(kept) < len(rows):
            print(f"{name}: {len(rows) - len(kept)} train rows left out, their text is in test")
        keep_rows(train_path, kept, source.dataset)


def fetch_corpus(work: Path, role: str, sources: list[Source], test_keys: list[str], max_rows: int | None) -> None:
    """Write the train and held-out passages of a role."""
    path, heldout_path = corpus_file(work, role), corpus_file(work, role, heldout=True)
    if not (path.exists() and heldout_path.exists()):
        train, heldout, dropped = corpus(sources, test_keys, max_rows)
        if dropped:
            print(f"{role}: {dropped} passages left out, they hold a test text")
        names = ", ".join(source.dataset for source in sources)
        keep_rows(heldout_path, heldout, names)
        keep_rows(path, train, names)


def readme(sources: Sources) -> str:
    """What lies in the folder, from where, under which licence."""
    rows = [(f"tasks/{name}", source) for name, source in sources.tasks.items()]
    rows += [(f"corpora/{role}", source) for role, own in sources.roles.items() for source in own]
    table = "".join(f"| {name} | {source.dataset} | {source.licence} |\n" for name, source in rows)
    return f"# Fetched data\n\nEach set keeps its own licence.\n\n| file | dataset | licence |\n|---|---|---|\n{table}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="data directory to write")
    parser.add_argument("--tasks", nargs="*", help="only these tasks (default: all)")
    parser.add_argument("--roles", nargs="*", help="only these roles (default: all)")
    parser.add_argument("--max_rows", type=int, help="at most so many rows of each dataset and split")
    parser.add_argument("--sources", type=Path, default=SOURCES, help="the table of datasets")
    args = parser.parse_args()
    if args.max_rows is not None and args.max_rows < 1:
        raise InputError(f"--max_rows {args.max_rows}: give a number above 0, or leave it out.")

    sources = read_sources(args.sources)
    for group, chosen in (("tasks", args.tasks), ("roles", args.roles)):
        known = getattr(sources, group)
        for name in chosen or ():
            if name not in known:
                raise InputError(f"--{group} {name}: {args.sources} lists {', '.join(known)}.{nearest(name, known)}")
        if chosen is not None:
            setattr(sources, group, {name: known[name] for name in chosen})
    inputs = {"sources": sources.model_dump(), "max_rows": args.max_rows}
    work = runs.begin(args.data_dir, "fetch_data", inputs)
    if work is None:
        return
    for name, source in sources.tasks.items():
        fetch_task(work, name, source, args.max_rows)
    test_keys = [
        text_key(row) for name in sources.tasks for row in read_rows(task_file(work, name, "test"), ("text",))
    ]
    for role, own in sources.roles.items():
        fetch_corpus(work, role, own, test_keys, args.max_rows)
    (work / "README.md").write_text(readme(sources))
    files = sorted(path.relative_to(work) for path in work.rglob("*.jsonl"))
    counts = {str(path): len(read_rows(work / path, ("text",))) for path in files}
    runs.finish(args.data_dir, {"results": {"rows": counts}})
    print(f"{args.data_dir}: " + ", ".join(f"{path} {count}" for path, count in counts.items()))


if __name__ == "__main__":
    run(main)
