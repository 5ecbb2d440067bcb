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

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from finteam_experts.threads import use_available_cores  # before torch

import yaml
from datasets import Dataset
from transformers import PretrainedConfig
from trl import SFTConfig, SFTTrainer

from finteam_experts import leaks, runs
from finteam_experts.arguments import (
    BaseModelConfig,
    RunArguments,
    check_length,
    check_lora,
    parse,
    settings,
    share_batch,
)
from finteam_experts.batches import encode
from finteam_experts.chats import ChatFormat
from finteam_experts.data import read_corpus, row_limits, task_file, tasks_of, tuning_rows
from finteam_experts.errors import InputError, run
from finteam_experts.models import as_chats, check_base, fingerprint, load_tokenizer, local_folder, read_config
from finteam_experts.routing import RoutingCallback
from finteam_experts.shards import weight_files
from finteam_experts.task_routing import EXPERT
from finteam_experts.tasks import TASKS, prompting, render_all, task_cards
from finteam_experts.training import ADAPTER, begin_on_all, end, merge_trained, merged_files, train_lora

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
        try:
            return row_limits(self.rows_per_task, yaml.safe_load(of_task) if isinstance(of_task, str) else of_task)
        except yaml.YAMLError:
            raise InputError(f"rows_of_task is {of_task!r}; write it as '{{stock_movement: 160}}'.") from None


def tuning_dataset(
    data: Path,
    form: ChatFormat,
    training_args: SFTConfig,
    args: TuneArguments,
    team: list[str],
    config: PretrainedConfig,
) -> Dataset:
    """The train rows of all tasks, or of those of the expert's role, shuffled: their tokens, with labels on the answers alone.

    Rows that are longer than `max_length` would lose their answer: they are left out, and counted on the screen. With
    `route_by_task` each row has the place in the team of its task's analyst as `expert`.
    """
    rows = tuning_rows(data, training_args.seed, args.limits(), hold_out=args.hold_out_validation)
    if args.own_tasks:
        rows = [(task, row) for task, row in rows if TASKS[task].role == args.role]
        if not rows:
            tasks = tasks_of(data)
            raise InputError(
                f"own_tasks: no task is of the role {args.role}. Those of {', '.join(tasks)} are "
                f"{', '.join(TASKS[task].role for task in tasks)}: tune this expert on all rows, or not at all."
            )
    prompts = {}
    for name in dict.fromkeys(task for task, _ in rows):
        prompts[name] = iter(render_all(TASKS[name], [row for task, row in rows if task == name], form.tokenizer))
    exchanges = form.exchanges([(next(prompts[task]), row["label"]) for task, row in rows])
    longest = training_args.max_length or config.max_position_embeddings
    columns = [
        {"input_ids": exchange.ids, "labels": exchange.labels}
        | ({EXPERT: team.index(TASKS[task].role)} if args.route_by_task else {})
        for (task, _), exchange in zip(rows, exchanges, strict=True)
        if len(exchange.ids) <= longest
    ]
    if not columns:
        raise InputError(f"none of the {len(rows)} rows has {longest} tokens or fewer: raise max_length.")
    if len(columns) < len(rows) and training_args.process_index == 0:
        print(f"{len(rows) - len(columns)} of {len(rows)} rows are left out: they have more than {longest} tokens")
    training_args.max_length = None  # nothing is left to cut
    return Dataset.from_list(columns)


def check_task_routing(
    args: TuneArguments, tasks: list[str], team: list[str], training_args: SFTConfig, modules_to_save: object
) -> None:
    """Raise `InputError` if rows are to be routed by task and that can't be or does not go with other settings."""
    if not args.route_by_task:
        return
    for task in (TASKS[name] for name in tasks):
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
    args: TuneArguments, data: Path, team: list[str], form: ChatFormat
) -> Callable[[SFTTrainer], RoutingCallback] | None:
    """Makes the callback that logs where the router sends each role's held-out text; `None` if none is wanted."""
    if not team or args.routing_steps < 1:
        return None
    passages = [read_corpus(data, role, heldout=True)[: args.routing_passages] for role in team]
    sequences = [encode(form.tokenizer, own, ROUTING_TOKENS) for own in passages]
    return lambda trainer: RoutingCallback(trainer, sequences, args.routing_steps)


def starting_model(args: TuneArguments, training_args: SFTConfig, model_args: BaseModelConfig) -> tuple[Path, dict]:
    """The folder of the model to tune and its record, which is empty for a base; `InputError` if they can't be tuned."""
    run_dir = Path(args.run_dir)
    if (args.start_from == "expert") != bool(args.role):
        raise InputError(
            f"start_from is {args.start_from} and role {args.role}: a role names the expert that is tuned by "
            "itself, with --start_from expert and not otherwise."
        )
    if args.own_tasks and not args.role:
        raise InputError(
            "own_tasks is for one expert that is tuned by itself: pass --start_from expert --role ROLE too."
        )
    if args.start_from == "base":
        folder = local_folder(model_args.model_name_or_path or str(run_dir / "base"))
        check_base(folder)
        return folder, {}
    if model_args.model_name_or_path:
        raise InputError(
            f"model_name_or_path (--base) is {model_args.model_name_or_path}, and start_from {args.start_from} tunes what was merged "
            f"in {run_dir}. Leave it out; another base goes to train_expert.py and merge_moe.py."
        )
    folder = run_dir / ("moe" if args.start_from == "moe" else f"experts/{args.role}")
    record = runs.require(folder, "python scripts/merge_moe.py")
    if args.role and training_args.data_seed is None:  # experts that see the rows in different orders err differently
        training_args.data_seed = random.Random(f"{training_args.seed} {args.role}").randrange(2**31)
    return folder, record


def main() -> None:
    script_args, training_args, model_args = parse((TuneArguments, SFTConfig, BaseModelConfig))
    use_available_cores()
    share_batch(script_args.rows_per_step, training_args)
    run_dir, data = Path(script_args.run_dir), script_args.data_folder()
    start, record = starting_model(script_args, training_args, model_args)
    config = read_config(start)
    check_lora(model_args, config)
    check_length(training_args.max_length, config, "max_length")
    form = as_chats(load_tokenizer(start), start)
    team = [member["name"] for member in record.get("team", ())]
    tasks = tasks_of(data)
    leaks.check_tasks(data, tasks)
    callback_of = routing_callback(script_args, data, team, form)
    check_task_routing(script_args, tasks, team, training_args, model_args.lora_modules_to_save)

    target = run_dir / OUTPUTS[script_args.start_from] / (script_args.role or "")
    inputs = {
        "model": fingerprint(start),
        "tasks": {task: runs.file_hash(task_file(data, task, "train")) for task in tasks},
        "asked": prompting(),
        "settings": settings(script_args, training_args, model_args),
    }
    if script_args.hold_out_validation:  # rows of train are left out where there is no file of them
        inputs["valid"] = [task for task in tasks if task_file(data, task, "valid").is_file()]
    dataset = tuning_dataset(data, form, training_args, script_args, team, config)
    work = begin_on_all(target, "instruct_tune", inputs)
    if work is None:
        return
    runs.check_disk_room(target, 2 * sum(file.stat().st_size for file in weight_files(start)))

    trainer = train_lora(
        start,
        dataset,
        form.tokenizer,
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
        about = {"team": record["team"], "system_prompt": form.system_prompt, "tasks": task_cards()} if team else {}
        runs.finish(target, {**about, "results": {**results, "merge_difference": difference}}, keep=merged_files(work))
        print(f"{target}: tuned on {results['rows_seen']} rows; merged and adapter outputs agree to {difference:.0e}")
    end(trainer)


if __name__ == "__main__":
    run(main)
