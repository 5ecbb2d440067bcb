# SPDX-License-Identifier: Apache-2.0
"""STEP 4. Evaluate every model of a run on the tasks and held-out conversations of its data, in the chat format of training.

    python scripts/evaluate.py --run_dir outputs/quickstart

A row's answer is the label with the highest log-likelihood, the end of the answer included. The report also has `generated`, the measure of many published
tables: the first label in the text that the model writes. Held-out conversations (chats/ROLE_heldout.jsonl) are answered, and
`--lm_eval_tasks` adds tasks that lm-eval knows. Writes RUN_DIR/reports/evaluation.json and evaluation.png.
"""

import argparse
from pathlib import Path
from typing import Any

from finteam_experts.threads import has_bf16_units, use_available_cores  # before torch

import matplotlib.pyplot as plt

from finteam_experts import runs
from finteam_experts.data import leaks
from finteam_experts.data.conversations import chat_file, chat_roles, read_chats
from finteam_experts.data.files import evenly_spread, rows_to_score, scored_file, tasks_of
from finteam_experts.data.tasks import about_tasks, prompting
from finteam_experts.errors import InputError, NotFiniteError, check_number, run
from finteam_experts.evaluation.lm_eval_tasks import run_tasks, task_manager, what_is_read
from finteam_experts.evaluation.seen import check_valid_unseen
from finteam_experts.evaluation.tables import answer_table, task_table
from finteam_experts.evaluation.tasks import difference, evaluate_model, majority
from finteam_experts.files import file_hash, read_json, write_json
from finteam_experts.fingerprints import fingerprint
from finteam_experts.models import local_folder
from finteam_experts.screen import screen

TEAM, DENSE = "moe-instruct", "dense-instruct"
UNMATCHED = (
    f"{DENSE} was not tuned for as many steps as experts and team together (match_steps): the comparison is not fair"
)
MODELS = ("base", DENSE, "moe", TEAM)


def print_report(report: dict[str, Any]) -> None:
    """Print the tables that there are, then a line for each of lm-eval's own tasks, comparison, repetition and routing."""
    console, models = screen(170), report["models"]
    if report["tasks"]:
        console.print(task_table(report, models))
    if next(iter(models.values()))["answers"]:
        console.print(answer_table(report, models))
    for name, part in models.items():
        for task, scores in part["lm_eval"].items():
            print(f"{name}, {task}: {', '.join(f'{metric} {value:.3f}' for metric, value in scores.items())}")
    for name, part in report["differences"].items():
        cells = [f"{task} {d['difference']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" for task, d in part.items()]
        print(f"{name}, main scores with 95 % intervals: {'; '.join(cells)}")
        if not report["matched_steps"]:
            print(f"Note: {UNMATCHED}")
    for task, counts in report["rows"].items():
        if any(counts.values()):
            found = f"{counts['repeated']} rows repeat another one, {counts['contradicting']} do so with another label"
            print(f"Note: {task}: {found}. Errors count a text once")
    for name, part in models.items():
        for task, shares in part.get("routing", {}).items():
            print(f"{name}, {task}, share of the gate: {', '.join(f'{role} {x:.0%}' for role, x in shares.items())}")


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw macro-F1 of every task, with the majority class as a line, and ROUGE-L of every role's answers."""
    models, roles = report["models"], list(next(iter(report["models"].values()))["answers"])
    titles = [task["title"] for task in report["tasks"]] + [f"answers, {role}" for role in roles]
    figure, axes = plt.subplots(figsize=(max(9, 1.8 * len(titles)), 4), layout="constrained")
    width = 0.8 / len(models)
    for position, (name, part) in enumerate(models.items()):
        left = [place + (position - (len(models) - 1) / 2) * width for place in range(len(titles))]
        bars = [(own["macro_f1"], own["macro_f1_stderr"]) for own in part["tasks"].values()]
        bars += [(own["rouge_l"], own["rouge_l_stderr"]) for own in part["answers"].values()]
        heights, errors = zip(*bars, strict=True)
        axes.bar(left, heights, width * 0.92, yerr=errors, label=name, error_kw={"elinewidth": 1})
    for position, own in enumerate(report["majority"].values()):
        label = None if position else "majority class"
        axes.hlines(own["macro_f1"], position - 0.45, position + 0.45, "black", "dashed", linewidth=1, label=label)
    axes.set_xticks(range(len(titles)), titles)
    what = " and ".join(["macro-F1"] * bool(report["tasks"]) + ["ROUGE-L of answers"] * bool(roles))
    axes.set(ylabel=f"{what}, ± standard error", ylim=(0, 1), title="The models of this run on held-out rows")
    axes.legend(ncols=5, fontsize="small", loc="upper center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--data_dir", type=Path, help="data directory (default: RUN_DIR/data)")
    parser.add_argument("--base", help="dense base: Hub id or folder (default: RUN_DIR/base)")
    parser.add_argument("--models", nargs="+", default=MODELS, help="base, or folders of the run")
    parser.add_argument("--tasks", nargs="+", help="of the data directory (default: all)")
    parser.add_argument("--split", choices=("test", "valid"), default="test")
    parser.add_argument("--limit", type=int, help="rows per task (default: all)")
    parser.add_argument("--chats", type=int, default=16, help="held-out conversations to answer per role; 0: none")
    parser.add_argument("--lm_eval_tasks", nargs="+", default=[], help="other tasks that lm-eval knows")
    parser.add_argument("--lm_eval_path", type=Path, help="folder with task files of those")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=has_bf16_units(),
                        help="score labels and given answers in bfloat16 (default: where this CPU has units for it)")  # fmt: skip
    parser.add_argument("--name", default="evaluation", help="writes RUN_DIR/reports/NAME.json and NAME.png")
    args = parser.parse_args()
    check_number("--limit", args.limit, least=2)  # a standard error needs two rows
    check_number("--chats", args.chats, least=0)

    use_available_cores()
    data, target = args.data_dir or args.run_dir / "data", args.run_dir / "reports" / f"{args.name}.json"
    tasks = tasks_of(data, args.tasks)
    leaks.check_data_dir(data)
    rows = {name: rows_to_score(data, task, args.split, args.limit) for name, task in tasks.items()}
    talkers = chat_roles(data, heldout=True) if args.chats else []
    chats = {role: evenly_spread(read_chats(data, role, heldout=True), args.chats) for role in talkers}
    if not tasks and not chats:
        raise InputError(f"{data} has nothing to evaluate: no tasks/TASK_test.jsonl and no chats/ROLE_heldout.jsonl.")
    manager = task_manager(args.lm_eval_tasks, args.lm_eval_path) if args.lm_eval_tasks else None
    folders = {name: args.run_dir / name for name in args.models}
    if "base" in folders:
        folders["base"] = local_folder(args.base or str(args.run_dir / "base"))
    for folder in (folder for name, folder in folders.items() if name != "base"):
        runs.require(
            folder,
            "scripts/merge_moe.py or recipes/instruct_tune.py, as the name says. Or leave it out, with --models",
        )
    if args.split == "valid":
        check_valid_unseen(args.run_dir, folders, data, tasks, local_folder(args.base or str(args.run_dir / "base")))
    inputs = {
        "models": {name: fingerprint(folder) for name, folder in folders.items()},
        "tasks": {task: file_hash(scored_file(data, task, args.split)) for task in tasks},
        "asked": prompting(tasks),
        "split": args.split,
        "limit": args.limit,
        "bf16": args.bf16,
    }
    if chats:
        files_of = {role: file_hash(chat_file(data, role, heldout=True)) for role in talkers}
        inputs["chats"] = {"files": files_of, "per_role": args.chats}
    if manager:
        inputs["lm_eval_tasks"] = what_is_read(manager, args.lm_eval_tasks, args.lm_eval_path)
    work = runs.begin(target, "evaluate", inputs)
    if work is None:
        return

    for name, folder in folders.items():
        part = work / f"{name}.json"
        if part.exists():
            print(f"{name}: scores are complete: skipped")
            continue
        print(f"Evaluating {name}")
        try:
            found = evaluate_model(folder, tasks, rows, chats, bf16=args.bf16)
            found["lm_eval"] = run_tasks(folder, manager, args.lm_eval_tasks, args.limit) if manager else {}
            write_json(part, found)
        except NotFiniteError as error:
            raise NotFiniteError(f"{folder}: {error}") from None

    models = {name: read_json(work / f"{name}.json") for name in folders}
    report = {
        "tasks": about_tasks(tasks)["tasks"],
        "majority": majority(tasks, rows),
        "rows": {task: leaks.repetitions(own) for task, own in rows.items()},
        "models": models,
        "differences": difference(tasks, models, rows, TEAM, DENSE) if tasks else {},
        "matched_steps": DENSE in folders and "matched_steps" in runs.read_record(folders[DENSE]).get("results", {}),
    }
    plot(report, target.with_suffix(".png"))
    runs.finish_report(target, report)
    print_report(report)
    print(f"Written to {target} and {target.with_suffix('.png')}")


if __name__ == "__main__":
    run(main)
