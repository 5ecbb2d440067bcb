# SPDX-License-Identifier: Apache-2.0
"""What a run has come to, on one screen and as one page: tasks, answers, routing, three questions to the team, cost.

    python scripts/summarize.py --run_dir outputs/quickstart

Reads the run's reports and asks the team three questions. Writes RUN_DIR/reports/summary.html, with the plots in it.
"""

import argparse
import base64
import json
from html import escape
from pathlib import Path
from typing import Any

from finteam_experts.threads import use_available_cores  # before torch

from accelerate import PartialState
from rich.table import Table
from rich.text import Text

from finteam_experts import runs
from finteam_experts.errors import InputError, run
from finteam_experts.evaluation.answers import MAX_NEW_TOKENS, greedy_answers
from finteam_experts.evaluation.routing import expert_shares
from finteam_experts.evaluation.tables import answer_table, task_table
from finteam_experts.files import read_json, write_text
from finteam_experts.fingerprints import is_model
from finteam_experts.models import as_chats, load_model, load_tokenizer
from finteam_experts.screen import screen

TEAM, DENSE = "moe-instruct", "dense-instruct"
QUESTIONS = (
    "The spread between BAA and AAA bonds widened to 1.40 points from 1.10 the month before.\n\nDid lenders become more careful?",
    "Operating profit of Ostrand Paper fell to EUR 4.1 mn from 9.8 mn after restructuring costs.\n\nWhat do investors ask?",
    "Daily returns in %: 0.42, -1.17, 0.08, 2.31, -0.64.\n\nHow volatile is this share?",
)
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>body {{ font-family: system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ overflow-x: auto; line-height: 1.25; }} img {{ max-width: 100%; height: auto; }}</style>
<h1>{title}</h1>{tables}{images}</html>
"""


def read_report(run_dir: Path, name: str, script: str, model: str) -> dict[str, Any]:
    """A report of the run; `InputError` unless it is there, and of the `model` that is there now."""
    path, command = run_dir / "reports" / f"{name}.json", f"python scripts/{script} --run_dir {run_dir}"
    if not path.is_file():
        raise InputError(f"{path} does not exist. Make it: {command}")
    report = read_json(path)
    if not is_model(run_dir / model, report["inputs"]["models"].get(model)):
        raise InputError(f"{path} is not of the {model} that is there now. Delete it and make it again: {command}")
    return report


def ask_team(folder: Path) -> list[tuple[str, str, dict[str, float]]]:
    """Each of `QUESTIONS`, the team's answer, and each analyst's share of the gate weight over question and answer."""
    form = as_chats(load_tokenizer(folder), folder)
    model = load_model(folder).to(PartialState().device)
    titles = [member["title"] for member in runs.read_record(folder)["team"]]
    answers = greedy_answers(model, form, list(QUESTIONS), max_new_tokens=MAX_NEW_TOKENS)
    exchanges = form.exchanges(
        [(question, answer or "-") for question, answer in zip(QUESTIONS, answers, strict=True)]
    )
    shares = expert_shares(model, form.tokenizer, [own.ids for own in exchanges], [own.spans for own in exchanges])
    shared = (dict(zip(titles, own, strict=True)) for own in shares.mean(0).tolist())
    return list(zip(QUESTIONS, answers, shared, strict=True))


def routing_table(routing: dict[str, Any]) -> Table:
    """Who gets whose tokens, for each kind of held-out text, with the last router of the report."""
    *_, shown = (name for name in routing["gates"] if ", " not in name)
    table = Table("held-out text", "of", title="Whose tokens each analyst gets (own analyst in bold)")
    for role in routing["roles"]:
        table.add_column(role, justify="right")
    for name, part in routing["gates"].items():
        router, _, what = name.partition(", ")
        if router != shown:
            continue
        for place, row in enumerate(part["confusion"]):
            cells = [Text(f"{share:.0%}", "bold" if place == column else "") for column, share in enumerate(row)]
            table.add_row(what or "corpus" if place == 0 else "", routing["roles"][place], *cells)
        table.add_section()
    return table


def question_table(asked: list[tuple[str, str, dict[str, float]]]) -> Table:
    table = Table("question", "the team's answer", "who gave it", title="Three questions to the team", show_lines=True)
    for question, answer, shares in asked:
        named = ", ".join(f"{title} {share:.0%}" for title, share in sorted(shares.items(), key=lambda item: -item[1]))
        table.add_row(question, answer, named)
    return table


def cost_table(notes: Path) -> Table:
    """Minutes and peak memory of each step, from the run in which it took longest: later runs only skip what is complete."""
    steps: dict[str, dict[str, Any]] = {}
    for note in map(json.loads, notes.read_text().splitlines()):
        steps[note["title"]] = max(steps.get(note["title"], note), note, key=lambda entry: entry["seconds"])
    table = Table("step", title="Time and peak memory")
    for column in ("minutes", "peak GiB"):
        table.add_column(column, justify="right")
    for title, step in steps.items():
        table.add_row(title, f"{step['seconds'] / 60:.1f}", f"{step['peak_gib']:.1f}")
    table.add_section()
    minutes = sum(step["seconds"] for step in steps.values()) / 60
    table.add_row("all", f"{minutes:.1f}", f"{max(step['peak_gib'] for step in steps.values()):.1f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"))
    args = parser.parse_args()
    reports = args.run_dir / "reports"
    runs.require(args.run_dir / TEAM, "recipes/instruct_tune.py")
    evaluation = read_report(args.run_dir, "evaluation", "evaluate.py", TEAM)
    routing = read_report(args.run_dir, "routing", "report_routing.py", "moe")

    use_available_cores()
    models = [name for name in ("base", "trunk", DENSE, TEAM) if name in evaluation["models"]]
    asked = ask_team(args.run_dir / TEAM)
    console = screen(140, record=True)
    if evaluation["tasks"]:
        console.print(task_table(evaluation, models))
    if evaluation["models"][TEAM]["answers"]:
        console.print(answer_table(evaluation, models))
    console.print(routing_table(routing))
    console.print(question_table(asked))
    if (notes := reports / "quickstart.jsonl").is_file():
        console.print(cost_table(notes))
    for name, part in evaluation["differences"].items():
        average = part.get("average")
        if average:
            found = f"average main score {average['difference']:+.3f} [{average['low']:+.3f}, {average['high']:+.3f}]"
            fair = (
                ""
                if evaluation["matched_steps"]
                else ". Not fair: the dense model took another number of steps (match_steps)"
            )
            console.print(f"{name}: {found} (95 % interval){fair}")

    images = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode((reports / f"{name}.png").read_bytes()).decode()}">'
        for name in ("evaluation", "routing")
    )
    tables = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    page = reports / "summary.html"
    write_text(page, PAGE.format(title=escape(f"FinTeamExperts: {args.run_dir.name}"), tables=tables, images=images))
    print(f"The same with plots: {page}")


if __name__ == "__main__":
    run(main)
