# SPDX-License-Identifier: Apache-2.0
"""STEP 1. Train the LoRA of one role expert on what its role has: corpus, conversations, tasks.

    accelerate launch --quiet recipes/train_expert.py --config recipes/sample/train_expert.yaml --role macro

Reads RUN_DIR/data and RUN_DIR/base unless --data_dir and --base name others, writes RUN_DIR/adapters/ROLE. The LoRA is
on the MLP alone: that is all that becomes an expert of the MoE. Any TRL setting can be overridden on the command line.

Without `learn_from` it learns from the corpus alone (next-token loss, packed). `learn_from` mixes corpus, the role's
conversations, general ones and the role's tasks in shares of the rows; the loss is on all of a passage, and on the answer of
everything else.

`--corpus FILES` streams the role's text from elsewhere, without a copy of it on this disk or in memory.

`--role shared` trains on the corpora of all roles, attention included if the recipe says so, and writes RUN_DIR/trunk: a
dense model that knows what the roles share. Give it to the later steps as --base RUN_DIR/trunk.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finteam_experts.threads import use_available_cores  # before torch

import yaml
from datasets import Dataset, IterableDataset, interleave_datasets
from trl import SFTConfig

from finteam_experts import runs
from finteam_experts.chats import ChatFormat
from finteam_experts.data.conversations import GENERAL, chat_roles
from finteam_experts.data.files import corpus_file, read_corpus, task_file, tasks_of
from finteam_experts.data.leaks import ScoredTexts, check_data_dir
from finteam_experts.data.tasks import prompting
from finteam_experts.data.trl_datasets import DatasetArguments, roles_of, stream_corpus
from finteam_experts.errors import InputError, check_number, is_main_process, run
from finteam_experts.evaluation.batches import encode
from finteam_experts.evaluation.heldout import heldout_loss, perplexity
from finteam_experts.files import file_hash
from finteam_experts.fingerprints import PLAIN_TEXT_PARTS, fingerprint
from finteam_experts.merging.config import SHARED, roles_to_train
from finteam_experts.models import ADAPTER_FILE, MLP_MODULES, as_chats, check_base, load_tokenizer, local_folder
from finteam_experts.training.arguments import (
    BaseModelConfig,
    RunArguments,
    TaskRowArguments,
    keep_rows_whole,
    output_folder,
    parse,
    settings,
)  # fmt: skip
from finteam_experts.training.lora import ADAPTER, begin_on_all, end, length_of, merge_trained, train_lora
from finteam_experts.training.rows import (
    Source,
    chat_source,
    check_length,
    corpus_source,
    dataset_source,
    in_shares,
    reads,
    recorded,
    rows_of_run,
    task_source,
    tokenise,
)

PARTS = ("corpus", "chats", "general", "tasks")
MERGE_FILE = Path(__file__).parents[1] / "moe_merge.yaml"


@dataclass
class ExpertArguments(TaskRowArguments, DatasetArguments, RunArguments):
    role: str | None = field(
        default=None, metadata={"help": "A role of the merge, one whose corpora the data has, or shared: all."}
    )
    corpus: str | None = field(
        default=None,
        metadata={
            "help": "Stream the role's text from these files instead of DATA_DIR/corpora/ROLE.jsonl: JSON lines or Parquet, "
            "with wildcards, also hf://datasets/OWNER/NAME/..."
        },
    )
    corpus_column: str = field(default="text", metadata={"help": "The column of those files that has the text."})
    learn_from: dict | str | None = field(
        default=None,
        metadata={
            "help": "Shares of the rows, as {corpus: 0.2, chats: 0.4, tasks: 0.4}; else the corpus alone, packed."
        },
    )
    steps_per_task: int | None = field(
        default=None, metadata={"help": "Steps for each task of the role, instead of max_steps or num_train_epochs."}
    )
    merge_config: str = field(default=str(MERGE_FILE), metadata={"help": "The merge: it lists the roles of the team."})
    heldout_passages: int = field(default=32, metadata={"help": "Passages for the perplexity before and after."})

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            shares = yaml.safe_load(self.learn_from) if isinstance(self.learn_from, str) else self.learn_from
        except yaml.YAMLError:
            shares = self.learn_from
        if shares is None:
            self.learn_from = None
            return
        if not isinstance(shares, dict) or not shares or not set(shares) <= set(PARTS):
            raise InputError(
                f"learn_from is {self.learn_from!r}; it gives {', '.join(PARTS)}, or some of them, a share above 0, as "
                "'{corpus: 0.2, chats: 0.4, tasks: 0.4}'."
            )
        for part, share in shares.items():
            check_number(f"learn_from, {part}", share, above=0)
        if self.corpus or self.role == SHARED:
            print("learn_from is for one role's own files: this training reads the corpus alone")
            self.learn_from = None
            return
        self.learn_from = {part: share / sum(shares.values()) for part, share in shares.items()}

    def set_steps(self, training_args: SFTConfig, roles: list[str]) -> None:
        """Set the steps of this training from `steps_per_task`, unless its own settings say how many."""
        if self.steps_per_task and training_args.max_steps < 1:
            limits = self.limits(known := tasks_of(self.data))
            tasks = sum(task.role in roles and limits[name] != 0 for name, task in known.items())
            training_args.max_steps = self.steps_per_task * max(1, tasks)

    def roles(self) -> list[str]:
        """The roles whose corpora are trained on."""
        return roles_to_train(self.role, Path(self.merge_config), self.data)


def streamed_corpus(
    args: ExpertArguments, training_args: SFTConfig, scored: ScoredTexts
) -> tuple[IterableDataset, dict]:
    """The texts of `corpus`, and what the record says of where they are from."""
    if args.role == SHARED or training_args.max_steps < 1:
        raise InputError(
            f"corpus is {args.corpus}, role {args.role} and max_steps {training_args.max_steps}: a stream is one role's, and its "
            "end is not known. Name a role, and set max_steps."
        )
    if args.sources():
        raise InputError(f"corpus is {args.corpus}, and {args.sources()[0].path} a dataset. Train on one of them.")
    return stream_corpus(args.corpus, args.corpus_column, training_args.seed, scored.find)


def rows_to_learn(
    args: ExpertArguments, roles: list[str], scored: ScoredTexts, training_args: SFTConfig, form: ChatFormat, positions: int
) -> tuple[Dataset, list[Source]]:  # fmt: skip
    """The rows to train on, in the shares of `learn_from`, and where they are from.

    Without `learn_from` they are the corpora of `roles`, one passage of each in turn. Texts are cut at `max_length`; other
    rows stay whole, as the trunk learned them, if they fit into the model's `positions`.
    """
    data, role, seed, shared, shares = args.data, args.role, training_args.seed, args.role == SHARED, args.learn_from
    wanted, limits = shares or {"corpus": 1.0}, args.limits(tasks_of(data))
    # the router will need a corpus, whatever the expert learns from
    sources = [corpus_source(data, name, name if shared else "corpus") for name in roles]
    sources += [chat_source(data, whose, part) for part, whose in (("chats", role), (GENERAL, GENERAL))
                if whose in chat_roles(data)]  # fmt: skip
    tasks = {name: task for name, task in tasks_of(data).items() if task.role == role and limits[name] != 0}
    if tasks and "tasks" in wanted:
        sources.append(task_source(data, tasks, form, seed, limits, hold_out=args.hold_out_validation))
    sources = [source for source in sources if source.part in (roles if shared else wanted)]
    if args.dataset_streaming and args.sources() and training_args.packing and not shares:
        raise InputError(
            "dataset_streaming and packing are both true: how many rows fill the sequences isn't known. Set packing: false, or "
            "stream the files with --corpus."
        )
    for dataset in args.load(rows_of_run(training_args), seed, None if shared else role):
        whose = dataset.role or role
        part = whose if shared or whose == GENERAL else "corpus" if dataset.is_text or not shares else "chats"
        if not shared and part not in wanted:
            kind = "text" if dataset.is_text else "conversations"
            raise InputError(
                f"dataset {dataset.name} has {kind} for '{part}', and {role} learns from {', '.join(wanted)} (learn_from). Give "
                f"{part} a share, or leave the dataset out."
            )
        sources.append(dataset_source(dataset, part, whose, scored))
    if not sources:
        raise InputError(f"{data} has nothing for {', '.join(wanted)} of learn_from and the role {role}.")

    cut = training_args.max_length or positions
    if not shares:
        parts = tokenise(sources, form, training_args, None, cut=None if training_args.packing else cut)
        return interleave_datasets([*parts.values()], stopping_strategy="all_exhausted"), sources
    keep_rows_whole(training_args)
    parts = tokenise(sources, form, training_args, positions, cut=cut, shares=shares)
    if (missing := [part for part in shares if part not in parts]) and is_main_process():
        print(f"{data} has nothing for {', '.join(missing)}: {role} learns from {', '.join(parts)}")
    return in_shares(parts, shares, seed), sources


def main() -> None:
    args, training_args, model_args = parse((ExpertArguments, SFTConfig, BaseModelConfig))
    use_available_cores()
    roles, shared, run_dir = args.roles(), args.role == SHARED, Path(args.run_dir)
    args.set_steps(training_args, roles)
    args.share_batch(training_args)
    base = local_folder(model_args.model_name_or_path or str(run_dir / "base"))
    config, tokenizer = check_base(base), load_tokenizer(base)
    model_args.check_lora(config, allowed=None if shared else MLP_MODULES)
    check_length(training_args.max_length, config)

    form = as_chats(tokenizer, base)
    args.check_dataset_roles(roles_of(args.data))
    scored, recorded_settings = check_data_dir(args.data), settings(args, training_args, model_args)
    if args.corpus:
        dataset, record = streamed_corpus(args, training_args, scored)
    else:
        dataset, sources = rows_to_learn(args, roles, scored, training_args, form, config.max_position_embeddings)
        record = recorded(sources)
    heldout = [text for name in roles for text in read_corpus(args.data, name, heldout=True)[: args.heldout_passages]]
    if not encode(tokenizer, heldout, 3):
        raise InputError(
            f"{corpus_file(args.data, roles[0], heldout=True)}: its first {len(heldout)} passages are of one token or none, of "
            "which there is no perplexity. Add longer ones, or raise heldout_passages."
        )
    target = output_folder(training_args, run_dir / "trunk" if shared else run_dir / "adapters" / args.role)
    inputs = {
        "role": args.role,
        # the trunk is a model with its chat template, an adapter of a corpus knows plain text alone
        "base": fingerprint(base) if shared or args.learn_from else fingerprint(base, PLAIN_TEXT_PARTS),
        "corpus": record,
        "asked": prompting(
            {name: task for name, task in tasks_of(args.data).items() if name in record.get("tasks", ())}
        ),
        "heldout": {name: file_hash(corpus_file(args.data, name, heldout=True)) for name in roles},
        "settings": recorded_settings,
    }
    if args.hold_out_validation:  # rows of train are left out where there is no file of them
        inputs["valid"] = [name for name in tasks_of(args.data) if task_file(args.data, name, "valid").is_file()]
    work = begin_on_all(target, "train_expert", inputs)
    if work is None:
        return
    if is_main_process() and not args.corpus:
        print(reads(dataset, sources, training_args))

    trainer = train_lora(base, dataset, tokenizer, args, training_args, model_args, work)
    trainer.save_model(str(work / ADAPTER if shared else work))

    model = trainer.accelerator.unwrap_model(trainer.model)
    after = perplexity(heldout_loss(model, tokenizer, heldout))
    with model.disable_adapter():
        before = perplexity(heldout_loss(model, tokenizer, heldout))
    results = {"heldout_perplexity_before": round(before, 3), "heldout_perplexity_after": round(after, 3)}
    results |= {"heldout_passages": len(heldout)} | length_of(trainer)

    if trainer.is_world_process_zero():
        keep = ["adapter_config.json", ADAPTER_FILE]
        if shared:
            results["merge_difference"], keep = merge_trained(trainer, base, work)
        runs.finish(target, {"results": results}, keep=keep)
        print(f"{target}: held-out perplexity of {args.role} {before:.2f} before, {after:.2f} after")
    end(trainer)


if __name__ == "__main__":
    run(main)
