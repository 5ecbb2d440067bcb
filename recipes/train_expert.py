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
from finteam_experts.data import check_passages, corpus_file, read_corpus
from finteam_experts.errors import InputError, run
from finteam_experts.merge_config import MERGE_FILE, SHARED, check_role, read_merge_config, trained_roles
from finteam_experts.models import (
    ADAPTER_FILE,
    MLP_MODULES,
    PLAIN_TEXT_PARTS,
    check_base,
    fingerprint,
    load_tokenizer,
    local_folder,
)
from finteam_experts.perplexity import heldout_loss, perplexity
from finteam_experts.streams import describe, stream_corpus
from finteam_experts.tasks import TASKS
from finteam_experts.training import ADAPTER, begin_on_all, end, merge_trained, merged_files, train_lora


@dataclass
class ExpertArguments(RunArguments):
    role: str | None = field(
        default=None, metadata={"help": "A role listed in moe_merge.yaml, or shared: all of them."}
    )
    corpus: str | None = field(
        default=None,
        metadata={
            "help": "Stream the role's text from these files instead of DATA_DIR/corpora/ROLE.jsonl: JSON lines or Parquet, "
            "with wildcards, also hf://datasets/OWNER/NAME/..."
        },
    )
    corpus_column: str = field(default="text", metadata={"help": "The column of those files that has the text."})
    merge_config: str = field(default=str(MERGE_FILE), metadata={"help": "The merge: it lists the roles of the team."})
    heldout_passages: int = field(default=32, metadata={"help": "Passages for the perplexity before and after."})


def team_passages(data: Path, names: list[str]) -> Dataset:
    """The corpora's passages in turn, one of each role; a short corpus starts again until the longest is through."""
    corpora = [Dataset.from_dict({"text": read_corpus(data, name)}) for name in names]
    return interleave_datasets(corpora, stopping_strategy="all_exhausted")


def role_text(
    args: ExpertArguments, data: Path, role: str, corpora: list[str], training_args: SFTConfig
) -> tuple[Dataset | IterableDataset, object]:
    """The passages to train on, and what the record says of where they are from."""
    if args.corpus is None:
        for name in corpora:
            check_passages(data, name, read_corpus(data, name))
        leaks.check_corpora(data, corpora, TASKS)
        hashes = {name: runs.file_hash(corpus_file(data, name)) for name in corpora}
        return team_passages(data, corpora), hashes if role == SHARED else hashes[role]
    if role == SHARED or training_args.max_steps < 1:
        raise InputError(
            f"corpus is {args.corpus}, role {role} and max_steps {training_args.max_steps}: a stream is one role's, and its end "
            "is not known. Name a role, and set max_steps."
        )
    passages = stream_corpus(args.corpus, args.corpus_column, training_args.seed, leaks.holds_test_text(data, TASKS))
    return passages, describe(args.corpus, args.corpus_column)


def main() -> None:
    script_args, training_args, model_args = parse((ExpertArguments, SFTConfig, BaseModelConfig))
    use_available_cores()
    share_batch(script_args.rows_per_step, training_args)
    merge_config = Path(script_args.merge_config)
    if script_args.role == SHARED:
        role, corpora = SHARED, trained_roles(read_merge_config(merge_config))
    else:
        role = check_role(script_args.role, merge_config)
        corpora = [role]
    run_dir, data = Path(script_args.run_dir), script_args.data_folder()
    base = local_folder(model_args.model_name_or_path or str(run_dir / "base"))
    config = check_base(base)
    check_lora(model_args, config, allowed=None if role == SHARED else MLP_MODULES)
    check_length(training_args.max_length, config, "max_length")
    tokenizer = load_tokenizer(base)
    passages, corpus = role_text(script_args, data, role, corpora, training_args)
    heldout = [
        text for name in corpora for text in read_corpus(data, name, heldout=True)[: script_args.heldout_passages]
    ]
    if not encode(tokenizer, heldout, 3):
        raise InputError(
            f"{corpus_file(data, corpora[0], heldout=True)}: its first {len(heldout)} passages are of one token or none, of which "
            "there is no perplexity. Add longer ones, or raise heldout_passages."
        )

    target = run_dir / "trunk" if role == SHARED else run_dir / "adapters" / role
    # the trunk is a model with its chat template, an adapter knows plain text alone
    inputs = {
        "role": role,
        "base": fingerprint(base) if role == SHARED else fingerprint(base, PLAIN_TEXT_PARTS),
        "corpus": corpus,
        "heldout": {name: runs.file_hash(corpus_file(data, name, heldout=True)) for name in corpora},
        "settings": settings(script_args, training_args, model_args),
    }
    work = begin_on_all(target, "train_expert", inputs)
    if work is None:
        return

    trainer = train_lora(base, passages, tokenizer, training_args, model_args, work)
    trainer.save_model(str(work / ADAPTER if role == SHARED else work))

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
        if role == SHARED:
            results["merge_difference"] = merge_trained(trainer, base, work)
        keep = merged_files(work) if role == SHARED else ("adapter_config.json", ADAPTER_FILE)
        runs.finish(target, {"results": results}, keep=keep)
        print(f"{target}: held-out perplexity of {role} {before:.2f} before, {after:.2f} after")
    end(trainer)


if __name__ == "__main__":
    run(main)
