# SPDX-License-Identifier: Apache-2.0
"""Merging a LoRA into its model by PEFT, with one decoder layer at a time in memory.

The whole model is built without memory (on the meta device) and PEFT puts the adapter into it, so that every module has its
own name, rank, scaling and options. Then one layer after another is read, merged, compared, written and freed.
transformers' and PEFT's own merge needs the whole model: 80 GB for a team of three 8B experts in float32
(benchmarks/merge.py).
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig

from finteam_experts import runs
from finteam_experts.errors import InputError, NotFiniteError
from finteam_experts.families import family_of, is_moe
from finteam_experts.files import file_hash, read_json
from finteam_experts.merging.gates import forced_expert
from finteam_experts.merging.moe import check_same_tokenizer, finish_folder
from finteam_experts.models import ADAPTER_FILE, TOKENIZER_CONFIG, read_config, stored_dtype
from finteam_experts.training.experts import adapts_linear_experts, split_experts
from finteam_experts.weights import StoredTensors, cast, new_writer

CONFIG_FILE = "adapter_config.json"
PICKLE = "adapter_model.bin"
_ADAPTER = "default"  # PEFT's name of the only adapter
# The options of LoraConfig whose effect is in the merged weights, or that have none on them. Others are refused.
_MERGED = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "target_parameters", "lora_alpha", "rank_pattern", "alpha_pattern",
    "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "use_dora", "modules_to_save", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "eva_config", "ensure_weight_tying", "megatron_core", "qalora_group_size",
}  # fmt: skip
# What a LoRA can be initialised with: these leave the model's weights as they are ...
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# ... and these take out of them what the adapter begins with, which can be computed again from the weights alone
_TAKEN_OUT = {
    "pissa": lambda module: module.pissa_init(_ADAPTER, "pissa"),
    "olora": lambda module: module.olora_init(_ADAPTER),
}
_IN_PEFT = "base_model.model."  # how the names of a model's modules begin in a PeftModel
_PROBE_TOKENS = 4
_TOLERANCE = 1e-3


def read_lora(folder: Path) -> LoraConfig:
    """The config of the LoRA in `folder`; `InputError` unless a merge can take over all that it says."""
    if not (folder / ADAPTER_FILE).is_file():
        found = "and is no adapter. Name the folder of one."
        if deeper := ", ".join(str(path.parent) for path in sorted(folder.glob(f"*/{ADAPTER_FILE}"))):
            found = f"but a folder in it has. Name that: {deeper}"
        if (folder / PICKLE).is_file():
            found = f"only {PICKLE}, which can run code when it is read. Load it with PEFT and save it again as safetensors."
        raise InputError(f"{folder} has no {ADAPTER_FILE}, {found}")
    content, file, default = read_json(folder / CONFIG_FILE), folder / CONFIG_FILE, LoraConfig().to_dict()
    if content.get("peft_type") != "LORA":
        raise InputError(f"{file}: peft_type is {content.get('peft_type')}. Only a LORA can be merged: train one.")
    for key, value in content.items():
        if value and key not in _MERGED and value != default.get(key):
            why = "can't be merged" if key in default else "is unknown to the PEFT that is installed"
            raise InputError(f"{file}: {key} is {value}, which {why}. Train the adapter without it.")
    if (start := content.get("init_lora_weights")) not in (*_PLAIN_STARTS, *_TAKEN_OUT):
        raise InputError(
            f"{file}: init_lora_weights is '{start}', which changed the model's own weights in a way that can't be computed again. "
            "Save the adapter as a plain LoRA: PEFT's save_pretrained with path_initial_model_for_weight_conversion."
        )
    try:
        return LoraConfig(**{key: value for key, value in content.items() if key in default})
    except (ValueError, TypeError) as error:
        raise InputError(f"{file}: PEFT refuses it: {error}") from None


def adapted_skeleton(config: PretrainedConfig, folder: Path, lora: LoraConfig) -> tuple[PeftModel, dict[str, str]]:
    """A model with the LoRA of `folder` in it, all on the meta device, and the name in it of each tensor of the adapter's file.

    Raises `InputError` unless the file has exactly the tensors that the model and the adapter's config ask for, and all of
    them are finite and within the decoder layers.
    """
    # the weights of an adapter are read from its file: what it started from is taken out of a layer once that is read
    lora = dataclasses.replace(lora, init_lora_weights=True, eva_config=None, base_model_name_or_path=None)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if adapts_linear_experts(config, lora.target_modules):
        split_experts(model)
    try:
        adapted = get_peft_model(model, lora, low_cpu_mem_usage=True).eval()
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise InputError(f"{folder}/{CONFIG_FILE}: PEFT can't put this adapter into its model: {error}") from None
    state = adapted.state_dict()
    # by the name in the file; PEFT is given names in the place of tensors
    names = get_peft_model_state_dict(adapted, {name: name for name in state}, save_embedding_layers=False)
    for name, in_model in names.items():
        if not in_model.startswith(f"{_IN_PEFT}model.layers."):
            raise InputError(
                f"{folder} changes {name}. A merge takes over what is in the decoder layers: leave embeddings and head out of "
                "lora_target_modules and lora_modules_to_save."
            )
    file = folder / ADAPTER_FILE
    with StoredTensors([file]) as stored:
        lacking, needless = names.keys() - set(stored), set(stored) - names.keys()
        if wrong := lacking or needless:
            what = "lacks" if lacking else "has, without a place for it in the model,"
            raise InputError(
                f"{file} {what} {min(wrong)} ({len(wrong)} in all, of {len(names)} that {CONFIG_FILE} asks for). The file is "
                "incomplete, or of another adapter: save the adapter again."
            )
        for name, in_model in names.items():
            shape, wanted = stored.shape(name), list(state[in_model].shape)
            if shape != wanted:
                why = (
                    "DeepSpeed's ZeRO-3 leaves weights empty that are saved without stage3_gather_16bit_weights_on_model_save."
                    if 0 in shape
                    else "It was trained on a model of another size, or with other ranks."
                )
                raise InputError(f"{file}: {name} is {shape}, and by its model and {CONFIG_FILE} {wanted}. {why}")
            if not stored[name].isfinite().all():
                raise NotFiniteError(f"{file}: {name} is not finite: its training diverged. Train it again.")
    return adapted, names


@torch.no_grad()
def merge_lora(model_folder: Path, adapter_folder: Path, target: Path) -> float:
    """Merge a LoRA into its model in fp32, and save the result to `target` in the model's dtype.

    Returns the largest difference between a layer's outputs with the adapter, as PEFT applies it, and merged, as a share of
    the largest output. Raises `InputError` if that exceeds 1e-3, if the adapter can't be merged (`read_lora`,
    `adapted_skeleton`), or if a weight is not finite in the model's dtype.
    """
    config, lora = read_config(model_folder), read_lora(adapter_folder)
    model, names = adapted_skeleton(config, adapter_folder, lora)
    config.dtype = stored_dtype(model_folder)  # building the model in fp32 has changed it
    differences = [torch.zeros(())]
    with StoredTensors(model_folder) as stored, StoredTensors([adapter_folder / ADAPTER_FILE]) as adapter:
        writer, base = new_writer(target), model.get_base_model()
        layers = {f"model.layers.{number}.": layer for number, layer in enumerate(base.model.layers)}
        by_layer: dict[str, list[str]] = {prefix: [] for prefix in ("", *layers)}  # what is in no layer comes first
        for name in stored:
            by_layer[next((prefix for prefix in layers if name.startswith(prefix)), "")].append(name)
        for prefix, of_layer in tqdm(by_layer.items(), desc=f"merging {adapter_folder.name}", leave=False):
            tensors, what = {name: stored[name] for name in of_layer}, f"{model_folder}: "
            weights = {
                in_model.removeprefix(_IN_PEFT + prefix): adapter[name].float()  # as PEFT keeps it
                for name, in_model in names.items()
                if prefix and in_model.startswith(_IN_PEFT + prefix)
            }
            if weights:
                layer, what = layers[prefix], f"{adapter_folder} merged into {model_folder}: "
                _fill(layer, prefix, tensors, model_folder, config)
                layer.load_state_dict(weights, strict=False, assign=True)
                if start := _TAKEN_OUT.get(lora.init_lora_weights):
                    for module in layer.modules():
                        if isinstance(module, LoraLayer):
                            start(module)  # writes the adapter's weights of then, too
                    layer.load_state_dict(weights, strict=False, assign=True)
                before = _outputs(base, layer)
                for module in layer.modules():
                    if isinstance(module, BaseTunerLayer):
                        module.merge()
                after, tensors = _outputs(base, layer), dict(_stored(layer, prefix, config))
                differences += [(b - a).abs().max() / a.abs().max() for a, b in zip(before, after, strict=True)]
                layer.to("meta")
                if (
                    not (off := torch.stack(differences).max().item()) <= _TOLERANCE
                ):  # NaN, where the weights are not finite
                    raise InputError(
                        f"{adapter_folder}: {prefix.strip('.')} with the adapter and merged differ by {off:.1e} of its largest output. "
                        f"The adapter has parts that a merge can't take over, or {model_folder} has weights that are not finite."
                    )
            for name, tensor in tensors.items():  # of fused experts they are views
                writer.save_tensor(name, cast(tensor, config.dtype, what + name), clone=bool(weights))
        writer.finalize()
    finish_folder(config, model_folder, target)
    return torch.stack(differences).max().item()


def dense_expert(
    base: Path, known_base: dict[str, str], adapter: Path, target: Path, *, overwrite: bool = False
) -> None:
    """Make the folder `target` of the base, whose fingerprint is `known_base`, with the adapter merged into it."""
    inputs = {"base": known_base, "adapter": file_hash(adapter / ADAPTER_FILE)}
    if work := runs.begin(target, "merge_expert", inputs, overwrite=overwrite):
        difference = merge_lora(base, adapter, work)
        runs.finish(target, {"results": {"merge_difference": difference}})
        print(f"{target}: adapter merged, its layers' outputs agree to {difference:.0e}")


def check_adapter(folder: Path, role: str, base: Path, known_base: dict[str, str]) -> None:
    """Raise `InputError` unless the adapter in `folder` was trained on the dense model in `base`, whose fingerprint is
    `known_base`, changes nothing but its MLPs, and can be merged.

    An adapter that PEFT or TRL saved has no record of its base: the screen says that it is taken for one of this base.
    """
    recorded = (folder / runs.RECORD).is_file()
    if recorded or not folder.is_dir():
        record = runs.require(folder, f"accelerate launch recipes/train_expert.py --config YAML --role {role}")
        trained_on = record["inputs"].get("base")
        if not isinstance(trained_on, dict) or any(known_base.get(part) != trained_on[part] for part in trained_on):
            raise InputError(
                f"{folder} was trained on another base (fingerprint {trained_on}; this base has {known_base}). Train the role "
                "again on this base, or name its base with --base."
            )
    lora, config = read_lora(folder), read_config(base)
    if not recorded:
        named = lora.base_model_name_or_path
        print(
            f"{folder} has no {runs.RECORD}: it says that its base is {named}, and is taken for an adapter of {base}"
        )
        if (folder / TOKENIZER_CONFIG).is_file():  # TRL saves the tokenizer that it trained with
            check_same_tokenizer(folder, base)
    family = family_of(config)
    for name in adapted_skeleton(config, folder, lora)[1]:
        if not any(f".{family.mlp}.{matrix}." in name for matrix in family.matrices):
            raise InputError(
                f"{folder}/{ADAPTER_FILE} changes {name}. The merge takes everything but the MLP from the base, so that "
                f"change would be lost: train {', '.join(family.matrices)} only."
            )


def _fill(
    layer: nn.Module, prefix: str, tensors: dict[str, torch.Tensor], folder: Path, config: PretrainedConfig
) -> None:
    """Put a decoder layer's weights, which `tensors` has by their names on disk, into it in fp32."""
    state, used = {}, set()
    for name, parameter in layer.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        parts = family_of(config).on_disk(prefix + _plain(name), len(parameter))
        used |= {part for rows in parts for part in rows}
        if used - tensors.keys():
            break
        joined = [torch.cat([tensors[part] for part in rows]) for rows in parts]
        state[name] = (torch.stack(joined) if parameter.dim() == 3 else joined[0]).to(torch.float32, copy=True)
        if state[name].shape != parameter.shape:
            raise InputError(
                f"{folder}: {parts[0][0]} has another shape than config.json says. They are not of one model."
            )
    if wrong := used ^ tensors.keys():
        raise InputError(
            f"{folder} lacks {min(wrong)}, or has no place for it. config.json and weights are not of one model."
        )
    layer.load_state_dict(state, strict=False, assign=True)


def _stored(layer: nn.Module, prefix: str, config: PretrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The merged weights of a decoder layer with their names on disk."""
    for name, parameter in layer.named_parameters():
        if ".lora_" not in name and ".original_module." not in name:
            parts = family_of(config).on_disk(prefix + _plain(name), len(parameter))
            for rows, of_expert in zip(
                parts, parameter.data if parameter.dim() == 3 else [parameter.data], strict=True
            ):
                yield from zip(rows, of_expert.chunk(len(rows)), strict=True)


def _plain(name: str) -> str:
    """The name of a parameter without what PEFT wraps around it."""
    for wrapper in (".base_layer", ".original_module", f".modules_to_save.{_ADAPTER}"):
        name = name.replace(wrapper, "")
    return name


def _outputs(model: nn.Module, layer: nn.Module) -> list[torch.Tensor]:
    """What a layer adds to some random hidden states: as its router chooses, and through each expert of an MoE."""
    hidden = torch.randn(1, _PROBE_TOKENS, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    positions, found = torch.arange(_PROBE_TOKENS)[None], []
    rotary = model.model.rotary_emb(hidden, positions)
    for expert in (None, *range(model.config.num_local_experts if is_moe(model.config) else 0)):
        with forced_expert(model, expert):
            found.append(layer(hidden, position_ids=positions, position_embeddings=rotary) - hidden)
    return found
