# SPDX-License-Identifier: Apache-2.0
"""STEP 0 with real data. Fetch tasks and role corpora from the Hub into a data directory, free of scored text.

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

from finteam_experts import files, runs
from finteam_experts.data import hub
from finteam_experts.data.fetching import SHORTEST, drop_scored, fetch_role, fetch_task
from finteam_experts.errors import InputError, check_number, nearest, run

SOURCES = Path(__file__).parent / "data_sources.yaml"
README = """# Fetched data

Each set keeps its own licence. No text is in two splits of a task, and none that is trained on is scored.

| file | dataset | commit | licence |
|---|---|---|---|
"""


def check(table_file: Path, sources: hub.Sources) -> None:
    """Print each set's splits, licence and first row, as it would be read; `InputError` with all that can't be read."""
    problems, tasks = [], hub.task_definitions(table_file, sources)
    for place, source in sources.listed():
        print(f"{place}: {source.dataset} ({source.licence})")
        try:
            splits = source.kinds()
            rows, classes = source.rows(splits["train"], hub.Draw())
            row = next(rows, {})
            is_chat = isinstance(source, hub.ChatSource)
            print(
                f"  {', '.join(splits.values())}: {source.messages_of(row) if is_chat else source.text_of(row)!r:.200}"
            )
            if isinstance(source, hub.TaskSource):
                labels = tasks[place.removeprefix("tasks/")].labels
                print(f"  label: {source.label_of(row, labels, classes)}")
                if source.question:
                    print(f"  question: {source.read(row, source.question)}")
        except hub.UnknownLabel as error:
            print(f"  label: unknown, {error}")
        except hub.UnusableRow as error:  # others may be usable
            print("  its first row would be left out, such rows {}: {!r:.100}".format(*error.args))
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))


def pin(work: Path, sources: hub.Sources) -> dict[str, str | None]:
    """Keep each set at the commit that it had when this fetch began, and return these; `InputError` if one can't be read."""

    def key(place: str, source: hub.Source) -> str:
        return " ".join(filter(None, (place, source.dataset, source.config, source.options.get("revision"))))

    path, listed = work / "commits.json", sources.listed()
    if not path.exists():
        commits = {key(place, source): source.commit() for place, source in listed}
        for _, source in listed:
            source.kinds()
        files.write_json(path, commits)
    commits = files.read_json(path)
    for place, source in listed:
        if commit := commits[key(place, source)]:
            source.options["revision"] = commit
    return commits


def chosen_sources(args: argparse.Namespace) -> hub.Sources:
    """The table of sources, narrowed by --tasks, --roles and --chats."""
    sources = hub.read_sources(args.sources)
    for group in ("tasks", "roles", "chats"):
        known, chosen = getattr(sources, group), getattr(args, group)
        for name in chosen or ():
            if name not in known:
                raise InputError(f"--{group} {name}: {args.sources} lists {', '.join(known)}.{nearest(name, known)}")
        if chosen is not None:
            sources = sources.model_copy(update={group: {name: known[name] for name in chosen}})
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
    parser.add_argument("--seed", type=int, default=0, help="which rows are drawn, and which serve as test rows")
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
    draw = hub.Draw(args.max_rows, args.seed, args.max_characters)
    work = runs.begin(args.data_dir, "fetch_data", vars(draw) | {"sources": sources.model_dump(mode="json")})
    if work is None:
        return

    commits = pin(work, sources)
    for name, task in hub.task_definitions(args.sources, sources).items():
        fetch_task(work, task, sources.tasks[name], draw)
        shutil.copyfile(hub.definition_file(args.sources, name), work / "tasks" / f"{name}.yaml")
    for folder, by_role in (("corpora", sources.roles), ("chats", sources.chats)):
        for role, listed in by_role.items():
            fetch_role(work, folder, role, listed, draw)
    counts = drop_scored(work)

    table = [f"| {p} | {s.dataset} | {s.options.get('revision', '')} | {s.licence} |" for p, s in sources.listed()]
    files.write_text(work / "README.md", README + "\n".join(table) + "\n")
    runs.finish(args.data_dir, {"results": {"rows": counts, "commits": commits}})
    print(f"{args.data_dir}: " + ", ".join(f"{path} {count}" for path, count in counts.items()))


if __name__ == "__main__":
    run(main)
