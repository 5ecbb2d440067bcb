# SPDX-License-Identifier: Apache-2.0
"""STEP 0 with real data. Fetch tasks and role corpora from the Hub into a data directory, free of test text.

    python scripts/fetch_data.py --check
    python scripts/fetch_data.py --data_dir outputs/hub-data --max_rows 5000
    python scripts/fetch_data.py --data_dir outputs/hub-data --sources scripts/data_sources_gated.yaml

What is fetched from where, with its licence: scripts/data_sources.yaml has sets that need no form, data_sources_gated.yaml
those of the published benchmarks, whose terms are accepted on their pages. `--check` looks at every set and downloads nothing.
A file that is complete is not fetched again.
"""

import argparse
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from finteam_experts import runs
from finteam_experts.data import corpus_file, read_rows, task_file, text_key, write_rows
from finteam_experts.errors import InputError, nearest, read_json, run
from finteam_experts.hub_sets import (
    SPLITS,
    Source,
    Sources,
    TaskSource,
    question_of,
    read_sources,
    revision_of,
    rows,
    sample,
    splits_of,
)
from finteam_experts.leaks import holds_test_text
from finteam_experts.tasks import TASKS

SOURCES = Path(__file__).parent / "data_sources.yaml"
SHORTEST = 200  # characters of a passage, unless it is a whole document
HELDOUT_PERCENT = 8  # of a corpus's documents
CHARACTERS_PER_TOKEN = 4  # of English, roughly
Revisions = dict[str, str | None]  # the commit of each set


def check(sources: Sources) -> list[str]:
    """Print whether each set can be read, with its splits, a row and its licence; returns what is wrong, a line a set."""
    problems = []
    table = Table(title="Sources")
    for column in ("for", "dataset", "splits", "first text", "label", "licence"):
        table.add_column(column, overflow="fold")
    listed = [(name, source) for name, source in sources.tasks.items()]
    listed += [(role, source) for role, own in sources.roles.items() for source in own]
    for name, source in listed:
        try:
            splits = splits_of(source)
            row = sample(source, "train")
            if row is None:
                raise InputError(f"{source.dataset} has no train split; it has {', '.join(splits)}.")
            text, label = source.text_of(row), ""
            if isinstance(source, TaskSource):
                _check_splits(source, splits)
                label = source.label_of(row, TASKS[name].labels) or f"unknown: {row[source.label]}"
                if source.question:
                    label += f" ({question_of(source.read(row, source.question), TASKS[name].labels)})"
            if not text:
                raise InputError(f"{source.dataset}: no text in its first row. The columns are {', '.join(row)}.")
            table.add_row(name, source.dataset, ", ".join(splits), text[:60], label, source.licence)
        except InputError as error:
            problems.append(str(error))
            table.add_row(name, source.dataset, "[red]can't be read", "", "", source.licence)
    Console(width=150).print(table)
    return problems


def _check_splits(source: TaskSource, splits: list[str]) -> None:
    for kind in ("train", "test"):
        if not set(SPLITS[kind]) & set(splits):
            raise InputError(f"{source.dataset} has no {kind} split; it has {', '.join(splits)}.")


def task_rows(
    name: str, source: TaskSource, kind: str, max_rows: int | None, seed: int, revision: str | None
) -> list[dict[str, str]]:
    """The rows of one task and split, without repetitions; `InputError` for a missing column or an unknown label.

    Rows without a text are left out, and counted on the screen.
    """
    labels, kept, empty = TASKS[name].labels, {}, 0
    for number, row in enumerate(tqdm(rows(source, kind, max_rows, seed, revision), desc=f"{name}, {kind}"), start=1):
        label, text = source.label_of(row, labels), source.text_of(row)
        if not text:
            empty += 1
            continue
        if label is None:
            found = str(row[source.label])
            raise InputError(
                f"{source.dataset}, {kind} row {number}: unknown label '{found}'. {name} has the labels {', '.join(labels)}."
                f"{nearest(found, labels)} Map others with labels in the table of sources."
            )
        one = {"text": text, "label": label}
        if source.question:
            one["question"] = question_of(source.read(row, source.question), labels)
        kept.setdefault((text_key(one), one.get("question")), one)
    if empty:
        print(f"{name}: {empty} {kind} rows of {source.dataset} are left out: they have no text")
    return list(kept.values())


def passages(text: str, longest: int) -> Iterator[str]:
    """A document in pieces of at most `longest` characters, cut between lines or sentences where it can be.

    Lines stay lines. A short document is one passage; of a long one, a rest below `SHORTEST` is left out.
    """
    if len(text) <= longest:
        yield text
        return
    piece = ""
    for part in re.split(r"(\n+|(?<=[.!?])[ \t]+)", text):
        for start in range(0, len(part), longest):
            cut = part[start : start + longest]
            if piece.strip() and len(piece) + len(cut) > longest:
                if len(piece.strip()) >= SHORTEST:
                    yield piece.strip()
                piece = ""
            piece += cut
    if len(piece.strip()) >= SHORTEST:
        yield piece.strip()


def fetch_task(
    work: Path, name: str, source: TaskSource, max_rows: int | None, seed: int, revision: str | None
) -> None:
    """Write the test rows of a task, its validation rows if it has some, and its train rows; no text in two of them."""
    known: set[str] = set()
    for kind in ("test", "valid", "train"):
        path = task_file(work, name, kind)
        if not path.exists():
            found = task_rows(name, source, kind, max_rows, seed, revision)
            kept = [row for row in found if text_key(row) not in known]
            if not found and kind == "valid":
                continue
            if len(kept) < len(found):
                print(
                    f"{name}: {len(found) - len(kept)} of {len(found)} {kind} rows are left out, since their text is scored. "
                    "Published scores may include such rows"
                )
            keep_rows(path, kept, source.dataset)
        known |= {text_key(row) for row in read_rows(path, ("text",))}


def fetch_corpus(
    work: Path, role: str, sources: list[Source], max_rows: int | None, seed: int, longest: int, revisions: Revisions
) -> None:
    """Write the train and held-out passages of a role: no document in both, and no passage with a test text."""
    path, heldout_path = corpus_file(work, role), corpus_file(work, role, heldout=True)
    if path.exists() and heldout_path.exists():
        return
    holds, parts, seen = holds_test_text(work, TASKS), ([], []), set()
    for source in sources:
        counts: Counter[str] = Counter()
        for row in tqdm(rows(source, "train", max_rows, seed, revisions[source.dataset]), desc=source.dataset):
            text = source.text_of(row)
            counts["rows"] += 1
            counts["rows without text"] += not text
            heldout = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 < HELDOUT_PERCENT
            for passage in passages(text, longest) if text else ():
                kept = {"text": passage, "source": source.dataset}
                key = text_key(kept)
                if holds(key):
                    counts["passages left out, they hold a test text"] += 1
                elif key not in seen:
                    seen.add(key)
                    parts[heldout].append(kept)
                    counts["passages"] += 1
                    counts["characters"] += len(passage)
        tokens = counts.pop("characters", 0) / CHARACTERS_PER_TOKEN
        said = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        print(f"{role}, {source.dataset}: {said}, about {tokens:,.0f} tokens")
        if not counts["passages"]:
            raise InputError(
                f"{source.dataset} gave {role} no passage from {counts['rows']} rows. Look at its columns with --check: the text may "
                "be in another one."
            )
    train, heldout = parts
    if not heldout:  # few documents: the hash of none fell into the held-out ones
        heldout = train[:: 100 // HELDOUT_PERCENT]
        train = [row for row in train if row not in heldout]
    if not train:
        raise InputError(f"{role} has {len(heldout)} passages in all. Add a source, or raise --max_rows.")
    write_rows(heldout_path, heldout)
    write_rows(path, train)


def keep_rows(path: Path, found: list[dict[str, str]], source: str) -> None:
    """Write the rows; `InputError` if there are none."""
    if not found:
        raise InputError(f"{source} gave no row for {path.name}. Raise --max_rows, or choose another source.")
    write_rows(path, found)


def readme(sources: Sources, revisions: Revisions) -> str:
    """What lies in the folder, from where, under which licence."""
    listed = [(f"tasks/{name}", source) for name, source in sources.tasks.items()]
    listed += [(f"corpora/{role}", source) for role, own in sources.roles.items() for source in own]
    table = "".join(
        f"| {name} | {source.dataset} | {revisions.get(source.dataset) or ''} | {source.licence} |\n"
        for name, source in listed
    )
    return (
        "# Fetched data\n\nEach set keeps its own licence. No text is in two splits of a task, and no test text in a corpus.\n\n"
        f"| file | dataset | commit | licence |\n|---|---|---|---|\n{table}"
    )


def pinned(work: Path, sources: Sources) -> Revisions:
    """The commit of every set, as it was when this fetch began; `InputError` with all sets that can't be read."""
    path = work / "commits.json"
    if path.exists():
        return read_json(path)
    found, problems = {}, []
    for source in sources.all():
        try:
            found[source.dataset] = revision_of(source)
            splits = splits_of(source, found[source.dataset])
            if isinstance(source, TaskSource):
                _check_splits(source, splits)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    runs.write_json(path, found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="data directory to write")
    parser.add_argument("--check", action="store_true", help="look at every set, download nothing")
    parser.add_argument("--tasks", nargs="*", help="only these tasks (default: all)")
    parser.add_argument("--roles", nargs="*", help="only these roles (default: all)")
    parser.add_argument("--max_rows", type=int, help="at most so many rows of each dataset and split, drawn at random")
    parser.add_argument(
        "--max_characters", type=int, default=6000, help="of a passage; 16000 for recipes of 4,096 tokens"
    )
    parser.add_argument("--seed", type=int, default=0, help="which rows are drawn")
    parser.add_argument("--sources", type=Path, default=SOURCES, help="the table of datasets")
    args = parser.parse_args()
    if args.max_rows is not None and args.max_rows < 1:
        raise InputError(f"--max_rows {args.max_rows}: give a number above 0, or leave it out.")
    if args.max_characters < SHORTEST:
        raise InputError(f"--max_characters {args.max_characters}: give {SHORTEST} or more.")
    if not args.check and args.data_dir is None:
        raise InputError("--data_dir is missing: name the data directory to write, or pass --check.")

    sources = read_sources(args.sources)
    for group, chosen in (("tasks", args.tasks), ("roles", args.roles)):
        known = getattr(sources, group)
        for name in chosen or ():
            if name not in known:
                raise InputError(f"--{group} {name}: {args.sources} lists {', '.join(known)}.{nearest(name, known)}")
        if chosen is not None:
            setattr(sources, group, {name: known[name] for name in chosen})
    if args.check:
        if problems := check(sources):
            raise InputError("\n".join(problems))
        return
    inputs = {"sources": sources.model_dump(mode="json"), "max_rows": args.max_rows, "max_characters": args.max_characters,
              "seed": args.seed}  # fmt: skip
    work = runs.begin(args.data_dir, "fetch_data", inputs)
    if work is None:
        return
    revisions = pinned(work, sources)
    for name, source in sources.tasks.items():
        fetch_task(work, name, source, args.max_rows, args.seed, revisions[source.dataset])
    for role, own in sources.roles.items():
        fetch_corpus(work, role, own, args.max_rows, args.seed, args.max_characters, revisions)
    (work / "README.md").write_text(readme(sources, revisions), encoding="utf-8")
    files = sorted(path.relative_to(work) for path in work.rglob("*.jsonl"))
    counts = {str(path): len(read_rows(work / path, ("text",))) for path in files}
    runs.finish(args.data_dir, {"results": {"rows": counts, "commits": revisions}})
    print(f"{args.data_dir}: " + ", ".join(f"{path} {count}" for path, count in counts.items()))
    for group, known in (("tasks", TASKS), ("roles", read_sources(args.sources).roles)):
        if missing := [name for name in known if name not in getattr(sources, group)]:
            print(f"Without the {group} {', '.join(missing)}: a run uses what its data directory has")


if __name__ == "__main__":
    run(main)
