# SPDX-License-Identifier: Apache-2.0
"""Whether a model has seen the rows that it is to be scored on, by the records of its trainings."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finteam_experts.data.files import task_file
from finteam_experts.errors import InputError
from finteam_experts.files import file_hash, read_json
from finteam_experts.fingerprints import fingerprint
from finteam_experts.merging.config import BASE
from finteam_experts.merging.moe import adapter_in_team
from finteam_experts.models import ADAPTER_FILE
from finteam_experts.runs import RECORD


def check_valid_unseen(
    run_dir: Path, folders: dict[str, Path], data_dir: Path, tasks: Iterable[str], base: Path
) -> None:
    """Raise `InputError` if a model, or an expert or trunk that it was made from, was trained on rows of the valid split.

    These are a tenth of the train rows, unless a task has a TASK_valid.jsonl, whose rows nobody may train on. A model whose
    start is neither `base` nor the run's trunk may have seen them.
    """
    tasks = [task for task in tasks if not task_file(data_dir, task, "valid").is_file()]
    problems = []
    for name, folder in folders.items() if tasks else ():
        for training, inputs in dict(_trainings(run_dir, folder, base)).items():
            trained = inputs.get("tasks") or inputs.get("corpus", {}).get("tasks", {})
            had_file = inputs.get("valid", ()) if inputs.get("settings", {}).get("hold_out_validation") else trained
            seen = [task for task in tasks if task in trained and task in had_file]
            if seen or not inputs:
                problems.append(f"{name} ({training}: {', '.join(seen) or 'no record of its training'})")
    if problems:
        raise InputError(
            f"--split valid: trained on these rows: {'; '.join(problems)}. Train with --hold_out_validation true, leave these "
            "models out with --models, or give the tasks other rows in tasks/TASK_valid.jsonl."
        )


def _trainings(run_dir: Path, folder: Path, base: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and recorded inputs of every training that a model went through; no inputs where the run has no record of it."""
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}  # a base has none
    step, inputs, trunk = record.get("step"), record.get("inputs", {}), run_dir / "trunk"
    if step in ("instruct_tune", "train_expert"):
        yield str(folder.relative_to(run_dir) if folder.is_relative_to(run_dir) else folder), inputs
    for name in (
        member["name"] for member in record.get("team", ()) if member["name"] != BASE
    ):  # a generalist is the base
        if adapter := adapter_in_team(run_dir, name):
            yield from _trainings(run_dir, adapter, base)
        else:
            yield f"the expert {name}", {}
    if step == "merge_expert":
        adapter = run_dir / "adapters" / folder.name
        known = (adapter / ADAPTER_FILE).is_file() and file_hash(adapter / ADAPTER_FILE) == inputs["adapter"]
        yield from _trainings(run_dir, adapter, base) if known else [(f"the adapter of {folder.name}", {})]
    start = (inputs.get("model") or inputs.get("base") or {}).get("weights")
    if start is None or "team" in record:  # a team's experts say what they started from
        return
    weights = {place: fingerprint(place, ["weights"])["weights"] for place in (trunk, base) if place.is_dir()}
    if folder != trunk and start == weights.get(trunk):
        yield from _trainings(run_dir, trunk, base)
    elif start != weights.get(base):
        yield "the model that it started from", {}
