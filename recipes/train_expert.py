# SPDX-License-Identifier: Apache-2.0
"""STEP 1. Train the LoRA of one role expert on what its role has: corpus, conversations, tasks.

    accelerate launch recipes/train_expert.py --config recipes/sample/train_expert.yaml --role macro

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
from finteam_experts.data import leaks
from finteam_experts.data.conversations import GENERAL, chat_file, chat_roles, read_chats
from finteam_experts.data.files import check_passages, corpus_file, read_corpus, task_file, tasks_of
from finteam_experts.data.streams import describe, stream_corpus
from finteam_experts.data.tasks import prompting
from finteam_experts.data.trl_datasets import DatasetArguments
from finteam_experts.errors import InputError, run
from finteam_experts.evaluation.batches import encode
from finteam_experts.evaluation.heldout import heldout_loss, perplexity
from finteam_experts.files import file_hash
from finteam_experts.fingerprints import PLAIN_TEXT_PARTS, fingerprint
from finteam_experts.merging.config import SHARED, roles_to_train
from finteam_experts.models import ADAPTER_FILE, MLP_MODULES, as_chats, check_base, load_tokenizer, local_folder
from finteam_experts.training.arguments import BaseModelConfig, RunArguments, TaskRowArguments, parse, settings
from finteam_experts.training.lora import ADAPTER, begin_on_all, end, merge_trained, train_lora
from finteam_experts.training.rows import (
    Example,
    check_length,
    conversation_examples,
    in_shares,
    rows_of_run,
    task_examples,
    text_examples,
)  # fmt: skip

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
        default=None, metadata={"help": "With learn_from: steps for each task of the role, if max_steps is not set."}
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
        right = isinstance(shares, dict) and shares and set(shares) <= set(PARTS)
        if not right or not all(isinstance(share, int | float) and share > 0 for share in shares.values()):
            raise InputError(
                f"learn_from is {self.learn_from!r}; it gives {', '.join(PARTS)}, or some of them, a share above 0, as "
                "'{corpus: 0.2, chats: 0.4, tasks: 0.4}'."
            )
        if self.corpus or self.role == SHARED:
            print("learn_from is for one role's own files: this training reads the corpus alone")
            self.learn_from = None
            return
        self.learn_from = {part: share / sum(shares.values()) for part, share in shares.items()}

    def set_steps(self, training_args: SFTConfig, roles: list[str]) -> None:
        """Set the steps of this training from `steps_per_task`, unless its own settings say how many."""
        if self.learn_from and self.steps_per_task and training_args.max_steps < 1:
            limits = self.limits(known := tasks_of(self.data))
            tasks = sum(task.role in roles and limits[name] != 0 for name, task in known.items())
            training_args.max_steps = self.steps_per_task * max(1, tasks)

    def roles(self) -> list[str]:
        """The roles whose corpora are trained on."""
        return roles_to_train(self.role, Path(self.merge_config), self.data)


def role_text(
    args: ExpertArguments, roles: list[str], training_args: SFTConfig, form: ChatFormat
) -> tuple[Dataset | IterableDataset, object]:
    """The passages to train on, and what the record says of where they are from.

    Of several corpora one passage in turn: a short one starts again until the longest is through.
    """
    if args.corpus is None:
        corpora = {name: read_corpus(args.data, name) for name in roles}
        for name, passages in corpora.items():
            check_passages(args.data, name, passages)
        leaks.check_corpora(args.data, roles)
        hashes: dict[str, object] = {name: file_hash(corpus_file(args.data, name)) for name in roles}
        if args.sources():
            for number, (rows, _) in enumerate(args.rows(rows_of_run(training_args))):
                conversations = [row for row in rows if not isinstance(row, str)]
                texts = [row for row in rows if isinstance(row, str)] + form.texts(conversations)
                corpora |= {f"dataset {number}": texts}
            hashes = {"files": hashes, "datasets": args.described()}
        datasets = [Dataset.from_dict({"text": passages}) for passages in corpora.values()]
        text = interleave_datasets(datasets, stopping_strategy="all_exhausted")
        return text, hashes.get(args.role, hashes)
    if args.role == SHARED or training_args.max_steps < 1:
        raise InputError(
            f"corpus is {args.corpus}, role {args.role} and max_steps {training_args.max_steps}: a stream is one role's, and its "
            "end is not known. Name a role, and set max_steps."
        )
    holds_test_text = leaks.holds_test_text(args.data)
    text = stream_corpus(args.corpus, args.corpus_column, training_args.seed, holds_test_text)
    return text, describe(args.corpus, args.corpus_column)


def role_rows(
    args: ExpertArguments, training_args: SFTConfig, form: ChatFormat, positions: int
) -> tuple[Dataset, object]:
    """The rows to train on, in the shares of `learn_from`, and what the record says of where they are from.

    Passages are cut at `max_length`; other rows stay whole, as the trunk learned them, if they fit into the model's `positions`.
    """
    data, role, seed = args.data, args.role, training_args.seed
    longest = training_args.max_length or positions
    limits = args.limits(tasks_of(data))
    tasks = {name: task for name, task in tasks_of(data).items() if task.role == role and limits[name] != 0}
    leaks.check_tasks(data, tasks)
    leaks.check_corpora(data, [role])
    leaks.check_chats(data, chat_roles(data))
    passages = read_corpus(data, role)
    check_passages(data, role, passages)  # the router will need them, whatever the expert learns from
    parts = {part: list[Example]() for part in PARTS}
    hashes: dict[str, object] = {}
    if "corpus" in args.learn_from:
        parts["corpus"] = text_examples(form, passages, role, longest)
        hashes["corpus"] = file_hash(corpus_file(data, role))
    for part, whose in (("chats", role), (GENERAL, GENERAL)):
        if part in args.learn_from and whose in chat_roles(data):
            parts[part] = conversation_examples(form, read_chats(data, whose), whose)
            hashes[part] = file_hash(chat_file(data, whose))
    if "tasks" in args.learn_from:
        parts["tasks"] = task_examples(data, tasks, form, seed, limits, hold_out=False)
        hashes["tasks"] = {name: file_hash(task_file(data, name, "train")) for name in tasks}
        hashes["asked"] = prompting(tasks)
    if args.sources():
        for rows, _ in args.rows(rows_of_run(training_args)):
            parts["corpus"] += text_examples(form, [row for row in rows if isinstance(row, str)], role, longest)
            parts["chats"] += conversation_examples(form, [row for row in rows if not isinstance(row, str)], role)
        hashes["datasets"] = args.described()
    found = {part: parts[part] for part in args.learn_from if parts[part]}
    if not found:
        raise InputError(f"{data} has nothing for {', '.join(args.learn_from)} of learn_from and the role {role}.")
    if missing := [part for part in args.learn_from if part not in found]:
        print(f"{data} has nothing for {', '.join(missing)}: {role} learns from {', '.join(found)}")
    return in_shares(found, args.learn_from, positions, seed), hashes


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
    if args.learn_from:
        dataset, sources = role_rows(args, training_args, form, config.max_position_embeddings)
        # whole rows, of which nothing is left to cut; packing would sort them by length
        training_args.max_length, training_args.packing, training_args.padding_free = None, False, True
    else:
        dataset, sources = role_text(args, roles, training_args, form)
    heldout = [text for name in roles for text in read_corpus(args.data, name, heldout=True)[: args.heldout_passages]]
    if not encode(tokenizer, heldout, 3):
        raise InputError(
            f"{corpus_file(args.data, roles[0], heldout=True)}: its first {len(heldout)} passages are of one token or none, of "
            "which there is no perplexity. Add longer ones, or raise heldout_passages."
        )
    target = run_dir / "trunk" if shared else run_dir / "adapters" / args.role
    inputs = {
        "role": args.role,
        # the trunk is a model with its chat template, an adapter of a corpus knows plain text alone
        "base": fingerprint(base) if shared or args.learn_from else fingerprint(base, PLAIN_TEXT_PARTS),
        "corpus": sources,
        "heldout": {name: file_hash(corpus_file(args.data, name, heldout=True)) for name in roles},
        "settings": settings(args, training_args, model_args),
    }
    work = begin_on_all(target, "train_expert", inputs)
    if work is None:
        return

    trainer = train_lora(base, dataset, tokenizer, args, training_args, model_args, work)
    trainer.save_model(str(work / ADAPTER if shared else work))

    model = trainer.accelerator.unwrap_model(trainer.model)
    after = perplexity(heldout_loss(model, tokenizer, heldout))
    with model.disable_adapter():
        before = perplexity(heldout_loss(model, tokenizer, heldout))
    results = {"heldout_perplexity_before": round(before, 3), "heldout_perplexity_after": round(after, 3)}
    results |= {"heldout_passages": len(heldout), "steps": trainer.state.global_step}
    results["train_tokens"] = trainer.state.num_input_tokens_seen

    if trainer.is_world_process_zero():
        keep = ["adapter_config.json", ADAPTER_FILE]
        if shared:
            results["merge_difference"], keep = merge_trained(trainer, base, work)
        runs.finish(target, {"results": results}, keep=keep)
        print(f"{target}: held-out perplexity of {args.role} {before:.2f} before, {after:.2f} after")
    end(trainer)


if __name__ == "__main__":
    run(main)
