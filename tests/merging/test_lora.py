# SPDX-License-Identifier: Apache-2.0
"""Merging layer by layer: the weights that PEFT's merge of the whole model has, for every option that is accepted."""

import json

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finteam_experts import weights
from finteam_experts.errors import InputError, NotFiniteError
from finteam_experts.merging import lora
from finteam_experts.merging.lora import merge_lora
from finteam_experts.models import load_model
from finteam_experts.training.experts import split_experts

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TOKENS = torch.arange(5, 40)[None]
FILE = "adapter_model.safetensors"


def train(folder, adapter, *, split=False, **settings):
    """Save a random adapter of the model in `folder`; return the logits of the model with it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if split:
        split_experts(model)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_dropout": 0.0} | settings))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_magnitude" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(adapter)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.fixture
def adapted(done_run, tmp_path):
    """Save a random adapter of a model of the complete run; return the model's folder, the adapter's and its logits."""

    def build(part, **settings):
        logits = train(done_run / part, tmp_path / "adapter", **settings)
        return done_run / part, tmp_path / "adapter", logits

    return build


DENSE = {
    "dense": {"target_modules": ATTENTION + MLP},
    "some layers": {"target_modules": MLP, "layers_to_transform": [1]},
    "some layers by pattern": {"target_modules": MLP, "layers_to_transform": [0], "layers_pattern": "layers"},
    "targets of one layer": {"target_modules": ["model.layers.1.mlp.up_proj", "layers.0.self_attn.q_proj"]},
    "targets by a regular expression": {"target_modules": r".*layers\.1\..*(up|down)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "all but some modules": {"target_modules": MLP, "exclude_modules": ["model.layers.0.mlp.up_proj"]},
    "all but those of an expression": {"target_modules": MLP, "exclude_modules": r".*layers\.1.*down_proj"},
    "ranks by layer": {"target_modules": MLP, "rank_pattern": {"model.layers.0.mlp.up_proj": 7, r"layers\.1\.mlp\..*": 2}},
    "alphas by layer": {"target_modules": MLP, "alpha_pattern": {"model.layers.1.mlp.up_proj": 64, "down_proj": 3}},
    "both, rank-stabilised": {
        "target_modules": MLP, "use_rslora": True, "rank_pattern": {"layers.1.mlp.up_proj": 9},
        "alpha_pattern": {r".*layers\.0.*": 40},
    },
    "rank-stabilised": {"target_modules": MLP, "use_rslora": True},
    "dora": {"target_modules": ATTENTION + MLP, "use_dora": True, "alpha_pattern": {"layers.1.mlp.up_proj": 64}},
    "dropout, biases that are not there": {"target_modules": MLP, "lora_dropout": 0.1, "bias": "all"},
    "a norm in full": {"target_modules": MLP, "modules_to_save": ["input_layernorm"]},
    "gaussian": {"target_modules": MLP, "init_lora_weights": "gaussian"},
    "random": {"target_modules": MLP, "init_lora_weights": False},
    "orthogonal": {"target_modules": MLP, "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": MLP, "init_lora_weights": "mica"},
    "eva": {"target_modules": MLP, "init_lora_weights": "eva", "eva_config": EvaConfig(), "rank_pattern": {"model.layers.1.mlp.up_proj": 9}},
    "pissa": {"target_modules": MLP, "init_lora_weights": "pissa", "alpha_pattern": {"layers.1.mlp.up_proj": 64}},
    "olora": {"target_modules": ATTENTION + MLP, "init_lora_weights": "olora", "rank_pattern": {"layers.0.mlp.up_proj": 6}},
    "pissa, dora and rank-stabilised": {"target_modules": MLP, "init_lora_weights": "pissa", "use_dora": True, "use_rslora": True},
}  # fmt: skip
MOE = {
    "experts as linear layers": {"target_modules": ATTENTION + MLP, "split": True},
    "of one layer": {"target_modules": [*MLP, "q_proj"], "layers_to_transform": [1], "split": True},
    "ranks by layer": {"target_modules": MLP, "rank_pattern": {r"layers\.1\.mlp.*": 7}, "split": True},
    "alphas by expert": {"target_modules": MLP, "alpha_pattern": {r".*experts\.experts\.2\..*": 64}, "split": True},
    "pissa": {"target_modules": MLP, "init_lora_weights": "pissa", "split": True},
    "fused": {"target_modules": [], "target_parameters": FUSED},
    "fused, one of two": {"target_modules": ["q_proj"], "target_parameters": FUSED[1:]},
    "fused, of one layer": {"target_modules": [], "target_parameters": ["layers.1.mlp.experts.down_proj"]},
    "fused, with ranks and alphas": {
        "target_modules": ["q_proj"], "target_parameters": FUSED, "rank_pattern": {r".*experts\.gate_up_proj": 6},
        "alpha_pattern": {r".*layers\.1\.mlp\.experts\.down_proj": 64},
    },
    "fused, and the router in full": {"target_modules": ATTENTION, "target_parameters": FUSED, "modules_to_save": ["gate"]},
    "fused by PEFT, router and all": {"target_modules": "all-linear"},
    "attention and router": {"target_modules": ATTENTION, "modules_to_save": ["gate"]},
}  # fmt: skip
CASES = [("base", case, settings) for case, settings in DENSE.items()] + [
    ("moe", case, settings) for case, settings in MOE.items()
]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(("part", "case", "settings"), CASES, ids=[f"{part}: {case}" for part, case, _ in CASES])
def test_it_is_what_peft_merges_into_the_whole_model(request, tmp_path, family, part, case, settings):
    folder = request.getfixturevalue("done_run" if family == "llama" else "qwen3_run") / part
    logits = train(folder, tmp_path / "adapter", **settings)
    assert merge_lora(folder, tmp_path / "adapter", tmp_path / "merged") < 1e-5
    model = load_model(folder)
    if settings.get("split"):
        split_experts(model)
    whole = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().eval()
    merged = load_model(tmp_path / "merged")
    if settings.get("split"):
        split_experts(merged)
    expected, found, before = whole.state_dict(), merged.state_dict(), load_file(folder / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name
    with torch.no_grad():
        off = (merged(TOKENS).logits - logits).abs().max() / logits.abs().max()
        assert off < 1e-5
        assert not torch.allclose(load_model(folder)(TOKENS).logits, logits, atol=1e-3)
    assert load_file(tmp_path / "merged/model.safetensors").keys() == before.keys()


def test_equal_to_the_bit_to_pefts_merge_of_the_whole(adapted, tmp_path):
    folder, adapter, _ = adapted("base", target_modules=ATTENTION + MLP)
    before = (folder / "model.safetensors").read_bytes()
    merge_lora(folder, adapter, tmp_path / "merged")
    whole = PeftModel.from_pretrained(load_model(folder), adapter).merge_and_unload().state_dict()
    ours = load_model(tmp_path / "merged").state_dict()
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_router_that_was_trained_in_bfloat16_is_merged(adapted, tmp_path):
    folder, adapter, _ = adapted("moe", **MOE["fused, and the router in full"])
    tensors = load_file(adapter / FILE)
    low = {name: tensor.bfloat16() if "gate.weight" in name else tensor for name, tensor in tensors.items()}
    assert any(tensor.dtype == torch.bfloat16 for tensor in low.values())
    save_file(low, adapter / FILE, metadata={"format": "pt"})
    assert merge_lora(folder, adapter, tmp_path / "merged") < 1e-5
    gate = load_model(tmp_path / "merged").model.layers[0].mlp.gate.weight
    trained = next(tensor for name, tensor in low.items() if "layers.0.mlp.gate.weight" in name)
    torch.testing.assert_close(gate.data, trained.float(), atol=0, rtol=0)


@pytest.mark.parametrize("place", range(3))
def test_every_expert_takes_part_in_the_comparison(adapted, tmp_path, monkeypatch, place):
    """Though no token of the probe may choose it."""
    folder, adapter, _ = adapted("moe", target_modules=MLP, split=True)
    outputs, seen = lora._outputs, []

    def outputs_with_a_fault(model, layer):
        if layer in seen:  # after the merge
            layer.mlp.experts.experts[place]["up_proj"].get_base_layer().weight.data *= 1.01
        seen.append(layer)
        return outputs(model, layer)

    monkeypatch.setattr(lora, "_outputs", outputs_with_a_fault)
    with pytest.raises(InputError, match="model.layers.0 with the adapter and merged differ by"):
        merge_lora(folder, adapter, tmp_path / "merged")


def test_an_interrupted_merge_starts_again(adapted, tmp_path, monkeypatch):
    folder, adapter, logits = adapted("base", target_modules=MLP)
    target = tmp_path / "merged"
    monkeypatch.setattr(weights, "SHARD_BYTES", 40_000)
    layers, outputs = [], lora._outputs

    def interrupted_at_layer_1(model, layer):
        if layer is model.model.layers[1]:
            raise KeyboardInterrupt
        layers.append(layer)
        return outputs(model, layer)

    with monkeypatch.context() as patched:
        patched.setattr(lora, "_outputs", interrupted_at_layer_1)
        with pytest.raises(KeyboardInterrupt):
            merge_lora(folder, adapter, target)
    assert layers
    assert list(target.glob("model*.safetensors"))
    assert not (target / "config.json").exists()

    merge_lora(folder, adapter, target)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in target.glob("*.safetensors")}
    assert len(weights.weight_files(target)) > 2
    with torch.no_grad():
        torch.testing.assert_close(load_model(target)(TOKENS).logits, logits, atol=1e-4, rtol=1e-4)


def test_an_adapter_of_the_head_is_refused(adapted, tmp_path):
    folder, adapter, _ = adapted("base", target_modules=[*MLP, "lm_head"])
    with pytest.raises(InputError, match="lm_head.*leave embeddings and head out"):
        merge_lora(folder, adapter, tmp_path / "merged")
    assert not list(tmp_path.glob("merged/*"))


SETTINGS = [
    ({"lora_bias": True}, "lora_bias is True, which can't be merged"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is .1, 2., which can't be merged"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices is .1."),
    ({"kasa_config": {"beta": 1.0}}, "kasa_config is"),
    ({"use_qalora": True}, "use_qalora is True"),
    ({"a_newer_option": 3}, "a_newer_option is 3, which is unknown to the PEFT that is installed"),
    ({"peft_type": "IA3"}, "peft_type is IA3. Only a LORA can be merged"),
    ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda', which changed the model's own weights"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    ({"target_modules": ["nothing"]}, "PEFT can't put this adapter into its model: .*nothing"),
    ({"r": 8}, r"lora_A.weight is \[4, 32\], and by its model and adapter_config.json \[8, 32\]"),
    ({"rank_pattern": {"layers.1.mlp.up_proj": 9}}, r"layers.1.mlp.up_proj.lora_A.weight is \[4, 32\], .* \[9, 32\]"),
    ({"target_modules": MLP[:2]}, "has, without a place for it in the model, .*down_proj.lora_A.weight .4 in all, of 8"),
    ({"target_modules": [*MLP, "q_proj"]}, "lacks .*layers.0.self_attn.q_proj.lora_A.weight .4 in all, of 16"),
    ({"exclude_modules": ["model.layers.0.mlp.up_proj"]}, "has, without a place .*layers.0.mlp.up_proj"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), SETTINGS, ids=lambda value: str(value)[:40])
def test_options_that_cannot_be_merged_are_refused_by_name(adapted, tmp_path, settings, message):
    folder, adapter, _ = adapted("base", target_modules=MLP)
    content = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(content | settings))
    with pytest.raises(InputError, match=message):
        merge_lora(folder, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if name not in key}


FILES = {
    "a layer": (without("layers.1"), r"lacks .*layers.1.mlp.down_proj.lora_A.weight \(6 in all, of 12"),
    "half a pair": (without("layers.1.mlp.up_proj.lora_B"), r"lacks .*layers.1.mlp.up_proj.lora_B.weight \(1 in all"),
    "all": (lambda tensors: {}, r"lacks .*layers.0.mlp.down_proj.lora_A.weight \(12 in all, of 12"),
    "its place": (
        lambda tensors: tensors | {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 32)},
        "has, without a place for it in the model, .*layers.7",
    ),
    "values": (
        lambda tensors: {name: torch.empty(0) for name in tensors},
        "lora_A.weight is \\[0\\], .* DeepSpeed's ZeRO-3 leaves weights empty",
    ),
    "finite values": (
        lambda tensors: {name: tensor / 0 for name, tensor in tensors.items()},
        "lora_A.weight is not finite: its training diverged",
    ),
    "the model's size": (
        lambda tensors: {name: tensor.repeat(1, 2) for name, tensor in tensors.items()},
        "on a model of another size, or with other ranks",
    ),
}


@pytest.mark.parametrize("lacks", FILES)
def test_every_target_has_its_tensors(adapted, tmp_path, lacks):
    folder, adapter, _ = adapted("base", target_modules=MLP)
    change, message = FILES[lacks]
    save_file(change(load_file(adapter / FILE)), adapter / FILE, metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        merge_lora(folder, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_is_a_pickle_or_one_folder_deeper(adapted, tmp_path):
    folder, adapter, _ = adapted("base", target_modules=MLP)
    (adapter.parent / "around").mkdir()
    adapter = adapter.rename(adapter.parent / "around/checkpoint-4")
    with pytest.raises(
        InputError, match=r"around has no adapter_model.safetensors, but a folder in it has. Name that: .*checkpoint-4"
    ):
        merge_lora(folder, adapter.parent, tmp_path / "merged")
    torch.save(load_file(adapter / FILE), adapter / "adapter_model.bin")
    (adapter / FILE).unlink()
    with pytest.raises(InputError, match=r"only adapter_model.bin, which can run code when it is read.*save it again"):
        merge_lora(folder, adapter, tmp_path / "merged")


def test_weights_that_overflow_in_float16_are_refused(adapted, tmp_path, make_base):
    base = make_base(dtype="float16")
    tensors = {name: tensor.half() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    _, adapter, _ = adapted("base", target_modules=MLP)
    merge_lora(base, adapter, tmp_path / "fits")
    large = {name: tensor * (3000 if "layers.1" in name else 1) for name, tensor in load_file(adapter / FILE).items()}
    save_file(large, adapter / FILE, metadata={"format": "pt"})
    message = (
        r"layers.1.mlp.\w+.weight has values up to .*, and float16 ends at 6.55e\+04. Merge in bfloat16 or float32"
    )
    with pytest.raises(NotFiniteError, match=message):
        merge_lora(base, adapter, tmp_path / "merged")


def test_the_merged_model_has_the_type_of_its_model(adapted, tmp_path, make_base):
    base = make_base(dtype="bfloat16")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    _, adapter, _ = adapted("base", target_modules=MLP)
    merge_lora(base, adapter, tmp_path / "merged")
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
