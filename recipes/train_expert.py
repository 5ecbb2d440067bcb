# SPDX-License-Identifier: Apache-2.0
"""STEP 1. Train the LoRA of one role expert on the role's corpus (next-token loss, packed).

    accelerate launch recipes/train_expert.py --config recipes/sample/train_expert.yaml --role macro

Reads RUN_DIR/data and RUN_DIR/base unless --data_dir and --base name others, writes RUN_DIR/adapters/ROLE. The LoRA is
on the MLP alone: that is all that becomes an expert of the MoE. Any TRL setting can be overridden on the command line.

`--corpus FILES` streams the role's text from elsewhere, without a copy of it on this disk or in memory.

`--role shared` trains on the corpora of all roles, attention included if the recipe says so, and writes RUN_DIR/trunk: a
dense model that knows what the roles share. Give it to the later steps as --base RUN_DIR/trunk.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finteam_experts.threads import use_available_cores  # before torch

from datasets import Dataset, IterableDataset, interleave_datasets
from trl import SFTConfig

from finteam_experts import runs
from finteam_experts.chats import ChatFormat
from finteam_experts.data import leaks
from finteam_experts.data.conversations import chat_file, chat_roles, read_chats
from finteam_experts.data.files import check_passages, corpus_file, read_corpus
from finteam_experts.data.streams import describe, stream_corpus
from finteam_experts.data.trl_datasets import DatasetArguments
from finteam_experts.errors import InputError, run
from finteam_experts.evaluation.batches import encode
from finteam_experts.evaluation.heldout import heldout_loss, perplexity
from finteam_experts.files import file_hash
from finteam_experts.fingerprints import PLAIN_TEXT_PARTS, fingerprint
from finteam_experts.merging.config import SHARED, check_role, read_merge_config, trained_roles
from finteam_experts.models import ADAPTER_FILE, MLP_MODULES, as_chats, check_base, load_tokenizer, local_folder
from finteam_experts.training.arguments import (
    BaseModelConfig,
    RunArguments,
    check_length,
    parse,
    rows_of_run,
    settings,
)
from finteam_experts.training.lora import ADAPTER, begin_on_all, end, merge_trained, train_lora

MERGE_FILE = Path(__file__).parents[1] / "moe_merge.yaml"


@dataclass
class ExpertArguments(DatasetArguments, RunArguments):
    role: str | None = field(default=None, metadata={"help": "A role of the merge, or shared: all of them."})
    corpus: str | None = field(
        default=None,
        metadata={
            "help": "Stream the role's text from these files instead of DATA_DIR/corpora/ROLE.jsonl: JSON lines or Parquet, "
            "with wildcards, also hf://datasets/OWNER/NAME/..."
        },
    )
    corpus_column: str = field(default="text", metadata={"help": "The column of those files that has the text."})
    with_chats: bool = field(default=False, metadata={"help": "Train on the role's conversations as well."})
    merge_config: str = field(default=str(MERGE_FILE), metadata={"help": "The merge: it lists the roles of the team."})
    heldout_passages: int = field(default=32, metadata={"help": "Passages for the perplexity before and after."})

    def roles(self) -> list[str]:
        """The roles whose corpora are trained on."""
        merge_config = Path(self.merge_config)
        shared = self.role == SHARED
        return trained_roles(read_merge_config(merge_config)) if shared else [check_role(self.role, merge_config)]


def role_text(
    args: ExpertArguments, roles: list[str], training_args: SFTConfig, form: ChatFormat
) -> tuple[Dataset | IterableDataset, object]:
    """The passages to train on, and what the record says of where they are from.

    Of several corpora one passage in turn: a short one starts again until the longest is through. Conversations are
    passages in the chat format.
    """
    if args.corpus is None:
        corpora = {name: read_corpus(args.data, name) for name in roles}
        for name, passages in corpora.items():
            check_passages(args.data, name, passages)
        leaks.check_corpora(args.data, roles)
        hashes: dict[str, object] = {name: file_hash(corpus_file(args.data, name)) for name in roles}
        if args.with_chats:
            talkers = [name for name in roles if name in chat_roles(args.data)]
            if not talkers:
                raise InputError(f"with_chats: {args.data}/chats has no conversations of {', '.join(roles)}.")
            corpora |= {f"{name}, chats": form.texts(read_chats(args.data, name)) for name in talkers}
            hashes = {"corpora": hashes, "chats": {name: file_hash(chat_file(args.data, name)) for name in talkers}}
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


def main() -> None:
    args, training_args, model_args = parse((ExpertArguments, SFTConfig, BaseModelConfig))
    use_available_cores()
    args.share_batch(training_args)
    roles, shared, run_dir = args.roles(), args.role == SHARED, Path(args.run_dir)
    base = local_folder(model_args.model_name_or_path or str(run_dir / "base"))
    config, tokenizer = check_base(base), load_tokenizer(base)
    model_args.check_lora(config, allowed=None if shared else MLP_MODULES)
    check_length(training_args.max_length, config)

    passages, corpus = role_text(args, roles, training_args, as_chats(tokenizer, base))
    heldout = [text for name in roles for text in read_corpus(args.data, name, heldout=True)[: args.heldout_passages]]
    if not encode(tokenizer, heldout, 3):
        raise InputError(
            f"{corpus_file(args.data, roles[0], heldout=True)}: its first {len(heldout)} passages are of one token or none, of "
            "which there is no perplexity. Add longer ones, or raise heldout_passages."
        )
    target = run_dir / "trunk" if shared else run_dir / "adapters" / args.role
    inputs = {
        "role": args.role,
        # the trunk is a model with its chat template, an adapter knows plain text alone
        "base": fingerprint(base) if shared else fingerprint(base, PLAIN_TEXT_PARTS),
        "corpus": corpus,
        "heldout": {name: file_hash(corpus_file(args.data, name, heldout=True)) for name in roles},
        "settings": settings(args, training_args, model_args),
    }
    work = begin_on_all(target, "train_expert", inputs)
    if work is None:
        return

    trainer = train_lora(base, passages, tokenizer, args, training_args, model_args, work)
    trainer.save_model(str(work / ADAPTER if shared else work))

    model = trainer.accelerator.unwrap_model(trainer.model)
    after = perplexity(heldout_loss(model, tokenizer, heldout))
    with model.disable_adapter():
        before = perplexity(heldout_loss(model, tokenizer, heldout))
    results = {
        "heldout_perplexity_before": round(before, 3),
        "heldout_perplexity_after": round(after, 3),
        "heldout_passages": len(heldout),
        "train_tokens": trainer.state.num_input_tokens_seen,
        "steps": trainer.state.global_step,
    }

    if trainer.is_world_process_zero():
        keep = ["adapter_config.json", ADAPTER_FILE]
        if shared:
            results["merge_difference"], keep = merge_trained(trainer, base, work)
        runs.finish(target, {"results": results}, keep=keep)
        print(f"{target}: held-out perplexity of {args.role} {before:.2f} before, {after:.2f} after")
    end(trainer)


if __name__ == "__main__":
    run(main)
