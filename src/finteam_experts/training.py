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

from finteam_experts import runs, sequence_attention
from finteam_experts.adapter_merge import merge_adapter
from finteam_experts.arguments import BaseModelConfig
from finteam_experts.checkpoints import (
    CompleteCheckpoints,
    FiniteGradients,
    complete_checkpoints,
    last_complete_checkpoint,
)
from finteam_experts.errors import InputError
from finteam_experts.fused_lora import fuse_lora
from finteam_experts.models import MLP_MODULES, adapts_split_experts, read_config
from finteam_experts.release import COMPANION_FILES
from finteam_experts.sft import CompactHeadSFTTrainer
from finteam_experts.shards import INDEX, weight_files
from finteam_experts.split_experts import split_experts

ADAPTER = "adapter"  # where a step that ends with a merged model keeps its adapter until then


def begin_on_all(target: Path, step: str, inputs: dict[str, Any]) -> Path | None:
    """`runs.begin` for a training, in every process of a launch: the main process makes the folder, the others find it.

    A folder without a complete checkpoint holds nothing that is worth keeping from a start with other settings.
    """
    state = PartialState()
    with state.main_process_first():
        if state.is_main_process:
            return runs.begin(target, step, inputs, has_progress=lambda work: bool(complete_checkpoints(work)))
        return None if target.exists() else runs.work_folder(target)


def train_lora(
    model_folder: Path,
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    training_args: SFTConfig,
    model_args: BaseModelConfig,
    work: Path,
    callback_of: Callable[[SFTTrainer], TrainerCallback] | None = None,
    experts_at_once: int | None = None,
    route_by_task: bool = False,
) -> SFTTrainer:
    """Train a LoRA on `dataset`, with checkpoints in `work`, from the last complete one if there is any.

    `callback_of(trainer)` makes a callback that needs the trainer; `experts_at_once` is for `split_experts`. With
    `route_by_task` the dataset's column `expert` says which expert of the MoE a row goes through.
    """
    set_seed(training_args.seed)  # the LoRA is drawn before the trainer sets its seed
    options = {"dtype": model_args.dtype or "auto", "attn_implementation": model_args.attn_implementation}
    on_cpu = training_args.device.type == "cpu"
    if on_cpu and not model_args.attn_implementation:
        options["attn_implementation"] = sequence_attention.NAME
    training_args.model_init_kwargs = {**options, **(training_args.model_init_kwargs or {})}
    quantization = get_quantization_config(model_args)
    model = str(model_folder)
    config = read_config(model_folder)
    if quantization and config.model_type == "mixtral":
        raise InputError(
            "load_in_4bit or load_in_8bit: transformers keeps an MoE's experts in fused tensors, which are not quantised. "
            "Leave it out, and cut the model over several GPUs with recipes/accelerate/fsdp2.yaml."
        )
    if adapts_split_experts(config, model_args.lora_target_modules):
        model = AutoModelForCausalLM.from_pretrained(model_folder, **training_args.model_init_kwargs)
        split_experts(model, at_once=experts_at_once)
        training_args.model_init_kwargs = None  # they are for a model that the trainer loads
    elif experts_at_once is not None:
        raise InputError(
            f"experts_at_once is {experts_at_once}: it is for an MoE with a LoRA on its experts' matrices. Leave it out, or "
            f"name {', '.join(MLP_MODULES)} in lora_target_modules."
        )
    training_args.output_dir = str(work)
    training_args.include_num_input_tokens_seen = "all"  # unlike TRL's own count, it survives a resume
    # The trainer deletes the oldest before the newest is marked complete: keep one more than the newest.
    training_args.save_total_limit = max(training_args.save_total_limit or 2, 2)
    checkpoint = last_complete_checkpoint(work)
    trainer = CompactHeadSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=quantization,
        callbacks=[CompleteCheckpoints(), FiniteGradients()],
    )
    if on_cpu:
        fuse_lora(trainer.model)
    if route_by_task:
        trainer.route_by_task()
    if callback_of:
        trainer.add_callback(callback_of(trainer))
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)) if checkpoint else None
    if state and state.global_step >= state.max_steps:  # only load it: the trainer would take a step more
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer


def merge_trained(trainer: SFTTrainer, model_folder: Path, work: Path) -> float:
    """Merge the adapter saved in `work` into its model, beside it; `merged_files` are what the step keeps then.

    Ends the trainer's use. Returns how far a layer's output moved, as `merge_adapter` does.
    """
    _release(trainer)  # room for the merge
    return merge_adapter(model_folder, work / ADAPTER, work)


def merged_files(work: Path) -> list[str]:
    """The files of a merged model in a step's folder."""
    return ["config.json", INDEX, *(file.name for file in weight_files(work)), *COMPANION_FILES]


def end(trainer: SFTTrainer) -> None:
    """Wait for every process of the launch, then end its process group; the trainer is of no use afterwards.

    The model goes first. Its gradient reducer would be the last to hold the process group, and free it with Python's lock in
    hand: a thread of gloo may want that lock for the barrier just passed, and neither would ever end.
    """
    _release(trainer)
    trainer.accelerator.wait_for_everyone()
    trainer.end()


def _release(trainer: SFTTrainer) -> None:
    handler = trainer.callback_handler
    handler.model = handler.optimizer = handler.lr_scheduler = handler.train_dataloader = None
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
