# SPDX-License-Identifier: Apache-2.0
"""LoRA training that resumes and stops at the first figure that is not finite: what both training recipes do."""

import math
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
from finteam_experts.merging.config import BASE
from finteam_experts.merging.lora import merge_lora
from finteam_experts.merging.moe import adapter_in_team
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
    if isinstance(dataset, IterableDataset):
        for name, wanted in (("train_sampling_strategy", "random"), ("data_seed", None)):
            if (value := getattr(training_args, name)) != wanted:
                raise InputError(
                    f"{name} is {value!r}, and a stream is read in the order that seed gives. Leave it out."
                )
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
    if training_args.include_num_input_tokens_seen == "no":
        training_args.include_num_input_tokens_seen = "all"  # unlike TRL's own count, it survives a resume
    # The trainer deletes the oldest before the newest is marked complete: keep one more than the newest.
    training_args.save_total_limit = max(training_args.save_total_limit or 2, 2)
    checkpoint = checkpoints.last_complete(work)
    try:
        trainer = RecipeTrainer(
            model=model, args=training_args, train_dataset=dataset, processing_class=tokenizer,
            peft_config=get_peft_config(model_args), quantization_config=quantization,
            callbacks=[checkpoints.CompleteCheckpoints(), checkpoints.FiniteGradients()],
        )  # fmt: skip
    except ValueError as error:  # settings that TRL or transformers can't follow together
        raise InputError(str(error)) from None
    trainer.cpu_speedups = fast
    trainer.balance_rows, trainer.stratify_rows = script_args.balance_rows, script_args.stratify_rows
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


def rows_per_step(training_args: SFTConfig) -> int:
    """The rows of an optimiser step in all processes together."""
    each = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    return each * PartialState().num_processes


def length_of(trainer: SFTTrainer) -> dict[str, int]:
    """How long a training was, as its record says it."""
    steps, tokens = trainer.state.global_step, trainer.state.num_input_tokens_seen
    return {"steps": steps, "rows_per_step": rows_per_step(trainer.args), "train_tokens": tokens}


def match_steps(run_dir: Path, training_args: SFTConfig) -> dict[str, Any]:
    """Set as many steps as the run folder's experts and team took together, and return theirs.

    Where a step of theirs has another number of rows, as many rows. Raises `InputError` where one of them isn't there yet.
    """
    advice = "(or set --max_steps: the baseline then takes that many steps, and the record doesn't call them matched)"
    team = runs.require(run_dir / "moe-instruct", f"recipes/instruct_tune.py for the team {advice}")
    results = {}
    for role in (member["name"] for member in team["team"] if member["name"] != BASE):  # which is not trained
        made_by = f"recipes/train_expert.py --role {role} {advice}"
        results[role] = runs.require(run_dir / "adapters" / role, made_by)["results"]
        if adapter_in_team(run_dir, role) is None:
            raise InputError(
                f"{run_dir}/moe has another expert '{role}' than {run_dir}/adapters/{role}, and how long its training was is not "
                "known: set --max_steps."
            )
    rows = sum(each["steps"] * each["rows_per_step"] for each in (*results.values(), team["results"]))
    training_args.max_steps = math.ceil(rows / rows_per_step(training_args))
    return {"experts": {role: each["steps"] for role, each in results.items()}, "team": team["results"]["steps"]}


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
        **length_of(trainer),
        "log": [entry for entry in log if "loss" in entry],
        "routing": routing,
    }


def merge_trained(trainer: SFTTrainer, model_folder: Path, work: Path) -> tuple[float, list[str]]:
    """Merge the adapter saved in `work` into its model, beside it. Ends the trainer's use.

    Returns how far a layer's output moved, as `merge_lora` does, and the files that the step keeps.
    """
    _release(trainer)  # room for the merge
    difference = merge_lora(model_folder, work / ADAPTER, work)
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
