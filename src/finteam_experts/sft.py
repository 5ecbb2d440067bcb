# SPDX-License-Identifier: Apache-2.0
"""TRL's SFT trainer with a language-model head that suits CPUs, and with rows that choose their expert."""

import torch
from trl import SFTTrainer

from finteam_experts.checkpoints import not_finite
from finteam_experts.task_routing import EXPERT, TaskRouting, with_experts

# A CPU compiles its kernels anew for every new number of tokens in bfloat16: batches are filled up to a multiple of this.
TOKENS = 32


class CompactHeadSFTTrainer(SFTTrainer):
    """On a CPU, runs the vocabulary head once, and only on the positions that carry a label.

    TRL 1.16 does so on GPUs; elsewhere it scores every position in chunks and computes each chunk again in the backward
    pass, which is a large part of a small model's training step. The loss is the same (see tests/test_training.py);
    the logged entropy is left out. Applies to padding-free batches (`packing: true`) and the plain loss; whatever else is asked
    for takes TRL's own path.
    """

    task_routing: TaskRouting | None = None

    def route_by_task(self) -> None:
        """Train each row in the expert that the dataset's column `expert` names."""
        self.task_routing = TaskRouting(self.accelerator.unwrap_model(self.model).get_base_model())
        self.data_collator = with_experts(self.data_collator)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self.task_routing and EXPERT not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, EXPERT]

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            raise not_finite("the loss", self.args.output_dir, self.state.global_step + 1)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.task_routing:
            self.task_routing.experts = inputs.pop(EXPERT)  # stays for the second forward pass of checkpointing
        on_cpu = inputs["input_ids"].device.type == "cpu"
        plain = (
            self.args.loss_type == "nll" and not self.args.label_smoothing_factor and self.compute_loss_func is None
        )
        if return_outputs or not self.padding_free or not on_cpu or not plain:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][0, 1:]  # padding-free: all sequences of the batch lie in one row
        positions = (labels != -100).nonzero().flatten()
        model_inputs = {key: value for key, value in inputs.items() if key != "labels"}
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        if self.args.bf16:
            model_inputs = _filled_up(model_inputs)
        outputs = model(**model_inputs, use_cache=False, logits_to_keep=positions)
        logits, targets = outputs.logits[0].float(), labels[positions]  # [labelled positions, vocabulary]
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        loss = loss / (targets.numel() if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # num_items_in_batch counts every process, DDP averages

        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["mean_token_accuracy"].append((logits.argmax(-1) == targets).float().mean().item())
        if self.model.training:
            tokens = torch.tensor(inputs["input_ids"].numel())
            self._total_train_tokens += self.accelerator.gather(tokens).sum().item()
        metrics["num_tokens"] = [self._total_train_tokens]
        if self.aux_loss_enabled:
            metrics["aux_loss"].append(outputs.aux_loss.item())
            # a mean over the micro-batch, unlike the token sum above, so gradient accumulation has to divide it
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        return loss


def _filled_up(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A padding-free batch with its first tokens once more at the end: no label reads them, and a router's load stays its own."""
    missing = -inputs["input_ids"].shape[1] % TOKENS
    longer = {key: torch.cat([inputs[key], inputs[key][:, :missing]], dim=1) for key in ("input_ids", "position_ids")}
    return inputs | longer
