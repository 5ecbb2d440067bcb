# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are complete and good: which of them a training resumes from, and what stops it before the next is bad."""

import shutil
from pathlib import Path

import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from finteam_experts.errors import NotFiniteError

_COMPLETE = "checkpoint_is_complete"


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint once every process has written its part, so that an interrupted one is never resumed from."""

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / _COMPLETE).touch()


class FiniteGradients(TrainerCallback):
    """Ends the training before a gradient that is not finite reaches the weights, so that the last checkpoint stays good."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.fp16:  # its scaler leaves such steps out
            return
        found = ((name, parameter.grad) for name, parameter in model.named_parameters())
        gradients = {name: _local(gradient) for name, gradient in found if gradient is not None}
        # one by one they take as long as the optimizer, and the norm of many finite ones can overflow
        if torch.nn.utils.get_total_norm(gradients.values()).isfinite():
            return
        for name, gradient in gradients.items():
            if not gradient.isfinite().all():
                raise not_finite(f"the gradient of {name}", args.output_dir, state.global_step + 1)


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def not_finite(what: str, work: str | Path, step: int) -> NotFiniteError:
    """The error that ends a training whose loss, gradients or weights are NaN or infinite."""
    steps = complete(Path(work))
    kept = f"The checkpoint of step {max(steps)} is kept in {work}" if steps else "No checkpoint had been saved"
    return NotFiniteError(
        f"step {step}: {what} is not finite. {kept}. Lower learning_rate, raise warmup_steps or set max_grad_norm; if it is the "
        "first step, look at the base's weights and the data. To start again with other settings, delete that folder."
    )


def complete(work: Path) -> dict[int, Path]:
    """The checkpoints of `work` that every process has written its part of, by step."""
    found = {int(path.name.rpartition("-")[2]): path for path in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    return {step: path for step, path in found.items() if (path / _COMPLETE).exists()}


def last_complete(work: Path) -> Path | None:
    """The newest complete checkpoint in `work`; half-written ones are deleted, lest the trainer writes into them."""
    found = complete(work)
    with PartialState().main_process_first():
        for path in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if path not in found.values():
                shutil.rmtree(path, ignore_errors=True)
    if not found:
        return None
    print(f"Resuming from step {max(found)}")
    return found[max(found)]
