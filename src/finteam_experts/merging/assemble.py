# SPDX-License-Identifier: Apache-2.0
"""Assembling dense experts into an MoE with mergekit, in the layout of `merging.layout`, and checking every tensor of it."""

import logging
from pathlib import Path

import torch
from mergekit.io import TensorWriter
from mergekit.merge import MergeOptions
from mergekit.moe import common
from mergekit.moe.config import MoEMergeConfig
from mergekit.moe.router import get_gate_params, get_hidden_states, tokenize_prompts
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from finteam_experts.errors import InputError, NotFiniteError
from finteam_experts.families import Family, family_in, family_of
from finteam_experts.merging.layout import finish_folder, on_disk
from finteam_experts.models import read_config
from finteam_experts.weights import SHARD_BYTES, StoredTensors, new_writer, size_of


def _per_expert_writer(family: Family) -> type[TensorWriter]:
    """mergekit's writer, which splits fused experts into the tensors of each expert."""

    class Writer(TensorWriter):
        def save_tensor(self, name: str, tensor: torch.Tensor, clone: bool = False) -> None:
            for own, part in on_disk({name: tensor}, family).items():
                # a view would keep the fused tensor in memory
                super().save_tensor(own, part, clone or part is not tensor)

    return Writer


def assemble(config: MoEMergeConfig, base: Path, base_config: PretrainedConfig, target: Path) -> None:
    """Write the MoE of `config`, whose models are absolute paths, to the folder `target`."""
    new_writer(target)  # clears what an interrupted merge left
    options = MergeOptions(copy_tokenizer=False, out_shard_size=min(SHARD_BYTES, max(2**28, size_of(base) // 5)))
    family = family_of(base_config)
    # "not usable in llama.cpp" no longer holds: it takes any number of experts. That layers are on disk is what we want.
    logging.disable(logging.WARNING)
    common.TensorWriter = _per_expert_writer(family)
    try:
        gates = _prompt_gates(config, base)
        family.output_architecture().write_model(str(target), config, options, router_weights=list(gates))
    finally:
        common.TensorWriter = TensorWriter
        logging.disable(logging.NOTSET)
    moe_config = read_config(target)
    moe_config.sliding_window = getattr(base_config, "sliding_window", None)  # mergekit leaves it out
    finish_folder(moe_config, base, target)


class _DecoderOnDisk:
    """A model's decoder whose layers are read from disk at every call, for mergekit's `get_hidden_states`."""

    device = "cpu"  # of the inputs

    def __init__(self, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "disk"})
        self._decoder = model.model

    def __call__(self, **inputs: object) -> BaseModelOutputWithPast:
        return self._decoder(**inputs)


def _prompt_gates(config: MoEMergeConfig, base: Path) -> torch.Tensor:
    """mergekit's gates from the experts' prompts, [layers, experts, hidden], without the base in memory.

    mergekit itself loads it whole for the modes that need hidden states, unless on a GPU: 16 GB for an 8B base.
    """
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")  # prompts end together, as in mergekit
    tokenizer.pad_token = tokenizer.bos_token or tokenizer.eos_token
    if not config.gate_mode.startswith("hidden") or torch.cuda.is_available():
        return get_gate_params(config.base_model, tokenizer, config.experts, mode=config.gate_mode)
    decoder, average = _DecoderOnDisk(base), config.gate_mode == "hidden_avg"
    gates = []
    for expert in tqdm(config.experts, desc="router prompts", leave=False):
        states = get_hidden_states(decoder, tokenize_prompts(expert.positive_prompts, tokenizer), average=average)
        if expert.negative_prompts:
            states -= get_hidden_states(decoder, tokenize_prompts(expert.negative_prompts, tokenizer), average=average)
        gates.append(torch.nn.functional.normalize(states, dim=-1, eps=1e-8))
    return torch.stack(gates, dim=1)


def check_moe(moe: Path, base: Path, config: MoEMergeConfig) -> None:
    """Raise unless every tensor of the MoE is its source's: the experts', the base's, or finite gates. Nothing is loaded."""
    dtype = getattr(torch, config.dtype)
    family = family_in(moe)
    with StoredTensors(moe) as merged:
        expected = set()

        def compare(name: str, source: torch.Tensor, origin: Path) -> None:
            expected.add(name)
            if not source.isfinite().all():
                raise NotFiniteError(
                    f"{origin} has weights in {name} that are not finite. Choose another, or train it again."
                )
            if not torch.equal(merged[name], source.to(dtype)):
                raise InputError(f"{moe}: {name} is not what it was merged from. Please report this as a bug.")

        with StoredTensors(base) as tensors:
            for name in tensors:
                if ".mlp." not in name:
                    compare(name, tensors[name], base)
        for place, expert in enumerate(config.experts):
            folder = Path(expert.source_model.model.path)
            with StoredTensors(folder) as tensors:
                for name in tensors:
                    if ".mlp." in name:
                        _, _, layer, _, matrix, _ = name.split(".")  # model.layers.N.mlp.gate_proj.weight
                        compare(family.expert_tensor(layer, place, matrix), tensors[name], folder)
        gates = {name for name in merged if name.endswith(".gate.weight")}
        if gates | expected != set(merged) or not all(merged[name].isfinite().all() for name in gates):
            raise InputError(f"{moe}: it has other tensors than its sources, or gates that are not finite.")
