# SPDX-License-Identifier: Apache-2.0
"""Merging a LoRA into its model one decoder layer at a time: memory for a layer, whatever the model's size.

A decoder layer is loaded as a model of its own, PEFT merges its part of the adapter, and the result goes to the shards of
the target. Whatever lies outside the layers is copied.
"""

import contextlib
import copy
import math
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
from finteam_experts.models import ADAPTER_FILE, adapts_split_experts, read_config, stored_dtype
from finteam_experts.release import finish_release, released_tensors
from finteam_experts.shards import INDEX, ShardWriter, StoredTensors, weight_files
from finteam_experts.split_experts import split_experts

_LAYER = re.compile(r"(?<=model\.layers\.)\d+(?=\.)")
_PROBE_TOKENS = 4
_TOLERANCE = 1e-3
_MERGED = "merging"  # a file beside the shards of a merge that is under way: the hash of its adapter


@torch.no_grad()
def merge_adapter(model_folder: Path, adapter_folder: Path, target: Path) -> float:
    """Merge a LoRA adapter into its model in fp32, save the result to `target` in the model's dtype and in the release layout.

    Shards that an interrupted merge of the same adapter left in `target` are kept.
    Returns the largest difference between a layer's outputs with the adapter and merged, as a share of the largest output.
    Raises `InputError` if it exceeds 1e-3, if the adapter changes anything outside the decoder layers, or if a weight of it or of
    the model is not finite.
    """
    config, dtype = read_config(model_folder), stored_dtype(model_folder)
    config.dtype = dtype
    adapter_file = adapter_folder / ADAPTER_FILE
    adapter_config = PeftConfig.from_pretrained(adapter_folder)
    adapter_config.layers_to_transform = (
        None  # each is layer 0 of its model; the adapter has no tensors for the others
    )
    split = adapts_split_experts(config, adapter_config.target_modules)
    difference = 0.0
    with StoredTensors(weight_files(model_folder)) as stored, StoredTensors([adapter_file]) as adapter:
        parts, changes = _by_layer(stored), _by_layer(adapter)
        for name in adapter:
            if not adapter[name].isfinite().all():
                raise NotFiniteError(f"{adapter_file}: {name} is not finite: its training diverged. Train it again.")
        if None in changes:
            raise InputError(
                f"{adapter_folder} changes {changes[None][0]}. A merge takes over what lies in the decoder layers: leave "
                "embeddings and head out of lora_target_modules and lora_modules_to_save."
            )
        layouts = {
            layer: released_tensors({name: stored.meta(name, dtype) for name in names})
            for layer, names in parts.items()
        }
        _forget_another(target, runs.file_hash(adapter_file))
        writer = ShardWriter(target, {name: meta for layout in layouts.values() for name, meta in layout.items()})
        for layer, names in tqdm(parts.items(), desc=f"merging {adapter_folder.name}", leave=False):
            if not any(map(writer.missing, layouts[layer])):
                continue
            if layer in changes:
                with _without_progress_bars():
                    model = _one_layer(config, {_as_first(name): stored.slice(name) for name in names})
                if split:
                    split_experts(model)
                # PEFT keeps a LoRA in fp32, but a router in whatever the model was trained in
                own = {_as_first(name): adapter[name].float() for name in changes[layer]}
                model, off = _merged(get_peft_model(model, adapter_config, low_cpu_mem_usage=True), own)
                if not math.isfinite(off):
                    raise NotFiniteError(
                        f"layer {layer} of {model_folder} gives outputs that are not finite: look at the model's weights."
                    )
                if off > _TOLERANCE:
                    raise InputError(
                        f"{adapter_folder}: layer {layer} with the adapter and merged differ by {off:.1e} of its largest "
                        "output. The adapter has parts that a merge can't take over."
                    )
                difference = max(difference, off)
                weights = {_LAYER.sub(str(layer), name): tensor for name, tensor in model.state_dict().items()}
            else:
                weights = {name: stored[name] for name in names}
            tensors = released_tensors(weights)
            for name in filter(writer.missing, layouts[layer]):
                writer.write(name, tensors[name].to(dtype))
        writer.finish()
    finish_release(config, model_folder, target)
    (target / _MERGED).unlink()
    return difference


def _forget_another(target: Path, adapter: str) -> None:
    """Delete the shards in `target` that are of another adapter than the one with this hash."""
    target.mkdir(parents=True, exist_ok=True)
    marker = target / _MERGED
    if not marker.is_file() or marker.read_text() != adapter:
        for path in (*target.glob("model*.safetensors"), target / INDEX):
            path.unlink(missing_ok=True)
        marker.write_text(adapter)


def _by_layer(names: Iterable[str]) -> dict[int | None, list[str]]:
    """Tensor names by the decoder layer that they belong to, in its order; those outside the layers first, under `None`."""
    found = defaultdict(list)
    for name in names:
        layer = _LAYER.search(name)
        found[int(layer[0]) if layer else None].append(name)
    return {layer: found[layer] for layer in sorted(found, key=lambda layer: -1 if layer is None else layer)}


def _as_first(name: str) -> str:
    return _LAYER.sub("0", name)


def _one_layer(config: PretrainedConfig, weights: dict[str, object]) -> PreTrainedModel:
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
    model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict={**weights, **around}, dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise InputError(f"{kind.replace('_', ' ')} in a decoder layer's weights: {sorted(report[kind])[:5]}")
    return model.eval()


def _merged(adapted: PeftModel, adapter: dict[str, torch.Tensor]) -> tuple[PreTrainedModel, float]:
    """The model with its adapter's tensors merged, and the difference that makes to a layer's output."""
    loaded = set_peft_model_state_dict(adapted, adapter, low_cpu_mem_usage=True)
    if loaded.unexpected_keys:
        raise InputError(f"the adapter has a tensor that its model has no place for: {loaded.unexpected_keys[0]}")
    adapted.eval()
    before = _probe(adapted.get_base_model())
    merged = adapted.merge_and_unload()
    return merged, ((_probe(merged) - before).abs().max() / before.abs().max()).item()


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
