# SPDX-License-Identifier: Apache-2.0
"""Settings of TRL's that the rest of the pipeline would not follow, or that do not go together."""

import dataclasses
from enum import Enum
from typing import Any

import torch
from transformers import get_scheduler
from trl import ModelConfig, SFTConfig

from finteam_experts.errors import InputError, check_number

_BASE = "What follows uses the base's own: put it into the base's folder, and name that folder with --base."
_SCORED = "Nothing is evaluated while a recipe trains: scripts/evaluate.py scores the models, on validation rows with --split valid."
_PUSHED = "scripts/publish.py pushes a run to the Hub, with its cards."
_LOSS = "A tuning's loss is on the answers, an expert's on all of its text."
# TRL's settings that the rest of the pipeline would not follow, by name or by the beginning of it.
_REFUSED = {
    "chat_template_path": _BASE, "eos_token": _BASE, "pad_token": _BASE, "trust_remote_code": "Bases are of families that transformers has itself.",
    "model_revision": "Download that revision with `hf download ID --revision REVISION --local-dir DIR`, and name it with --base.",
    "assistant_only_loss": _LOSS, "completion_only_loss": _LOSS,
    "dataset_text_field": "Corpora have the column text; --corpus_column names another one of streamed files.",
    "dataset_kwargs": "Rows are prepared by this package.", "truncation_mode": "Texts are cut at their end or not at all.",
    "eval_": _SCORED, "do_eval": _SCORED, "do_predict": _SCORED, "per_device_eval_batch_size": _SCORED, "load_best_model_at_end": _SCORED,
    "metric_for_best_model": _SCORED, "greater_is_better": _SCORED, "include_for_metrics": _SCORED, "batch_eval_metrics": _SCORED,
    "prediction_loss_only": _SCORED, "push_to_hub": _PUSHED, "hub_": _PUSHED,
    "resume_from_checkpoint": "The same command resumes by itself.",
    "auto_find_batch_size": "It would change the batch while training: set per_device_train_batch_size to what fits.",
    "output_dir": "It is set by run_dir, so that the next step finds it. Remove it, set run_dir.",
}  # fmt: skip

# Numbers that torch and PEFT refuse in the middle of a run, or take to mean something else, by what they have to be.
_BOUNDS: dict[str, dict[str, float]] = {
    **dict.fromkeys(("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
                     "logging_steps", "save_steps", "save_total_limit", "max_length", "lora_r", "lora_alpha"), {"above": 0}),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "adam_epsilon", "warmup_steps", "neftune_noise_alpha", "router_aux_loss_coef",
                     "dataloader_num_workers", "routing_steps"), {"least": 0}),
    **dict.fromkeys(("lora_dropout", "adam_beta1", "adam_beta2", "label_smoothing_factor"), {"least": 0, "below": 1}),
    **dict.fromkeys(("seed", "data_seed"), {"least": 0, "below": 2**32}),
    **dict.fromkeys(("heldout_passages", "routing_passages", "rows_per_step", "steps_per_task"), {"least": 1}),
    "chat_share": {"least": 0, "most": 1},
}  # fmt: skip


def check_settings(arguments: Any) -> None:
    """Raise `InputError` for the first setting that a recipe can't have, and for a schedule that can't be made.

    `arguments` is TRL's `SFTConfig` or `ModelConfig`, or a recipe's own dataclass.
    """
    for f in dataclasses.fields(arguments):
        value = getattr(arguments, f.name)
        if value == default_of(f) or (f.name == "output_dir" and value == "trainer_output"):
            continue
        for name, reason in _REFUSED.items() if isinstance(arguments, SFTConfig | ModelConfig) else ():
            if f.name == name or (name.endswith("_") and f.name.startswith(name)):
                found = value.value if isinstance(value, Enum) else value
                raise InputError(f"{f.name} is {found!r}, which a recipe can't set. {reason}")
        check_bounds(f.name, f.name, value)
    if isinstance(arguments, SFTConfig):
        if arguments.save_strategy == "best":
            raise InputError(f"save_strategy is 'best'. {_SCORED} Set it to steps or epoch.")
        _check_schedule(arguments)


def check_bounds(title: str, key: str, value: Any) -> None:
    """Raise `InputError`, which calls the setting `title`, for a number that the setting `key` can't have."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        check_number(title, value, **_BOUNDS.get(key, {}))


def _check_schedule(arguments: SFTConfig) -> None:
    """Check `lr_scheduler_kwargs` against its schedule: overriding one of the two in a recipe means setting both."""
    kind, options = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    try:
        get_scheduler(kind, optimizer, num_warmup_steps=1, num_training_steps=100, scheduler_specific_kwargs=options)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"lr_scheduler_kwargs is {options!r}, and lr_scheduler_type {kind.value}: {error}. Set both: they go together."
        ) from None


def default_of(f: dataclasses.Field) -> Any:
    """The value of a dataclass's field that nobody sets."""
    return f.default_factory() if callable(f.default_factory) else f.default
