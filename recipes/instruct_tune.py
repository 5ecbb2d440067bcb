# SPDX-License-Identifier: Apache-2.0
"""STEP 3. Instruct-tune the MoE on the finance tasks, or the dense base on the same rows as its baseline.

    accelerate launch recipes/instruct_tune.py --config recipes/sample/instruct_tune_moe.yaml
    accelerate launch recipes/instruct_tune.py --config recipes/sample/instruct_tune_dense.yaml

Reads RUN_DIR/data and RUN_DIR/moe (or the dense base), writes RUN_DIR/moe-instruct (or RUN_DIR/dense-instruct): the
adapter merged into the model, with the base's companion files. The loss is on the answers only.
"""

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
OUTPUTS = {"moe": "moe-instruct", "base": "dense-instruct"}


@dataclass
class TuneArguments(TaskRowArguments, DatasetArguments, RunArguments):
    start_from: str = field(default="moe", metadata={"help": "What to tune.", "choices": list(OUTPUTS)})
    as_trunk: bool = field(
        default=False,
        metadata={"help": "Write the tuned base to RUN_DIR/trunk, for experts and team to branch off from."},
    )
    tasks: list[str] | None = field(
        default=None, metadata={"help": "Tune on these tasks of the data directory alone."}
    )
    chat_share: float | None = field(
        default=None,
        metadata={"help": "Share of the tokens that are of conversations. Default: all rows that there are."},
    )
    hold_out_validation: bool = field(
        default=False, metadata={"help": "Leave out the train rows that evaluate.py --split valid scores."}
    )
    routing_steps: int = field(
        default=100, metadata={"help": "Measure the MoE's routing of held-out text every N steps; 0: never."}
    )
    routing_passages: int = field(default=8, metadata={"help": "Held-out passages per role for that, 96 tokens each."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.as_trunk and self.start_from != "base":
            raise InputError(f"as_trunk is for start_from base; start_from is {self.start_from}.")


def initial_model(args: TuneArguments, model_args: BaseModelConfig) -> tuple[Path, dict]:
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
    folder = run_dir / "moe"
    return folder, runs.require(folder, "python scripts/merge_moe.py")


def tuning_dataset(
    args: TuneArguments,
    tasks: Tasks,
    training_args: SFTConfig,
    form: ChatFormat,
    config: PretrainedConfig,
) -> Dataset:
    """The train rows of tasks, conversations and datasets, with labels on the answers alone."""
    seed = training_args.seed
    asked = task_examples(args.data, tasks, form, seed, args.limits(tasks), hold_out=args.hold_out_validation)
    chats = chat_examples(args.data, form, seed) + dataset_examples(form, args.rows(rows_of_run(training_args)), seed)
    rows = mixed(asked, chats, args.chat_share, seed)
    if not rows:
        raise InputError(f"{args.data} has nothing to tune on: no tasks/TASK_train.jsonl and no chats/ROLE.jsonl.")
    longest = training_args.max_length or config.max_position_embeddings
    training_args.max_length = None  # nothing is left to cut
    return as_dataset(rows, longest)


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
    start, record = initial_model(args, model_args)
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
    target = Path(args.run_dir) / ("trunk" if args.as_trunk else OUTPUTS[args.start_from])
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
    dataset = tuning_dataset(args, tasks, training_args, form, config)
    work = begin_on_all(target, "instruct_tune", inputs)
    if work is None:
        return
    check_disk_room(target, 2 * size_of(start))

    trainer = train_lora(start, dataset, form.tokenizer, args, training_args, model_args, work, callback_of)
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
