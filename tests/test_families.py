# SPDX-License-Identifier: Apache-2.0
"""Every family of bases goes all the way to a tuned, changed and evaluated team, and others are refused with the reason."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from conftest import ROLES, call, fit_router, instruct_tune, saved_again, train_expert
from finteam_experts import families
from finteam_experts.errors import InputError
from finteam_experts.families import FAMILIES, OTHERS, check_config, family_of
from finteam_experts.fingerprints import expert_fingerprint
from finteam_experts.merging.gates import read_gates
from finteam_experts.models import load_model, parameter_counts

BASES = {
    "llama": {"config_class": LlamaConfig},
    "mistral": {"config_class": MistralConfig, "sliding_window": None},
    "qwen3": {"config_class": Qwen3Config, "head_dim": 8},
}


def test_every_kind_of_base_is_of_a_family():
    assert {kind for family in FAMILIES for kind in family.dense_types} == set(BASES)


def test_the_tuned_team_is_an_moe_of_its_family(qwen3_run):
    family = family_of(AutoConfig.from_pretrained(qwen3_run / "base"))
    for part in ("moe", "moe-instruct"):
        tensors, config = (
            load_file(qwen3_run / part / "model.safetensors"),
            json.loads((qwen3_run / part / "config.json").read_text()),
        )
        assert config["model_type"] == family.moe_type
        assert config["num_experts_per_tok"] == 1
        assert config["num_experts"] == 3  # where transformers 4, vLLM and llama.cpp look
        for layer in range(2):
            assert tensors[family.gate_tensor(layer)].shape == (3, 32)
            for matrix, shape in (("gate_proj", (48, 32)), ("up_proj", (48, 32)), ("down_proj", (32, 48))):
                assert all(tensors[family.expert_tensor(layer, place, matrix)].shape == shape for place in range(3))
        counts = parameter_counts(load_model(qwen3_run / part))
        assert counts["total"] - counts["active"] == round(counts["experts"] * 2 / 3)


def test_the_tuning_reached_attention_and_every_expert(qwen3_run):
    family = family_of(AutoConfig.from_pretrained(qwen3_run / "base"))
    before, after = (load_file(qwen3_run / part / "model.safetensors") for part in ("moe", "moe-instruct"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.layers.1.self_attn.q_proj.weight" in changed
    assert {family.expert_tensor(0, place, "up_proj") for place in range(3)} <= changed
    assert not any(name.endswith((".gate.weight", "norm.weight")) for name in changed)


def test_it_is_saved_as_it_was_loaded(qwen3_run, tmp_path):
    model, tokens = saved_again(qwen3_run / "moe-instruct", tmp_path), torch.arange(5, 60)[None]
    assert (
        load_file(tmp_path / "model.safetensors").keys()
        == load_file(qwen3_run / "moe-instruct/model.safetensors").keys()
    )
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(tokens).logits, model(tokens).logits)


def test_it_changes(qwen3_run):
    call("scripts/change_team.py", "remove", "micro", "--run_dir", qwen3_run, "--limit", "4")
    assert read_gates(qwen3_run / "moe-remove-micro").shape == (2, 2, 32)
    assert load_model(qwen3_run / "moe-remove-micro").config.num_local_experts == 2


@pytest.mark.parametrize("kind", BASES)
def test_three_identical_experts_are_the_base(kind, make_base, toy_data, tmp_path):
    """Whatever the router does, the logits are the base's: fp32, 1e-6 of the largest."""
    run = tmp_path / "run"
    shutil.copytree(make_base(**BASES[kind]), run / "base")
    shutil.copytree(toy_data, run / "data")
    for role in ROLES:
        train_expert(run, role)
        path = run / "adapters" / role / "adapter_model.safetensors"
        save_file({name: torch.zeros_like(t) for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
    call("scripts/merge_moe.py", "--run_dir", run, "--experts_per_token", "2")
    tokens = torch.arange(5, 60)[None]
    with torch.no_grad():
        expected, found = (load_model(run / name)(tokens).logits for name in ("base", "moe"))
    assert (expected - found).abs().max() <= 1e-6 * expected.abs().max()


class MadeUpConfig(Qwen3Config):
    model_type = "made_up"
    auto_map = {}  # TRL asks for it


class MadeUpLayer(Qwen3DecoderLayer):
    """One whose MLP has another name."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.feed_forward = self._modules.pop("mlp")

    @property
    def mlp(self):
        return self.feed_forward


class MadeUpForCausalLM(Qwen3ForCausalLM):
    config_class = MadeUpConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.layers = nn.ModuleList([MadeUpLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.post_init()


def test_another_kind_of_base_needs_nothing_but_its_entry(make_base, toy_data, tmp_path, monkeypatch):
    AutoConfig.register("made_up", MadeUpConfig, exist_ok=True)
    AutoModelForCausalLM.register(MadeUpConfig, MadeUpForCausalLM, exist_ok=True)
    run = tmp_path / "run"
    shutil.copytree(make_base(config_class=MadeUpConfig, head_dim=8), run / "base")
    shutil.copytree(toy_data, run / "data")
    with pytest.raises(InputError, match="'made_up'. A team can't be built from it. Choose a Llama, Mistral or Qwen3"):
        train_expert(run, "macro")
    monkeypatch.setattr(
        families,
        "FAMILIES",
        [*FAMILIES, replace(family_of("qwen3"), dense_types={"made_up": "Made-up"}, mlp="feed_forward")],
    )
    for role in ROLES:
        train_expert(run, role)
    call("scripts/merge_moe.py", "--run_dir", run)
    fit_router(run)
    instruct_tune(run, "moe")
    assert load_model(run / "moe-instruct").config.num_local_experts == 3
    call("scripts/report_routing.py", "--run_dir", run)
    call(
        "scripts/router_sums.py", "--run_dir", run, "--base", run / "base", "--role", "macro", "--tokens_per_role", 600
    )
    call(
        "scripts/change_team.py", "replace", "micro", "--run_dir", run, "--expert", run / "experts/macro", "--limit", 4
    )
    assert expert_fingerprint(run / "moe-replace-micro", 1) == expert_fingerprint(run / "experts/macro")


@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_other_families_are_refused_with_the_reason(kind):
    with pytest.raises(
        InputError, match=r"A team can't be built from it \(it|A team can't be built from it \(its"
    ) as refused:
        check_config(AutoConfig.for_model(kind), "base")
    assert OTHERS[kind] in str(refused.value)


def test_what_the_moe_has_no_place_for_is_refused():
    sliding = Qwen3Config(use_sliding_window=True, sliding_window=64, max_window_layers=1)
    with pytest.raises(
        InputError, match="base/config.json: use_sliding_window or layer_types give some layers a window"
    ):
        check_config(sliding, "base")
    with pytest.raises(InputError, match="attention_bias is true"):
        check_config(Qwen3Config(attention_bias=True), "base")
    with pytest.raises(
        InputError, match="'gpt_neox'. A team can't be built from it. Choose a Llama, Mistral or Qwen3"
    ):
        check_config(AutoConfig.for_model("gpt_neox"), "base")
