# SPDX-License-Identifier: Apache-2.0
"""STEP 3. Instruct-tune the MoE on the finance tasks, or the dense base on the same rows as its baseline.

    accelerate launch recipes/instruct_tune.py --config recipes/sample/instruct_tune_moe.yaml
    accelerate launch recipes/instruct_tune.py --config recipes/sample/instruct_tune_dense.yaml

Reads RUN_DIR/data and RUN_DIR/moe (or the dense base), writes RUN_DIR/moe-instruct (or RUN_DIR/dense-instruct): the
adapter merged into the model, with the base's companion files. The loss is on the answers only.

`--start_from expert --role ROLE` tunes RUN_DIR/experts/ROLE by itself, on the same rows in its own order, and writes
RUN_DIR/experts-instruct/ROLE. When all experts are tuned, scripts/join_experts.py makes RUN_DIR/moe-instruct of them.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from finteam_experts.threads import use_available_cores  # before torch

from datasets import Dataset
from transformers import PretrainedConfig
from trl import SFTConfig, SFTTrainer

from finteam_experts import runs
from finteam_experts.chats import ChatFormat
from finteam_experts.data import leaks
from finteam_experts.data.conversations import chat_file, chat_roles, check_chat_roles
from finteam_experts.data.files import check_roles, corpus_file, read_corpus, task_file, tasks_of
from finteam_experts.data.tasks import Tasks, about_tasks, prompting
from finteam_experts.data.trl_datasets import DatasetArguments
from finteam_experts.errors import InputError, run
from finteam_experts.evaluation.batches import encode
from finteam_experts.evaluation.routing import RoutingCallback
from finteam_experts.files import check_disk_room, file_hash
from finteam_experts.fingerprints import fingerprint
from finteam_experts.models import as_chats, check_base, load_tokenizer, local_folder, read_config
from finteam_experts.training.arguments import BaseModelConfig, RunArguments, TaskRowArguments, parse, settings
from finteam_experts.training.lora import ADAPTER, begin_on_all, end, merge_trained, train_lora, tuning_results
from finteam_experts.training.rows import (
    as_dataset,
    chat_examples,
    check_length,
    dataset_examples,
    mixed,
    rows_of_run,
    task_examples,
)  # fmt: skip
from finteam_experts.weights import size_of

ROUTING_TOKENS = 96
OUTPUTS = {"moe": "moe-instruct", "base": "dense-instruct", "expert": "experts-instruct"}


@dataclass
class TuneArguments(TaskRowArguments, DatasetArguments, RunArguments):
    start_from: str = field(default="moe", metadata={"help": "What to tune.", "choices": list(OUTPUTS)})
    as_trunk: bool = field(
        default=False,
        metadata={"help": "Write the tuned base to RUN_DIR/trunk, for experts and team to branch off from."},
    )
    role: str | None = field(default=None, metadata={"help": "Which expert, for start_from expert."})
    tasks: list[str] | None = field(
        default=None, metadata={"help": "Tune on these tasks of the data directory alone."}
    )
    own_tasks: bool = field(default=False, metadata={"help": "Tune that expert on the tasks of its role alone."})
    chat_share: float | None = field(
        default=None,
        metadata={"help": "Share of the tokens that are of conversations. Default: all rows that there are."},
    )
    hold_out_validation: bool = field(
        default=False, metadata={"help": "Leave out the train rows that evaluate.py --split valid scores."}
    )
    experts_at_once: int | None = field(
        default=None,
        metadata={"help": "Train this many experts of a layer in each step, drawn every time; evaluation uses all."},
    )
    route_by_task: bool = field(
        default=False,
        metadata={"help": "Train each row in the expert of its task's role; fit the router afterwards."},
    )
    routing_steps: int = field(
        default=100, metadata={"help": "Measure the MoE's routing of held-out text every N steps; 0: never."}
    )
    routing_passages: int = field(default=8, metadata={"help": "Held-out passages per role for that, 96 tokens each."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.start_from == "expert") != bool(self.role):
            raise InputError(
                f"start_from is {self.start_from} and role {self.role}: a role names the expert that is tuned by itself, with "
                "--start_from expert and not otherwise."
            )
        if self.as_trunk and self.start_from != "base":
            raise InputError(f"as_trunk is for start_from base; start_from is {self.start_from}.")
        if self.own_tasks and not self.role:
            raise InputError("own_tasks is for one expert tuned by itself: pass --start_from expert --role ROLE.")

    def check_task_routing(
        self, tasks: Tasks, team: list[str], training_args: SFTConfig, model_args: BaseModelConfig
    ) -> None:
        """Raise `InputError` if rows are to be routed by task and that is not possible, or clashes with other settings."""
        if not self.route_by_task:
            return
        for task in tasks.values():
            if task.role not in team:
                whose = f"the {task.role} analyst" if task.role else "no analyst"
                raise InputError(
                    f"route_by_task: {task.name} is a task of {whose}, and the model to be tuned has "
                    f"{', '.join(team) or 'no team'}. It is for --start_from moe, with a team that has an expert for every task."
                )
        trains_gate = "gate" in (model_args.lora_modules_to_save or ())
        if training_args.router_aux_loss_coef or trains_gate or self.experts_at_once:
            raise InputError(
                "route_by_task leaves the router nothing to choose: set router_aux_loss_coef to 0, and leave out "
                "experts_at_once and the gate in lora_modules_to_save."
            )


def initial_model(args: TuneArguments, training_args: SFTConfig, model_args: BaseModelConfig) -> tuple[Path, dict]:
    """The folder of the model to tune and its record, which is empty for a base; `InputError` if it can't be tuned."""
    run_dir, base = Path(args.run_dir), model_args.model_name_or_path
    if args.start_from == "base":
        folder = local_folder(base or str(run_dir / "base"))
        check_base(folder)
        return folder, {}
    if base:
        raise InputError(
            f"model_name_or_path (--base) is {base}, and start_from {args.start_from} tunes what was merged in {run_dir}. Leave it "
            "out; another base goes to train_expert.py and merge_moe.py."
        )
    folder = run_dir / ("moe" if args.start_from == "moe" else f"experts/{args.role}")
    record = runs.require(folder, "python scripts/merge_moe.py")
    if args.role:  # experts that see the rows in different orders err differently
        seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
        training_args.data_seed = random.Random(f"{seed} {args.role}").randrange(2**31)
    return folder, record


def tuning_dataset(
    args: TuneArguments,
    tasks: Tasks,
    training_args: SFTConfig,
    form: ChatFormat,
    team: list[str],
    config: PretrainedConfig,
) -> Dataset:
    """The train rows of tasks, conversations and datasets, or of the expert's role, with labels on the answers alone."""
    seed = training_args.seed
    asked = task_examples(args.data, tasks, form, seed, args.limits(tasks), hold_out=args.hold_out_validation)
    chats = chat_examples(args.data, form, seed) + dataset_examples(form, args.rows(rows_of_run(training_args)), seed)
    if args.own_tasks:
        asked, chats = ([row for row in rows if row.role == args.role] for rows in (asked, chats))
        if not asked and not chats:
            raise InputError(
                f"own_tasks: no task or conversation is of the role {args.role}. The tasks {', '.join(tasks)} are of "
                f"{', '.join(task.role or 'none' for task in tasks.values())}: tune this expert on all rows, or not at all."
            )
    rows = mixed(asked, chats, args.chat_share, seed)
    if not rows:
        raise InputError(f"{args.data} has nothing to tune on: no tasks/TASK_train.jsonl and no chats/ROLE.jsonl.")
    longest = training_args.max_length or config.max_position_embeddings
    training_args.max_length = None  # nothing is left to cut
    return as_dataset(rows, longest, team if args.route_by_task else None)


def routing_callback(
    args: TuneArguments, team: list[str], form: ChatFormat
) -> Callable[[SFTTrainer], RoutingCallback] | None:
    """Makes the callback that logs where the router sends each role's held-out text; `None` if none is wanted or there."""
    if not team or args.routing_steps < 1:
        return None
    if not any(corpus_file(args.data, role, heldout=True).is_file() for role in team):
        print(f"{args.data} has no held-out corpora: the routing is not measured while tuning")
        return None
    passages = [read_corpus(args.data, role, heldout=True)[: args.routing_passages] for role in team]
    sequences = [encode(form.tokenizer, own, ROUTING_TOKENS) for own in passages]
    return lambda trainer: RoutingCallback(trainer, sequences, args.routing_steps)


def main() -> None:
    args, training_args, model_args = parse((TuneArguments, SFTConfig, BaseModelConfig))
    use_available_cores()
    args.share_batch(training_args)
    start, record = initial_model(args, training_args, model_args)
    config, form = read_config(start), as_chats(load_tokenizer(start), start)
    team = [member["name"] for member in record.get("team", ())]
    model_args.check_lora(config)
    check_length(training_args.max_length, config)

    tasks = tasks_of(args.data, args.tasks)
    if team:
        check_roles(args.data, tasks, team)
        check_chat_roles(args.data, team)
    leaks.check_tasks(args.data, tasks)
    leaks.check_chats(args.data, chat_roles(args.data))
    callback_of = routing_callback(args, team, form)
    args.check_task_routing(tasks, team, training_args, model_args)
    target = Path(args.run_dir) / ("trunk" if args.as_trunk else OUTPUTS[args.start_from]) / (args.role or "")
    inputs = {
        "model": fingerprint(start),
        "tasks": {task: file_hash(task_file(args.data, task, "train")) for task in tasks},
        "asked": prompting(tasks),
        "settings": settings(args, training_args, model_args),
    }
    if roles := chat_roles(args.data):
        inputs["chats"] = {role: file_hash(chat_file(args.data, role)) for role in roles}
    if args.sources():
        inputs["datasets"] = args.described()
    if args.hold_out_validation:  # rows of train are left out where there is no file of them
        inputs["valid"] = [task for task in tasks if task_file(args.data, task, "valid").is_file()]
    dataset = tuning_dataset(args, tasks, training_args, form, team, config)
    work = begin_on_all(target, "instruct_tune", inputs)
    if work is None:
        return
    check_disk_room(target, 2 * size_of(start))

    trainer = train_lora(
        start, dataset, form.tokenizer, args, training_args, model_args, work, callback_of,
        experts_at_once=args.experts_at_once, route_by_task=args.route_by_task,
    )  # fmt: skip
    trainer.save_model(str(work / ADAPTER))
    results = tuning_results(trainer, len(dataset))

    if trainer.is_world_process_zero():
        results["merge_difference"], keep = merge_trained(trainer, start, work)
        about = about_tasks(tasks) | ({"team": record["team"]} if team else {})
        runs.finish(target, {**about, "results": results}, keep=keep)
        off = results["merge_difference"]
        print(f"{target}: tuned on {results['rows_seen']} rows; merged and adapter outputs agree to {off:.0e}")
    end(trainer)


if __name__ == "__main__":
    run(main)
