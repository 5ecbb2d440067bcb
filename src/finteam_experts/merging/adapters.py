# SPDX-License-Identifier: Apache-2.0
"""Merging a LoRA into its model one decoder layer at a time.

A decoder layer is loaded as a model of its own, PEFT merges its part of the adapter, and the result goes to the shards of
the target; everything outside the layers is copied. PEFT's and transformers' own merge needs the whole model in memory:
80 GB for a team of three 8B experts in float32, where this needs about three layers (benchmarks/merge.py).
"""

import contextlib
import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from finteam_experts import runs
from finteam_experts.errors import InputError, NotFiniteError
from finteam_experts.families import family_of
from finteam_experts.files import file_hash, read_json
from finteam_experts.merging.layout import finish_folder, on_disk
from finteam_experts.models import ADAPTER_FILE, MLP_MODULES, check_loading, read_config, stored_dtype
from finteam_experts.training.experts import adapts_linear_experts, split_experts
from finteam_experts.weights import StoredTensors, new_writer

_LAYER = re.compile(r"(?<=model\.layers\.)\d+(?=\.)")
_PROBE_TOKENS = 4
_TOLERANCE = 1e-3


@torch.no_grad()
def merge_adapter(model_folder: Path, adapter_folder: Path, target: Path) -> float:
    """Merge a LoRA adapter into its model in fp32, and save the result to `target` in the model's dtype.

    Returns the largest difference between a layer's outputs with the adapter and merged, as a share of the largest output.
    Raises `InputError` if it exceeds 1e-3, if the adapter changes anything outside the decoder layers, or if a weight of it
    or of the model is not finite.
    """
    config, dtype = read_config(model_folder), stored_dtype(model_folder)
    family = family_of(config)
    config.dtype = dtype
    adapter_config = PeftConfig.from_pretrained(adapter_folder)
    adapter_config.layers_to_transform = None  # every layer is layer 0 of its model; the adapter says which it changes
    difference = 0.0
    with StoredTensors(model_folder) as stored, StoredTensors([adapter_folder / ADAPTER_FILE]) as adapter:
        parts, changes = _by_layer(stored), _by_layer(adapter)
        check_finite(adapter_folder, adapter)
        if None in changes:
            raise InputError(
                f"{adapter_folder} changes {changes[None][0]}. A merge takes over what is in the decoder layers: leave "
                "embeddings and head out of lora_target_modules and lora_modules_to_save."
            )
        writer = new_writer(target)
        for layer, names in tqdm(parts.items(), desc=f"merging {adapter_folder.name}", leave=False):
            tensors = {name: stored[name] for name in names}
            if layer in changes:
                # PEFT keeps a LoRA in fp32, but a router in the type that the model was trained in
                own = {_as_first(name): adapter[name].float() for name in changes[layer]}
                model, off = _merged_layer(config, adapter_config, {_as_first(n): t for n, t in tensors.items()}, own)
                _check_difference(off, layer, model_folder, adapter_folder)
                difference = max(difference, off)
                state = {name: tensor for name, tensor in model.state_dict().items() if _LAYER.search(name)}
                tensors = {_LAYER.sub(str(layer), name): tensor for name, tensor in state.items()}
            for name, tensor in on_disk(tensors, family).items():
                writer.save_tensor(name, tensor.to(dtype), clone=layer in changes)
        writer.finalize()
    finish_folder(config, model_folder, target)
    return difference


def dense_expert(
    base: Path, known_base: dict[str, str], adapter: Path, target: Path, *, overwrite: bool = False
) -> None:
    """Make the folder `target` of the base, whose fingerprint is `known_base`, with the adapter merged into it."""
    inputs = {"base": known_base, "adapter": file_hash(adapter / ADAPTER_FILE)}
    if work := runs.begin(target, "merge_expert", inputs, overwrite=overwrite):
        difference = merge_adapter(base, adapter, work)
        runs.finish(target, {"results": {"merge_difference": difference}})
        print(f"{target}: adapter merged, its layers' outputs agree to {difference:.0e}")


def check_finite(folder: Path, adapter: StoredTensors) -> None:
    """Raise `NotFiniteError` if a weight of the adapter in `folder` is NaN or infinite."""
    for name in adapter:
        if not adapter[name].isfinite().all():
            raise NotFiniteError(
                f"{folder}/{ADAPTER_FILE}: {name} is not finite: its training diverged. Train it again."
            )


def check_adapter(folder: Path, role: str, base: dict[str, str]) -> None:
    """Raise `InputError` unless the adapter was trained on the base of that fingerprint and changes nothing but the MLP.

    An adapter that PEFT or TRL saved has no record of its base: the screen says that it is taken for one of this base.
    """
    settings = read_json(folder / "adapter_config.json") if (folder / ADAPTER_FILE).is_file() else {}
    if settings and not (folder / runs.RECORD).exists():
        named = settings.get("base_model_name_or_path")
        print(
            f"{folder} has no {runs.RECORD}: it says that its base is {named}, and is taken for an adapter of this one"
        )
    else:
        record = runs.require(folder, f"accelerate launch recipes/train_expert.py --config YAML --role {role}")
        trained_on = record["inputs"].get("base")
        if not isinstance(trained_on, dict) or any(base.get(part) != trained_on[part] for part in trained_on):
            raise InputError(
                f"{folder} was trained on another base (fingerprint {trained_on}; this base has {base}). Train the role again "
                "on this base, or name its base with --base."
            )
    if settings.get("bias", "none") != "none" or settings.get("modules_to_save"):
        raise InputError(
            f"{folder}/adapter_config.json: trains biases or whole modules, which a merge can't take over."
        )
    with StoredTensors([folder / ADAPTER_FILE]) as adapter:
        check_finite(folder, adapter)
        for name in adapter:
            if not any(f".mlp.{module}." in name for module in MLP_MODULES):
                raise InputError(
                    f"{folder}/{ADAPTER_FILE} changes {name}. The merge takes everything but the MLP from the base, so that "
                    f"change would be lost: train {', '.join(MLP_MODULES)} only."
                )


def _by_layer(names: Iterable[str]) -> dict[int | None, list[str]]:
    """Tensor names by decoder layer, in order; those outside the layers come first, under `None`."""
    found = defaultdict(list)
    for name in names:
        layer = _LAYER.search(name)
        found[int(layer[0]) if layer else None].append(name)
    return {layer: found[layer] for layer in sorted(found, key=lambda layer: -1 if layer is None else layer)}


def _as_first(name: str) -> str:
    return _LAYER.sub("0", name)


def _merged_layer(
    config: PretrainedConfig, adapter_config: PeftConfig, weights: dict, adapter: dict
) -> tuple[PreTrainedModel, float]:
    """The model of one layer with its part of the adapter merged, and how far its output moved by that."""
    model = _one_layer(config, weights)
    if adapts_linear_experts(config, adapter_config.target_modules):
        split_experts(model)
    adapted: PeftModel = get_peft_model(model, adapter_config, low_cpu_mem_usage=True)
    try:
        loaded = set_peft_model_state_dict(adapted, adapter, low_cpu_mem_usage=True)
    except RuntimeError as error:  # other shapes
        raise InputError(f"the adapter was trained on a model of another size: {error}") from None
    if loaded.unexpected_keys:
        raise InputError(f"the adapter has a tensor that its model has no place for: {loaded.unexpected_keys[0]}")
    adapted.eval()
    before = _probe(adapted.get_base_model())
    merged = adapted.merge_and_unload()
    return merged, ((_probe(merged) - before).abs().max() / before.abs().max()).item()


def _check_difference(off: float, layer: int, model: Path, adapter: Path) -> None:
    if off != off:  # NaN
        raise NotFiniteError(
            f"layer {layer} of {model} gives outputs that are not finite: look at the model's weights."
        )
    if off > _TOLERANCE:
        raise InputError(
            f"{adapter}: layer {layer} with the adapter and merged differ by {off:.1e} of its largest output. The adapter has "
            "parts that a merge can't take over."
        )


def _one_layer(config: PretrainedConfig, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A model of one decoder layer in fp32, with next to no vocabulary; `InputError` if `weights` are not that layer's."""
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 1, None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    around = {
        "model.embed_tokens.weight": torch.zeros(1, config.hidden_size),
        "lm_head.weight": torch.zeros(1, config.hidden_size),
        "model.norm.weight": torch.ones(config.hidden_size),
    }
    if config.tie_word_embeddings:
        del around["lm_head.weight"]
    with _without_progress_bars():
        model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict={**weights, **around}, dtype=torch.float32, output_loading_info=True
        )
    check_loading(report, "a decoder layer")
    return model.eval()


def _probe(model: PreTrainedModel) -> torch.Tensor:
    """What the only layer adds to some random hidden states."""
    hidden = torch.randn(1, _PROBE_TOKENS, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(_PROBE_TOKENS)[None]
    rotary = model.model.rotary_emb(hidden, positions)
    return model.model.layers[0](hidden, position_ids=positions, position_embeddings=rotary) - hidden


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Without transformers' bar for every layer: there is one for the whole merge."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
