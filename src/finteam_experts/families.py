# SPDX-License-Identifier: Apache-2.0
"""The families of bases: which dense models become which mixture of experts, and what its tensors and config keys are called.

All that depends on a base's architecture is here; everything else asks `family_of`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from mergekit.moe.arch import MoEOutputArchitecture
from transformers import CONFIG_MAPPING, PretrainedConfig

from finteam_experts.errors import InputError
from finteam_experts.files import read_json


@dataclass(frozen=True)
class Family:
    dense_types: dict[str, str]  # `model_type` of the dense bases, and how people call them
    moe_type: str  # `model_type` of the MoE
    moe_name: str  # and how people call it
    mergekit: str  # module and class of mergekit's output architecture
    block: str  # the MoE's block in a decoder layer, as it is called on disk
    matrices: dict[str, str]  # of a dense MLP, and of an expert on disk
    # config keys of the MoE that follow from the dense config
    keys: Callable[[PretrainedConfig], dict[str, Any]] = lambda dense: {}
    # keys that readers of today and of transformers 4 look for, and the ones that transformers 5 writes instead
    older_keys: dict[str, str] = field(default_factory=dict)
    # what of a dense config the MoE has no place for, or None
    refuses: Callable[[PretrainedConfig], str | None] = lambda dense: None

    def expert_tensor(self, layer: int | str, expert: int, matrix: str) -> str:
        """The name on disk of an expert's `gate_proj`, `up_proj` or `down_proj`."""
        return f"model.layers.{layer}.{self.block}.experts.{expert}.{self.matrices[matrix]}.weight"

    def gate_tensor(self, layer: int | str) -> str:
        """The name on disk of a layer's gate."""
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def output_architecture(self) -> MoEOutputArchitecture:
        module, _, name = self.mergekit.partition(":")
        return getattr(import_module(module), name)()

    def moe_config(self, dense: PretrainedConfig, experts: int, used: int) -> PretrainedConfig:
        """The config of the MoE that mergekit makes from that many experts of a dense base, `used` of them per token."""
        same = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings", "dtype",
        )  # fmt: skip
        config = CONFIG_MAPPING[self.moe_type](**{key: getattr(dense, key) for key in same}, **self.keys(dense))
        config.num_local_experts, config.num_experts_per_tok = experts, used
        return config


def _biases(config: PretrainedConfig) -> str | None:
    found = [key for key in ("attention_bias", "mlp_bias") if getattr(config, key, False)]
    return f"{found[0]} is true, and the MoE has no biases" if found else None


def _qwen3_refuses(config: PretrainedConfig) -> str | None:
    if getattr(config, "use_sliding_window", False):
        return "use_sliding_window is true for some layers, and the MoE's attention has one kind of layer"
    return _biases(config)


FAMILIES = [
    Family(
        dense_types={"llama": "Llama", "mistral": "Mistral"},
        moe_type="mixtral",
        moe_name="Mixtral",
        mergekit="mergekit.moe.mixtral:MixtralMoE",
        block="block_sparse_moe",
        matrices={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
        refuses=_biases,
    ),
    Family(
        dense_types={"qwen3": "Qwen3"},
        moe_type="qwen3_moe",
        moe_name="Qwen3-MoE",
        mergekit="mergekit.moe.qwen3:Qwen3MoE",
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
    "phi3": "its gate and up projections are one matrix, which mergekit does not take apart",
    "phi": "its MLP has no gate projection",
    "gpt2": "its MLP has no gate projection",
    "mixtral": "it is a mixture of experts already",
    "qwen3_moe": "it is a mixture of experts already",
}


def family_of(config: PretrainedConfig | str) -> Family:
    """The family of a config, or of a `model_type`, dense or MoE; `InputError` if it is of none."""
    kind = config if isinstance(config, str) else config.model_type
    for family in FAMILIES:
        if kind == family.moe_type or kind in family.dense_types:
            return family
    raise InputError(f"models of the type '{kind}' are of no known family. {_advice(kind)}")


def family_in(folder: Path) -> Family:
    """The family of the model in `folder`."""
    return family_of(str(read_json(folder / "config.json").get("model_type")))


def is_moe(config: PretrainedConfig) -> bool:
    return any(config.model_type == family.moe_type for family in FAMILIES)


def check_config(config: PretrainedConfig, where: Path | str) -> None:
    """Raise `InputError` unless mergekit can turn a dense base of this config into an MoE; `where` names it."""
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
