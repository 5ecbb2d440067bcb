# SPDX-License-Identifier: Apache-2.0
"""Make, tune and score every model of a comparison, one after the other; `experiments/report.py` makes the tables.

    python experiments/compare.py --config experiments/own_tasks/comparison.yaml --data_dir DIR
    python experiments/compare.py --config experiments/own_tasks/comparison.yaml --data_dir DIR --only dense-instruct-3

Each finished run leaves a file in the folder `results` beside the YAML, and is not made again while that is there. A run
that was interrupted goes on from its last checkpoint. `--only` also takes ablations, which are scored on validation rows.
"""

import argparse
import hashlib
import json
import shutil
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate import PartialState

from comparison import REPOSITORY, Comparison, Model, read_comparison
from finteam_experts import runs
from finteam_experts.data.files import corpus_file, evenly_spread, read_corpus, task_file, tasks_of
from finteam_experts.data.tasks import prompting, tasks_from
from finteam_experts.errors import InputError, nearest, run
from finteam_experts.evaluation.heldout import heldout_loss
from finteam_experts.families import is_moe
from finteam_experts.files import file_hash, read_json, write_json
from finteam_experts.models import empty_model, load_model, load_tokenizer, parameter_counts, read_config
from steps import InitialModels, options_of, step


def perplexities(comparison: Comparison, initial: InitialModels, names: list[str]) -> None:
    """Held-out loss of each initial model on every role's corpus, in nats per token: the experts x corpora matrix."""
    path = comparison.results / "perplexity.json"
    known = read_json(path) if path.exists() else {}
    for name in names:
        if name in known:
            continue
        folder, loss = initial.make(name), {}
        model, tokenizer = load_model(folder).to(PartialState().device), load_tokenizer(folder)
        for role in initial.roles:
            passages = evenly_spread(read_corpus(initial.data, role, heldout=True), comparison.heldout_passages)
            loss[role] = heldout_loss(model, tokenizer, passages, max_tokens=comparison.heldout_tokens)
        known[name] = {"nats": loss, "tokens": initial.tokens(name)}
        write_json(path, known)
        print(f"{name}: held-out nats per token {', '.join(f'{role} {value:.3f}' for role, value in loss.items())}")


def tune(
    initial: InitialModels, model: Model, seed: int, start: Path, folder: Path
) -> tuple[Path, dict[str, Any] | None]:
    """The model below `folder`, tuned from `start` if it is to be, and what its tuning took."""
    dense = not is_moe(read_config(start))
    place = _linked(folder / ("base" if dense else "moe"), start)  # steps expect it inside their run folder
    if not model.recipe:
        return place, None
    if model.experts:
        tuned, tuning = tune_experts(initial, model, seed, start, folder)
    else:
        tuned = folder / ("dense-instruct" if dense else "moe-instruct")
        arguments = ("--base", start) if dense else ()
        tuning = _summary([_launch(initial, model, seed, folder, tuned, *arguments)])
    if model.router:
        where = ("--run_dir", folder, "--data_dir", initial.data, "--model", tuned.name)
        step("scripts/fit_router.py", *where, *options_of(model.router))
    return tuned, tuning


def tune_experts(
    initial: InitialModels, model: Model, seed: int, start: Path, folder: Path
) -> tuple[Path, dict[str, Any]]:
    """The model joined or averaged from experts that were each tuned by itself, and what their tuning took together.

    The tuned experts stay, for other models that are made of them.
    """
    made_of = json.dumps([model.initial_model.split("/")[0], model.recipe, model.overrides, seed])
    name = f"experts-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}-seed{seed}"
    shared = initial.comparison.run_dir / "runs" / name
    shared.mkdir(parents=True, exist_ok=True)
    _linked(shared / "experts", start.parent / "experts")
    parts = []
    for role in initial.roles:
        alone = ("--start_from", "expert", "--role", role)
        parts.append(_launch(initial, model, seed, shared, shared / "experts-instruct" / role, *alone))
    for part in ("experts", "experts-instruct"):
        _linked(folder / part, shared / part)
    averaged = model.experts == "averaged"
    step("scripts/join_experts.py", "--run_dir", folder, *(["--average"] if averaged else []))
    return folder / ("average-instruct" if averaged else "moe-instruct"), _summary(parts)


def _linked(place: Path, target: Path) -> Path:
    place.unlink(missing_ok=True)
    place.symlink_to(target.absolute(), target_is_directory=True)
    return place


def _launch(
    initial: InitialModels, model: Model, seed: int, run_dir: Path, target: Path, *arguments: object
) -> dict[str, Any]:
    """Tune `target`, a folder of `run_dir`: its record's results, with the `seconds` that it took if they are known."""
    began, fresh = time.monotonic(), not target.exists() and not runs.work_folder(target).exists()
    options = ("--run_dir", run_dir, "--seed", seed, *arguments)
    initial.launch("recipes/instruct_tune.py", model.recipe, *options, overrides=model.overrides)
    return {**runs.read_record(target)["results"], "seconds": round(time.monotonic() - began) if fresh else None}


def _summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What one or several trainings took together; losses are their mean."""
    later = [[e["loss"] for e in part["log"] if e["step"] > part["steps"] / 2] for part in parts]
    seconds = [part["seconds"] for part in parts]
    return {
        "trainable_parameters": sum(part["trainable_parameters"] for part in parts),
        "rows_seen": parts[0]["rows_seen"],
        "train_tokens": sum(part["train_tokens"] for part in parts),
        "steps": parts[0]["steps"],
        "seconds": None if None in seconds else sum(seconds),
        "final_loss": mean(part["log"][-1]["loss"] for part in parts),
        "second_half_loss": mean(map(mean, later)),  # in a first epoch, of rows not seen before
        "routing": parts[0]["routing"],
    }


def score(initial: InitialModels, split: str, start: Path, folder: Path, model: Path) -> dict[str, Any]:
    """The model's scores on a sample of that split, with one digit per prediction: the label's place in the task's list."""
    comparison = initial.comparison
    limit = comparison.limit if split == "test" else comparison.validation_limit
    options = ["--limit", limit] if limit else []
    options += ["--bf16" if comparison.overrides.get("bf16") else "--no-bf16"]
    where = ("--run_dir", folder, "--data_dir", initial.data, "--base", start)
    step("scripts/evaluate.py", *where, "--models", model.name, "--split", split, "--name", split, *options)
    report = read_json(folder / "reports" / f"{split}.json")
    scored, tasks = report["models"][model.name], tasks_from(report["tasks"])
    for task, result in scored["tasks"].items():
        result["predictions"] = "".join(str(tasks[task].labels.index(label)) for label in result["predictions"])
    return {"limit": limit, "files": report["inputs"]["tasks"], **scored}


def run_model(initial: InitialModels, model: Model, seed: int) -> None:
    """Tune and score one model with one seed, and write its result file.

    Ablations are chosen on validation rows and not scored on test rows; what they are compared with is scored on both.
    """
    comparison, start = initial.comparison, initial.make(model.initial_model)
    folder = comparison.run_dir / "runs" / f"{model.name}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    tuned, tuning = tune(initial, model, seed, start, folder)
    is_ablation, main_runs = model in comparison.ablations, (comparison.team, *comparison.baselines)
    splits = ["valid"] if is_ablation or (seed == model.seeds[0] and model.name in main_runs) else []
    splits += [] if is_ablation else ["test"]
    threads = f"CPU, {torch.get_num_threads()} threads"
    result = {
        **made_from(initial, model),
        **model.model_dump(exclude={"seeds", "keep"}),
        "seed": seed,
        "parameters": parameter_counts(empty_model(read_config(tuned))),
        "tokens_before_tuning": initial.tokens(model.initial_model),
        "tuning": tuning,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else threads,
        "torch": torch.__version__,
        **{split: score(initial, split, start, folder, tuned) for split in splits},
    }
    path = comparison.result_file(model, seed)
    write_json(path, result)
    print(f"Written to {path}")
    if model.recipe and not model.keep:
        shutil.rmtree(tuned)


def made_from(initial: InitialModels, model: Model) -> dict[str, Any]:
    """What a model's results follow from, for its result file."""
    comparison, data = initial.comparison, initial.data
    team = comparison.teams.get(model.initial_model.split("/")[0])
    return {
        **model.model_dump(exclude={"name", "title", "seeds", "keep"}),
        "recipe_file": model.recipe and file_hash(REPOSITORY / model.recipe),
        "expert_recipe_file": team and file_hash(REPOSITORY / comparison.expert_recipe),
        "team": team and team.model_dump(),
        "common_overrides": comparison.overrides,
        "asked": prompting(tasks_of(data)),
        "train_files": {task: file_hash(task_file(data, task, "train")) for task in tasks_of(data)},
        "corpora": {role: file_hash(corpus_file(data, role)) for role in initial.roles},
    }


def check_result(path: Path, now: dict[str, Any]) -> None:
    """Raise `InputError` if a result file was made from something else, as far as it says."""
    recorded = read_json(path)
    known = {key: recorded[key] for key in now if key in recorded}
    advice = "Delete it to run it again, or undo the change."
    runs.check_same_inputs(path, known, {key: now[key] for key in known}, advice)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the comparison's YAML")
    parser.add_argument("--data_dir", type=Path, required=True, help="data directory")
    parser.add_argument("--base", help="dense base: Hub id or folder (default: the quickstart's)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models or ablations (default: all models)")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these of their seeds")
    args = parser.parse_args()

    comparison = read_comparison(args.config)
    known = {model.name: model for model in (*comparison.models, *comparison.ablations)}
    for name in args.only or ():
        if name not in known:
            raise InputError(f"--only {name}: {args.config} has no such model.{nearest(name, known)}")
    chosen = [known[name] for name in args.only] if args.only else list(comparison.models)
    initial = InitialModels(comparison, args.data_dir, args.base)

    for model in chosen:
        for seed in args.seeds or model.seeds:
            if seed not in model.seeds:
                continue
            if (done := comparison.result_file(model, seed)).exists():
                check_result(done, made_from(initial, model))
                print(f"{done} exists: skipped")
            else:
                run_model(initial, model, seed)
    perplexities(comparison, initial, sorted({model.initial_model for model in chosen}))


if __name__ == "__main__":
    run(main)
