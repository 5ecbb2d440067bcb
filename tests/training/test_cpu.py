# SPDX-License-Identifier: Apache-2.0
"""The speed-ups on a CPU: the outputs, losses and gradients of PEFT, transformers and TRL, with one switch to turn them off."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from conftest import instruct_tune
from finteam_experts.models import load_model, load_tokenizer
from finteam_experts.runs import read_record
from finteam_experts.training import cpu
from finteam_experts.training.cpu import ATTENTION, FusedLoraLinear, fuse_lora
from finteam_experts.training.trainer import RecipeTrainer

TOKENS = torch.arange(5, 45).view(2, 20)
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(base, **settings):
    """The toy base with a LoRA that changes something already."""
    torch.manual_seed(0)
    model = get_peft_model(load_model(base), LoraConfig(r=4, target_modules=EVERYWHERE, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def loss_and_gradients(model, bf16):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_outputs_and_gradients_are_pefts(toy_base, rank_stabilised):
    expected = adapted(toy_base, use_rslora=rank_stabilised)
    fused = copy.deepcopy(expected)
    assert fuse_lora(fused) == 2 * len(EVERYWHERE)  # two layers
    (loss, gradients), (own_loss, own) = loss_and_gradients(expected, False), loss_and_gradients(fused, False)
    torch.testing.assert_close(own_loss, loss, rtol=1e-5, atol=0)
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        assert (own[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_in_bfloat16_it_is_as_close_to_float32_as_peft_is(toy_base):
    exact, theirs = adapted(toy_base), adapted(toy_base)
    ours = copy.deepcopy(theirs)
    fuse_lora(ours)
    gradients = [loss_and_gradients(model, bf16)[1] for model, bf16 in ((exact, False), (theirs, True), (ours, True))]
    flat = [torch.cat([own[name].flatten() for name in sorted(own)]) for own in gradients]
    of_peft, of_ours = ((part - flat[0]).norm() / flat[0].norm() for part in flat[1:])
    assert 0 < of_ours <= 1.25 * of_peft < 0.1


def test_without_its_adapter_and_merged_the_layer_is_pefts(toy_base):
    expected = adapted(toy_base).eval()
    fused = copy.deepcopy(expected)
    fuse_lora(fused)
    with expected.disable_adapter(), fused.disable_adapter():
        assert torch.equal(fused(TOKENS).logits, expected(TOKENS).logits)
    assert torch.equal(fused.merge_and_unload()(TOKENS).logits, expected.merge_and_unload()(TOKENS).logits)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_layers_that_do_more_are_left_alone(toy_base, settings):
    model = adapted(toy_base, **settings)
    assert fuse_lora(model) == 0
    assert not any(isinstance(module, FusedLoraLinear) for module in model.modules())


CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ROW = torch.arange(5, 45)[None]


@pytest.fixture(params=["base", "moe"])
def models(done_run, request):
    """The same model with transformers' attention and with ours."""
    return [
        AutoModelForCausalLM.from_pretrained(done_run / request.param, attn_implementation=name)
        for name in ("sdpa", ATTENTION)
    ]


def packed(*lengths):
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": ROW[:, : positions.shape[1]], "position_ids": positions, "use_cache": False}


@pytest.mark.parametrize("lengths", [(40,), (17, 23), (1, 30, 2, 7)])
def test_packed_sequences_do_not_see_each_other(models, lengths):
    expected, ours = (model(**packed(*lengths)).logits for model in models)
    torch.testing.assert_close(ours, expected, **CLOSE)
    apart = [models[1](**packed(length)).logits for length in lengths[:1]]  # the first alone, its tokens are the same
    torch.testing.assert_close(ours[:, : lengths[0]], apart[0], **CLOSE)


def test_attention_has_transformers_gradients(models):
    gradients = []
    for model in models:
        model(**packed(17, 23), labels=ROW).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, **CLOSE)


def test_padded_batches_and_generation_are_transformers_own(models):
    padded = {"input_ids": ROW.view(2, 20), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    padded["attention_mask"][0, :6] = 0
    expected, ours = (model(**padded).logits[:, 6:] for model in models)
    torch.testing.assert_close(ours, expected, **CLOSE)
    written = [model.generate(ROW[:, :9], max_new_tokens=6, do_sample=False) for model in models]
    assert torch.equal(*written)


@pytest.mark.parametrize(("model", "aux"), [("base", None), ("moe", 0.01)])
@pytest.mark.parametrize("steps", [1, 2])
def test_compact_head_gives_the_loss_and_gradients_of_trl(done_run, tmp_path, model, aux, steps):
    rows = [{"prompt": "Rates rose in " + "March " * n, "completion": "positive" * (n + 1)} for n in range(4)]

    def gradients(trainer_class):
        torch.manual_seed(0)
        args = SFTConfig(output_dir=str(tmp_path), padding_free=True, max_length=None, use_cpu=True, bf16=False,
                         per_device_train_batch_size=4, report_to="none", router_aux_loss_coef=aux,
                         gradient_checkpointing=False)  # fmt: skip
        trainer = trainer_class(
            model=load_model(done_run / model).train(), args=args, train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(done_run / model),
        )  # fmt: skip
        trainer.current_gradient_accumulation_steps = steps
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(37))
        loss.backward()
        return loss, {name: p.grad for name, p in trainer.model.named_parameters()}, trainer._metrics["train"]

    expected, compact = gradients(SFTTrainer), gradients(RecipeTrainer)
    torch.testing.assert_close(compact[0], expected[0], rtol=1e-5, atol=1e-6)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(compact[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    for metric in set(expected[2]) - {"entropy"}:
        assert compact[2][metric] == pytest.approx(expected[2][metric]), metric


@pytest.mark.parametrize("what", ["moe", "dense"])
def test_on_and_off_train_the_same(copied_run, monkeypatch, what):
    """One switch: without it, nothing of `training.cpu` is used, and the tuned weights agree."""
    target = copied_run / f"{what}-instruct"
    fast, log = load_file(target / "model.safetensors"), read_record(target)["results"]["log"]
    target.rename(copied_run / "fast")

    def not_used(*_args, **_options):
        raise AssertionError("a speed-up was used")

    for name in ("fuse_lora", "attention_within_sequences"):
        monkeypatch.setattr(cpu, name, not_used)
    monkeypatch.setattr("finteam_experts.training.trainer.score_labels", not_used)
    instruct_tune(copied_run, what, "--cpu_speedups", "false")
    assert read_record(target)["inputs"]["settings"]["cpu_speedups"] is False
    slow = load_file(target / "model.safetensors")
    assert slow.keys() == fast.keys()
    for name, tensor in slow.items():
        torch.testing.assert_close(fast[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    for ours, theirs in zip(log, read_record(target)["results"]["log"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
