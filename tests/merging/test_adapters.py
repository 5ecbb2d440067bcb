# SPDX-License-Identifier: Apache-2.0
"""Merging layer by layer: the weights that PEFT's merge of the whole model has, in shards."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finteam_experts import weights
from finteam_experts.errors import InputError
from finteam_experts.merging import adapters
from finteam_experts.merging.adapters import merge_adapter
from finteam_experts.models import load_model
from finteam_experts.training.experts import split_experts

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TOKENS = torch.arange(5, 40)[None]


@pytest.fixture
def adapted(done_run, tmp_path):
    """Save a random adapter of a model of the complete run; return the model's folder, the adapter's and its logits."""

    def build(part, *, split=False, **settings):
        model = AutoModelForCausalLM.from_pretrained(done_run / part)
        if split:
            split_experts(model)
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.0, **settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "adapter")
        with torch.no_grad():
            return done_run / part, tmp_path / "adapter", model.eval()(TOKENS).logits

    return build


CASES = {
    "dense": ("base", {"target_modules": ATTENTION + MLP}),
    "some layers": ("base", {"target_modules": MLP, "layers_to_transform": [1]}),
    "rank-stabilised": ("base", {"target_modules": MLP, "use_rslora": True}),
    "dora": ("base", {"target_modules": MLP, "use_dora": True}),
    "experts as linear layers": ("moe", {"target_modules": ATTENTION + MLP, "split": True}),
    "a tuned team": ("moe-instruct", {"target_modules": MLP, "split": True}),
    "fused experts and router": (
        "moe",
        {"target_modules": ATTENTION, "target_parameters": FUSED, "modules_to_save": ["gate"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_is_the_adapted_one(adapted, tmp_path, case):
    part, settings = CASES[case]
    folder, adapter, logits = adapted(part, **settings)
    assert merge_adapter(folder, adapter, tmp_path / "merged") < 1e-4
    with torch.no_grad():
        merged = load_model(tmp_path / "merged")(TOKENS).logits
        assert not torch.allclose(load_model(folder)(TOKENS).logits, logits, atol=1e-2)
    torch.testing.assert_close(merged, logits, atol=1e-4, rtol=1e-4)


def test_a_router_that_was_trained_in_bfloat16_is_merged(adapted, tmp_path):
    part, settings = CASES["fused experts and router"]
    folder, adapter, _ = adapted(part, **settings)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    low = {name: tensor.bfloat16() if "gate.weight" in name else tensor for name, tensor in tensors.items()}
    assert any(tensor.dtype == torch.bfloat16 for tensor in low.values())
    save_file(low, path, metadata={"format": "pt"})
    assert merge_adapter(folder, adapter, tmp_path / "merged") < 1e-4
    gate = load_model(tmp_path / "merged").model.layers[0].mlp.gate.weight
    trained = next(tensor for name, tensor in low.items() if "layers.0.mlp.gate.weight" in name)
    torch.testing.assert_close(gate.data, trained.float(), atol=0, rtol=0)


def test_equal_to_the_bit_to_pefts_merge_of_the_whole(adapted, tmp_path):
    folder, adapter, _ = adapted("base", target_modules=ATTENTION + MLP)
    merge_adapter(folder, adapter, tmp_path / "merged")
    whole = PeftModel.from_pretrained(load_model(folder), adapter).merge_and_unload().state_dict()
    ours = load_model(tmp_path / "merged").state_dict()
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_an_interrupted_merge_starts_again(adapted, tmp_path, monkeypatch):
    folder, adapter, logits = adapted("base", target_modules=MLP)
    target = tmp_path / "merged"
    monkeypatch.setattr(weights, "SHARD_BYTES", 40_000)
    layers = []

    def interrupted_at_layer_1(*arguments, **options):
        if layers:
            raise KeyboardInterrupt
        layers.append(0)
        return get_peft_model(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(adapters, "get_peft_model", interrupted_at_layer_1)
        with pytest.raises(KeyboardInterrupt):
            merge_adapter(folder, adapter, target)
    assert list(target.glob("model*.safetensors"))
    assert not (target / "config.json").exists()

    merge_adapter(folder, adapter, target)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in target.glob("*.safetensors")}
    assert len(weights.weight_files(target)) > 2
    with torch.no_grad():
        torch.testing.assert_close(load_model(target)(TOKENS).logits, logits, atol=1e-4, rtol=1e-4)


def test_an_adapter_of_the_head_is_refused(adapted, tmp_path):
    folder, adapter, _ = adapted("base", target_modules=[*MLP, "lm_head"])
    with pytest.raises(InputError, match="lm_head.*leave embeddings and head out"):
        merge_adapter(folder, adapter, tmp_path / "merged")
    assert not list(tmp_path.glob("merged/*"))


def test_an_adapter_that_is_not_finite_is_refused(adapted, tmp_path):
    folder, adapter, _ = adapted("base", target_modules=MLP)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)
    model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight.data[0, 0] = float("nan")
    model.save_pretrained(adapter)
    with pytest.raises(InputError, match="layers.1.mlp.up_proj.lora_B.weight is not finite: its training diverged"):
        merge_adapter(folder, adapter, tmp_path / "merged")
