# SPDX-License-Identifier: Apache-2.0
"""Step 3: what tuning changes and logs, how it resumes, and that the CPU's loss is TRL's loss."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROLES, instruct_tune
from finteam_experts.data.files import read_corpus, task_file
from finteam_experts.errors import InputError
from finteam_experts.evaluation.batches import encode
from finteam_experts.evaluation.routing import measure_routing
from finteam_experts.models import load_model, load_tokenizer
from finteam_experts.runs import read_record, work_folder
from finteam_experts.training.trainer import RecipeTrainer


def test_tuning_moves_attention_and_every_expert_and_leaves_the_router(done_run):
    before, after = (dict(load_model(done_run / name).state_dict()) for name in ("moe", "moe-instruct"))
    assert before.keys() == after.keys()
    for name in before:
        moved = not torch.equal(before[name], after[name])
        assert moved == ("self_attn" in name or ".mlp.experts." in name), name
    for position in range(3):
        name = "model.layers.1.mlp.experts.down_proj"
        assert not torch.equal(before[name][position], after[name][position])


def test_routing_is_logged_while_tuning(copied_run):
    shutil.rmtree(copied_run / "moe-instruct")
    instruct_tune(copied_run, "moe", "--routing_steps", 2, "--routing_passages", 3, "--learning_rate", "1e-3")
    log = read_record(copied_run / "moe-instruct")["results"]["routing"]
    assert [entry["step"] for entry in log] == [0, 2, 4]
    start, end = log[0], log[-1]
    assert start["own_role_tokens"] > 0.45  # the fitted router's
    assert start["own_role_weight"] != end["own_role_weight"]
    tokenizer = load_tokenizer(copied_run / "moe")
    texts = [read_corpus(copied_run / "data", role, heldout=True)[:3] for role in ROLES]
    sequences = [encode(tokenizer, own, 96) for own in texts]
    measured = measure_routing(load_model(copied_run / "moe-instruct"), tokenizer, sequences).summary()
    # the last entry is the saved model's, but for the merge of the LoRA
    assert end["own_role_weight"] == pytest.approx(measured["own_role_weight"], abs=2e-3)


def test_aux_loss_is_logged_and_off_in_the_saved_config(done_run):
    log = read_record(done_run / "moe-instruct")["results"]["log"]
    assert len(log) == 4
    assert all(0.75 < entry["aux_loss"] < 1.75 for entry in log)  # perfect balance is top_k = 1
    assert load_model(done_run / "moe-instruct").config.output_router_logits is False
    assert "aux_loss" not in read_record(done_run / "dense-instruct")["results"]["log"][0]


def test_dense_baseline_has_as_many_rows_and_steps(done_run):
    moe, dense = (read_record(done_run / name)["results"] for name in ("moe-instruct", "dense-instruct"))
    assert (moe["steps"], moe["rows_seen"]) == (dense["steps"], dense["rows_seen"]) == (4, 32)
    assert max(moe["merge_difference"], dense["merge_difference"]) < 1e-3


def test_the_team_travels_with_the_model(done_run):
    record = read_record(done_run / "moe-instruct")
    assert [member["title"] for member in record["team"]] == ["Macro analyst", "Micro analyst", "Quantitative analyst"]
    assert {task["name"] for task in record["tasks"]} == {"fpb", "fiqasa", "headlines", "stock_movement"}
    assert str(done_run) not in json.dumps(record)


def test_interrupted_tuning_of_the_moe_resumes_to_the_same_weights(copied_run, tmp_path, monkeypatch):
    """Router, expert LoRA and attention LoRA all come back from a checkpoint, with their optimiser states."""
    shutil.rmtree(copied_run / "moe-instruct")
    straight = shutil.copytree(copied_run, tmp_path / "straight")
    instruct_tune(straight, "moe")

    with monkeypatch.context() as patched:
        patched.setattr(RecipeTrainer, "save_model", _save_until_step_two(RecipeTrainer.save_model))
        with pytest.raises(KeyboardInterrupt):
            instruct_tune(copied_run, "moe")
    assert (work_folder(copied_run / "moe-instruct") / "checkpoint-2/checkpoint_is_complete").exists()
    instruct_tune(copied_run, "moe")
    expected, resumed = (load_file(run / "moe-instruct/model.safetensors") for run in (straight, copied_run))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_interrupted_between_training_and_merge(copied_run, monkeypatch):
    """The last checkpoint is complete training: the same command merges it and takes no step more."""
    expected = load_file(copied_run / "moe-instruct/model.safetensors")
    results = read_record(copied_run / "moe-instruct")["results"]
    shutil.rmtree(copied_run / "moe-instruct")
    with monkeypatch.context() as patched:
        patched.setattr("finteam_experts.merging.lora.get_peft_model", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            instruct_tune(copied_run, "moe")
    instruct_tune(copied_run, "moe")
    merged = load_file(copied_run / "moe-instruct/model.safetensors")
    assert all(torch.equal(expected[name], merged[name]) for name in expected)
    again = read_record(copied_run / "moe-instruct")["results"]
    assert [again[key] for key in ("steps", "train_tokens", "rows_seen")] == [
        results[key] for key in ("steps", "train_tokens", "rows_seen")
    ]


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def _save_until_step_two(save):
    def save_model(trainer, *args, **kwargs):
        return save(trainer, *args, **kwargs) if trainer.state.global_step <= 2 else _interrupt()

    return save_model


def test_a_router_that_gets_no_gradient_is_not_trained(copied_run):
    shutil.rmtree(copied_run / "moe-instruct")
    with pytest.raises(
        InputError, match="names gate, and each token of this model has one expert.*--experts_per_token 2"
    ):
        instruct_tune(copied_run, "moe", "--lora_modules_to_save", "gate")


def test_other_settings_are_refused(copied_run):
    with pytest.raises(InputError, match=r"settings\.learning_rate: recorded 0\.0005, now 0\.5"):
        instruct_tune(copied_run, "dense", "--learning_rate", "0.5")


def test_test_row_inside_train_is_refused_before_training(new_run):
    line = task_file(new_run / "data", "fpb", "train").read_text().splitlines()[0]
    with task_file(new_run / "data", "fpb", "test").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=r"fpb_test\.jsonl, line 13: the same text is in .*fpb_train\.jsonl, line 1"):
        instruct_tune(new_run, "dense")
    assert not (new_run / "dense-instruct").exists()


def test_limits_of_single_tasks(new_run):
    """--rows_of_task as on the command line: three rows of one task, two of each other one, none of the validation rows."""
    instruct_tune(new_run, "dense", "--rows_per_task", 2, "--rows_of_task", '{"fpb": 3}', "--hold_out_validation", True,
                  "--max_steps", -1, "--num_train_epochs", 1, "--lr_scheduler_type", "constant")  # fmt: skip
    assert read_record(new_run / "dense-instruct")["results"]["rows_seen"] == 9
    with pytest.raises(InputError, match="rows_of_task: unknown task 'fbp'. Did you mean 'fpb'"):
        instruct_tune(new_run, "dense", "--rows_of_task", '{"fbp": 3}')


def test_an_output_folder_of_ones_own(copied_run, tmp_path):
    """Another training of the same run, beside the first."""
    before = (copied_run / "moe-instruct/finteam.json").read_bytes()
    instruct_tune(copied_run, "moe", "--learning_rate", "2e-4", "--output_dir", tmp_path / "mine")
    assert load_model(tmp_path / "mine").config.num_local_experts == 3
    assert (copied_run / "moe-instruct/finteam.json").read_bytes() == before
