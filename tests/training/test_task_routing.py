# SPDX-License-Identifier: Apache-2.0
"""Tuning with every row in the expert of its task: what each expert learns from, and the router fitted afterwards."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from conftest import REPOSITORY, ROLES, SHORT, call, fit_router, instruct_tune
from finteam_experts.errors import InputError
from finteam_experts.merging import gates
from finteam_experts.models import load_model
from finteam_experts.runs import read_record
from finteam_experts.training.task_routing import TaskRouting, with_experts

BY_TASK = ("--route_by_task", "true", "--router_aux_loss_coef", "0")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MICRO_ALONE = ("--rows_per_task", 12, "--rows_of_task", '{"headlines": 0, "stock_movement": 0}')


@pytest.mark.parametrize(
    ("padding_free", "experts"), [(True, [2, 2, 2, 0, 0]), (False, [2, 2, 2, 0, 0, 0])], ids=["one row", "padded"]
)
def test_every_token_has_the_expert_of_its_row(padding_free, experts):
    collate = with_experts(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free))
    rows = [{"input_ids": [5, 6, 7], "expert": 2}, {"input_ids": [8, 9], "expert": 0}]
    assert collate(rows)["expert"].tolist() == experts


def test_the_experts_of_a_batch_replace_the_gates_choice_while_training(done_run):
    model, forced = load_model(done_run / "moe"), load_model(done_run / "moe")
    tokens = torch.arange(5, 25).view(1, 20)
    chosen = model(tokens).logits
    routing = TaskRouting(model)
    routing.experts = torch.full((18,), 1)  # a batch that was filled up by two
    torch.testing.assert_close(model(tokens).logits, chosen)  # not in training: the router's own choice
    with gates.forced_expert(forced, 1):
        torch.testing.assert_close(model.train()(tokens).logits, forced(tokens).logits)


@pytest.mark.parametrize("split", [False, True], ids=["fused experts", "split experts"])
def test_an_expert_learns_from_its_own_tasks_alone_and_attention_from_all(copied_run, split):
    shutil.rmtree(copied_run / "moe-instruct")
    recipe = yaml.safe_load((REPOSITORY / "recipes/sample/instruct_tune_moe.yaml").read_text())
    if not split:
        recipe["lora_target_modules"] = ATTENTION
        recipe["lora_target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    path = copied_run / "instruct_tune.yaml"
    path.write_text(yaml.safe_dump(recipe))
    options = ("--config", path, "--run_dir", copied_run, *SHORT)
    call("recipes/instruct_tune.py", *options, *BY_TASK, *MICRO_ALONE)
    before, after = (dict(load_model(copied_run / name).state_dict()) for name in ("moe", "moe-instruct"))
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        assert not torch.equal(before[f"{prefix}.self_attn.q_proj.weight"], after[f"{prefix}.self_attn.q_proj.weight"])
        for matrix in ("gate_up_proj", "down_proj"):
            was, now = (weights[f"{prefix}.mlp.experts.{matrix}"] for weights in (before, after))
            moved = [not torch.equal(a, b) for a, b in zip(was, now, strict=True)]
            assert moved == [role == "micro" for role in ROLES]
        assert torch.equal(before[f"{prefix}.mlp.gate.weight"], after[f"{prefix}.mlp.gate.weight"])


def test_the_router_of_a_tuned_team_is_fitted_to_what_its_gates_read_now(copied_run):
    tuned, moe = copied_run / "moe-instruct", gates.read_gates(copied_run / "moe")
    before = load_file(tuned / "model.safetensors")
    fit_router(copied_run, "--model", "moe-instruct", "--chat_share", 0.5, "--scale", 8)
    after = load_file(tuned / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)
    }
    assert torch.equal(gates.read_gates(copied_run / "moe"), moe)
    record = read_record(tuned)
    assert record["router"]["inputs"]["settings"]["chat_share"] == 0.5
    assert record["results"]["steps"] == 4  # what the tuning recorded is still there
    assert load_model(tuned)
    with pytest.raises(InputError, match="settings.chat_share: recorded 0.5, now 0.75"):
        fit_router(copied_run, "--model", "moe-instruct", "--chat_share", 0.75, "--scale", 8)
    with pytest.raises(InputError, match="--chat_share is 2.0; it has to be 0 or more and 1 or less"):
        fit_router(copied_run, "--model", "moe-instruct", "--chat_share", 2)


@pytest.mark.parametrize(
    ("what", "arguments", "message"),
    [
        ("moe", ("--route_by_task", "true"), "set router_aux_loss_coef to 0"),
        ("dense", BY_TASK, "the model to be tuned has no team"),
        ("moe", ("--own_tasks", "true"), "own_tasks is for one expert tuned by itself"),
    ],
)
def test_what_does_not_go_together_is_refused(copied_run, what, arguments, message):
    with pytest.raises(InputError, match=message):
        instruct_tune(copied_run, what, *arguments)


def test_an_expert_alone_on_its_own_tasks(copied_run):
    alone = ("--start_from", "expert", "--role", "macro", "--own_tasks", "true", "--rows_per_task", 8)
    short = ("--max_steps", -1, "--num_train_epochs", 1, "--per_device_train_batch_size", 2)
    instruct_tune(copied_run, "dense", *alone, *short)
    results = read_record(copied_run / "experts-instruct/macro")["results"]
    assert results["rows_seen"] == 8  # one of the four tasks
    shutil.copytree(copied_run / "experts/macro", copied_run / "experts/base")
    with pytest.raises(InputError, match="no task or conversation is of the role base"):
        instruct_tune(copied_run, "dense", "--start_from", "expert", "--role", "base", "--own_tasks", "true")
