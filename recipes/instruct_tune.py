# SPDX-License-Identifier: Apache-2.0
"""STEP 3. Instruct-tune the MoE on the finance tasks, or the dense base on the same rows as its baseline.

    accelerate launch --quiet recipes/instruct_tune.py --config recipes/sample/instruct_tune_moe.yaml
    accelerate launch --quiet recipes/instruct_tune.py --config recipes/sample/instruct_tune_dense.yaml

Reads RUN_DIR/data and RUN_DIR/moe (or the dense base), writes RUN_DIR/moe-instruct (or RUN_DIR/dense-instruct): the
adapter merged into the model, with the base's companion files. `--output_dir` names another folder to write. The loss is on the answers only.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from finteam_experts.threads import use_available_cores  # before torch

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from finteam_experts import runs
from finteam_experts.chats import ChatFormat
from finteam_experts.data.conversations import GENERAL, chat_roles, check_chat_roles
from finteam_experts.data.files import check_roles, corpus_file, read_corpus, task_file, tasks_of
from finteam_experts.data.leaks import ScoredTexts, check_data_dir
from finteam_experts.data.tasks import Tasks, about_tasks, prompting
from finteam_experts.data.trl_datasets import DatasetArguments, roles_of
from finteam_experts.errors import InputError, is_main_process, run
from finteam_experts.evaluation.batches import encode
from finteam_experts.evaluation.routing import RoutingCallback
from finteam_experts.files import check_disk_room
from finteam_experts.fingerprints import fingerprint
from finteam_experts.models import as_chats, check_base, load_tokenizer, local_folder, read_config
from finteam_experts.training.arguments import (
    BaseModelConfig,
    RunArguments,
    TaskRowArguments,
    keep_rows_whole,
    output_folder,
    parse,
    settings,
)  # fmt: skip
from finteam_experts.training.lora import (
    ADAPTER,
    begin_on_all,
    end,
    match_steps,
    merge_trained,
    train_lora,
    tuning_results,
)  # fmt: skip
from finteam_experts.training.rows import (
    Source,
    chat_source,
    check_length,
    dataset_source,
    mixed,
    reads,
    recorded,
    rows_of_run,
    task_source,
    tokenise,
)
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
    match_steps: bool = field(
        default=False,
        metadata={"help": "Of the dense baseline: take as many steps as RUN_DIR's experts and team took together."},
    )
    routing_steps: int = field(
        default=100, metadata={"help": "Measure the MoE's routing of held-out text every N steps; 0: never."}
    )
    routing_passages: int = field(default=8, metadata={"help": "Held-out passages per role for that, 96 tokens each."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.tasks, str):  # as YAML gives a list of one
            self.tasks = [self.tasks]
        if self.as_trunk and self.start_from != "base":
            raise InputError(f"as_trunk is for start_from base; start_from is {self.start_from}.")
        if self.match_steps and (self.start_from != "base" or self.as_trunk):
            raise InputError("match_steps is for the dense baseline: start_from base, without as_trunk.")


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


def rows_to_tune(
    args: TuneArguments, tasks: Tasks, scored: ScoredTexts | None, training_args: SFTConfig, form: ChatFormat, positions: int
) -> tuple[Dataset, list[Source]]:  # fmt: skip
    """The train rows of tasks, conversations and datasets, with labels on the answers alone, and where they are from."""
    seed, limits = training_args.seed, args.limits(tasks)
    sources = [task_source(args.data, tasks, form, seed, limits, hold_out=args.hold_out_validation)] if tasks else []
    sources += [chat_source(args.data, role) for role in chat_roles(args.data)]
    datasets = args.load(rows_of_run(training_args), seed)
    sources += [dataset_source(dataset, "chats", dataset.role or GENERAL, scored) for dataset in datasets]
    if not sources:
        raise InputError(f"{args.data} has nothing to tune on: no tasks/TASK_train.jsonl and no chats/ROLE.jsonl.")
    if training_args.packing:
        raise InputError(
            "packing is true, and it sorts rows by length, which here means by task. Set padding_free: true."
        )
    longest = training_args.max_length or positions
    shares = None if args.chat_share is None else {"tasks": 1.0, "chats": 1.0}  # of the tokens it is another one
    parts = tokenise(sources, form, training_args, longest, cut=longest, shares=shares)
    keep_rows_whole(training_args)
    return mixed(parts, args.chat_share, seed), sources


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
    matched = match_steps(Path(args.run_dir), training_args) if args.match_steps else None
    start, record = initial_model(args, model_args)
    config, form = read_config(start), as_chats(load_tokenizer(start), start)
    team = [member["name"] for member in record.get("team", ())]
    model_args.check_lora(config)
    check_length(training_args.max_length, config)

    tasks, scored = {}, None
    if args.data.is_dir() or args.tasks or not args.sources():  # a dataset alone is enough
        scored = check_data_dir(args.data)
        tasks = tasks_of(args.data, args.tasks)
    if team:
        check_roles(args.data, tasks, team)
        check_chat_roles(args.data, team)
    args.check_dataset_roles(team or roles_of(args.data))
    callback_of = routing_callback(args, team, form)
    place = Path(args.run_dir) / ("trunk" if args.as_trunk else OUTPUTS[args.start_from])
    target = output_folder(training_args, place)
    recorded_settings = settings(args, training_args, model_args)
    dataset, sources = rows_to_tune(args, tasks, scored, training_args, form, config.max_position_embeddings)
    inputs = {
        "model": fingerprint(start),
        "asked": prompting(tasks),
        "settings": recorded_settings,
        **recorded(sources),
    }
    if args.hold_out_validation:  # rows of train are left out where there is no file of them
        inputs["valid"] = [task for task in tasks if task_file(args.data, task, "valid").is_file()]
    work = begin_on_all(target, "instruct_tune", inputs)
    if work is None:
        return
    if is_main_process():
        print(reads(dataset, sources, training_args))
    check_disk_room(target, 2 * size_of(start))

    trainer = train_lora(start, dataset, form.tokenizer, args, training_args, model_args, work, callback_of)
    trainer.save_model(str(work / ADAPTER))
    results = tuning_results(trainer, len(dataset)) | ({"matched_steps": matched} if matched else {})

    if trainer.is_world_process_zero():
        results["merge_difference"], keep = merge_trained(trainer, start, work)
        about = about_tasks(tasks) | ({"team": record["team"]} if team else {})
        if "ridge" in record.get("router", {}):  # of which a change of the team solves again
            about["router"] = {"ridge": record["router"]["ridge"]}
        runs.finish(target, {**about, "results": results}, keep=keep)
        off = results["merge_difference"]
        print(f"{target}: tuned on {results['rows_seen']} rows; merged and adapter outputs agree to {off:.0e}")
    end(trainer)


if __name__ == "__main__":
    run(main)
