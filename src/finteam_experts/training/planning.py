# SPDX-License-Identifier: Apache-2.0
"""Estimates of a training step from configs alone: parameters, memory per device by part, FLOPs and hours.

The models are built without memory (on the meta device) and adapted by PEFT itself, so that parameters are counted, not
estimated. A LoRA's forward pass takes two FLOPs per parameter and token; its backward pass as many again, for gradients of the
inputs but none of frozen weights (a full training would take four: Kaplan et al. 2020, arXiv:2001.08361).
"""

from dataclasses import dataclass, replace
from typing import Any

from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from transformers import PretrainedConfig

from finteam_experts.families import is_moe
from finteam_experts.models import empty_model, parameter_counts
from finteam_experts.training.experts import adapts_linear_experts, split_experts

GIB = 2**30
FLOAT = 4  # bytes: PEFT trains adapters in float32
ADAM = 2 * FLOAT
NF4 = 0.56  # of a weight that load_in_4bit keeps in four bits, with the scales of its blocks
# What a process holds besides the model: interpreter, libraries and what they keep for their kernels; on a GPU the context, the
# kernels and NCCL's buffers.
PROCESS_GIB = {"cpu": 0.85, "gpu": 2.0}
USABLE = 0.9  # of a device's memory: the rest goes to the allocator's gaps
LOGITS_ON_GPU = 256  # positions whose logits TRL's fused head holds at once


@dataclass(frozen=True)
class Devices:
    """`count` devices of `memory_gib` each, `tflops` of bfloat16 per device at its best, of which `utilisation` is reached."""

    count: int
    memory_gib: float
    tflops: float
    utilisation: float
    kind: str = "gpu"


@dataclass(frozen=True)
class Training:
    """The settings of a step that decide what it takes."""

    sequences: int  # per device and micro-step
    tokens: int  # per sequence
    labelled: int  # tokens of them that carry a label
    accumulation: int
    steps: int
    checkpointing: bool
    whole_logits: (
        bool  # of all labels at once, as on a CPU and for label smoothing; TRL's fused head holds some at a time
    )
    weight_bytes: float  # of a frozen parameter
    activation_bytes: int
    sharded: bool
    lora: dict[str, Any]

    def rows_of_run(self, devices: int = 1) -> int:
        return self.steps * self.accumulation * self.sequences * devices

    def tokens_of_run(self, devices: int) -> int:
        return self.rows_of_run(devices) * self.tokens


@dataclass(frozen=True)
class Shape:
    """A model's parameters, by what matters to a plan."""

    total: int
    active: int
    trainable: int
    embedding: int  # parameters that are looked up, not multiplied
    layer: int  # of the largest decoder layer
    adapted_experts: int  # parameters of fused experts with a LoRA: PEFT adds it to a copy of them
    config: PretrainedConfig


def shape(config: PretrainedConfig, lora: dict[str, Any] | None) -> Shape:
    """Count a model's parameters, and those that a LoRA of these settings trains; nothing is loaded."""
    model = empty_model(config)
    counts, trainable = parameter_counts(model), 0
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    if lora:
        if adapts_linear_experts(config, lora.get("target_modules")):
            split_experts(model)
        with init_empty_weights():
            trainable, _ = get_peft_model(model, LoraConfig(**lora)).get_nb_trainable_parameters()
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    fused = counts["experts"] if (lora or {}).get("target_parameters") else 0
    return Shape(counts["total"], counts["active"], trainable, looked_up, max(layers), fused, config)


def flops_per_token(model: Shape, tokens: int, checkpointing: bool) -> float:
    """FLOPs of training on one token of a sequence of so many, with the second forward pass of activation checkpointing."""
    attention = 2 * model.config.num_hidden_layers * model.config.hidden_size * tokens  # causal: half of all pairs
    forward = 2 * (model.active - model.embedding) + attention
    return forward * (3 if checkpointing else 2)


def activations(model: Shape, training: Training, devices: Devices) -> float:
    """Bytes that the backward pass needs of one decoder layer, per token: what autograd saves, without the weights."""
    config = model.config
    hidden, inner, width = config.hidden_size, config.intermediate_size, training.activation_bytes
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    norms = 2 * (hidden + 1) * FLOAT
    # Queries, the attention's output, keys, values; a CPU attends in float32 (training/cpu.py)
    attention = 2 * (heads + key_heads) * head * (FLOAT if devices.kind == "cpu" else width)
    targets = set(training.lora.get("target_modules") or ())
    adapted = ({"q_proj", "k_proj", "v_proj"} & targets != set()) + ("o_proj" in targets)
    inputs = adapted * hidden * width  # of frozen layers nothing is saved
    # Of an MLP: its input, both projections, the activation and their product. A chosen expert keeps a copy of its tokens and
    # its output, and the padding of both; where all are used, none copies its tokens
    used = getattr(config, "num_experts_per_tok", 0)
    copies = 3 * used if used < getattr(config, "num_local_experts", 0) else used + 1
    mlp = (max(used, 1) * 4 * inner + copies * hidden) * width
    rank = training.lora.get("r", 0) * (len(targets) + 3 * max(used - 1, 0)) * width
    return norms + attention + inputs + mlp + rank


def memory(model: Shape, training: Training, devices: Devices) -> dict[str, float]:
    """GiB on each device, by part."""
    shards, width = devices.count if training.sharded else 1, training.activation_bytes
    config, tokens = model.config, training.sequences * training.tokens
    a_layer = activations(model, training, devices) * tokens
    kept = config.hidden_size * width * tokens  # of each layer, with checkpointing: its input
    layers = config.num_hidden_layers
    copies = model.adapted_experts * training.weight_bytes / (layers if training.checkpointing else 1)
    labelled = training.sequences * training.labelled
    positions = labelled if training.whole_logits else min(labelled, LOGITS_ON_GPU)
    parts = {
        "frozen weights": model.total * training.weight_bytes / shards,
        "adapter, gradients, Adam": model.trainable * (FLOAT + FLOAT + ADAM) / shards,
        "layers in full": 2 * model.layer * training.weight_bytes * (shards > 1),  # one computes, the next is fetched
        "adapted copies of experts": copies,
        "activations": layers * kept + a_layer if training.checkpointing else layers * a_layer,
        # In float32 themselves, their softmax and their gradient; before that as the model gives them, and its gradient
        "logits": positions * config.vocab_size * (3 * FLOAT + (2 * width if width < FLOAT else 0)),
    }
    return {name: part / GIB for name, part in parts.items()} | {"process": PROCESS_GIB[devices.kind]}


def fits(parts: dict[str, float], devices: Devices) -> bool:
    return sum(parts.values()) <= USABLE * devices.memory_gib


def hours(model: Shape, training: Training, devices: Devices) -> float:
    """Hours of the run's steps."""
    tokens = training.tokens_of_run(devices.count)
    speed = devices.count * devices.tflops * 1e12 * devices.utilisation
    return tokens * flops_per_token(model, training.tokens, training.checkpointing) / speed / 3600


def what_makes_it_fit(model: Shape, training: Training, devices: Devices) -> str | None:
    """The first change of settings with which a device's memory holds the step; `None` if none of them does."""
    accumulation = training.accumulation * training.sequences
    one_row = {"sequences": 1, "accumulation": accumulation}
    both, fsdp2 = {"checkpointing": True} | one_row, "recipes/accelerate/fsdp2.yaml"
    also = "and one row per device with gradient_checkpointing"
    changes: list[tuple[str, dict[str, Any], int]] = [
        ("gradient_checkpointing: true", {"checkpointing": True}, devices.count),
        (f"per_device_train_batch_size: 1, gradient_accumulation_steps: {accumulation}", one_row, devices.count),
        ("both: gradient_checkpointing and one row per device", both, devices.count),
    ]
    if devices.count > 1:
        changes.append((f"{fsdp2}, {also}", {"sharded": True} | both, devices.count))
    if not is_moe(model.config):
        qlora = {"weight_bytes": NF4, "sharded": False} | both
        changes.append((f"load_in_4bit: true (QLoRA), {also}", qlora, devices.count))
    more = [count for count in (2, 4, 8, 16, 32, 64) if count > devices.count]
    changes += [(f"{count} devices with {fsdp2}, {also}", {"sharded": True} | both, count) for count in more]
    for words, change, count in changes:
        if fits(memory(model, replace(training, **change), replace(devices, count=count)), devices):
            return words
    return None
