# SPDX-License-Identifier: Apache-2.0
"""STEP 1. Train the LoRA of one role expert on the role's corpus (next-token loss, packed).

    accelerate launch recipes/train_expert.py --config recipes/sample/train_expert.yaml --role macro

Reads RUN_DIR/data and RUN_DIR/base unless --data_dir and --base name others, writes RUN_DIR/adapters/ROLE. The LoRA is
on the MLP alone: that is all that becomes an expert of the MoE. Any TRL setting can be overridden on the command line.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig

from finteam_experts import runs
from finteam_experts.data import corpus_file, read_corpus
from finteam_experts.errors import InputError, run
from finteam_experts.merge_config import MERGE_FILE, check_role
from finteam_experts.models import MLP_MODULES, check_base, fingerprint, load_tokenizer, local_folder
from finteam_experts.perplexity import heldout_loss
from finteam_experts.training import (
    BaseModelConfig,
    RunArguments,
    begin_on_all,
    parse,
    settings,
    train_lora,
)


@dataclass
class ExpertArguments(RunArguments):
    role: str | None = field(default=None, metadata={"help": "A role listed in moe_merge.yaml."})
    merge_config: str = field(default=str(MERGE_FILE), metadata={"help": "The merge: it lists the roles of the team."})
    heldout_passages: int = field(default=32, metadata={"help": "Passages for the perplexity before and after."})


def main() -> None:
    script_args, training_args, model_args = parse((ExpertArguments, SFTConfig, BaseModelConfig))
    role = check_role(script_args.role, Path(script_args.merge_config))
    if not model_args.use_peft or not set(model_args.lora_target_modules or ["?"]) <= set(MLP_MODULES):
        raise InputError(
            f"lora_target_modules is {model_args.lora_target_modules} (use_peft: {model_args.use_peft}). A role expert "
            f"adapts {', '.join(MLP_MODULES)} only: the merge takes attention from the base and would drop the rest."
        )
    run_dir, data = Path(script_args.run_dir), script_args.data_folder()
    base = local_folder(model_args.model_name_or_path or str(run_dir / "base"))
    check_base(base)
    tokenizer = load_tokenizer(base)
    passages, heldout = read_corpus(data, role), read_corpus(data, role, heldout=True)

    target = run_dir / "adapters" / role
    inputs = {
        "role": role,
        "base": fingerprint(base),
        "corpus": runs.file_hash(corpus_file(data, role)),
        "settings": settings(script_args, training_args, model_args),
    }
    work = begin_on_all(target, "train_expert", inputs)
    if work is None:
        return

    trainer = train_lora(base, Dataset.from_dict({"text": passages}), tokenizer, training_args, model_args, work)
    trainer.save_model(str(work))

    model = trainer.accelerator.unwrap_model(trainer.model)
    heldout = heldout[: script_args.heldout_passages]
    after = heldout_loss(model, tokenizer, heldout)
    with model.disable_adapter():
        before = heldout_loss(model, tokenizer, heldout)
    if trainer.is_world_process_zero():
        results = {
            "heldout_perplexity_before": round(math.exp(before), 3),
            "heldout_perplexity_after": round(math.exp(after), 3),
            "heldout_passages": len(heldout),
            "train_tokens": trainer.state.num_input_tokens_seen,
            "steps": trainer.state.global_step,
        }
        runs.remove_all_but(work, ("adapter_config.json", "adapter_model.safetensors", runs.RECORD))
        runs.finish(target, {"results": results})
        print(f"{target}: held-out perplexity of {role} {math.exp(before):.2f} before, {math.exp(after):.2f} after")
    trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    run(main)
