# SPDX-License-Identifier: Apache-2.0
"""STEP 0 with real data. Fetch tasks and role corpora from the Hub into a data directory, free of test text.

    python scripts/fetch_data.py --check
    python scripts/fetch_data.py --data_dir outputs/hub-data --max_rows 5000
    python scripts/fetch_data.py --data_dir outputs/hub-data --sources scripts/data_sources_gated.yaml

What is fetched from where, with its licence: scripts/data_sources.yaml has sets that need no form, data_sources_gated.yaml
those of the published benchmarks, whose terms are accepted on their pages. `--check` looks at every set and downloads
nothing. A file that is complete is not fetched again.
"""

import argparse
import hashlib
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from tqdm import tqdm

from finteam_experts import files, runs
from finteam_experts.data import hub
from finteam_experts.data.files import Row, corpus_file, read_rows, task_file, text_key, write_rows
from finteam_experts.data.leaks import holds_test_text
from finteam_experts.data.passages import SHORTEST, passages
from finteam_experts.data.tasks import TASKS
from finteam_experts.errors import InputError, nearest, run

SOURCES = Path(__file__).parent / "data_sources.yaml"
HELDOUT_PERCENT = 8  # of a corpus's documents
CHARACTERS_PER_TOKEN = 4  # of English, roughly
Revisions = dict[str, str | None]  # the commit of each set


def check(sources: hub.Sources) -> None:
    """Print whether each set can be read, with its splits, a row and its licence; `InputError` with all problems."""
    problems = []
    names = ("for", "dataset", "splits", "first text", "label", "licence")
    table = Table(*(Column(name, overflow="fold") for name in names), title="Sources")
    for place, source in sources.listed():
        try:
            splits, row = hub.splits_of(source), next(hub.rows(source, "train", None, 0), {})
            text, label = source.text_of(row), ""
            if isinstance(source, hub.TaskSource):
                labels = TASKS[place.removeprefix("tasks/")].labels
                label = source.label_of(row, labels) or f"unknown: {row[source.label]}"
                if source.question:
                    label += f" ({hub.question_of(source.read(row, source.question), labels)})"
            if not text:
                raise InputError(f"{source.dataset}: no text in its first row. The columns are {', '.join(row)}.")
            table.add_row(place, source.dataset, ", ".join(splits), text[:60], label, source.licence)
        except InputError as error:
            problems.append(str(error))
            table.add_row(place, source.dataset, "[red]can't be read", "", "", source.licence)
    Console(width=150).print(table)
    if problems:
        raise InputError("\n".join(problems))


def task_rows(
    name: str, source: hub.TaskSource, kind: str, args: argparse.Namespace, revision: str | None
) -> list[Row]:
    """The rows of one task and split, without repetitions; `InputError` for a missing column or an unknown label.

    Rows without a text are left out, and counted on the screen.
    """
    labels, kept, empty = TASKS[name].labels, {}, 0
    rows = hub.rows(source, kind, args.max_rows, args.seed, revision)
    for number, row in enumerate(tqdm(rows, desc=f"{name}, {kind}"), start=1):
        label, text = source.label_of(row, labels), source.text_of(row)
        if not text:
            empty += 1
            continue
        if label is None:
            found = str(row[source.label])
            advice = f"{nearest(found, labels)} Map others with labels in the table of sources."
            where = f"{source.dataset}, {kind} row {number}"
            raise InputError(f"{where}: unknown label '{found}'. {name} has the labels {', '.join(labels)}.{advice}")
        one = {"text": text, "label": label}
        if source.question:
            one["question"] = hub.question_of(source.read(row, source.question), labels)
        kept.setdefault((text_key(one), one.get("question")), one)
    if empty:
        print(f"{name}: {empty} {kind} rows of {source.dataset} are left out: they have no text")
    return list(kept.values())


def fetch_task(work: Path, name: str, source: hub.TaskSource, args: argparse.Namespace, revision: str | None) -> None:
    """Write the test rows of a task, its validation rows if it has some, and its train rows; no text in two of them."""
    known: set[str] = set()
    for kind in ("test", "valid", "train"):
        path = task_file(work, name, kind)
        if not path.exists():
            found = task_rows(name, source, kind, args, revision)
            kept = [row for row in found if text_key(row) not in known]
            if not found and kind == "valid":
                continue
            if len(kept) < len(found):
                left_out = (
                    f"{len(found) - len(kept)} of {len(found)} {kind} rows are left out, since their text is scored"
                )
                print(f"{name}: {left_out}. Published scores may include such rows")
            if not kept:
                advice = "Raise --max_rows, or choose another source."
                raise InputError(f"{source.dataset} gave no row for {path.name}. {advice}")
            write_rows(path, kept)
        known |= {text_key(row) for row in read_rows(path, ("text",))}


def fetch_corpus(
    work: Path, role: str, sources: list[hub.Source], args: argparse.Namespace, revisions: Revisions
) -> None:
    """Write the train and held-out passages of a role: no document in both, and no passage with a test text."""
    path, heldout_path = corpus_file(work, role), corpus_file(work, role, heldout=True)
    if path.exists() and heldout_path.exists():
        return
    holds, parts, seen = holds_test_text(work, TASKS), ([], []), set()
    for source in sources:
        counts: Counter[str] = Counter()
        stream = hub.rows(source, "train", args.max_rows, args.seed, revisions[source.dataset])
        for row in tqdm(stream, desc=source.dataset):
            text = source.text_of(row)
            counts["rows"] += 1
            counts["rows without text"] += not text
            heldout = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 < HELDOUT_PERCENT
            for passage in passages(text, args.max_characters) if text else ():
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
        listed = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        print(f"{role}, {source.dataset}: {listed}, about {tokens:,.0f} tokens")
        if not counts["passages"]:
            found = f"{source.dataset} gave {role} no passage from {counts['rows']} rows"
            raise InputError(f"{found}. Look at its columns with --check: the text may be in another one.")
    train, heldout = parts
    if not heldout:  # few documents: the hash of none selected it
        heldout = train[:: 100 // HELDOUT_PERCENT]
        train = [row for row in train if row not in heldout]
    if not train:
        raise InputError(f"{role} has {len(heldout)} passages in all. Add a source, or raise --max_rows.")
    write_rows(heldout_path, heldout)
    write_rows(path, train)


def readme(sources: hub.Sources, revisions: Revisions) -> str:
    """What is in the folder, from where, under which licence."""
    rows = [(place, s.dataset, revisions.get(s.dataset) or "", s.licence) for place, s in sources.listed()]
    table = "".join(
        f"| {' | '.join(row)} |\n" for row in (("file", "dataset", "commit", "licence"), ("---",) * 4, *rows)
    )
    promise = "Each set keeps its own licence. No text is in two splits of a task, and no test text in a corpus."
    return f"# Fetched data\n\n{promise}\n\n{table}"


def pinned(work: Path, sources: hub.Sources) -> Revisions:
    """The commit of every set, as it was when this fetch began; `InputError` with all sets that can't be read."""
    path = work / "commits.json"
    if path.exists():
        return files.read_json(path)
    found, problems = {}, []
    for _, source in sources.listed():
        try:
            found[source.dataset] = hub.revision_of(source)
            hub.splits_of(source, found[source.dataset])
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    files.write_json(path, found)
    return found


def chosen_sources(args: argparse.Namespace) -> hub.Sources:
    """The table of sources, narrowed by --tasks and --roles."""
    sources = hub.read_sources(args.sources)
    for group in ("tasks", "roles"):
        known, chosen = getattr(sources, group), getattr(args, group)
        for name in chosen or ():
            if name not in known:
                raise InputError(f"--{group} {name}: {args.sources} lists {', '.join(known)}.{nearest(name, known)}")
        if chosen is not None:
            setattr(sources, group, {name: known[name] for name in chosen})
    return sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="data directory to write")
    parser.add_argument("--check", action="store_true", help="look at every set, download nothing")
    parser.add_argument("--tasks", nargs="*", help="only these tasks (default: all)")
    parser.add_argument("--roles", nargs="*", help="only these roles (default: all)")
    parser.add_argument("--max_rows", type=int, help="at most so many rows of each dataset and split, drawn at random")
    parser.add_argument(
        "--max_characters", type=int, default=6000, help="per passage; 16000 for recipes of 4,096 tokens"
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
    sources = chosen_sources(args)
    if args.check:
        check(sources)
        return
    inputs = {key: getattr(args, key) for key in ("max_rows", "max_characters", "seed")}
    work = runs.begin(args.data_dir, "fetch_data", inputs | {"sources": sources.model_dump(mode="json")})
    if work is None:
        return

    revisions = pinned(work, sources)
    for name, source in sources.tasks.items():
        fetch_task(work, name, source, args, revisions[source.dataset])
    for role, own in sources.roles.items():
        fetch_corpus(work, role, own, args, revisions)

    files.write_text(work / "README.md", readme(sources, revisions))
    written = sorted(path.relative_to(work) for path in work.rglob("*.jsonl"))
    counts = {str(path): len(read_rows(work / path, ("text",))) for path in written}
    runs.finish(args.data_dir, {"results": {"rows": counts, "commits": revisions}})
    print(f"{args.data_dir}: " + ", ".join(f"{path} {count}" for path, count in counts.items()))


if __name__ == "__main__":
    run(main)
