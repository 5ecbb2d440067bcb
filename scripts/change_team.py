# SPDX-License-Identifier: Apache-2.0
"""Change a finished team: an analyst joins, is replaced or leaves. No other expert changes, and nobody's text is needed.

    python scripts/change_team.py add credit --expert ../credit/experts/credit
    python scripts/change_team.py replace quant --expert OWNER/quant-expert
    python scripts/change_team.py remove micro

Reads RUN_DIR/moe, or another team that --model names, and writes the changed one beside it: RUN_DIR/moe-add-credit unless
--output says otherwise. An expert is a folder or a Hub id, dense or an adapter, and branched off from the team's trunk. The router
is computed again from the sums that every analyst brings (scripts/router_sums.py). Where the data directory has tasks, all of
them are scored before and after.
"""

import argparse
import time
from pathlib import Path

from finteam_experts.threads import has_bf16_units, use_available_cores  # before torch

import torch
from rich.table import Table

from finteam_experts import runs
from finteam_experts.data.files import rows_to_score, tasks_of
from finteam_experts.data.tasks import Tasks, about_tasks
from finteam_experts.errors import InputError, check_number, run
from finteam_experts.evaluation.tasks import evaluate_model
from finteam_experts.files import check_disk_room, file_hash, write_json
from finteam_experts.fingerprints import expert_fingerprint, fingerprint, trunk_fingerprint
from finteam_experts.merging.gates import read_gates
from finteam_experts.merging.lora import check_adapter, dense_expert
from finteam_experts.merging.moe import KINDS, Expert, changed_team, check_expert, write_moe
from finteam_experts.merging.sums import (
    RIDGE,
    SUMS,
    RouterSums,
    check_sums,
    load_sums,
    save_sums,
    solve_gates,
    sums_file,
)
from finteam_experts.models import ADAPTER_FILE, local_folder, read_config, stored_dtype
from finteam_experts.roles import team_card
from finteam_experts.screen import screen
from finteam_experts.weights import size_of

ALIKE = 0.999  # cosine of the team's gates and those of its sums, above which they are the same


def find_expert(args: argparse.Namespace) -> tuple[Path, Path]:
    """The folder of the dense expert that joins, and the one that was named: the same, or of an adapter that was merged."""
    own = args.run_dir / "experts" / args.role
    folder = Path(args.expert or (own if own.is_dir() else args.run_dir / "adapters" / args.role))
    if args.expert and not folder.is_dir():
        folder = local_folder(args.expert, ["adapter_config.json", ADAPTER_FILE, runs.RECORD, SUMS])
    if (folder / "config.json").is_file() and not (folder / ADAPTER_FILE).is_file():
        return folder, folder
    trunk = local_folder(args.base or str(args.run_dir / "trunk"))
    known_trunk = fingerprint(trunk)
    check_adapter(folder, args.role, trunk, known_trunk)
    if own.is_dir():  # of the analyst that is replaced
        own = own.with_name(f"{args.role}-{file_hash(folder / ADAPTER_FILE)[:8]}")
    dense_expert(trunk, known_trunk, folder, own)
    return own, folder


def team_sums(moe: Path, names: list[str]) -> dict[str, RouterSums]:
    """The sums of every analyst of the team; `InputError` if some are missing or are not of the experts in it."""
    files = {name: sums_file(moe, name) for name in names}
    if missing := [name for name, file in files.items() if not file.is_file()]:
        raise InputError(
            f"{moe} has no router sums of {', '.join(missing)}, so its router can't be computed again. Compute them once from the "
            "text: scripts/fit_router.py --overwrite"
        )
    sums = {name: load_sums(file) for name, file in files.items()}
    like = sums[names[0]]
    tuned = trunk_fingerprint(moe) != like.trunk
    for place, (name, file) in enumerate(files.items()):
        check_sums(sums[name], file, like, like.trunk, None if tuned else expert_fingerprint(moe, place))
    if tuned:
        print(
            f"{moe} was tuned as a whole after its router was fitted: its attention is not quite the trunk's any more, and every "
            "expert has seen the rows of all. The team before that is RUN_DIR/moe."
        )
    return sums


def scale_of(gates: torch.Tensor, solved: torch.Tensor) -> float:
    """How many times the solved gates the team's gates are; says so where they are others."""
    cosine = torch.nn.functional.cosine_similarity(gates.flatten(), solved.flatten(), dim=0).item()
    if cosine < ALIKE:
        print(f"The team's router is not that of its sums (cosine {cosine:.3f}): it is computed again from these.")
    return (gates.norm() / solved.norm()).item()


def who_joins(args: argparse.Namespace, moe: Path, like: RouterSums) -> tuple[Path, Path, Path, RouterSums]:
    """The dense expert that joins the team in `moe`, the folder that was named, the file of its router sums, and these.

    Raises `InputError` if they do not fit.
    """
    expert, named = find_expert(args)
    check_expert(expert, moe, like.trunk)
    source = args.sums or (expert if (expert / SUMS).is_file() else named) / SUMS
    if not source.is_file():
        raise InputError(
            f"{source} does not exist: a router needs the sums of who joins. Their owner computes them, from text that stays "
            f"there: scripts/router_sums.py --role {args.role}"
        )
    sums = load_sums(source)
    check_sums(sums, source, like, like.trunk, expert_fingerprint(expert))
    return expert, named, source, sums


def description(record: dict, joined: dict, now: list[str], tasks: Tasks) -> dict:
    """What the record of the changed team says of it: as before, with the analysts and tasks of now.

    `joined` is what is known of the expert that joins, by its name.
    """
    cards = {member["name"]: member for member in (*team_card(now), *record["team"])}
    known = record.get("experts", {}) | joined  # of a tuned team's experts nothing is known
    about = {
        "system_prompt": record["system_prompt"],
        "team": [cards[name] for name in now],
        "experts": {name: known[name] for name in now if name in known},
    }
    if "tasks" in record:
        listed = {task["name"]: task for task in (*about_tasks(tasks)["tasks"], *record["tasks"])}
        about["tasks"] = [task for task in listed.values() if task["role"] in (None, *now)]
    return about


def score_both(moe: Path, changed: Path, data: Path, tasks: Tasks, limit: int) -> dict[str, dict[str, float]]:
    """Score the team before and after on the tasks, and print a row for each; returns the main scores."""
    rows = {name: rows_to_score(data, task, "test", limit) for name, task in tasks.items()}
    scores = {}
    for when, folder in (("before", moe), ("after", changed)):
        print(f"Scoring the team {when} the change")
        scores[when] = evaluate_model(folder, tasks, rows, {}, bf16=has_bf16_units(), generate=False)
    table = Table("task", "its analyst", "main score", title="What changed")
    for column in ("before", "after", "difference", "gate share of its analyst before", "after"):
        table.add_column(column, justify="right")
    main: dict[str, dict[str, float]] = {when: {} for when in scores}
    for name, task in tasks.items():
        shares = []
        for when, own in scores.items():
            main[when][name] = own["tasks"][name][task.main_score]
            share = own["routing"][name].get(task.role)
            shares.append("-" if share is None else f"{share:.0%}")
        before, after = main["before"][name], main["after"][name]
        table.add_row(
            name, task.role or "-", task.main_score, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}", *shares
        )
    screen(120).print(table)
    return main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("role", help="the analyst that joins, is replaced or leaves")
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--model", default="moe", help="the team to change, a folder of the run")
    parser.add_argument("--output", help="the folder of the run to write (default: MODEL-KIND-ROLE)")
    parser.add_argument("--expert", help="who joins: folder or Hub id (default: RUN_DIR/experts/ROLE, or its adapter)")
    parser.add_argument("--base", help="the trunk that an adapter was trained on (default: RUN_DIR/trunk)")
    parser.add_argument("--sums", type=Path, help=f"the router sums of who joins (default: {SUMS} of the expert)")
    parser.add_argument(
        "--ridge", type=float, help="penalty, as in scripts/fit_router.py (default: that of the team's router)"
    )
    parser.add_argument("--data_dir", type=Path, help="whose tasks are scored (default: RUN_DIR/data)")
    parser.add_argument("--limit", type=int, default=60, help="rows per task to score; 0: none")
    args = parser.parse_args()
    for name, needless in (("--expert", args.expert), ("--sums", args.sums)):
        if args.kind == "remove" and needless:
            raise InputError(f"{name} is for an analyst that joins; {args.role} is to be removed.")

    check_number("--ridge", args.ridge, above=0)
    if args.limit:
        check_number("--limit", args.limit, least=2)  # a standard error needs two rows

    use_available_cores()
    started, moe, data = time.monotonic(), args.run_dir / args.model, args.data_dir or args.run_dir / "data"
    record = runs.require(moe, "scripts/merge_moe.py and scripts/fit_router.py")
    if "team" not in record:
        raise InputError(f"{moe} is no team. Name one with --model.")
    names = [member["name"] for member in record["team"]]
    now = changed_team(names, args.kind, args.role)
    sums, ridge = team_sums(moe, names), args.ridge or record.get("router", {}).get("ridge", RIDGE)
    scale = scale_of(read_gates(moe), solve_gates(list(sums.values()), ridge))
    inputs = {
        "model": fingerprint(moe),
        "change": {args.kind: args.role},
        "sums": {name: file_hash(sums_file(moe, name)) for name in names},
        "settings": {"ridge": ridge},
    }
    members, joined = {name: Expert(moe, place) for place, name in enumerate(names)}, {}
    if args.kind != "remove":
        expert, named, source, sums[args.role] = who_joins(args, moe, sums[names[0]])
        members[args.role] = Expert(expert)
        adapter = file_hash(named / ADAPTER_FILE) if (named / ADAPTER_FILE).is_file() else None
        joined = {args.role: {"fingerprint": sums[args.role].expert, "adapter": adapter}}
        inputs |= {"expert": fingerprint(expert), "expert_sums": file_hash(source)}

    output = args.output or f"{args.model}-{args.kind}-{args.role}"
    target = args.run_dir / output
    work = runs.begin(target, "change_team", inputs, overwrite=output == args.model)
    if work is None:
        return
    check_disk_room(target, size_of(moe) * (len(now) + 1) // len(names))
    gates = scale * solve_gates([sums[name] for name in now], ridge)
    config = read_config(moe)
    config.num_local_experts, config.dtype = len(now), stored_dtype(moe)
    config.num_experts_per_tok = min(config.num_experts_per_tok, len(now))
    write_moe(moe, [members[name] for name in now], gates, config, work)
    for name in now:
        save_sums(sums[name], sums_file(work, name))
    seconds = time.monotonic() - started

    tasks = tasks_of(data) if args.limit and data.is_dir() else {}
    about = description(record, joined, now, tasks)
    results: dict = {"seconds": round(seconds, 1)}
    if tasks:
        write_json(work / runs.RECORD, runs.read_record(work) | about)  # the scores name the analysts
        results["scores"] = score_both(moe, work, data, tasks, args.limit)
    runs.finish(target, about | {"router": {"kind": "sums", "scale": scale, "ridge": ridge}, "results": results})
    print(
        f"{target}: {', '.join(now)}. It took {seconds:.0f} seconds without the scores; no other expert was changed."
    )


if __name__ == "__main__":
    run(main)
