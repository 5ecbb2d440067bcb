# SPDX-License-Identifier: Apache-2.0
"""Make, tune and score every model of a comparison, one after the other; `scripts/report_results.py` makes the tables.

    python scripts/compare.py --config recipes/smollm2-135m/comparison.yaml --data_dir DIR
    python scripts/compare.py --config recipes/smollm2-135m/comparison.yaml --data_dir DIR --only dense-instruct moe-fitted

Each finished run leaves a file in the comparison's `results` folder, and is not made again while that is there. A run
that was cut off goes on from its last checkpoint. `--only` also names levers, which are scored on validation rows.
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
from transformers import AutoConfig

from finteam_experts import runs
from finteam_experts.comparison import Comparison, Contestant, read_comparison, result_file
from finteam_experts.data import corpus_file, evenly_spread, read_corpus, task_file, tasks_of
from finteam_experts.errors import InputError, nearest, read_json, run
from finteam_experts.models import load_model, load_tokenizer, parameter_counts
from finteam_experts.perplexity import heldout_loss
from finteam_experts.starts import Starts, options_of, step
from finteam_experts.tasks import TASKS, prompting


def perplexities(comparison: Comparison, starts: Starts, names: list[str]) -> None:
    """Held-out loss of each start on every role's corpus, in nats a token: the experts x corpora matrix."""
    path = comparison.results / "perplexity.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        if name in known:
            continue
        folder = starts.start(name)
        model, tokenizer = load_model(folder).to(PartialState().device), load_tokenizer(folder)
        loss = {}
        for role in starts.roles:
            passages = evenly_spread(read_corpus(starts.data, role, heldout=True), comparison.heldout_passages)
            loss[role] = heldout_loss(model, tokenizer, passages, max_tokens=comparison.heldout_tokens)
        known[name] = {"nats": loss, "tokens": starts.tokens(name)}
        runs.write_json(path, known)
        print(f"{name}: held-out nats a token {', '.join(f'{role} {value:.3f}' for role, value in loss.items())}")


def tune(
    comparison: Comparison, starts: Starts, contestant: Contestant, seed: int, start: Path, folder: Path
) -> tuple[Path, dict[str, Any] | None]:
    """The contestant's model below `folder`, tuned if it is to be, and what its tuning took."""
    dense = AutoConfig.from_pretrained(start).model_type != "mixtral"
    place = _linked(folder / ("base" if dense else "moe"), start)  # steps expect it inside their run folder
    if not contestant.recipe:
        return place, None
    if contestant.experts:
        model, tuning = tune_experts(comparison, starts, contestant, seed, start, folder)
    else:
        model = folder / ("dense-instruct" if dense else "moe-instruct")
        arguments = ("--base", start) if dense else ()
        tuning = _summary([_launch(comparison, starts, contestant, seed, folder, model, *arguments)])
    if contestant.router:
        options = [part for key, value in contestant.router.items() for part in options_of(key, value)]
        where = ("--run_dir", folder, "--data_dir", starts.data, "--model", model.name)
        step("scripts/fit_router.py", *where, *options)
    return model, tuning


def tune_experts(
    comparison: Comparison, starts: Starts, contestant: Contestant, seed: int, start: Path, folder: Path
) -> tuple[Path, dict[str, Any]]:
    """The model joined or averaged from the start's experts, each tuned by itself, and what their tuning took together.

    The tuned experts stay, for whoever else is made of them.
    """
    made_of = [contestant.start.split("/")[0], contestant.recipe, contestant.overrides, seed]
    name = f"experts-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]}-seed{seed}"
    shared = comparison.run_dir / "runs" / name
    shared.mkdir(parents=True, exist_ok=True)
    _linked(shared / "experts", start.parent / "experts")
    parts = []
    for role in starts.roles:
        alone = ("--start_from", "expert", "--role", role)
        parts.append(_launch(comparison, starts, contestant, seed, shared, shared / "experts-instruct" / role, *alone))
    for part in ("experts", "experts-instruct"):
        _linked(folder / part, shared / part)
    averaged = contestant.experts == "averaged"
    step("scripts/join_experts.py", "--run_dir", folder, *(["--average"] if averaged else []))
    return folder / ("average-instruct" if averaged else "moe-instruct"), _summary(parts)


def _linked(place: Path, target: Path) -> Path:
    place.unlink(missing_ok=True)
    place.symlink_to(target.absolute(), target_is_directory=True)
    return place


def _launch(
    comparison: Comparison,
    starts: Starts,
    contestant: Contestant,
    seed: int,
    run_dir: Path,
    model: Path,
    *arguments: object,
) -> dict[str, Any]:
    """Tune `model`, a folder of `run_dir`: its record's results, with the `seconds` that it took if they are known."""
    began, fresh = time.monotonic(), not model.exists() and not runs.work_folder(model).exists()
    options = ("--config", contestant.recipe, "--run_dir", run_dir, "--seed", seed, *arguments)
    starts.launch("recipes/instruct_tune.py", *options, overrides={**comparison.overrides, **contestant.overrides})
    return {**runs.read_record(model)["results"], "seconds": round(time.monotonic() - began) if fresh else None}


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


def score(
    comparison: Comparison, starts: Starts, split: str, start: Path, folder: Path, model: Path
) -> dict[str, Any]:
    """The model's scores on a sample of that split, with one digit a prediction: the label's place in the task's list."""
    limit = comparison.limit if split == "test" else comparison.validation_limit
    target = folder / "reports" / f"{split}.json"
    options = [
        *(options_of("limit", limit) if limit else []),
        *(["--bf16"] if comparison.overrides.get("bf16") else []),
    ]
    step("scripts/evaluate.py", "--run_dir", folder, "--data_dir", starts.data, "--models", model.name, "--base", start,
         "--split", split, "--name", target.stem, *options)  # fmt: skip
    report = json.loads(target.read_text())
    scored = report["models"][model.name]
    for task, result in scored["tasks"].items():
        result["predictions"] = "".join(str(TASKS[task].labels.index(label)) for label in result["predictions"])
    return {"limit": limit, "files": report["inputs"]["tasks"], **scored}


def play(comparison: Comparison, starts: Starts, contestant: Contestant, seed: int) -> None:
    """Tune and score one contestant with one seed, and write its result file.

    Levers are chosen on validation rows: they are not scored on test rows, and what they are compared with is scored on both.
    """
    start = starts.start(contestant.start)
    folder = comparison.run_dir / "runs" / f"{contestant.name}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    model, tuning = tune(comparison, starts, contestant, seed, start, folder)
    scored = {}
    is_lever = contestant in comparison.levers
    if is_lever or (seed == contestant.seeds[0] and contestant.name in (comparison.team, *comparison.baselines)):
        scored["valid"] = score(comparison, starts, "valid", start, folder, model)
    if not is_lever:
        scored["test"] = score(comparison, starts, "test", start, folder, model)
    cuda = torch.cuda.is_available()
    result = {
        **contestant.model_dump(exclude={"seeds", "keep"}),
        "seed": seed,
        "parameters": parameter_counts(model),
        "tokens_before_tuning": starts.tokens(contestant.start),
        "tuning": tuning,
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        **scored,
    }
    path = result_file(comparison, contestant, seed)
    result |= {key: value for key, value in made_from(comparison, starts, contestant).items() if key not in result}
    runs.write_json(path, result)
    print(f"Written to {path}")
    if contestant.recipe and not contestant.keep:
        shutil.rmtree(model)


def made_from(comparison: Comparison, starts: Starts, contestant: Contestant) -> dict[str, Any]:
    """What a contestant's results follow from, for its result file."""
    team = comparison.teams.get(contestant.start.split("/")[0])
    return {
        **contestant.model_dump(exclude={"name", "title", "seeds", "keep"}),
        "recipe_file": contestant.recipe and runs.file_hash(Path(contestant.recipe)),
        "expert_recipe_file": team and runs.file_hash(comparison.expert_recipe),
        "team": team and team.model_dump(),
        "common_overrides": comparison.overrides,
        "asked": prompting(),
        "train_files": {task: runs.file_hash(task_file(starts.data, task, "train")) for task in tasks_of(starts.data)},
        "corpora": {role: runs.file_hash(corpus_file(starts.data, role)) for role in starts.roles},
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
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these contestants or levers (default: all contestants)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="only these of their seeds")
    args = parser.parse_args()

    comparison = read_comparison(args.config)
    known = {contestant.name: contestant for contestant in (*comparison.contestants, *comparison.levers)}
    for name in args.only or ():
        if name not in known:
            raise InputError(f"--only {name}: {args.config} has no such contestant.{nearest(name, known)}")
    chosen = [known[name] for name in args.only] if args.only else list(comparison.contestants)
    starts = Starts(comparison, args.data_dir, args.base)
    for contestant in chosen:
        for seed in contestant.seeds:
            if args.seeds and seed not in args.seeds:
                continue
            if (done := result_file(comparison, contestant, seed)).exists():
                check_result(done, made_from(comparison, starts, contestant))
                print(f"{done} is there: skipped")
            else:
                play(comparison, starts, contestant, seed)
    perplexities(comparison, starts, sorted({contestant.start for contestant in chosen}))


if __name__ == "__main__":
    run(main)
