# SPDX-License-Identifier: Apache-2.0
"""Measuring the router of an MoE: on text whose role is known, and on any other text."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerControl

from finteam_experts.chats import SPANS
from finteam_experts.evaluation.batches import padded_batches
from finteam_experts.scoring import float_head

DEAD = 0.01  # an expert is dead in a layer if it is the first choice of a smaller share of tokens


def mixing_weights(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """The weights that mix the experts' outputs, fp32 [tokens, experts]: softmax, the top k kept and renormalised."""
    probabilities = router_logits.float().softmax(-1)
    top = probabilities.topk(top_k, dim=-1)
    kept = torch.zeros_like(probabilities).scatter(1, top.indices, top.values)
    return kept / kept.sum(-1, keepdim=True)


@dataclass
class Routing:
    """Sums over held-out text of the roles: shape [layers, roles, experts] unless said otherwise.

    A role without text has zeros, and is in no mean.
    """

    first_choices: torch.Tensor  # tokens whose highest gate is the expert
    weights: torch.Tensor  # mixing weight
    passages: torch.Tensor  # passages in which the expert is most tokens' first choice
    tokens: torch.Tensor  # [roles]
    losses: torch.Tensor  # [roles] nats
    own_by_span: torch.Tensor  # [roles, spans] tokens of SPANS that go to their own expert, the mean over layers
    tokens_by_span: torch.Tensor  # [roles, spans]

    def loss(self) -> list[float]:
        """Held-out loss of each role in nats per token."""
        return (self.losses / self.tokens).tolist()

    def summary(self) -> dict[str, float | int]:
        """The routing in five figures. Roles count alike, however many tokens they have; shares are means over layers.

        `load_entropy` is that of the experts' shares of first choices, 1 if all are equal; `dead_experts` counts
        (layer, expert) pairs with less than `DEAD` of them. Both are of the experts whose role has text.
        """
        there = self.tokens > 0
        load = self.load()[:, there]
        load = load / load.sum(-1, keepdim=True)
        entropy = -(load * load.clamp(min=1e-12).log()).sum(-1) / torch.tensor(float(max(load.shape[-1], 2))).log()
        entropy = entropy.clamp(min=0)  # not -0
        return {
            "own_role_tokens": _own(self.shares())[:, there].mean().item(),
            "own_role_passages": _own(self.passage_shares())[:, there].mean().item(),
            "own_role_weight": _own(self.mean_weights())[:, there].mean().item(),
            "load_entropy": entropy.mean().item(),
            "lowest_load_entropy": entropy.min().item(),
            "dead_experts": int((load < DEAD).sum()),
        } | self.spans()

    def spans(self) -> dict[str, float]:
        """The share of tokens that go to their own expert, for each of `SPANS` that the text has."""
        own, tokens = self.own_by_span.sum(0).tolist(), self.tokens_by_span.sum(0).tolist()
        return {f"own_role_{span}": a / b for span, a, b in zip(SPANS, own, tokens, strict=True) if b}

    def details(self) -> dict[str, Any]:
        """By layer and role, and the confusion of roles (rows: the text's role, columns: the expert)."""
        return {
            "own_role_tokens": _rounded(_own(self.shares())),  # [layers, roles]
            "own_role_passages": _rounded(_own(self.passage_shares())),  # [layers, roles]
            "load": _rounded(self.load()),  # [layers, experts]
            "confusion": _rounded(self.shares().mean(0)),  # [roles, experts]
            "mean_weights": _rounded(self.mean_weights()),  # [layers, roles, experts]
        }

    def shares(self) -> torch.Tensor:
        return self.first_choices / self.tokens.clamp(min=1)[:, None]

    def mean_weights(self) -> torch.Tensor:
        return self.weights / self.tokens.clamp(min=1)[:, None]

    def passage_shares(self) -> torch.Tensor:
        return self.passages / self.passages.sum(-1, keepdim=True).clamp(min=1)

    def load(self) -> torch.Tensor:
        """Each expert's share of first choices, if roles were equally frequent: [layers, experts]."""
        return self.shares()[:, self.tokens > 0].mean(1)


@torch.no_grad()
def measure_routing(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sequences: list[list[list[int]]],
    *,
    losses: bool = True,
    spans: list[list[list[int]]] | None = None,
) -> Routing:
    """Run the MoE on the token sequences of each role, in the order of the experts, and add up what its router does.

    First tokens are left out. Of conversations, `spans` names each token's place in `SPANS`, and those with -1 are left out:
    the template's are the same in every role's. Without `losses` the vocabulary head is not computed, and `losses` is 0.
    """
    was_training = model.training
    model.eval()
    roles = [role for role, own in enumerate(sequences) for _ in own]
    everything = [ids for own in sequences for ids in own]
    layers, experts = model.config.num_hidden_layers, model.config.num_local_experts
    first, weights, passages = (torch.zeros(layers, len(sequences), experts) for _ in range(3))
    marks = [torch.tensor(own) for of_role in spans or () for own in of_role]
    own_by_span, tokens_by_span = torch.zeros(2, len(sequences), len(SPANS))
    tokens, loss = torch.zeros(len(sequences)), torch.zeros(len(sequences))
    for rows, batch in padded_batches(everything, tokenizer, title="routing"):
        batch = batch.to(model.device)
        with float_head(model):
            outputs = model(**batch, output_router_logits=True, logits_to_keep=0 if losses else 1)
        kept = batch["attention_mask"].bool().cpu()
        kept[:, 0] = False
        row_roles = torch.tensor([roles[row] for row in rows])
        if spans:
            padded = pad_sequence([marks[row] for row in rows], batch_first=True, padding_value=-1)
            kept &= padded >= 0
            # by row, token and span
            by_span = torch.nn.functional.one_hot(padded.clamp(min=0), len(SPANS)) * kept[..., None]
            tokens_by_span.index_add_(0, row_roles, by_span.sum(1).float())
        tokens.index_add_(0, row_roles, kept.sum(-1).float())
        if losses:
            targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
            logits = outputs.logits[:, :-1].flatten(0, 1)
            nats = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)
            loss.index_add_(0, row_roles, nats.sum(-1).cpu())
        for layer, logits in enumerate(outputs.router_logits):  # [rows * length, experts]
            logits = logits.float().cpu()
            if spans:
                own = logits.argmax(-1).view(kept.shape) == row_roles[:, None]
                own_by_span.index_add_(0, row_roles, (by_span * own[..., None]).sum(1).float() / layers)
            choices = torch.nn.functional.one_hot(logits.argmax(-1), experts).float()
            choices, mixed = (
                (part.view(*kept.shape, experts) * kept[..., None]).sum(1)  # [rows, experts]
                for part in (choices, mixing_weights(logits, model.config.num_experts_per_tok))
            )
            first[layer].index_add_(0, row_roles, choices)
            weights[layer].index_add_(0, row_roles, mixed)
            winners = torch.nn.functional.one_hot(choices.argmax(-1), experts).float()
            passages[layer].index_add_(0, row_roles, winners)
    model.train(was_training)
    return Routing(first, weights, passages, tokens, loss, own_by_span, tokens_by_span)


def expert_shares(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, token_ids: list[list[int]], spans: list[list[int]]
) -> torch.Tensor:
    """The share of the gate weight that each expert gets in each conversation: [layers, conversations, experts].

    It is the mean over the tokens that `measure_routing` counts; those of all experts sum to 1.
    """
    each, places = [[ids] for ids in token_ids], [[own] for own in spans]
    return measure_routing(model, tokenizer, each, losses=False, spans=places).mean_weights()


class RoutingCallback(TrainerCallback):
    """Measures the routing of held-out text every N steps of a training, and logs it as `routing/...`."""

    def __init__(self, trainer: Trainer, sequences: list[list[list[int]]], every: int) -> None:
        self.trainer, self.sequences, self.every = trainer, sequences, every

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._log(control)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._log(control)

    def _log(self, control: TrainerControl) -> None:
        routing = measure_routing(self.trainer.model, self.trainer.processing_class, self.sequences, losses=False)
        due = control.should_log
        # not TRL's own `log`, which would empty its running means of the training step into this entry
        Trainer.log(self.trainer, {f"routing/{name}": round(value, 4) for name, value in routing.summary().items()})
        control.should_log = due  # logging resets it, and the step's loss would not be logged


def _own(by_role: torch.Tensor) -> torch.Tensor:
    """The share of each role's own expert: [layers, roles] of [layers, roles, experts]."""
    return by_role.diagonal(dim1=1, dim2=2)


def _rounded(values: torch.Tensor) -> list:
    return [_rounded(row) if row.dim() else round(row.item(), 4) for row in values]
