# SPDX-License-Identifier: Apache-2.0
"""TRL's SFT trainer with stratified rows, one loss for all devices, and an end at the first that is not finite.

It reads attributes of `SFTTrainer` that are no public interface: tests/training/test_trl.py checks that they are there.
"""

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from trl import SFTTrainer

from finteam_experts.training.checkpoints import not_finite
from finteam_experts.training.cpu import TOKENS
from finteam_experts.training.loss import (
    ScoredLabels,
    count_rows,
    label_mask,
    rows_of_labels,
    score_labels,
    summed_loss,
)  # fmt: skip
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
            return StratifiedSampler(whole[STRATUM][:], seed)
        return super()._get_train_sampler(train_dataset)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As transformers makes it, but `num_decay_steps` below 1 is a share of the steps, as `warmup_steps` is.

        No decay is longer than the training: it would begin near its end.
        """
        options = self.args.lr_scheduler_kwargs or {}
        if decay := options.get("num_decay_steps"):
            decay = round(decay * num_training_steps) if decay < 1 else min(decay, num_training_steps)
            self.args.lr_scheduler_kwargs = options | {"num_decay_steps": decay}
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            raise not_finite("the loss", self.args.output_dir, self.state.global_step + 1)
        return loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of an optimiser step, and how many labels they have, or rows where these are what counts."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.balance_rows:
            items = torch.stack([count_rows(batch) for batch in batches]).sum().to(device) if batches else None
            if batches and self.args.average_tokens_across_devices:
                items = self.accelerator.gather(items).sum()
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The micro-batch's part of its optimiser step's loss; `num_items_in_batch` are the step's labels, or its rows.

        It is the same loss for any number of micro-batches and processes. An MoE's auxiliary loss is, as TRL has it, the mean of
        the micro-batches' own.
        """
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scored = self._score(model, inputs)
        rows = rows_of_labels(inputs) if self.balance_rows else None
        smoothing, dft = self.args.label_smoothing_factor, self.args.loss_type == "dft"
        loss, items = summed_loss(scored, dft=dft, smoothing=smoothing, rows=rows), num_items_in_batch
        if items is None:
            items = len(scored.log_probs) if rows is None else count_rows(inputs)
        elif self.args.average_tokens_across_devices:  # they are those of all processes, whose gradients are averaged
            loss = loss * self.accelerator.num_processes
        loss = loss / torch.as_tensor(items).clamp(min=1)
        if self.aux_loss_enabled:
            batches = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * scored.aux_loss / batches
        self._keep_metrics(inputs, scored)
        return loss

    def _score(self, model: torch.nn.Module, inputs: dict[str, Any]) -> ScoredLabels:
        """Score the labels: in TRL's fused head, which never holds whole logits, but for smoothing and on a CPU.

        Smoothing needs the whole distribution of each label. On a CPU the fused head scores every position, and twice.
        """
        if self.aux_loss_enabled:
            inputs = inputs | {"output_router_logits": True}
        smoothing, on_cpu = self.args.label_smoothing_factor > 0, inputs["input_ids"].device.type == "cpu"
        if smoothing or (self.cpu_speedups and on_cpu):
            multiple = TOKENS if self.args.bf16 and on_cpu else 1
            return score_labels(model, inputs, smoothing=smoothing, multiple=multiple)
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        mask = outputs.label_mask
        entropy = outputs.entropy.detach()[mask]
        return ScoredLabels(outputs.log_probs[mask], outputs.is_top1[mask], entropy, None, outputs.aux_loss)

    def _keep_metrics(self, inputs: dict[str, Any], scored: ScoredLabels) -> None:
        """TRL's metrics of this micro-batch in all processes, for the next line of the log."""
        metrics, gather = (
            self._metrics["train" if self.model.training else "eval"],
            self.accelerator.gather_for_metrics,
        )
        labels = gather(label_mask(inputs).sum()).sum().clamp(min=1)
        metrics["mean_token_accuracy"].append((gather(scored.is_top.sum()).sum() / labels).item())
        if scored.entropy is not None:
            metrics["entropy"].append((gather(scored.entropy.sum()).sum() / labels).item())
        if self.model.training:
            ids = inputs["input_ids"]
            tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else torch.tensor(ids.numel())
            self._total_train_tokens += gather(tokens.to(ids.device)).sum().item()
        metrics["num_tokens"] = [self._total_train_tokens]
        if self.aux_loss_enabled:
            metrics["aux_loss"].append(gather(scored.aux_loss.detach()).mean().item())
