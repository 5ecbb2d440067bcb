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
import shutil
from pathlib import Path

from rich.table import Column, Table

from finteam_experts import files, runs
from finteam_experts.data import hub
from finteam_experts.data.fetching import Draw, Revisions, fetch_chats, fetch_corpus, fetch_task, question_of
from finteam_experts.data.files import read_rows
from finteam_experts.data.passages import SHORTEST
from finteam_experts.errors import InputError, check_number, nearest, run
from finteam_experts.screen import screen

SOURCES = Path(__file__).parent / "data_sources.yaml"


def check(table_file: Path, sources: hub.Sources) -> None:
    """Print whether each set can be read, with its splits, a row and its licence; `InputError` with all problems."""
    problems, tasks = [], hub.task_definitions(table_file, sources)
    names = ("for", "dataset", "splits", "first text", "label", "licence")
    table = Table(*(Column(name, overflow="fold") for name in names), title="Sources")
    for place, source in sources.listed():
        try:
            splits, row = hub.splits_of(source), next(hub.rows(source, "train", None, 0), {})
            chat = isinstance(source, hub.ChatSource)
            text, label = str(source.messages_of(row)) if chat else source.text_of(row), ""
            if isinstance(source, hub.TaskSource):
                labels = tasks[place.removeprefix("tasks/")].labels
                label = source.label_of(row, labels) or f"unknown: {row[source.label]}"
                if source.question:
                    label += f" ({question_of(source.read(row, source.question), labels)})"
            if not text:
                raise InputError(f"{source.dataset}: no text in its first row. The columns are {', '.join(row)}.")
            table.add_row(place, source.dataset, ", ".join(splits), text[:60], label, source.licence)
        except InputError as error:
            problems.append(str(error))
            table.add_row(place, source.dataset, "can't be read", "", "", source.licence)
    screen(150).print(table)
    if problems:
        raise InputError("\n".join(problems))


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
    for group in ("tasks", "roles", "chats"):
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
    parser.add_argument("--roles", nargs="*", help="only the corpora of these roles (default: all)")
    parser.add_argument("--chats", nargs="*", help="only the conversations of these roles (default: all)")
    parser.add_argument("--max_rows", type=int, help="at most so many rows of each dataset and split, drawn at random")
    parser.add_argument(
        "--max_characters", type=int, default=6000, help="per passage; 16000 for recipes of 4,096 tokens"
    )
    parser.add_argument("--seed", type=int, default=0, help="which rows are drawn")
    parser.add_argument("--sources", type=Path, default=SOURCES, help="the table of datasets")
    args = parser.parse_args()
    check_number("--max_rows", args.max_rows, least=1)
    check_number("--max_characters", args.max_characters, least=SHORTEST)
    if not args.check and args.data_dir is None:
        raise InputError("--data_dir is missing: name the data directory to write, or pass --check.")
    sources = chosen_sources(args)
    if args.check:
        check(args.sources, sources)
        return
    inputs = {key: getattr(args, key) for key in ("max_rows", "max_characters", "seed")}
    work = runs.begin(args.data_dir, "fetch_data", inputs | {"sources": sources.model_dump(mode="json")})
    if work is None:
        return

    revisions, draw = pinned(work, sources), Draw(args.max_rows, args.seed, args.max_characters)
    for name, task in hub.task_definitions(args.sources, sources).items():
        source = sources.tasks[name]
        fetch_task(work, task, source, draw, revisions[source.dataset])
        shutil.copyfile(hub.definition_file(args.sources, name), work / "tasks" / f"{name}.yaml")
    for role, own in sources.roles.items():
        fetch_corpus(work, role, own, draw, revisions)
    for role, own in sources.chats.items():
        fetch_chats(work, role, own, draw, revisions)

    files.write_text(work / "README.md", readme(sources, revisions))
    written = sorted(path.relative_to(work) for path in work.rglob("*.jsonl"))
    counts = {str(path): len(read_rows(work / path, ())) for path in written}
    runs.finish(args.data_dir, {"results": {"rows": counts, "commits": revisions}})
    print(f"{args.data_dir}: " + ", ".join(f"{path} {count}" for path, count in counts.items()))


if __name__ == "__main__":
    run(main)
