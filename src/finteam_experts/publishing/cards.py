# SPDX-License-Identifier: Apache-2.0
"""Model cards from a run: the Markdown in templates/, with figures from the run's own reports."""

import importlib.metadata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from finteam_experts import runs
from finteam_experts.chats import ChatFormat
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


@dataclass(frozen=True)
class Cards:
    """The model cards of a run, and what is read once for all of them."""

    run: PublishedRun
    licence: str
    version: str
    licences: dict[str, str]  # of the data, by source

    @cached_property
    def report(self) -> dict[str, Any] | None:
        """The run's evaluation on test rows, if there is one."""
        report = self._report("evaluation", "moe-instruct")
        if report and report["inputs"]["split"] != "test":
            raise InputError(
                "reports/evaluation.json has scores on validation rows. Evaluate on test rows: --split test."
            )
        return report

    def _report(self, name: str, part: str) -> dict[str, Any] | None:
        """A report of the run, if there is one; `InputError` if it is of another model than the one in `part` now."""
        path = self.run.run_dir / "reports" / f"{name}.json"
        if not path.is_file():
            return None
        report = read_json(path)
        if not is_model(self.run.run_dir / part, report["inputs"]["models"].get(part)):
            raise InputError(f"{path} is of another {part} than the one there now. Delete it and make it again.")
        return report

    @cached_property
    def tasks(self) -> list[Task]:
        """The tasks that the team was tuned on, those of its report first."""
        tuned = runs.read_record(self.run.run_dir / "moe-instruct").get("tasks", [])
        return list(tasks_from((self.report or {}).get("tasks", tuned)).values())

    @cached_property
    def chat_format(self) -> ChatFormat:
        """How the models of the run write conversations: all of them as the base does."""
        folder = self.run.run_dir / "moe-instruct"
        return as_chats(load_tokenizer(folder), folder)

    def snippet(self, repo: Repo) -> str:
        """The code of the card, which a reader copies and runs: it asks as the model was tuned."""
        adapter = repo.card == "adapter"
        question = (role_of(repo.part.split("/")[1]).question if adapter else None) or QUESTION
        return _ENVIRONMENT.get_template("snippet.py.jinja").render(
            adapter=adapter, name=repo.id, dense=self.run.id_of(self.run.dense), messages=self.chat_format.messages(question),
            thinks="enable_thinking" in str(self.chat_format.tokenizer.chat_template),
        )  # fmt: skip

    def metadata(self, repo: Repo) -> ModelCardData:
        """The card's metadata, in the Hub's terms."""
        run, is_moe = self.run, repo.card.startswith("moe")
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
            ["moe", "mixture-of-experts", family_in(run.run_dir / repo.part).moe_type, "mergekit"] if is_moe else []
        )
        return ModelCardData(
            language="en", license=self.licence, library_name="peft" if repo.card == "adapter" else "transformers",
            pipeline_tag="text-generation", tags=tags, base_model=base_model, base_model_relation=relation,
            datasets=[source for source in self.licences if "/" in source] or None, model_name=repo.id.split("/")[1],
            eval_results=self._eval_results() if repo.part == "moe-instruct" and self.report else None,
        )  # fmt: skip

    def _eval_results(self) -> list[EvalResult]:
        titles = {task.name: task.title for task in self.tasks}
        return [
            EvalResult(
                task_type="text-classification", dataset_type=task, dataset_name=f"{titles[task]} ({result['n']} test rows)",
                metric_type=metric, metric_name=ours.replace("_", " "), metric_value=round(result[ours], 4),
            )
            for task, result in self.report["models"]["moe-instruct"]["tasks"].items()
            for metric, ours in SCORES.items()
        ]  # fmt: skip

    def render(self, repo: Repo, tried: dict[str, Any]) -> bytes:
        """The README.md of a model's repository. `tried` is what the card's snippet printed and took."""
        run, adapter = self.run, repo.card == "adapter"
        folder = run.run_dir / repo.part
        record, figure = runs.read_record(folder), f"{FIGURES.get(repo.part)}.png"
        settings = record["inputs"].get("settings")
        body = _ENVIRONMENT.get_template(f"{repo.card}.md").render(
            run=run, repo=repo, record=record, results=record.get("results", {}), tasks=self.tasks, report=self.report,
            adapter=read_json(folder / "adapter_config.json") if adapter else None,
            learned=learned_from(record) if adapter else None,
            role=role_of(repo.part.split("/")[1]) if adapter else None,
            family=family_in(folder) if repo.card.startswith("moe") else None,
            team=[role_of(member["name"], place) for place, member in enumerate(run.team)],
            parameters=None if adapter else parameter_counts(empty_model(read_config(folder))),
            routing=self._report("routing", "moe") if repo.card == "moe" else None,
            figure=figure if figure in repo.files else None,
            snippet=self.snippet(repo), tried=tried,
            licence=self.licence, licences=self.licences, built_with_llama=self.licence.startswith("llama3"),
            version=self.version, versions={name: importlib.metadata.version(name) for name in LIBRARIES},
            seed=None if settings is None else settings.get("seed", 42),
        )  # fmt: skip
        card = f"---\n{self.metadata(repo).to_yaml()}\n---\n\n{body}"
        ModelCard(card)  # raises if its metadata are not what the Hub reads
        return card.encode()


def learned_from(record: dict[str, Any]) -> str:
    """The rows that an expert was trained on, in words, with the shares of those that its data had."""
    shares, sources = record["inputs"]["settings"].get("learn_from"), record["inputs"]["corpus"]
    if not shares:
        return "passages of its field"
    found = {part: share for part, share in shares.items() if sources.get(part)}
    total = sum(found.values())
    return ", ".join(f"{PARTS[part]} ({share / total:.0%})" for part, share in found.items())
