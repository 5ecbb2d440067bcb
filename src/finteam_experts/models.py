# SPDX-License-Identifier: Apache-2.0
"""Model folders: finding, checking and loading them, and telling two bases apart."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from finteam_experts.chats import ChatFormat, TemplateError, chat_format
from finteam_experts.errors import InputError, read_json
from finteam_experts.release import COMPANION_FILES, GENERATION_FILE, TEMPLATE_FILE, TOKENIZER_FILES
from finteam_experts.shards import INDEX, StoredTensors, open_tensors, weight_files
from finteam_experts.tasks import SYSTEM_PROMPT

MLP_MODULES = ("gate_proj", "up_proj", "down_proj")  # what becomes the experts of the MoE
ADAPTER_FILE = "adapter_model.safetensors"
SUPPORTED_TYPES = ("llama", "mistral")
# What a model folder holds that shapes results: texts are scored and written with all of it, a LoRA on plain text is trained
# with the first three.
PARTS = ("weights", "config", "tokenizer", "chat_template", "generation_config")
PLAIN_TEXT_PARTS = PARTS[:3]


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
        # not every *.safetensors: some repositories hold all weights a second time, consolidated
        patterns = ["model.safetensors", "model-*.safetensors", INDEX, "config.json", *COMPANION_FILES]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"the model '{name}' is not a folder here and could not be fetched from the Hub: {error}"
        ) from None


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a model folder; `InputError` if it can't be read or names an architecture unknown to transformers."""
    read_json(folder / "config.json")
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/config.json: transformers can't read it: {error}") from None


def check_config(config: PretrainedConfig, where: Path | str) -> None:
    """Raise `InputError` unless mergekit can turn a dense base of this config into a Mixtral; `where` names it."""
    if config.model_type not in SUPPORTED_TYPES:
        raise InputError(
            f"{where}/config.json: model_type is '{config.model_type}'. A Mixtral-style MoE can be built from "
            f"{' or '.join(SUPPORTED_TYPES)} only; choose such a base."
        )
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            raise InputError(f"{where}/config.json: {key} is true. Mixtral has no biases; choose a base without them.")
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise InputError(
            f"{where}/config.json: the weights are quantised ({method}), which can't be merged. Choose the original weights; "
            "load_in_4bit in the recipe quantises them for the training alone."
        )


def check_base(folder: Path) -> PretrainedConfig:
    """Return the config of a dense base that can be trained and merged; `InputError` says why one can't be.

    Looks at its config, the names and shapes of its weights, its tokenizer and its chat template.
    """
    config = read_config(folder)
    check_config(config, folder)
    _check_tensors(folder, config)
    if (tokens := len(load_tokenizer(folder))) > config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokens} tokens and the model's vocabulary {config.vocab_size}: "
            "tokens were added to one and not to the other. Resize the embeddings, or take the model's own tokenizer."
        )
    return config


def _check_tensors(folder: Path, config: PretrainedConfig) -> None:
    with init_empty_weights():
        wanted = {
            name: list(tensor.shape) for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    with StoredTensors(weight_files(folder)) as stored:
        stored.dtype()
        found = {name: stored.slice(name).get_shape() for name in stored}
        if config.tie_word_embeddings:
            if head in found and not torch.equal(stored[head], stored[embedding]):
                raise InputError(
                    f"{folder}: {head} differs from {embedding}, and config.json says that they are one. Set "
                    "tie_word_embeddings to false there."
                )
            wanted.pop(head)
            found.pop(head, None)
    for what, names in (
        ("lack", wanted.keys() - found.keys()),
        ("have, unlike its architecture,", found.keys() - wanted.keys()),
    ):
        if names:
            raise InputError(
                f"{folder}: its weights {what} {', '.join(sorted(names)[:3])} ({len(names)} in all). config.json and weights "
                "are not of one model, or the model is an adapter or of another kind than it says."
            )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise InputError(
                f"{folder}: {name} is {found[name]}, and by config.json {shape}. They are not of one model."
            )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder; `InputError` if chats can't be written and read with it."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise InputError(f"{folder}: its tokenizer can't be loaded: {error}") from None
    if not tokenizer.chat_template:
        raise InputError(
            f"{folder}: its tokenizer has no chat template, and tasks are asked as chats. "
            "Choose an instruct model, or put a chat_template.jinja into that folder."
        )
    if tokenizer.eos_token is None:
        raise InputError(
            f"{folder}: its tokenizer has no eos_token, so no answer would end. Set it in tokenizer_config.json."
        )
    if tokenizer.pad_token is None:  # as in Llama 3: padding is masked, so any token serves
        tokenizer.pad_token = tokenizer.eos_token
    as_chats(tokenizer, folder)
    return tokenizer


def as_chats(tokenizer: PreTrainedTokenizerBase, folder: Path) -> ChatFormat:
    """How the tokenizer of the model in `folder` writes conversations; `InputError` if its template can't be used."""
    try:
        return chat_format(tokenizer, SYSTEM_PROMPT)
    except TemplateError as error:
        raise InputError(
            f"{folder}: its chat template can't be used: {error} Put a template into {folder}/{TEMPLATE_FILE} that writes an "
            "answered prompt as it writes the prompt."
        ) from None


def load_model(folder: Path, dtype: str | torch.dtype = "auto") -> torch.nn.Module:
    """Load a causal language model for inference; `InputError` if its weights do not fit its architecture exactly."""
    for file in weight_files(folder):
        open_tensors(file)
    read_config(folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise InputError(f"{folder}: {kind.replace('_', ' ')} in the weights: {sorted(report[kind])[:5]}")
    return model.eval()


def stored_dtype(folder: Path) -> torch.dtype:
    """The type of a model's weights: as its config says or, if that says nothing, as most of them are stored."""
    if dtype := read_config(folder).dtype:
        return dtype
    with StoredTensors(weight_files(folder)) as tensors:
        return tensors.dtype()


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


def fingerprint(folder: Path, parts: Collection[str] = PARTS) -> dict[str, str]:
    """16 hex digits for each of these parts of a model folder, that change with any byte of it (about 1.5 GB a second)."""
    makers = {
        "weights": lambda: _digest({file.name: file for file in weight_files(folder)}),
        "config": lambda: _digest({"config.json": folder / "config.json"}),
        "tokenizer": lambda: _digest({name: folder / name for name in TOKENIZER_FILES}, _without_template(folder)),
        "chat_template": lambda: _digest(
            {TEMPLATE_FILE: folder / TEMPLATE_FILE}, str(_tokenizer_settings(folder).get(_TEMPLATE))
        ),
        "generation_config": lambda: _digest({GENERATION_FILE: folder / GENERATION_FILE}),
    }
    return {part: makers[part]() for part in parts}


def is_model(folder: Path, recorded: object) -> bool:
    """Whether the model in `folder` has the fingerprint that a record holds, in the parts that it holds."""
    known = isinstance(recorded, dict) and recorded.keys() <= set(PARTS)
    return known and fingerprint(folder, recorded) == recorded


def _digest(files: dict[str, Path], *texts: str) -> str:
    """Of the files that exist, by name, read in parallel (hashing leaves Python's lock free), and of the texts."""
    present = {name: file for name, file in sorted(files.items()) if file.is_file()}
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda file: hashlib.file_digest(file.open("rb"), "sha256").hexdigest(), present.values())
        return hashlib.sha256(repr((list(present), list(digests), texts)).encode()).hexdigest()[:16]


_TEMPLATE = "chat_template"  # older folders have it among the tokenizer's settings


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _without_template(folder: Path) -> str:
    settings = _tokenizer_settings(folder)
    settings.pop(_TEMPLATE, None)
    return json.dumps(settings, sort_keys=True)


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
