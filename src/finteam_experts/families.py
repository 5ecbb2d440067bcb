# SPDX-License-Identifier: Apache-2.0
"""The families of bases: which dense models become which mixture of experts, and what its tensors and config keys are called.

All that depends on a base's architecture is here; everything else asks `family_of`.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finteam_experts.errors import InputError
from finteam_experts.files import read_json


@dataclass(frozen=True)
class Family:
    dense_types: dict[str, str]  # `model_type` of the dense bases, and how people call them
    moe_type: str  # `model_type` of the MoE
    moe_name: str  # and how people call it
    block: str  # the MoE's block in a decoder layer, as it is called on disk
    matrices: dict[str, str]  # gate, up and down projection of a dense MLP, in this order, and of an expert on disk
    mlp: str = "mlp"  # the MLP in a decoder layer of a dense model
    moe_block: str = "mlp"  # the MoE's block in a decoder layer, as transformers calls it in memory
    # config keys of the MoE that follow from the dense config
    keys: Callable[[PretrainedConfig], dict[str, Any]] = lambda dense: {}
    # keys that readers of today and of transformers 4 look for, and the ones that transformers 5 writes instead
    older_keys: dict[str, str] = field(default_factory=dict)
    # what of a dense config the MoE has no place for, or None
    refuses: Callable[[PretrainedConfig], str | None] = lambda dense: None

    def expert_tensor(self, layer: int | str, expert: int | str, matrix: str) -> str:
        """The name on disk of an expert's `gate_proj`, `up_proj` or `down_proj`."""
        return f"model.layers.{layer}.{self.block}.experts.{expert}.{self.matrices[matrix]}.weight"

    def expert_tensors(self, layer: int, place: int | None) -> list[str]:
        """The names on disk of the matrices of an expert: at a place in an MoE or, with `None`, of a dense model."""
        if place is None:
            return [f"model.layers.{layer}.{self.mlp}.{matrix}.weight" for matrix in self.matrices]
        return [self.expert_tensor(layer, place, matrix) for matrix in self.matrices]

    def gate_tensor(self, layer: int | str) -> str:
        """The name on disk of a layer's gate."""
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def in_trunk(self, tensor: str) -> bool:
        """Whether the experts of a team share this tensor, which is on disk in a dense model or an MoE."""
        return f".{self.mlp}." not in tensor and f".{self.block}." not in tensor

    def on_disk(self, name: str, experts: int) -> list[list[str]]:
        """The names on disk of the tensor that a model in memory calls `name`.

        transformers keeps an MoE's experts in fused tensors: for each expert there is a list of the tensors whose rows follow each
        other. Experts that were split into linear layers (`training.experts`) and all else are one tensor.
        """
        found = re.fullmatch(rf"model\.layers\.(\d+)\.{self.moe_block}\.(.+)", name)
        layer, inner = found.groups() if found else ("", "")
        gate, up, down = self.matrices
        fused = {"experts.gate_up_proj": (gate, up), "experts.down_proj": (down,)}
        if inner in fused:
            return [[self.expert_tensor(layer, place, m) for m in fused[inner]] for place in range(experts)]
        if linear := re.fullmatch(r"experts\.experts\.(\d+)\.(\w+)\.weight", inner):
            return [[self.expert_tensor(layer, *linear.groups())]]
        return [[self.gate_tensor(layer) if inner == "gate.weight" else name]]

    def moe_config(self, dense: PretrainedConfig, experts: int, used: int) -> PretrainedConfig:
        """The config of the MoE of that many experts of a dense base, `used` of them per token.

        It has the base's value for each key that both classes know. What the class of the base does not know does not act there,
        like the sliding window in a config that was once a Mistral's, and has to stay out.
        """
        moe_class = CONFIG_MAPPING[self.moe_type]
        shared = (_keys(type(dense)) & _keys(moe_class)) | {"head_dim", "dtype"}
        config = moe_class(**{key: copy.deepcopy(getattr(dense, key)) for key in sorted(shared)} | self.keys(dense))
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.moe_type]]
        config.num_local_experts, config.num_experts_per_tok = experts, used
        return config


# A MoE's counts of experts, and keys that act in training or in generation alone
_NOT_COMPUTED_WITH = {
    "num_local_experts", "num_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef",
    "router_jitter_noise", "attention_dropout", "initializer_range", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id",
}  # fmt: skip


def _keys(config_class: type[PretrainedConfig]) -> set[str]:
    """The keys that a config class has beside those of every config."""
    return set(config_class().to_dict()) - set(PretrainedConfig().to_dict())


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """With the keys of dictionaries inside as `outer.inner`."""
    nested = {key: value for key, value in values.items() if isinstance(value, dict)}
    inner = {f"{outer}.{key}": value for outer, content in nested.items() for key, value in content.items()}
    return {key: value for key, value in values.items() if key not in nested} | inner


def _biases(config: PretrainedConfig) -> str | None:
    found = [key for key in ("attention_bias", "mlp_bias") if getattr(config, key, False)]
    return f"{found[0]} is true, and the MoE has no biases" if found else None


def _qwen3_refuses(config: PretrainedConfig) -> str | None:
    if getattr(config, "use_sliding_window", False) or set(config.layer_types) != {"full_attention"}:
        return "use_sliding_window or layer_types give some layers a window, and the MoE's attention has one kind of layer"
    return _biases(config)


FAMILIES = [
    Family(
        dense_types={"llama": "Llama", "mistral": "Mistral"},
        moe_type="mixtral",
        moe_name="Mixtral",
        block="block_sparse_moe",
        matrices={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
        refuses=_biases,
    ),
    Family(
        dense_types={"qwen3": "Qwen3"},
        moe_type="qwen3_moe",
        moe_name="Qwen3-MoE",
        block="mlp",
        matrices={matrix: matrix for matrix in ("gate_proj", "up_proj", "down_proj")},
        keys=lambda dense: {
            "moe_intermediate_size": dense.intermediate_size,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
        },  # fmt: skip
        older_keys={"num_experts": "num_local_experts"},
        refuses=_qwen3_refuses,
    ),
]
# why bases of other families can't become a team
OTHERS = {
    "qwen2": "its queries, keys and values have biases, which none of these MoEs has a place for",
    "gemma": "it scales its embeddings, which none of these MoEs does",
    "gemma2": "it has norms behind attention and MLP, which none of these MoEs has",
    "gemma3": "it has norms behind attention and MLP, which none of these MoEs has",
    "gemma3_text": "it has norms behind attention and MLP, which none of these MoEs has",
    "phi3": "its gate and up projections are one matrix, which a merge does not take apart",
    "phi": "its MLP has no gate projection",
    "gpt2": "its MLP has no gate projection",
    "mixtral": "it is a mixture of experts already",
    "qwen3_moe": "it is a mixture of experts already",
}


def family_of(config: PretrainedConfig | str) -> Family:
    """The family of a config, or of a `model_type`, dense or MoE; `InputError` if it is of none."""
    kind = config if isinstance(config, str) else _type(config)
    for family in FAMILIES:
        if kind == family.moe_type or kind in family.dense_types:
            return family
    raise InputError(f"models of the type '{kind}' are of no known family. {_advice(kind)}")


def family_in(folder: Path) -> Family:
    """The family of the model in `folder`."""
    return family_of(str(read_json(folder / "config.json").get("model_type")))


def is_moe(config: PretrainedConfig) -> bool:
    return any(_type(config) == family.moe_type for family in FAMILIES)


def config_difference(one: PretrainedConfig, other: PretrainedConfig) -> str | None:
    """The first key in which two configs, dense or MoE, compute differently, with both values; `None` if there is none."""
    configs = [c if is_moe(c) else family_of(c).moe_config(c, 1, 1) for c in (one, other)]
    keys = sorted(_keys(type(configs[0])) - _NOT_COMPUTED_WITH | {"head_dim"})
    mine, others = (_flat({key: getattr(config, key, None) for key in keys}) for config in configs)
    for key in sorted(mine | others):
        if mine.get(key) != others.get(key):
            return f"{key} is {mine.get(key)} and not {others.get(key)}"
    return None


def _type(config: PretrainedConfig) -> str:
    """The class's, since a model whose experts were split says another one (`training.experts`)."""
    return type(config).model_type


def check_config(config: PretrainedConfig, where: Path | str) -> None:
    """Raise `InputError` unless a dense base of this config can become an MoE; `where` names it."""
    family = next((family for family in FAMILIES if config.model_type in family.dense_types), None)
    if family is None:
        raise InputError(f"{where}/config.json: model_type is '{config.model_type}'. {_advice(config.model_type)}")
    if problem := family.refuses(config):
        raise InputError(f"{where}/config.json: {problem}. Choose a base without that.")
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise InputError(
            f"{where}/config.json: the weights are quantised ({method}), which can't be merged. Choose the original "
            "weights; load_in_4bit in the recipe quantises them for the training alone."
        )


def _advice(kind: str) -> str:
    *names, last = [name for family in FAMILIES for name in family.dense_types.values()]
    why = f" ({OTHERS[kind]})" if kind in OTHERS else ""
    return f"A team can't be built from it{why}. Choose a {', '.join(names)} or {last}."
