# SPDX-License-Identifier: Apache-2.0
"""Model cards from a run: templates in scripts/cards/, figures from the run's own reports, snippets that were run."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from finteam_experts import runs
from finteam_experts.errors import InputError, read_json
from finteam_experts.models import (
    ADAPTER_FILE,
    as_chats,
    fingerprint,
    is_model,
    load_tokenizer,
    parameter_counts,
)
from finteam_experts.publishing import FIGURES, REPOSITORY, Release, Repo
from finteam_experts.roles import role_of
from finteam_experts.tasks import TASKS

TEMPLATES = REPOSITORY / "scripts" / "cards"
SCORES = {"accuracy": "accuracy", "f1": "macro_f1", "matthews_correlation": "mcc"}  # the Hub's names and ours
ORIGINAL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # of what scripts/make_base.py unpacks
QUESTIONS = {
    "macro": "Why do bond yields rise when a central bank fights inflation?",
    "quant": "Daily returns in %: 0.42, -1.17, 0.08, 2.31, -0.64. How volatile is this share?",
}
QUESTION = (
    "Net sales of Kelvik Foods rose to EUR 235 mn from 191 mn.\n\n"
    "What does this mean for the company? Answer negative, neutral or positive."
)
PEAK = "\nimport resource\nprint()\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
LIBRARIES = ("transformers", "trl", "peft", "mergekit", "torch")
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    keep_trailing_newline=True,
)  # fmt: skip


def snippet(release: Release, repo: Repo) -> str:
    """The code of the card, which a reader copies and runs: it asks as the model was tuned."""
    question = QUESTION if repo.card != "adapter" else QUESTIONS.get(repo.part.split("/")[1], QUESTION)
    folder = release.folder_of(release.dense)
    form = as_chats(load_tokenizer(folder), folder)
    return _ENVIRONMENT.get_template("snippet.py.jinja").render(
        adapter=repo.card == "adapter",
        name=repo.id,
        dense=release.id_of(release.dense),
        messages=form.messages(question),
        thinks="enable_thinking" in str(form.tokenizer.chat_template),
    )


def tried(release: Release, repo: Repo) -> dict[str, Any]:
    """What the card's snippet printed and took when it was run on the run's own folders; kept until these change."""
    folder, dense = release.run_dir / repo.part, release.folder_of(release.dense)
    known_file = release.run_dir / "reports" / "snippets.json"
    known = json.loads(known_file.read_text()) if known_file.exists() else {}
    code = snippet(release, repo)
    model = runs.file_hash(folder / ADAPTER_FILE) if repo.card == "adapter" else fingerprint(folder)
    inputs = {"code": code, "model": model}
    if known.get(repo.part, {}).get("inputs") != inputs:
        names = {repo.id: folder, release.id_of(release.dense): dense}
        for name, path in names.items():
            code = code.replace(json.dumps(name), json.dumps(str(path)))
        print(f"Running the snippet of {repo.id}")
        began = time.monotonic()
        # an absent Hub must not slow it, and the card's figures are of the model alone
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        ended = subprocess.run(
            [sys.executable, "-c", code + PEAK], capture_output=True, text=True, env=environment, check=False
        )
        if ended.returncode:
            raise InputError(f"the card's snippet fails on {folder}:\n{ended.stderr[-2000:]}")
        output, _, peak = ended.stdout.strip().rpartition("\n")
        known[repo.part] = {
            "inputs": inputs,
            "output": output.strip(),
            "seconds": round(time.monotonic() - began, 1),
            "peak_gib": round(int(peak) / (2**30 if sys.platform == "darwin" else 2**20), 1),  # bytes, KiB elsewhere
            "cores": os.cpu_count(),
        }
        runs.write_json(known_file, known)
    return known[repo.part]


def evaluation(release: Release) -> dict[str, Any] | None:
    """The run's evaluation report, if there is one and it is of the model that is there now."""
    path = release.run_dir / "reports" / "evaluation.json"
    if not path.is_file():
        return None
    report = read_json(path)
    if not is_model(release.run_dir / "moe-instruct", report["inputs"]["models"].get("moe-instruct")):
        raise InputError(f"{path} is of another moe-instruct. Evaluate this one: scripts/evaluate.py")
    return report


def metadata(release: Release, repo: Repo, licence: str, datasets: list[str]) -> ModelCardData:
    """The card's metadata, in the Hub's terms."""
    above = {
        "adapter": (release.id_of(release.dense), "adapter"),
        "moe": (
            [release.id_of(f"adapters/{role}") for role in release.roles] or [release.id_of(release.dense)],
            "merge",
        ),
        "moe-instruct": (release.id_of("moe"), "finetune"),
        "base": (ORIGINAL, "quantized") if repo.part == "base" else (release.id_of("base"), "finetune"),
    }[repo.card]
    tags = ["finance", "finteam-experts"]
    tags += ["lora", "trl", "sft"] if repo.card == "adapter" else []
    tags += ["moe", "mixture-of-experts", "mixtral", "mergekit"] if repo.card.startswith("moe") else []
    return ModelCardData(
        language="en",
        license=licence,
        library_name="peft" if repo.card == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        base_model=above[0],
        base_model_relation=above[1],
        datasets=datasets or None,
        model_name=repo.id.split("/")[1],
        eval_results=_eval_results(release) if repo.part == "moe-instruct" else None,
    )


def _eval_results(release: Release) -> list[EvalResult] | None:
    report = evaluation(release)
    if not report:
        return None
    return [
        EvalResult(
            task_type="text-classification",
            dataset_type=task,
            dataset_name=f"{TASKS[task].title} ({result['n']} test rows)",
            metric_type=metric,
            metric_name=ours.replace("_", " "),
            metric_value=round(result[ours], 4),
        )
        for task, result in report["models"]["moe-instruct"]["tasks"].items()
        for metric, ours in SCORES.items()
    ]


def render(release: Release, repo: Repo, licence: str, version: str, licences: dict[str, str]) -> bytes:
    """The README.md of a model's repository."""
    folder = release.run_dir / repo.part
    record = runs.read_record(folder)
    routing_file = release.run_dir / "reports" / "routing.json"
    data = metadata(release, repo, licence, [source for source in licences if "/" in source])
    body = _ENVIRONMENT.get_template(f"{repo.card}.md").render(
        release=release,
        repo=repo,
        record=record,
        results=record.get("results", {}),
        adapter=json.loads(repo.files["adapter_config.json"]) if repo.card == "adapter" else None,
        team=[role_of(name, place) for place, name in enumerate(member["name"] for member in release.team)],
        tasks=list(TASKS.values()),
        snippet=snippet(release, repo),
        tried=tried(release, repo),
        parameters=parameter_counts(folder) if repo.card != "adapter" else None,
        report=evaluation(release),
        routing=json.loads(routing_file.read_text()) if routing_file.is_file() else None,
        figure=f"{FIGURES.get(repo.part)}.png" if f"{FIGURES.get(repo.part)}.png" in repo.files else None,
        licence=licence,
        licences=licences,
        version=version,
        versions={name: importlib.metadata.version(name) for name in LIBRARIES},
        role=role_of(repo.part.split("/")[1]) if repo.card == "adapter" else None,
        seed=record["inputs"].get("settings", {}).get("seed", 42) if "settings" in record["inputs"] else None,
        built_with_llama=licence.startswith("llama3"),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}".encode()
