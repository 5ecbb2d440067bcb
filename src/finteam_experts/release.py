# SPDX-License-Identifier: Apache-2.0
"""The layout in which a model is released: one that transformers 5 and 4, vLLM and llama.cpp read alike.

transformers 5 fuses a Mixtral's experts into two tensors a layer. Older readers expect one tensor an expert and matrix,
`block_sparse_moe.experts.N.w1/w2/w3`; some leave experts that they do not find at random values with no more than a
warning. transformers 5 reads both layouts.
"""

import json
import shutil
from pathlib import Path

import torch

from finteam_experts.runs import write_json

# Files beside the weights that a derived model carries over byte for byte.
COMPANION_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation config unchanged, over whatever a library wrote there."""
    for name in COMPANION_FILES:
        (target / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def save_release(model: torch.nn.Module, source: Path, target: Path) -> None:
    """Save `model` to `target` for every reader, with the tokenizer, chat template and generation config of `source`."""
    model.config.output_router_logits = False  # it would cost every user the auxiliary loss
    model._weight_conversions = None  # else the layout that it was loaded from is kept
    model.save_pretrained(target)
    copy_companions(source, target)
    _update_json(target / "config.json", _with_old_keys)
    if (target / "tokenizer_config.json").is_file():
        _update_json(target / "tokenizer_config.json", _with_old_class)


def _update_json(path: Path, change) -> None:
    write_json(path, change(json.loads(path.read_text())))


def _with_old_keys(config: dict) -> dict:
    """The model config with what transformers 4 and its contemporaries look for beside what transformers 5 does."""
    rope = dict(config.get("rope_parameters") or {})
    config["torch_dtype"] = config["dtype"]
    config["rope_theta"] = rope.pop("rope_theta", 10000.0)
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    return config


def _with_old_class(config: dict) -> dict:
    """The tokenizer config with a class that transformers 4 knows, and special tokens in a form that it reads."""
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
