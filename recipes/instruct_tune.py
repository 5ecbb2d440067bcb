# SPDX-License-Identifier: Apache-2.0
"""STEP 3. Instruct-tune the MoE on the finance tasks, or the dense base on the same rows as its baseline.

    accelerate launch recipes/instruct_tune.py --config recipes/sample/instruct_tune_moe.yaml
    accelerate launch recipes/instruct_tune.py --config recipes/sample/instruct_tune_dense.yaml

Reads RUN_DIR/data and RUN_DIR/moe (or the dense base), writes RUN_DIR/moe-instruct (or RUN_DIR/dense-instruct): the
adapter merged into the model, with the base's tokenizer, chat template and generation config. The loss is on the
answers only.

`--start_from expert --role ROLE` tunes RUN_DIR/experts/ROLE by itself, on the same rows in an order of its own, and writes
RUN_DIR/experts-instruct/ROLE. When all of the team are tuned, scripts/join_experts.py makes RUN_DIR/moe-instruct of them.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from finteam_experts import runs
from finteam_experts.batches import encode
from finteam_experts.data import read_corpus, read_task, row_limits, task_file, tuning_rows
from finteam_experts.errors import InputError, run
from finteam_experts.models import (
    check_base,
    fingerprint,
    load_tokenizer,
    local_folder,
)
from finteam_experts.routing import RoutingCallback
from finteam_experts.shards import weight_files
from finteam_experts.task_routing import EXPERT
from finteam_experts.tasks import TASKS, conversation
from finteam_experts.training import (
    ADAPTER,
    BaseModelConfig,
    RunArguments,
    begin_on_all,
    end,
    merge_trained,
    parse,
    settings,
    share_batch,
    train_lora,
)

ROUTING_TOKENS = 96
OUTPUTS = {"moe": "moe-instruct", "base": "dense-instruct", "expert": "experts-instruct"}


@dataclass
class TuneArguments(RunArguments):
    start_from: str = field(default="moe", metadata={"help": "What to tune.", "choices": list(OUTPUTS)})
    role: str | None = field(default=None, metadata={"help": "Which expert, for start_from expert."})
    own_tasks: bool = field(default=False, metadata={"help": "Tune that expert on the tasks of its role alone."})
    rows_per_task: int | None = field(default=None, metadata={"help": "At most so many train rows of each task."})
    rows_of_task: dict | str | None = field(
        default=None, metadata={"help": "Another limit for some tasks, as {stock_movement: 160}."}
    )
    hold_out_validation: bool = field(
        default=False, metadata={"help": "Leave out the train rows that evaluate.py --split valid scores."}
    )
    experts_at_once: int | None = field(
        default=None,
        metadata={"help": "Train so many experts of a layer in each step, drawn anew each time; evaluation uses all."},
    )
    route_by_task: bool = field(
        default=False,
        metadata={"help": "Train each row in the expert of its task's role; fit the router afterwards."},
    )
    routing_steps: int = field(
        default=100, metadata={"help": "Measure the MoE's routing of held-out text every so many steps; 0: never."}
    )
    routing_passages: int = field(default=8, metadata={"help": "Held-out passages a role for that, 96 tokens each."})

    def limits(self) -> dict[str, int | None]:
        of_task = self.rows_of_task
        return row_limits(self.rows_per_task, json.loads(of_task) if isinstance(of_task, str) else of_task)


def conversations(
    data: Path, tokenizer: PreTrainedTokenizerBase, seed: int, args: TuneArguments, team: list[str]
) -> Dataset:
    """The train rows of all tasks, or of those of the expert's role, as prompt and completion, shuffled.

    With `route_by_task` each has the place in the team of its task's analyst as `expert`.
    """
    for task in TASKS:
        read_task(data, task, "test")  # refuses test rows that are in train, before hours are spent
    rows = tuning_rows(data, seed, args.limits(), hold_out=args.hold_out_validation)
    if args.own_tasks:
        rows = [(task, row) for task, row in rows if TASKS[task].role == args.role]
        if not rows:
            raise InputError(
                f"own_tasks: no task is of the role {args.role}. Those of {', '.join(TASKS)} are "
                f"{', '.join(task.role for task in TASKS.values())}: tune this expert on all rows, or not at all."
            )
    asked = [conversation(TASKS[task], row, tokenizer) for task, row in rows]
    if args.route_by_task:
        asked = [row | {EXPERT: team.index(TASKS[task].role)} for (task, _), row in zip(rows, asked, strict=True)]
    return Dataset.from_list(asked)


def check_task_routing(
    args: TuneArguments, team: list[str], training_args: SFTConfig, modules_to_save: object
) -> None:
    """Raise `InputError` if rows are to be routed by task and that can't be or does not go with other settings."""
    if not args.route_by_task:
        return
    for task in TASKS.values():
        if task.role not in team:
            raise InputError(
                f"route_by_task: {task.name} is a task of the {task.role} analyst, and the model that is to be tuned has "
                f"{', '.join(team) or 'no team'}. It is for --start_from moe, with a team that has an expert for every task."
            )
    if training_args.router_aux_loss_coef or "gate" in (modules_to_save or ()) or args.experts_at_once:
        raise InputError(
            "route_by_task leaves the router nothing to choose: set router_aux_loss_coef to 0, and leave out experts_at_once "
            "and the gate in lora_modules_to_save."
        )


def routing_callback(
    args: TuneArguments, data: Path, team: list[str], tokenizer: PreTrainedTokenizerBase
) -> Callable[[SFTTrainer], RoutingCallback] | None:
    """Makes the callback that logs where the router sends each role's held-out text; `None` if none is wanted."""
    if not team or args.routing_steps < 1:
        return None
    passages = [read_corpus(data, role, heldout=True)[: args.routing_passages] for role in team]
    sequences = [encode(tokenizer, own, ROUTING_TOKENS) for own in passages]
    return lambda trainer: RoutingCallback(trainer, sequences, args.routing_steps)


def main() -> None:
    script_args, training_args, model_args = parse((TuneArguments, SFTConfig, BaseModelConfig))
    share_batch(script_args.rows_per_step, training_args)
    run_dir, data = Path(script_args.run_dir), script_args.data_folder()
    if (script_args.start_from == "expert") != bool(script_args.role):
        raise InputError(
            f"start_from is {script_args.start_from} and role {script_args.role}: a role names the expert that is tuned by "
            "itself, with --start_from expert and not otherwise."
        )
    if script_args.own_tasks and not script_args.role:
        raise InputError(
            "own_tasks is for one expert that is tuned by itself: pass --start_from expert --role ROLE too."
        )
    if script_args.start_from == "moe":
        start = run_dir / "moe"
        record = runs.require(start, "python scripts/merge_moe.py")
    elif script_args.start_from == "expert":
        start = run_dir / "experts" / script_args.role
        record = runs.require(start, "python scripts/merge_moe.py")
        if training_args.data_seed is None:  # experts that see the rows in different orders err differently
            training_args.data_seed = random.Random(f"{training_args.seed} {script_args.role}").randrange(2**31)
    else:
        start, record = local_folder(model_args.model_name_or_path or str(run_dir / "base")), {}
        check_base(start)
    tokenizer = load_tokenizer(start)
    team = [member["name"] for member in record.get("team", ())]
    callback_of = routing_callback(script_args, data, team, tokenizer)
    check_task_routing(script_args, team, training_args, model_args.lora_modules_to_save)
    dataset = conversations(data, tokenizer, training_args.seed, script_args, team)

    target = run_dir / OUTPUTS[script_args.start_from] / (script_args.role or "")
    inputs = {
        "model": fingerprint(start),
        "tasks": {task: runs.file_hash(task_file(data, task, "train")) for task in TASKS},
        "settings": settings(script_args, training_args, model_args),
    }
    work = begin_on_all(target, "instruct_tune", inputs)
    if work is None:
        return
    runs.check_disk_room(target, 2 * sum(file.stat().st_size for file in weight_files(start)))

    trainer = train_lora(
        start,
        dataset,
        tokenizer,
        training_args,
        model_args,
        work,
        callback_of,
        experts_at_once=script_args.experts_at_once,
        route_by_task=script_args.route_by_task,
    )
    trainable, total = trainer.model.get_nb_trainable_parameters()
    trainer.save_model(str(work / ADAPTER))
    results = {
        "trainable_parameters": trainable,
        "total_parameters": total - trainable,
        "rows_seen": round(trainer.state.epoch * len(dataset)),
        "train_tokens": trainer.state.num_input_tokens_seen,
        "steps": trainer.state.global_step,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "routing": [
            {
                "step": entry["step"],
                **{key.removeprefix("routing/"): value for key, value in entry.items() if key.startswith("routing/")},
            }
            for entry in trainer.state.log_history
            if "routing/load_entropy" in entry
        ],
    }

    if trainer.is_world_process_zero():
        difference = merge_trained(trainer, start, work)
        about = {key: record[key] for key in ("team", "system_prompt", "tasks") if key in record}
        runs.finish(target, {**about, "results": {**results, "merge_difference": difference}})
        print(f"{target}: tuned on {results['rows_seen']} rows; merged and adapter outputs agree to {difference:.0e}")
    end(trainer)


if __name__ == "__main__":
    run(main)
