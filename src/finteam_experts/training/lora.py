# SPDX-License-Identifier: Apache-2.0
"""LoRA training that resumes and stops at the first figure that is not finite: what both training recipes do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from finteam_experts import runs
from finteam_experts.errors import InputError
from finteam_experts.families import is_moe
from finteam_experts.merging.adapters import merge_adapter
from finteam_experts.merging.sums import copy_sums
from finteam_experts.models import COMPANION_FILES, read_config
from finteam_experts.training import checkpoints, cpu
from finteam_experts.training.arguments import BaseModelConfig, RunArguments
from finteam_experts.training.experts import adapts_linear_experts, split_experts
from finteam_experts.training.trainer import RecipeTrainer
from finteam_experts.weights import INDEX, weight_files

ADAPTER = "adapter"  # where a step that ends with a merged model keeps its adapter until then


def begin_on_all(target: Path, step: str, inputs: dict[str, Any]) -> Path | None:
    """`runs.begin` for a training, in every process of a launch: the main process makes the folder, the others find it.

    A folder without a complete checkpoint has nothing worth keeping, and is started again with other settings.
    """
    state = PartialState()
    with state.main_process_first():
        if state.is_main_process:
            return runs.begin(target, step, inputs, has_progress=lambda work: bool(checkpoints.complete(work)))
        return None if target.exists() else runs.work_folder(target)


def train_lora(
    model_folder: Path, dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, script_args: RunArguments,
    training_args: SFTConfig, model_args: BaseModelConfig, work: Path,
    callback_of: Callable[[SFTTrainer], TrainerCallback] | None = None,
) -> SFTTrainer:  # fmt: skip
    """Train a LoRA on `dataset`, with checkpoints in `work`, from the last complete one if there is any.

    `callback_of(trainer)` makes a callback that needs the trainer.
    """
    set_seed(training_args.seed)  # the LoRA is drawn before the trainer sets its seed
    config, quantization = read_config(model_folder), get_quantization_config(model_args)
    if quantization and is_moe(config):
        raise InputError(
            "load_in_4bit or load_in_8bit: transformers keeps an MoE's experts in fused tensors, which are not quantised. "
            "Leave it out, and cut the model over several GPUs with recipes/accelerate/fsdp2.yaml."
        )
    fast = script_args.cpu_speedups and training_args.device.type == "cpu"
    attention = model_args.attn_implementation or (cpu.ATTENTION if fast else None)
    # without a cast of every weight in every step; a LoRA's own weights stay in float32
    dtype = model_args.dtype or ("bfloat16" if fast and training_args.bf16 else "float32")
    options = {"dtype": dtype, "attn_implementation": attention}
    training_args.model_init_kwargs = {**options, **(training_args.model_init_kwargs or {})}
    model = str(model_folder)
    if adapts_linear_experts(config, model_args.lora_target_modules):
        model = AutoModelForCausalLM.from_pretrained(model_folder, **training_args.model_init_kwargs)
        split_experts(model)
        training_args.model_init_kwargs = None  # they are for a model that the trainer loads
    training_args.output_dir = str(work)
    training_args.include_num_input_tokens_seen = "all"  # unlike TRL's own count, it survives a resume
    # The trainer deletes the oldest before the newest is marked complete: keep one more than the newest.
    training_args.save_total_limit = max(training_args.save_total_limit or 2, 2)
    checkpoint = checkpoints.last_complete(work)
    trainer = RecipeTrainer(
        model=model, args=training_args, train_dataset=dataset, processing_class=tokenizer,
        peft_config=get_peft_config(model_args), quantization_config=quantization,
        callbacks=[checkpoints.CompleteCheckpoints(), checkpoints.FiniteGradients()],
    )  # fmt: skip
    trainer.cpu_speedups, trainer.balance_rows, trainer.stratify_rows = (
        fast,
        script_args.balance_rows,
        script_args.stratify_rows,
    )
    if fast:
        cpu.fuse_lora(trainer.model)
    if callback_of:
        trainer.add_callback(callback_of(trainer))
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)) if checkpoint else None
    if state and state.global_step >= state.max_steps:  # only load it: the trainer would take a step more
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer


def tuning_results(trainer: SFTTrainer, rows: int) -> dict:
    """What the record keeps of a tuning on that many rows."""
    trainable, total = trainer.model.get_nb_trainable_parameters()
    log = trainer.state.log_history
    routing = [
        {"step": entry["step"]} | {k.removeprefix("routing/"): v for k, v in entry.items() if k.startswith("routing/")}
        for entry in log
        if "routing/load_entropy" in entry
    ]
    return {
        "trainable_parameters": trainable,
        "total_parameters": total - trainable,
        "rows_seen": round(trainer.state.epoch * rows),
        "train_tokens": trainer.state.num_input_tokens_seen,
        "steps": trainer.state.global_step,
        "log": [entry for entry in log if "loss" in entry],
        "routing": routing,
    }


def merge_trained(trainer: SFTTrainer, model_folder: Path, work: Path) -> tuple[float, list[str]]:
    """Merge the adapter saved in `work` into its model, beside it. Ends the trainer's use.

    Returns how far a layer's output moved, as `merge_adapter` does, and the files that the step keeps.
    """
    _release(trainer)  # room for the merge
    difference = merge_adapter(model_folder, work / ADAPTER, work)
    kept = ["config.json", INDEX, *(file.name for file in weight_files(work)), *COMPANION_FILES]
    return difference, kept + copy_sums(model_folder, work)


def end(trainer: SFTTrainer) -> None:
    """Wait for every process of the launch, then end its process group; the trainer is of no use afterwards.

    The model goes first. Its gradient reducer would be the last to hold the process group, and free it while holding Python's
    lock: a thread of gloo may want that lock for the barrier just passed, and neither would ever end.
    """
    _release(trainer)
    trainer.accelerator.wait_for_everyone()
    trainer.end()


def _release(trainer: SFTTrainer) -> None:
    handler = trainer.callback_handler
    handler.model = handler.optimizer = handler.lr_scheduler = handler.train_dataloader = None
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
