# SPDX-License-Identifier: Apache-2.0
"""Model cards from a run: the Markdown in templates/, with figures from the run's own reports."""

import importlib.metadata
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from finteam_experts import runs
from finteam_experts.data.tasks import Task, tasks_from
from finteam_experts.errors import InputError
from finteam_experts.families import family_in
from finteam_experts.files import read_json
from finteam_experts.fingerprints import is_model
from finteam_experts.models import as_chats, empty_model, load_tokenizer, parameter_counts, read_config
from finteam_experts.publishing.repositories import FIGURES, PublishedRun, Repo
from finteam_experts.roles import role_of

SCORES = {"accuracy": "accuracy", "f1": "macro_f1", "matthews_correlation": "mcc"}  # the Hub's names and ours
ORIGINAL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # of what scripts/make_base.py unpacks
QUESTION = "Operating profit of Ostrand Paper fell to EUR 4.1 mn from 9.8 mn after restructuring costs.\n\nWhat do investors ask?"
PARTS = {  # what an expert may learn from, in words
    "corpus": "passages of its field", "chats": "conversations about it", "general": "everyday conversations",
    "tasks": "rows of its tasks",
}  # fmt: skip
LIBRARIES = ("transformers", "trl", "peft", "mergekit", "torch")
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
_ENVIRONMENT.filters["cell"] = lambda text: " ".join(text.split()).replace("|", r"\|")  # of a table


def snippet(run: PublishedRun, repo: Repo) -> str:
    """The code of the card, which a reader copies and runs: it asks as the model was tuned."""
    own = role_of(repo.part.split("/")[1]).question if repo.card == "adapter" else None
    folder = run.folder_of(run.dense)
    form = as_chats(load_tokenizer(folder), folder)
    return _ENVIRONMENT.get_template("snippet.py.jinja").render(
        adapter=repo.card == "adapter", name=repo.id, dense=run.id_of(run.dense), messages=form.messages(own or QUESTION),
        thinks="enable_thinking" in str(form.tokenizer.chat_template),
    )  # fmt: skip


def evaluation(run: PublishedRun) -> dict[str, Any] | None:
    """The run's evaluation report, if there is one; `InputError` if it is of another model than the one there now."""
    path = run.run_dir / "reports" / "evaluation.json"
    if not path.is_file():
        return None
    report = read_json(path)
    if not is_model(run.run_dir / "moe-instruct", report["inputs"]["models"].get("moe-instruct")):
        raise InputError(f"{path} is of another moe-instruct. Evaluate this one: scripts/evaluate.py")
    return report


def tasks_of_run(run: PublishedRun) -> list[Task]:
    """The tasks that the team was tuned on, those of its report first."""
    tuned = runs.read_record(run.run_dir / "moe-instruct").get("tasks", [])
    scored = (evaluation(run) or {}).get("tasks", tuned)
    return list(tasks_from(scored).values())


def metadata(run: PublishedRun, repo: Repo, licence: str, datasets: list[str]) -> ModelCardData:
    """The card's metadata, in the Hub's terms."""
    adapters = [run.id_of(f"adapters/{role}") for role in run.roles]
    base_model, relation = {
        "adapter": (run.id_of(run.dense), "adapter"),
        "moe": (adapters or [run.id_of(run.dense)], "merge"),
        "moe-instruct": (run.id_of("moe"), "finetune"),
        "base": (ORIGINAL, "quantized") if repo.part == "base" else (run.id_of("base"), "finetune"),
    }[repo.card]
    tags = ["finance", "finteam-experts"]
    tags += ["lora", "trl", "sft"] if repo.card == "adapter" else []
    tags += (
        ["moe", "mixture-of-experts", family_in(run.run_dir / repo.part).moe_type, "mergekit"]
        if repo.card.startswith("moe")
        else []
    )
    return ModelCardData(
        language="en", license=licence, library_name="peft" if repo.card == "adapter" else "transformers",
        pipeline_tag="text-generation", tags=tags, base_model=base_model, base_model_relation=relation,
        datasets=datasets or None, model_name=repo.id.split("/")[1],
        eval_results=_eval_results(run) if repo.part == "moe-instruct" else None,
    )  # fmt: skip


def _eval_results(run: PublishedRun) -> list[EvalResult] | None:
    report = evaluation(run)
    if not report:
        return None
    titles = {task.name: task.title for task in tasks_of_run(run)}
    return [
        EvalResult(
            task_type="text-classification", dataset_type=task, dataset_name=f"{titles[task]} ({result['n']} test rows)",
            metric_type=metric, metric_name=ours.replace("_", " "), metric_value=round(result[ours], 4),
        )
        for task, result in report["models"]["moe-instruct"]["tasks"].items()
        for metric, ours in SCORES.items()
    ]  # fmt: skip


def learned_from(record: dict[str, Any]) -> str:
    """The rows that an expert was trained on, in words, with the shares of those that its data had."""
    shares, sources = record["inputs"]["settings"].get("learn_from"), record["inputs"]["corpus"]
    if not shares:
        return "passages of its field"
    found = {
        part: share
        for part, share in shares.items()
        if sources.get(part) or (part in ("corpus", "chats") and "datasets" in sources)
    }
    total = sum(found.values())
    return ", ".join(f"{PARTS[part]} ({share / total:.0%})" for part, share in found.items())


def render(
    run: PublishedRun, repo: Repo, licence: str, version: str, licences: dict[str, str], tried: dict[str, Any]
) -> bytes:
    """The README.md of a model's repository. `tried` is what the card's snippet printed and took, where it was run."""
    folder, routing_file = run.run_dir / repo.part, run.run_dir / "reports" / "routing.json"
    record, adapter = runs.read_record(folder), repo.card == "adapter"
    figure, settings = f"{FIGURES.get(repo.part)}.png", record["inputs"].get("settings")
    data = metadata(run, repo, licence, [source for source in licences if "/" in source])
    body = _ENVIRONMENT.get_template(f"{repo.card}.md").render(
        run=run,
        repo=repo,
        record=record,
        results=record.get("results", {}),
        adapter=read_json(folder / "adapter_config.json") if adapter else None,
        learned=learned_from(record) if adapter else None,
        role=role_of(repo.part.split("/")[1]) if adapter else None,
        family=family_in(folder) if repo.card.startswith("moe") else None,
        team=[role_of(name, place) for place, name in enumerate(member["name"] for member in run.team)],
        tasks=tasks_of_run(run),
        snippet=snippet(run, repo),
        tried=tried,
        parameters=None if adapter else parameter_counts(empty_model(read_config(folder))),
        report=evaluation(run),
        routing=read_json(routing_file) if routing_file.is_file() else None,
        figure=figure if figure in repo.files else None,
        licence=licence,
        licences=licences,
        version=version,
        versions={name: importlib.metadata.version(name) for name in LIBRARIES},
        seed=None if settings is None else settings.get("seed", 42),
        built_with_llama=licence.startswith("llama3"),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}".encode()
