# SPDX-License-Identifier: Apache-2.0
"""Experts as linear layers: the same function, the same gradients, and back again without a trace."""

import copy
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from conftest import REPOSITORY, SHORT, call, on_disk
from finteam_experts.models import load_model
from finteam_experts.runs import read_record
from finteam_experts.training.experts import split_experts
from finteam_experts.training.trainer import RecipeTrainer


@pytest.fixture
def models(done_run):
    fused = load_model(done_run / "moe")
    split = copy.deepcopy(fused)
    split_experts(split)
    return fused, split


CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TOKENS = torch.arange(5, 45).view(2, 20)


def test_same_logits(models):
    fused, split = models
    for model in (split, split.train()):
        torch.testing.assert_close(model(TOKENS).logits, fused(TOKENS).logits, **CLOSE)


def test_same_gradients(models):
    fused, split = models
    for model in models:
        model.requires_grad_(True)
        model(TOKENS, labels=TOKENS).loss.backward()
    for ours, theirs in zip(split.model.layers, fused.model.layers, strict=True):
        for place, expert in enumerate(ours.mlp.experts.experts):
            gate_up = torch.cat([expert["gate_proj"].weight.grad, expert["up_proj"].weight.grad])
            torch.testing.assert_close(gate_up, theirs.mlp.experts.gate_up_proj.grad[place], **CLOSE)
            torch.testing.assert_close(
                expert["down_proj"].weight.grad, theirs.mlp.experts.down_proj.grad[place], **CLOSE
            )
        torch.testing.assert_close(ours.mlp.gate.weight.grad, theirs.mlp.gate.weight.grad, **CLOSE)


def test_splitting_one_model_leaves_others_alone(qwen3_run):
    """PEFT converts a LoRA of a Qwen3-MoE's gate_proj to one of the fused tensors; of a split model it may not."""
    mlp, found = ["gate_proj", "up_proj", "down_proj"], []
    for split in (False, True, False, True):
        model = load_model(qwen3_run / "moe")
        if split:
            split_experts(model)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", *mlp]))
        found.append(adapted.get_nb_trainable_parameters()[0])
        assert model.config.to_dict()["model_type"] == "qwen3_moe"
    layers, experts, rank, hidden, inner = 2, 3, 4, 32, 48
    attention = rank * (hidden + 4 * 8)
    linear = layers * (attention + experts * 3 * rank * (hidden + inner))
    # of the fused gate_up_proj, one LoRA of twice the rank
    fused = layers * (attention + experts * (2 * rank * (hidden + 2 * inner) + rank * (hidden + inner)))
    assert found == [fused, linear, fused, linear]


def test_splitting_takes_no_memory(done_run):
    model = load_model(done_run / "moe")
    fused = model.model.layers[1].mlp.experts.gate_up_proj
    split_experts(model)
    linear = model.model.layers[1].mlp.experts.experts[2]["up_proj"]
    assert linear.weight.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()


def test_released_under_the_same_names_as_fused_experts(models):
    fused, split = (on_disk(model.state_dict(), "mixtral") for model in models)
    assert fused.keys() == split.keys()
    assert all(torch.equal(fused[name], split[name]) for name in fused)


def test_an_expert_that_no_token_chose_still_takes_part_in_the_backward_pass(models):
    """Else processes of one launch would wait for each other's gradients for ever."""
    _, split = models
    split.train().requires_grad_(True)
    for layer in split.model.layers:
        layer.mlp.gate.weight.data.zero_()
        layer.mlp.gate.weight.data[0] = 0  # ties: the first two of three are chosen
    split(TOKENS, labels=TOKENS).loss.backward()
    unused = split.model.layers[0].mlp.experts.experts[2]["down_proj"].weight.grad
    assert unused is not None
    assert not unused.any()


def tune(run_dir, *arguments):
    recipe = REPOSITORY / "recipes/sample/instruct_tune_moe.yaml"
    call("recipes/instruct_tune.py", "--config", recipe, "--run_dir", run_dir, *SHORT, "--rows_per_task", 8,
         "--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", "{}", "--bf16", False,
         "--dtype", "float32", *arguments)  # fmt: skip


def test_tuning_split_experts_ends_with_a_fused_model(copied_run):
    shutil.rmtree(copied_run / "moe-instruct")
    tune(copied_run)
    before, after = (dict(load_model(copied_run / name).state_dict()) for name in ("moe", "moe-instruct"))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) != ("self_attn" in name or ".mlp.experts." in name), name
    results = read_record(copied_run / "moe-instruct")["results"]
    assert results["merge_difference"] < 1e-4  # of the adapted, split model and the merged one
    rank, layers, hidden, inner, experts = 4, 2, 32, 48, 3
    mlp = 3 * rank * (hidden + inner)
    attention = rank * (2 * (hidden + hidden) + 2 * (hidden + hidden // 2))
    assert results["trainable_parameters"] == layers * (experts * mlp + attention)


def test_interrupted_tuning_of_split_experts_resumes_to_the_same_weights(copied_run, tmp_path, monkeypatch):
    shutil.rmtree(copied_run / "moe-instruct")
    straight = shutil.copytree(copied_run, tmp_path / "straight")
    tune(straight)

    original = RecipeTrainer.save_model

    def save_until_step_two(trainer, *arguments, **options):
        if trainer.state.global_step > 2:
            raise KeyboardInterrupt
        return original(trainer, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(RecipeTrainer, "save_model", save_until_step_two)
        with pytest.raises(KeyboardInterrupt):
            tune(copied_run)
    tune(copied_run)
    expected, resumed = (load_file(run / "moe-instruct/model.safetensors") for run in (straight, copied_run))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
