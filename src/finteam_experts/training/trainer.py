# SPDX-License-Identifier: Apache-2.0
"""TRL's SFT trainer with stratified rows, the CPU's loss, and an end at the first that is not finite.

It reads attributes of `SFTTrainer` that are no public interface: tests/training/test_trl.py checks that they are there.
"""

from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from trl import SFTTrainer

from finteam_experts.training import cpu
from finteam_experts.training.checkpoints import not_finite
from finteam_experts.training.loss import balanced_loss
from finteam_experts.training.sampler import STRATUM, StratifiedSampler


class RecipeTrainer(SFTTrainer):
    cpu_speedups = True
    balance_rows = False
    stratify_rows = True

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        whole = self.train_dataset  # `train_dataset` is without the columns that the model doesn't take
        shuffled = self.args.train_sampling_strategy == "random"
        if self.stratify_rows and shuffled and STRATUM in (whole.column_names or ()):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return StratifiedSampler(whole[STRATUM], seed)
        return super()._get_train_sampler(train_dataset)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As transformers makes it, but no decay is longer than the training, which would begin near its end."""
        options = self.args.lr_scheduler_kwargs or {}
        if options.get("num_decay_steps", 0) > num_training_steps:
            self.args.lr_scheduler_kwargs = options | {"num_decay_steps": num_training_steps}
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            raise not_finite("the loss", self.args.output_dir, self.state.global_step + 1)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.cpu_speedups and not return_outputs and cpu.has_compact_loss(self, inputs):
            return cpu.compact_loss(self, model, inputs, num_items_in_batch, balance_rows=self.balance_rows)
        if self.balance_rows:
            return balanced_loss(self, model, inputs, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
