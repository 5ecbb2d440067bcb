# SPDX-License-Identifier: Apache-2.0
"""The one layout of an MoE on disk, which transformers 4 and 5, vLLM and llama.cpp read alike.

transformers 5 fuses the experts of a layer into two tensors when it loads them. On disk every expert has three tensors (a
Mixtral's are `block_sparse_moe.experts.N.w1/w2/w3`): older readers look for those, and some of them leave experts that they do
not find at random values with no more than a warning.
"""

import re
import shutil
from pathlib import Path

import torch
from transformers import PretrainedConfig

from finteam_experts.families import Family, family_of, is_moe
from finteam_experts.files import read_json, write_json
from finteam_experts.models import COMPANION_FILES

_LINEAR_EXPERT = re.compile(r"\.mlp\.experts\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")


def on_disk(tensors: dict[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """The same weights under the names on disk of their family, as views.

    Experts may be fused, as transformers 5 has them in memory, or linear layers, as in `training.experts`.
    """
    renamed = {}
    for name, tensor in tensors.items():
        layer = name.split(".")[2] if ".layers." in name else ""
        if linear := _LINEAR_EXPERT.search(name):
            renamed[family.expert_tensor(layer, int(linear[1]), linear[2])] = tensor
        elif name.endswith(".mlp.experts.gate_up_proj"):  # [experts, 2 x intermediate, hidden]
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                renamed |= {
                    family.expert_tensor(layer, expert, "gate_proj"): gate,
                    family.expert_tensor(layer, expert, "up_proj"): up,
                }
        elif name.endswith(".mlp.experts.down_proj"):
            renamed |= {
                family.expert_tensor(layer, expert, "down_proj"): matrix for expert, matrix in enumerate(tensor)
            }
        else:
            renamed[family.gate_tensor(layer) if name.endswith(".mlp.gate.weight") else name] = tensor
    return renamed


def save_model(model: torch.nn.Module, source: Path, target: Path) -> None:
    """Save a dense model, or an MoE that was loaded from this layout, with the companions of the model in `source`."""
    model.save_pretrained(target)
    finish_folder(model.config, source, target)


def finish_folder(config: PretrainedConfig, source: Path, target: Path) -> None:
    """Put what every reader wants beside the weights in `target`: the config, and the companions of `source`."""
    config.output_router_logits = False  # it would cost every user the auxiliary loss
    config.save_pretrained(target)
    for name in COMPANION_FILES:
        (target / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    content = read_json(target / "config.json")
    rope = dict(content.get("rope_parameters") or {})
    content |= {
        "torch_dtype": content.get("dtype"),
        "rope_theta": rope.pop("rope_theta", 10000.0),
    }  # transformers 4's keys
    if is_moe(config):
        content |= {key: content[now] for key, now in family_of(config).older_keys.items() if now in content}
    if rope.get("rope_type", "default") != "default":
        content["rope_scaling"] = rope
    write_json(target / "config.json", content)
    _for_older_readers(target / "tokenizer_config.json")


def _for_older_readers(path: Path) -> None:
    """Name a tokenizer class that transformers 4 knows, and write special tokens in a form that it reads."""
    if not path.is_file():
        return
    content = read_json(path)
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    write_json(path, content)
