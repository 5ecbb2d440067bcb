# SPDX-License-Identifier: Apache-2.0
"""Model folders: finding, checking and loading them, and telling two bases apart."""

import hashlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from finteam_experts.errors import InputError
from finteam_experts.release import COMPANION_FILES
from finteam_experts.shards import StoredTensors, weight_files

MLP_MODULES = ("gate_proj", "up_proj", "down_proj")  # what becomes the experts of the MoE
SUPPORTED_TYPES = ("llama", "mistral")


def local_folder(name: str) -> Path:
    """The folder of a model given as a folder or as a Hub id, which is downloaded (weights as safetensors only)."""
    if (Path(name) / "config.json").is_file():
        return Path(name)
    if Path(name).exists() or name.count("/") != 1:
        raise InputError(
            f"'{name}' is neither a model folder (it has no config.json) nor a Hub id like 'owner/name'. Name a base with "
            "--base, or let scripts/make_base.py write RUN_DIR/base."
        )
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", *COMPANION_FILES]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"the model '{name}' is not a folder here and could not be fetched from the Hub: {error}"
        ) from None


def check_base(folder: Path) -> PretrainedConfig:
    """Return the config of a dense base that mergekit can turn into a Mixtral; `InputError` says why one can't be."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in SUPPORTED_TYPES:
        raise InputError(
            f"{folder}/config.json: model_type is '{config.model_type}'. A Mixtral-style MoE can be built from "
            f"{' or '.join(SUPPORTED_TYPES)} only; choose such a base."
        )
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            raise InputError(
                f"{folder}/config.json: {key} is true. Mixtral has no biases; choose a base without them."
            )
    return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder; `InputError` if it has no chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise InputError(
            f"{folder}: its tokenizer has no chat template, and tasks are asked as chats. "
            "Choose an instruct model, or put a chat_template.jinja into that folder."
        )
    if tokenizer.pad_token is None:  # as in Llama 3: padding is masked, so any token serves
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(folder: Path, dtype: str | torch.dtype = "auto") -> torch.nn.Module:
    """Load a causal language model for inference; `InputError` if its weights do not fit its architecture exactly."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise InputError(f"{folder}: {kind.replace('_', ' ')} in the weights: {sorted(report[kind])[:5]}")
    return model.eval()


def parameter_counts(folder: Path) -> dict[str, int]:
    """A model's parameters, `total` and those `active` in each token, from its config alone."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    used = config.num_experts_per_tok / config.num_local_experts if experts else 1
    return {"total": total, "active": total - round(experts * (1 - used))}


def fingerprint(folder: Path) -> str:
    """16 hex digits that change with any tensor's name, shape, type or first row (a sample: bases run to many GB)."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                part = tensors.get_slice(name)
                digest.update(f"{name} {part.get_shape()} {part.get_dtype()}".encode())
                digest.update(part[:1].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def stored_tensors(
    folder: Path, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a model folder by name, one at a time and without their model, if their name is `wanted`."""
    with StoredTensors(weight_files(folder)) as tensors:
        for name in filter(wanted, tensors):
            yield name, tensors[name]


def adapts_split_experts(config: PretrainedConfig, target_modules: Collection[str] | None) -> bool:
    """Whether a LoRA on modules of these names is meant for an MoE's experts as linear layers."""
    return config.model_type == "mixtral" and not set(MLP_MODULES).isdisjoint(target_modules or ())


@torch.no_grad()
def weight_average(folders: list[Path]) -> torch.nn.Module:
    """The dense model whose MLPs are the mean of the experts' (all else they have from the base)."""
    model = load_model(folders[0])
    mean = {name: tensor / len(folders) for name, tensor in model.state_dict().items() if _in_mlp(name)}
    for folder in folders[1:]:
        for name, tensor in load_model(folder).state_dict().items():
            if _in_mlp(name):
                mean[name] += tensor / len(folders)
    model.load_state_dict(mean, strict=False)
    return model


def _in_mlp(name: str) -> bool:
    return any(f".mlp.{module}." in name for module in MLP_MODULES)
