# SPDX-License-Identifier: Apache-2.0
"""The layout in which a model is released: one that transformers 5 and 4, vLLM and llama.cpp read alike.

transformers 5 fuses a Mixtral's experts into two tensors a layer. Older readers expect one tensor an expert and matrix,
`block_sparse_moe.experts.N.w1/w2/w3`; some leave experts that they do not find at random values with no more than a
warning. transformers 5 reads both layouts.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from transformers import PretrainedConfig

from finteam_experts.runs import write_json

# Files beside the weights that a derived model carries over byte for byte. tokenizer_config.json is one of them, too.
TOKENIZER_FILES = (
    "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
TEMPLATE_FILE, GENERATION_FILE = "chat_template.jinja", "generation_config.json"
COMPANION_FILES = (*TOKENIZER_FILES, "tokenizer_config.json", TEMPLATE_FILE, GENERATION_FILE)
_LINEAR_EXPERT = re.compile(r"\.mlp\.experts\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")
_MATRICES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation config unchanged, over whatever a library wrote there."""
    for name in COMPANION_FILES:
        (target / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def save_release(model: torch.nn.Module, source: Path, target: Path) -> None:
    """Save `model` to `target` for every reader, with the tokenizer, chat template and generation config of `source`."""
    model._weight_conversions = None  # else the layout that it was loaded from is kept
    model.save_pretrained(target)
    finish_release(model.config, source, target)


def finish_release(config: PretrainedConfig, source: Path, target: Path) -> None:
    """Put beside the weights in `target` what every reader wants: the config, and the tokenizer and the like of `source`."""
    config.output_router_logits = False  # it would cost every user the auxiliary loss
    config.save_pretrained(target)
    copy_companions(source, target)
    _update_json(target / "config.json", _with_old_keys)
    if (target / "tokenizer_config.json").is_file():
        _update_json(target / "tokenizer_config.json", _with_old_class)


def released_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under the names of the release layout, as views: one tensor an expert and matrix.

    Experts may be fused, as transformers 5 has them, or linear layers, as in `split_experts`.
    """
    released = {}
    for name, tensor in tensors.items():
        if linear := _LINEAR_EXPERT.search(name):
            released[_expert(name, int(linear[1]), _MATRICES[linear[2]])] = tensor
        elif name.endswith(".mlp.experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                released[_expert(name, expert, "w1")], released[_expert(name, expert, "w3")] = both.chunk(2)
        elif name.endswith(".mlp.experts.down_proj"):
            released |= {_expert(name, expert, "w2"): matrix for expert, matrix in enumerate(tensor)}
        else:
            released[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = tensor
    return released


def _expert(name: str, expert: int, matrix: str) -> str:
    return f"{name.partition('.mlp.')[0]}.block_sparse_moe.experts.{expert}.{matrix}.weight"


def _update_json(path: Path, change) -> None:
    write_json(path, change(json.loads(path.read_text())))


def _with_old_keys(config: dict) -> dict:
    """The model config with what transformers 4 and its contemporaries look for beside what transformers 5 does."""
    rope = dict(config.get("rope_parameters") or {})
    config["torch_dtype"] = config.get("dtype")
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
