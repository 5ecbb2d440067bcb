# SPDX-License-Identifier: Apache-2.0
"""The plan: parameters as the real models have them, what does not fit is named with what helps, only configs are read."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from conftest import REPOSITORY, call, load_script
from finteam_experts.errors import InputError
from finteam_experts.families import family_of
from finteam_experts.models import empty_model, load_model, parameter_counts, read_config
from finteam_experts.runs import read_record
from finteam_experts.training import planning
from finteam_experts.training.cpu import ATTENTION, fuse_lora
from finteam_experts.training.experts import split_experts
from finteam_experts.training.planning import Devices

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

EIGHT_BILLION = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def eight_billion(tmp_path_factory):
    """The folder of an 8B base that has a config and nothing else."""
    folder = tmp_path_factory.mktemp("8b")
    LlamaConfig(**EIGHT_BILLION).save_pretrained(folder)
    return folder


def lora(name):
    recipe = yaml.safe_load((REPOSITORY / f"recipes/sample/{name}.yaml").read_text())
    names = load_script("scripts/plan.py").LORA
    return {name: recipe[key] for key, name in names.items() if key in recipe} | {"r": 4}  # as the toy run has it


def test_parameters_are_those_of_the_models(done_run):
    dense = AutoConfig.from_pretrained(done_run / "base")
    moe = family_of(dense).moe_config(dense, experts=3, used=1)
    for config, folder, recipe in ((dense, "base", "instruct_tune_dense"), (moe, "moe", "instruct_tune_moe")):
        shape = planning.shape(config, lora(recipe))
        assert shape.total == sum(parameter.numel() for parameter in load_model(done_run / folder).parameters())
        counts = parameter_counts(empty_model(read_config(done_run / folder)))
        assert (shape.total, shape.active) == (counts["total"], counts["active"])
        tuned = read_record(done_run / ("moe-instruct" if folder == "moe" else "dense-instruct"))["results"]
        assert shape.trainable == tuned["trainable_parameters"]


def test_split_experts_train_what_their_recipe_says(done_run):
    dense = AutoConfig.from_pretrained(done_run / "base")
    everywhere = {"r": 4, "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
    attention = planning.shape(dense, {"r": 4, "target_modules": ["q_proj"]}).trainable
    alone = planning.shape(dense, everywhere).trainable
    team = planning.shape(family_of(dense).moe_config(dense, experts=3, used=3), everywhere).trainable
    assert team - attention == 3 * (alone - attention)


def test_flops_are_two_a_parameter_and_pass():
    config = LlamaConfig(**EIGHT_BILLION)
    shape = planning.shape(config, None)
    assert shape.total == 8_030_261_248  # Llama 3.1 8B's
    multiplied = 8_030_261_248 - 128256 * 4096
    attention = 2 * 32 * 4096 * 1000
    assert planning.flops_per_token(shape, 1000, checkpointing=False) == 2 * (2 * multiplied + attention)
    assert planning.flops_per_token(shape, 1000, checkpointing=True) == 3 * (2 * multiplied + attention)


@pytest.fixture
def plan(capsys):
    """Runs plan.py in this process: its exit code, and what it printed to both streams."""

    def run(base, *arguments, recipes="recipes/llama3-8b"):
        with pytest.raises(SystemExit) as ended:
            call("scripts/plan.py", "--base", base, "--recipes", REPOSITORY / recipes, *arguments)
        return ended.value.code, *capsys.readouterr()

    return run


def test_plan_of_eight_gpus(plan, eight_billion, tmp_path):
    _, printed, problems = plan(eight_billion, "--gpus", 8, "--run_dir", tmp_path)
    assert "8.030 B" in printed
    assert "19.305 B" in printed  # three experts
    assert "does not fit: step" not in problems
    assert [path.name for path in eight_billion.iterdir()] == ["config.json"]


def test_a_trunk_is_planned_where_there_is_a_recipe_for_it(plan, eight_billion, tmp_path):
    _, without, _ = plan(eight_billion, "--gpus", 8, "--run_dir", tmp_path)
    assert "trunk" not in without
    _, printed, _ = plan(eight_billion, "--run_dir", tmp_path, recipes="recipes/qwen3-0.6b")
    assert "1: the trunk" in printed
    assert "│ trunk " in printed  # and its folder


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("experts", [0, 2, 3], ids=["dense", "two of three experts", "all three"])
@pytest.mark.parametrize("targets", [LINEAR, LINEAR[4:]], ids=["all linear", "MLP"])
def test_activations_are_what_autograd_saves(bf16, experts, targets):
    """Of one layer, as it is trained on a CPU: the difference between a model of three layers and one of two."""
    dense = LlamaConfig(
        hidden_size=144, intermediate_size=384, num_attention_heads=9, num_key_value_heads=3, vocab_size=99
    )
    config = family_of(dense).moe_config(dense, experts=3, used=experts) if experts else dense
    lora, tokens = {"r": 8, "target_modules": targets}, 256
    kept = []
    for layers in (2, 3):
        config.num_hidden_layers = layers
        options = {"dtype": torch.bfloat16 if bf16 else torch.float32, "attn_implementation": ATTENTION}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, **options)
        if experts:
            split_experts(model)
        model = get_peft_model(model, LoraConfig(**lora)).train()
        fuse_lora(model)
        weights = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
        saved = {}

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(torch.arange(1, 1 + tokens)[None] % 99, position_ids=torch.arange(tokens)[None], use_cache=False)
        kept.append(sum(t.untyped_storage().nbytes() for place, t in saved.items() if place not in weights))
    recipe = REPOSITORY / "recipes/sample/instruct_tune_moe.yaml"
    training = load_script("scripts/plan.py").training_of(
        recipe, SimpleNamespace(gpus=1, row_tokens=100, label_tokens=3, rows=1000, cpu=False), sharded=False
    )
    training = replace(training, lora=lora, activation_bytes=2 if bf16 else 4)
    planned = planning.activations(SimpleNamespace(config=config), training, Devices(1, 80, 989, 0.4, "cpu"))
    # an expert's tokens are filled up to a multiple of 32
    assert planned * tokens == pytest.approx(kept[1] - kept[0], rel=0.1)


def test_one_small_card_is_told_what_fits(plan, eight_billion):
    code, _, problems = plan(eight_billion, "--gpus", 1, "--memory", 16)
    assert code == 1
    assert "step 1: an expert needs" in problems
    assert "load_in_4bit: true (QLoRA)" in problems
    assert "step 3: the team needs" in problems
    assert "devices with recipes/accelerate/fsdp2.yaml" in problems


def test_a_change_that_is_named_does_fit():
    shape = planning.shape(
        LlamaConfig(**EIGHT_BILLION), {"r": 64, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    )
    recipe = REPOSITORY / "recipes/llama3-8b/train_expert.yaml"
    training = load_script("scripts/plan.py").training_of(
        recipe, SimpleNamespace(gpus=1, row_tokens=100, label_tokens=3, rows=1000, cpu=False), sharded=False
    )
    card = Devices(count=1, memory_gib=16, tflops=100, utilisation=0.4)
    before = planning.memory(shape, training, card)
    assert not planning.fits(before, card)
    assert planning.what_makes_it_fit(shape, training, card).startswith("load_in_4bit")
    assert planning.what_makes_it_fit(shape, training, Devices(1, 4, 100, 0.4)) is None


def test_pieces_on_more_devices_take_less_of_each():
    shape = planning.shape(LlamaConfig(**EIGHT_BILLION), {"r": 8, "target_modules": ["q_proj"]})
    script = load_script("scripts/plan.py")
    parts = []
    for count in (2, 8):
        training = script.training_of(
            REPOSITORY / "recipes/llama3-8b/instruct_tune_dense.yaml",
            SimpleNamespace(gpus=count, row_tokens=100, label_tokens=3, rows=1000, cpu=False),
            sharded=True,
        )
        parts.append(planning.memory(shape, training, Devices(count, 80, 989, 0.4)))
    assert parts[0]["frozen weights"] == 4 * parts[1]["frozen weights"]
    assert parts[0]["activations"] == parts[1]["activations"]


def test_devices_that_cannot_share_a_batch_and_bases_without_config_are_refused(eight_billion, tmp_path):
    with pytest.raises(InputError, match="rows_per_step is 64, which 7 devices"):
        call("scripts/plan.py", "--base", eight_billion, "--recipes", REPOSITORY / "recipes/llama3-8b", "--gpus", 7)
    with pytest.raises(InputError, match="no config could be read"):
        call("scripts/plan.py", "--base", tmp_path / "nothing", "--gpus", 8)


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("instruct_tune_moe", {"per_device_train_batch_size": "four"}, "per_device_train_batch_size is 'four'"),
        ("instruct_tune_moe", {"rows_per_step": -8}, "rows_per_step is -8; it has to be 1 or more"),
        ("instruct_tune_dense", {"max_steps": 2.5}, "max_steps is 2.5: input should be a valid integer"),
        ("instruct_tune_dense", {"packing": True, "max_length": None}, "Packed rows need a length"),
        ("train_expert", {"steps_per_task": "twelve"}, "steps_per_task is 'twelve'; it has to be a number"),
        ("train_expert", {"steps_per_task": 0}, "steps_per_task is 0; it has to be 1 or more"),
    ],
)
def test_a_wrong_value_of_a_recipe_is_named_with_its_file(eight_billion, tmp_path, name, setting, message):
    folder = shutil.copytree(REPOSITORY / "recipes/llama3-8b", tmp_path / "recipes")
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | setting))
    with pytest.raises(InputError, match=message) as raised:
        call("scripts/plan.py", "--base", eight_billion, "--recipes", folder, "--gpus", 8)
    assert str(file) in str(raised.value)


def test_a_disk_that_is_too_small_is_named(plan, eight_billion, monkeypatch, tmp_path):
    free = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    code, _, problems = plan(eight_billion, "--gpus", 8, "--run_dir", tmp_path)
    assert code == 1
    assert "its disk has 1.0 GB free" in problems
    assert "--run_dir" in problems
