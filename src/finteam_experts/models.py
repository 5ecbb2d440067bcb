# SPDX-License-Identifier: Apache-2.0
"""Model folders: finding, checking and loading them."""

from collections.abc import Collection
from pathlib import Path

from finteam_experts.threads import has_bf16_units

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from finteam_experts.chats import ChatFormat, TemplateError, chat_format
from finteam_experts.data.tasks import SYSTEM_PROMPT
from finteam_experts.errors import InputError
from finteam_experts.families import check_config
from finteam_experts.files import read_json, write_json
from finteam_experts.weights import DTYPES, INDEX, StoredTensors, open_tensors, weight_files

MLP_MODULES = ("gate_proj", "up_proj", "down_proj")  # what becomes the experts of the MoE
ADAPTER_FILE = "adapter_model.safetensors"
# Files beside the weights that a derived model takes over from its base
TOKENIZER_FILES = (
    "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
TOKENIZER_CONFIG, TEMPLATE_FILE, GENERATION_FILE = (
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
COMPANION_FILES = (*TOKENIZER_FILES, TOKENIZER_CONFIG, TEMPLATE_FILE, GENERATION_FILE)
# What is fetched of a model: not every *.safetensors, since some repositories hold all weights a second time, consolidated
FETCHED_FILES = ("model.safetensors", "model-*.safetensors", INDEX, "config.json", *COMPANION_FILES)


def local_folder(name: str, others: Collection[str] = ()) -> Path:
    """The folder of a model given as a folder or as a Hub id, which is downloaded (weights as safetensors only).

    `others` are files that are wanted beside those of a model, or instead of them.
    """
    if any((Path(name) / file).is_file() for file in ("config.json", *others)):
        return Path(name)
    if Path(name).exists() or name.count("/") != 1:
        raise InputError(
            f"'{name}' is neither a model folder (it has no config.json) nor a Hub id like 'owner/name'. Name a base with "
            "--base, or let scripts/make_base.py write RUN_DIR/base."
        )
    try:
        return Path(snapshot_download(name, allow_patterns=[*FETCHED_FILES, *others]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"the model '{name}' is not a folder here and could not be fetched from the Hub. If it is private, log in with "
            f"'hf auth login' as someone who may read it. The Hub's answer: {error}"
        ) from None


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a model folder; `InputError` if it can't be read or names an architecture unknown to transformers."""
    content = read_json(folder / "config.json")
    for key in ("dtype", "torch_dtype"):
        if content.get(key) not in (None, *DTYPES):
            raise InputError(
                f"{folder}/config.json: {key} is {content[key]!r}, which transformers can't read. Write the type of the weights: "
                f"{', '.join(DTYPES)}."
            )
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/config.json: transformers can't read it: {error}") from None


def check_base(folder: Path) -> PretrainedConfig:
    """Return the config of a dense base that can be trained and merged; `InputError` says why one can't be.

    Looks at its config, the names and shapes of its weights, its tokenizer and its chat template.
    """
    config = read_config(folder)
    check_config(config, folder)
    _check_tensors(folder, config)
    for name in ("config.json", GENERATION_FILE):
        _eos_ids(folder / name, config.vocab_size)
    if (tokens := len(load_tokenizer(folder))) > config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokens} tokens and the model's vocabulary {config.vocab_size}: "
            "tokens were added to one and not to the other. Resize the embeddings, or take the model's own tokenizer."
        )
    return config


def _check_tensors(folder: Path, config: PretrainedConfig) -> None:
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    with StoredTensors(folder) as stored:
        stored.dtype()
        found = {name: stored.shape(name) for name in stored}
        if config.tie_word_embeddings:
            if head in found and not torch.equal(stored[head], stored[embedding]):
                raise InputError(
                    f"{folder}: {head} differs from {embedding}, and config.json says that they are one. Set "
                    "tie_word_embeddings to false there."
                )
            wanted.pop(head)
            found.pop(head, None)
    for what, names in (
        ("lack", wanted.keys() - found.keys()), ("have, unlike its architecture,", found.keys() - wanted.keys()),
    ):  # fmt: skip
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
        return chat_format(tokenizer, SYSTEM_PROMPT, InputError)
    except TemplateError as error:
        raise InputError(
            f"{folder}: its chat template can't be used: {error} Put a template into {folder}/{TEMPLATE_FILE} that writes an "
            "answered prompt as it writes the prompt, and ends an answer with a special token."
        ) from None


def _eos_ids(path: Path, tokens: int) -> list[int]:
    """The `eos_token_id` of a config, where generation stops; `InputError` unless they are numbers of a model's `tokens` tokens."""
    value = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and 0 <= token < tokens for token in ids):
        raise InputError(
            f"{path}: eos_token_id is {value!r}; it is the number of a token below {tokens}, or a list of them."
        )
    return ids


def align_eos(folder: Path) -> None:
    """Let whatever generates with the model in `folder` stop at the token that its chat template puts after an answer.

    As TRL does with an `eos_token`: transformers and vLLM stop at any eos_token_id of generation_config.json, where those of
    the base stay; llama.cpp stops at the tokenizer's eos_token, or that of config.json.
    """
    tokenizer, config = load_tokenizer(folder), read_json(folder / "config.json")
    stop, path = as_chats(tokenizer, folder).stop_id, folder / GENERATION_FILE
    of_config, of_generation = (_eos_ids(file, config["vocab_size"]) for file in (folder / "config.json", path))
    if not {stop, tokenizer.eos_token_id} <= set(of_generation):
        others = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
        content = read_json(path) if path.is_file() else others
        ids = dict.fromkeys([stop, tokenizer.eos_token_id, *(of_generation or of_config)])
        write_json(path, content | {"eos_token_id": list(ids)})
    if stop not in of_config:
        write_json(folder / "config.json", config | {"eos_token_id": stop})
    if (
        tokenizer.eos_token_id != stop and "eos_token" not in tokenizer.get_chat_template()
    ):  # it would write another text
        for file in (folder / TOKENIZER_CONFIG, folder / "special_tokens_map.json"):
            if file.is_file():
                write_json(file, read_json(file) | {"eos_token": tokenizer.convert_ids_to_tokens(stop)})


def load_model(folder: Path, dtype: str | torch.dtype = "auto") -> torch.nn.Module:
    """Load a causal language model for inference; `InputError` if its weights do not fit its architecture exactly."""
    for file in weight_files(folder):
        open_tensors(file)
    read_config(folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    check_loading(report, str(folder))
    return model.eval()


def reading_dtype(device: torch.device) -> str:
    """The type for a model that only reads text: bfloat16 on a CPU that multiplies in it, or else that of the weights."""
    return "bfloat16" if device.type == "cpu" and has_bf16_units() else "auto"


def check_loading(report: dict, what: str) -> None:
    """Raise `InputError` if transformers' loading report names weights that are missing, left over or of a wrong shape."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise InputError(f"{what}: {kind.replace('_', ' ')} in the weights: {sorted(report[kind])[:5]}")


def stored_dtype(folder: Path) -> torch.dtype:
    """The type of a model's weights: as its config says or, if that says nothing, as most of them are stored."""
    if dtype := read_config(folder).dtype:
        return dtype
    with StoredTensors(folder) as tensors:
        return tensors.dtype()


def parameter_counts(model: torch.nn.Module) -> dict[str, int]:
    """A model's parameters: `total`, those `active` per token, and those in `experts`. It may be on the meta device."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total, experts = sum(sizes.values()), sum(size for name, size in sizes.items() if ".experts." in name)
    unused = 1 - model.config.num_experts_per_tok / model.config.num_local_experts if experts else 0
    return {"total": total, "active": total - round(experts * unused), "experts": experts}


def empty_model(config: PretrainedConfig) -> torch.nn.Module:
    """The model of that config on the meta device, to count its parameters."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model
