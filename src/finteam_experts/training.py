# SPDX-License-Identifier: Apache-2.0
"""What the two training recipes share: their arguments, strict parsing, and LoRA training that resumes."""

import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from finteam_experts import runs, sequence_attention
from finteam_experts.adapter_merge import merge_adapter
from finteam_experts.errors import InputError, nearest
from finteam_experts.fused_lora import fuse_lora
from finteam_experts.models import MLP_MODULES, adapts_split_experts
from finteam_experts.release import COMPANION_FILES
from finteam_experts.sft import CompactHeadSFTTrainer
from finteam_experts.shards import INDEX, weight_files
from finteam_experts.split_experts import split_experts

ADAPTER = "adapter"  # where a step that ends with a merged model keeps its adapter until then
_COMPLETE = "checkpoint_is_complete"
# Settings that change what is shown, kept or where it lies, never the weights: two runs may differ in them.
_NOT_INPUTS = (
    "output_dir", "run_dir", "data_dir", "merge_config", "model_name_or_path", "use_cpu", "disable_tqdm", "report_to",
    "run_name", "project", "trackio", "logging_", "log_", "save_", "hub_", "push_to_hub",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers",
    "dataset_num_proc", "resume_from_checkpoint", "local_rank", "ddp_", "heldout_passages", "accelerator_config", "debug",
    "role", "corpus", "routing_", "activation_checkpointing", "gradient_checkpointing",
)  # fmt: skip


@dataclass
class RunArguments:
    run_dir: str = field(
        default="outputs/quickstart", metadata={"help": "Run folder; every step has its place in it."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Data directory. Defaults to RUN_DIR/data."})
    rows_per_step: int | None = field(
        default=None,
        metadata={"help": "Rows of an optimiser step in all processes together; sets gradient_accumulation_steps."},
    )

    def data_folder(self) -> Path:
        return Path(self.data_dir or Path(self.run_dir) / "data")


@dataclass
class BaseModelConfig(ModelConfig):
    model_name_or_path: str | None = field(
        default=None,
        metadata={"aliases": ["--base"], "help": "Dense base: Hub id or folder. Defaults to RUN_DIR/base."},
    )


def parse(argument_classes: tuple[type, ...]) -> tuple[Any, ...]:
    """Parse the command line and its `--config` YAML into dataclasses; an unknown key is an `InputError`, not ignored."""
    known = {f.name for cls in argument_classes for f in dataclasses.fields(cls)} | {"base", "config"}
    if "--config" in sys.argv[:-1]:
        path = Path(sys.argv[sys.argv.index("--config") + 1])
        if not path.is_file():
            raise InputError(f"--config {path}: no such file.")
        content = yaml.safe_load(path.read_text())
        if not isinstance(content, dict):
            raise InputError(f"{path}: a recipe is a mapping of settings, found {type(content).__name__}.")
        for key in content:
            if key not in known:
                raise InputError(f"{path}: unknown key '{key}'.{nearest(key, known)}")
    try:
        *parsed, unknown = TrlParser(argument_classes, allow_abbrev=False).parse_args_and_config(
            return_remaining_strings=True
        )
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from None
    if unknown:
        raise InputError(f"unknown argument '{unknown[0]}'.{nearest(unknown[0].lstrip('-'), known)}")
    for arguments in parsed:
        if isinstance(arguments, SFTConfig):
            if arguments.output_dir not in (None, "trainer_output"):
                raise InputError(
                    "output_dir is set by run_dir, so that the next step finds it. Remove it, set run_dir."
                )
            PartialState(cpu=arguments.use_cpu)  # whoever makes it first says where the processes meet
    return tuple(parsed)


def share_batch(rows_per_step: int | None, training_args: SFTConfig) -> None:
    """Set how often each process accumulates gradients, so that an optimiser step has that many rows on any machine.

    Raises `InputError` if the processes can't share them equally.
    """
    if rows_per_step is None:
        return
    processes, rows = PartialState().num_processes, training_args.per_device_train_batch_size
    if training_args.gradient_accumulation_steps != 1:
        raise InputError("rows_per_step and gradient_accumulation_steps are both set. Leave the second one out.")
    if rows_per_step % (processes * rows):
        raise InputError(
            f"rows_per_step is {rows_per_step}, which {processes} processes of per_device_train_batch_size {rows} can't share "
            f"equally. Launch another number of processes, or set one of the two so that {rows_per_step} is a multiple of "
            "processes times per_device_train_batch_size."
        )
    training_args.gradient_accumulation_steps = rows_per_step // (processes * rows)


def settings(*arguments: Any) -> dict[str, Any]:
    """The settings that differ from their defaults and can change the weights, by name."""
    left_out = _NOT_INPUTS
    if any(getattr(group, "rows_per_step", None) for group in arguments):
        left_out += ("gradient_accumulation_steps",)  # it follows from the number of processes
    changed = {}
    for group in arguments:
        for f in dataclasses.fields(group):
            default = f.default_factory() if callable(f.default_factory) else f.default
            value = getattr(group, f.name)
            if f.init and not f.name.startswith(left_out) and value not in (default, None):
                changed[f.name] = value if isinstance(value, bool | int | float | str | list | dict) else str(value)
    return changed


def begin_on_all(target: Path, step: str, inputs: dict[str, Any]) -> Path | None:
    """`runs.begin` in every process of a launch: the main process makes the folder, the others find it in silence."""
    state = PartialState()
    silence = contextlib.nullcontext() if state.is_main_process else contextlib.redirect_stdout(None)
    with state.main_process_first(), silence:
        return runs.begin(target, step, inputs)


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
    if training_args.use_cpu:  # `accelerate launch` leaves each process with one thread
        torch.set_num_threads(max(1, os.cpu_count() // PartialState().num_processes))
    set_seed(training_args.seed)  # the LoRA is drawn before the trainer sets its seed
    options = {"dtype": model_args.dtype or "auto", "attn_implementation": model_args.attn_implementation}
    on_cpu = training_args.device.type == "cpu"
    if on_cpu and not model_args.attn_implementation:
        options["attn_implementation"] = sequence_attention.NAME
    training_args.model_init_kwargs = {**options, **(training_args.model_init_kwargs or {})}
    quantization = get_quantization_config(model_args)
    model = str(model_folder)
    if quantization and AutoConfig.from_pretrained(model_folder).model_type == "mixtral":
        raise InputError(
            "load_in_4bit or load_in_8bit: transformers keeps an MoE's experts in fused tensors, which are not quantised. "
            "Leave it out, and cut the model over several GPUs with recipes/accelerate/fsdp2.yaml."
        )
    if adapts_split_experts(AutoConfig.from_pretrained(model_folder), model_args.lora_target_modules):
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
    checkpoint = _last_complete_checkpoint(work)
    trainer = CompactHeadSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=quantization,
        callbacks=[CompleteCheckpoints()],
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
    """Merge the adapter saved in `work` into its model, leave nothing but the merged model and the record in `work`.

    Ends the trainer's use. Returns how far a layer's output moved, as `merge_adapter` does.
    """
    _release(trainer)  # room for the merge
    difference = merge_adapter(model_folder, work / ADAPTER, work)
    weights = [file.name for file in weight_files(work)]
    keep = ("config.json", INDEX, runs.RECORD, *weights, *COMPANION_FILES)
    runs.remove_all_but(work, keep)
    return difference


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


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint once every process has written its part, so that a cut-off one is never resumed from."""

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / _COMPLETE).touch()


def _last_complete_checkpoint(work: Path) -> Path | None:
    """The newest complete checkpoint in `work`; half-written ones are deleted, lest the trainer writes into them."""
    checkpoints = {int(path.name.rpartition("-")[2]): path for path in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    with PartialState().main_process_first():
        for path in checkpoints.values():
            if not (path / _COMPLETE).exists():
                shutil.rmtree(path, ignore_errors=True)
    complete = [step for step, path in checkpoints.items() if path.exists()]
    if not complete:
        return None
    print(f"Resuming from step {max(complete)}")
    return checkpoints[max(complete)]
