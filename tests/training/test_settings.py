# SPDX-License-Identifier: Apache-2.0
"""Every setting that a recipe or a launch can have acts, or is refused by name, or changes nothing but what is shown and kept.

The tables name every field of TRL's and transformers' arguments, of this package's and of accelerate's: a new one fails the test
until it is known what it does here, beside the sample recipe's other settings.
"""

import contextlib
import dataclasses
import sys

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from datasets import Dataset
from peft import get_peft_model_state_dict
from transformers import MixtralConfig
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import ModelConfig, SFTConfig

from conftest import REPOSITORY, load_script
from finteam_experts.data.trl_datasets import DatasetArguments
from finteam_experts.errors import InputError
from finteam_experts.files import read_yaml
from finteam_experts.models import load_tokenizer, read_config
from finteam_experts.training.arguments import (
    BaseModelConfig,
    RunArguments,
    TaskRowArguments,
    keep_rows_whole,
    parse,
    settings,
)  # fmt: skip
from finteam_experts.training.lora import train_lora

TUNE = load_script("recipes/instruct_tune.py").TuneArguments
EXPERT = load_script("recipes/train_expert.py").ExpertArguments
RECIPE = REPOSITORY / "recipes/sample/instruct_tune_dense.yaml"
# Three steps of four rows on the toy
SHORT = {
    "max_steps": 3, "per_device_train_batch_size": 4, "warmup_steps": 1, "lora_r": 4, "bf16": "false", "logging_steps": 1,
    "save_strategy": "no", "disable_tqdm": "true", "learning_rate": 0.01,
}  # fmt: skip

# The words that show that a setting acts: they change the weights. After `|` those of the training to compare with.
ACTS = {
    SFTConfig: {
        "per_device_train_batch_size": "2", "num_train_epochs": "2", "max_steps": "2", "learning_rate": "0.02",
        "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"num_decay_steps":2}', "warmup_steps": "0", "optim": "sgd",
        "optim_args": "momentum=0.5 --optim sgd | --optim sgd", "weight_decay": "0.5",
        "adam_beta1": "0.5", "adam_beta2": "0.5", "adam_epsilon": "0.01", "gradient_accumulation_steps": "2", "max_grad_norm": "0.01",
        "label_smoothing_factor": "0.2", "loss_type": "dft", "bf16": "true", "neftune_noise_alpha": "5", "seed": "1", "data_seed": "1",
        "dataloader_drop_last": "true --per_device_train_batch_size 8 | --per_device_train_batch_size 8",
        "train_sampling_strategy": "sequential", "shuffle_dataset": "true", "model_init_kwargs": '{"dtype":"bfloat16"}',
    },
    ModelConfig: {
        "dtype": "bfloat16", "lora_r": "2", "lora_alpha": "64", "lora_dropout": "0.5", "lora_target_modules": "q_proj",
        "use_rslora": "true", "use_dora": "true",
    },
    RunArguments: {"rows_per_step": "8", "balance_rows": "false", "stratify_rows": "false"},
}  # fmt: skip
# Those that change memory and speed, and the weights by rounding
SPEED = {
    SFTConfig: {
        "gradient_checkpointing": "true", "activation_checkpointing": "true", "activation_checkpointing_kwargs": '{"use_reentrant":false}',
        "gradient_checkpointing_kwargs": '{"use_reentrant":false}', "padding_free": "false", "pad_to_multiple_of": "8",
        "dataloader_num_workers": "1", "full_determinism": "true",
    },
    ModelConfig: {"attn_implementation": "eager"},
    RunArguments: {"cpu_speedups": "false"},
}  # fmt: skip
# Those that change what is shown or kept, and nothing of the weights or of the settings that the record compares
SHOWN = {
    SFTConfig: {
        "logging_strategy": "steps", "logging_steps": "2", "logging_first_step": "true", "log_on_each_node": "false",
        "logging_nan_inf_filter": "false", "include_num_input_tokens_seen": "true", "log_level": "error",
        "log_level_replica": "error", "disable_tqdm": "true", "report_to": "none", "run_name": "mine", "project": "mine",
        "trackio_space_id": "me/mine", "trackio_bucket_id": "me/mine", "trackio_static_space_id": "me/mine", "save_strategy": "steps",
        "save_steps": "1", "save_on_each_node": "true", "save_total_limit": "1", "enable_jit_checkpoint": "true",
        "dataloader_pin_memory": "false", "dataset_num_proc": "1", "debug": "", "skip_memory_metrics": "false", "do_train": "true",
        "torch_empty_cache_steps": "1", "ddp_timeout": "60",
    },
}  # fmt: skip
REFUSED = {
    SFTConfig: {
        "chat_template_path": "x", "eos_token": "x", "pad_token": "x", "trust_remote_code": "true",
        "assistant_only_loss": "true", "completion_only_loss": "true", "dataset_text_field": "x", "dataset_kwargs": '{a: 1}',
        "remove_unused_columns": "false", "length_column_name": "x", "truncation_mode": "keep_end", "eval_strategy": "steps",
        "eval_steps": "2", "eval_delay": "1", "eval_on_start": "true", "eval_do_concat_batches": "false", "eval_packing": "true",
        "eval_use_gather_object": "true", "eval_accumulation_steps": "2", "per_device_eval_batch_size": "2",
        "prediction_loss_only": "true", "include_for_metrics": "[loss]", "batch_eval_metrics": "true", "bf16_full_eval": "true",
        "fp16_full_eval": "true", "label_names": "x", "do_eval": "true", "do_predict": "true",
        "metric_for_best_model": "loss", "greater_is_better": "true", "push_to_hub": "true", "hub_token": "x",
        "hub_private_repo": "true", "hub_model_id": "x", "hub_strategy": "end", "hub_always_push": "true", "hub_revision": "x",
        "resume_from_checkpoint": "x", "ignore_data_skip": "true", "save_only_model": "true",
        "restore_callback_states_from_checkpoint": "true", "dataloader_in_order": "false", "auto_find_batch_size": "true",
        "use_cache": "true", "liger_kernel_config": '{rope: true}', "fsdp_config": '{version: 2}', "optim_target_modules": "q_proj",
        "packing_strategy": "wrapped", "accelerator_config": '{split_batches: true}',
    },
    ModelConfig: {
        "model_revision": "x", "use_peft": "false", "lora_modules_to_save": "lm_head", "lora_target_parameters": "nothing",
        "lora_task_type": "SEQ_CLS", "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": "true", "bnb_4bit_quant_storage": "uint8",
    },
}  # fmt: skip
# Those that this test does not try, with the test or the machine that does
ELSEWHERE = {
    SFTConfig: {
        "output_dir": "test_instruct_tune.py::test_an_output_folder_of_ones_own", "use_cpu": "a GPU machine", "fp16": "a GPU", "tf32": "a GPU", "use_liger_kernel": "a GPU: layer kernels, the same weights",
        "activation_offloading": "a GPU: memory alone", "torch_compile": "a compiler: speed alone",
        "torch_compile_backend": "a compiler", "torch_compile_mode": "a compiler",
        "average_tokens_across_devices": "test_loss.py::test_two_processes_take_the_step_of_one",
        "load_best_model_at_end": "transformers refuses it without an evaluation", "parallelism_config": "no value on the command line",
        "router_aux_loss_coef": "test_settings.py::test_settings_of_an_moe_act",
        "max_length": "test_arguments.py::test_rows_that_are_cut_or_left_out_are_counted",
        "packing": "test_settings.py::test_packing_is_for_a_corpus_alone",
        "dataloader_persistent_workers": "speed alone", "dataloader_prefetch_factor": "speed alone",
        "dataloader_multiprocessing_context": "speed alone", "ddp_find_unused_parameters": "several processes: speed alone",
        "ddp_bucket_cap_mb": "several processes: speed alone", "ddp_broadcast_buffers": "several processes: no model has any",
        "ddp_static_graph": "several processes: speed alone", "ddp_backend": "several processes: speed alone",
        "fsdp": "several GPUs", "deepspeed": "several GPUs", "local_rank": "set by the launcher",
    },
    ModelConfig: {
        "model_name_or_path": "test_arguments.py::test_a_base_for_a_tuning_that_starts_from_the_team", "load_in_8bit": "a GPU",
        "load_in_4bit": "a GPU",
    },
    RunArguments: {
        "run_dir": "every test", "data_dir": "test_train_expert.py::test_bad_arguments",
    },
    TaskRowArguments: {
        "rows_per_task": "test_instruct_tune.py::test_limits_of_single_tasks",
        "rows_of_task": "test_instruct_tune.py::test_limits_of_single_tasks",
        "hold_out_validation": "test_train_expert.py::test_validation_rows_are_held_out_of_an_expert",
    },
    TUNE: {
        "start_from": "test_arguments.py::test_a_base_for_a_tuning_that_starts_from_the_team", "as_trunk": "test_steps.py::test_match_steps_is_for_the_dense_baseline",
        "tasks": "test_sampler.py::test_a_tuning_reads_its_rows_in_that_order_unless_it_is_told_not_to",
        "match_steps": "test_steps.py::test_the_baseline_takes_the_steps_of_experts_and_team",
        "chat_share": "test_sampler.py::test_a_tuning_reads_its_rows_in_that_order_unless_it_is_told_not_to",
        "routing_steps": "what is logged", "routing_passages": "what is logged",
    },
    EXPERT: {
        "role": "test_train_expert.py::test_changes_only_the_mlp", "learn_from": "test_train_expert.py::test_learns_its_corpus",
        "corpus": "test_train_expert.py::test_a_corpus_may_be_streamed_from_files_with_another_column",
        "corpus_column": "test_train_expert.py::test_a_corpus_may_be_streamed_from_files_with_another_column",
        "steps_per_task": "test_train_expert.py::test_an_expert_takes_its_steps_for_each_of_its_tasks",
        "merge_config": "which roles there are", "heldout_passages": "what is reported",
    },
}  # fmt: skip
TABLES = (ACTS, SPEED, SHOWN, REFUSED, ELSEWHERE)


def inherited(cls):
    """The fields that a class has from classes with a table of their own."""
    others = [
        other
        for other in (RunArguments, TaskRowArguments, DatasetArguments)
        if other is not cls and issubclass(cls, other)
    ]
    return {field.name for other in others for field in dataclasses.fields(other)}


@pytest.mark.parametrize("cls", [SFTConfig, ModelConfig, RunArguments, TaskRowArguments, TUNE, EXPERT])
def test_every_setting_is_in_one_table(cls):
    named = [name for table in TABLES for name in table.get(cls, {})]
    assert len(named) == len(set(named))
    assert {field.name for field in dataclasses.fields(cls)} - inherited(cls) == set(named)
    for where in ELSEWHERE.get(cls, {}).values():
        file, _, test = where.partition("::")
        if file.endswith(".py"):
            assert f"def {test}" in (REPOSITORY / "tests/training" / file).read_text()


ROWS = [
    {
        "input_ids": [7 + n] * 4 + [30 + n] * (1 + n % 5),
        "labels": [-100] * 4 + [30 + n] * (1 + n % 5),
        "stratum": "ab"[n % 3 > 0],
    }
    for n in range(12)
]


@pytest.fixture
def train(tmp_path, toy_base, monkeypatch):
    """Trains the toy as a recipe of the sample does but for `words`: the LoRA, and what the record would hold of the settings."""
    done = {}

    def run(words="", base=toy_base, rows=ROWS, recipe=RECIPE):
        key = (words, base, id(rows))
        if key in done:
            return done[key]
        given = words.split()
        short = {name: value for name, value in SHORT.items() if f"--{name}" not in given}
        if "--num_train_epochs" in given:
            short.pop("max_steps")
        overrides = [part for name, value in short.items() for part in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(recipe), *overrides, *given])
        args, training_args, model_args = parse((TUNE if recipe == RECIPE else EXPERT, SFTConfig, BaseModelConfig))
        args.share_batch(training_args)
        if rows is ROWS:
            keep_rows_whole(training_args)
        recorded = settings(args, training_args, model_args)
        dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
        work = tmp_path / f"work{len(done)}"
        trainer = train_lora(base, dataset, load_tokenizer(toy_base), args, training_args, model_args, work)
        done[key] = get_peft_model_state_dict(trainer.model), recorded
        return done[key]

    return run


def furthest(one, other):
    assert one.keys() == other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


def listed(table):
    return [(name, words) for fields in table.values() for name, words in fields.items()]


def test_what_acts_changes_the_weights_and_the_record(train):
    without_effect = []
    for name, words in listed(ACTS):
        words, _, beside = words.partition(" | ")
        (weights, recorded), (reference, before) = train(f"--{name} {words}"), train(beside)
        if weights.keys() == reference.keys() and all(map(torch.equal, weights.values(), reference.values())):
            without_effect.append(name)
        assert recorded != before, name
    assert not without_effect


def test_what_changes_speed_alone_changes_the_weights_by_rounding(train):
    reference, _ = train()
    for name, words in listed(SPEED):
        assert furthest(train(f"--{name} {words}")[0], reference) < 2e-5, name
    torch.use_deterministic_algorithms(False)


def test_what_is_shown_or_kept_changes_nothing_else(train):
    reference, before = train()
    words = " ".join(
        f"--{name} {value}" for name, value in listed(SHOWN) if value and name not in ("report_to", "disable_tqdm")
    )
    weights, recorded = train(words)
    assert furthest(weights, reference) == 0
    assert recorded == before


def test_what_has_no_effect_is_refused_by_name(toy_base, tmp_path, monkeypatch):
    recipe, config, accepted = read_yaml(RECIPE), read_config(toy_base), []
    for name, words in listed(REFUSED):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {name: yaml.safe_load(words)}))
        monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(tmp_path / "recipe.yaml"), "--bf16", "false"])
        try:
            _, _, model_args = parse((TUNE, SFTConfig, BaseModelConfig))
            model_args.check_lora(config)
            accepted.append(name)
        except InputError as error:
            assert name in str(error), error
    assert not accepted


# --- settings of an MoE, of packed corpora and of streams


def test_settings_of_an_moe_act(train, make_base):
    moe = make_base(config_class=MixtralConfig, num_local_experts=3, num_experts_per_tok=2)
    reference, _ = train(base=moe)
    assert furthest(train("--router_aux_loss_coef 0.5", base=moe)[0], reference) > 1e-5
    words = "--lora_target_modules q_proj --lora_target_parameters mlp.experts.down_proj --lora_modules_to_save gate"
    names = train(words, base=moe)[0]
    for part in ("q_proj.lora_A", "mlp.experts", "mlp.gate"):
        assert any(part in name for name in names), part
    with pytest.raises(InputError, match="router_aux_loss_coef.* is not a Mixture-of-Experts model"):
        train("--router_aux_loss_coef 0.5")


CORPUS = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in ROWS]


def test_packing_is_for_a_corpus_alone(train):
    """Packed, every passage counts alike; where TRL forgets where one ends, that is refused."""
    packed = "--packing true --max_length 24 --balance_rows"
    assert furthest(train(f"{packed} true", rows=CORPUS)[0], train(f"{packed} false", rows=CORPUS)[0]) > 1e-4
    with pytest.raises(InputError, match="balance_rows is true and packing_strategy wrapped"):
        train(f"{packed} true --packing_strategy wrapped", rows=CORPUS)
    with pytest.raises(InputError, match="`padding_free=True` without packing"):
        train("--max_length 24", rows=CORPUS)
    with pytest.raises(InputError, match="packing is true, and it is for a corpus alone"):
        train("--packing true")


def test_a_stream_is_read_in_the_order_of_the_seed(train):
    stream, recipe = Dataset.from_list(CORPUS).to_iterable_dataset(), REPOSITORY / "recipes/sample/train_expert.yaml"
    balanced, by_token = (
        train(f"--balance_rows {balance}", rows=stream, recipe=recipe)[0] for balance in ("true", "false")
    )
    assert furthest(balanced, by_token) > 1e-4
    for words in ("--data_seed 1", "--train_sampling_strategy sequential"):
        with pytest.raises(InputError, match="a stream is read in the order that seed gives"):
            train(words, rows=stream, recipe=recipe)


# --- names of modules


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lora_target_modules gate_proj up_proj down_prj", "lora_target_modules names 'down_prj', .* Did you mean 'down_proj'"),
        ("--lora_target_modules q_proj w1", "lora_target_modules names 'w1', and the model has nothing of that name"),
        ("--lora_target_modules q_proj layers.7.mlp.up_proj", "names 'layers.7.mlp.up_proj', and the model has nothing"),
        ("--lora_target_modules q_proj --lora_target_parameters mlp.experts.down_proj", "lora_target_parameters names"),
        ("--lora_target_modules q_proj mlp", "PEFT can't make this LoRA: Target module LlamaMLP"),
        ("--lora_target_modules q_proj lm_head", "lora_target_modules names lm_head. A merge takes over"),
        ("--lora_target_modules q_proj embed_tokens", "lora_target_modules names embed_tokens. A merge takes over"),
        ("--lora_target_modules q_proj --lora_modules_to_save gate", "lora_modules_to_save is gate"),
    ],
)  # fmt: skip
def test_every_name_matches_a_module(toy_base, monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(RECIPE), "--bf16", "false", *words.split()])
    _, _, model_args = parse((TUNE, SFTConfig, BaseModelConfig))
    with pytest.raises(InputError, match=message):
        model_args.check_lora(read_config(toy_base))


# --- how long a training is


@pytest.mark.parametrize(
    ("words", "steps", "epochs"),
    [
        ("", -1, 3),  # by the recipe's steps_per_task
        ("--max_steps 5", 5, 3),
        ("--num_train_epochs 2", -1, 2),
        ("--max_steps=5", 5, 3),
        ("--max-steps 5", 5, 3),
    ],
)
def test_the_command_line_says_how_long_before_the_recipe(monkeypatch, capsys, words, steps, epochs):
    recipe = REPOSITORY / "recipes/sample/train_expert.yaml"
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(recipe), "--bf16", "false", *words.split()])
    args, training_args, _ = parse((EXPERT, SFTConfig, BaseModelConfig))
    assert (training_args.max_steps, training_args.num_train_epochs) == (steps, epochs)
    assert args.steps_per_task == (None if words else 12)
    assert ("replaces the recipe's steps_per_task" in capsys.readouterr().out) == bool(words)


def test_a_setting_that_is_turned_off_takes_along_what_depends_on_it(monkeypatch, tmp_path):
    recipe = REPOSITORY / "recipes/llama3-8b/train_expert.yaml"  # packing with a strategy, and rows_per_step
    words = "--packing false --gradient_accumulation_steps 2 --lr_scheduler_type constant --bf16 false --use_cpu true"
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(recipe), *words.split()])
    args, training_args, _ = parse((EXPERT, SFTConfig, BaseModelConfig))
    assert args.rows_per_step is None
    found = (training_args.packing_strategy, training_args.warmup_steps, training_args.gradient_accumulation_steps)
    assert found == ("bfd", 0, 2)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--rows_per_step", "8"])
    args, training_args, _ = parse((EXPERT, SFTConfig, BaseModelConfig))
    with pytest.raises(InputError, match="rows_per_step and gradient_accumulation_steps are both set"):
        args.share_batch(training_args)


@pytest.mark.parametrize("words", ["--max_steps 5 --num_train_epochs 2", "--num_train_epochs 2 --match_steps true"])
def test_two_lengths_are_refused(monkeypatch, tmp_path, words):
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(RECIPE), "--bf16", "false", *words.split()])
    with pytest.raises(InputError, match="are both set, and each says how long the training is"):
        parse((TUNE, SFTConfig, BaseModelConfig))
    (tmp_path / "recipe.yaml").write_text("max_steps: 5\nnum_train_epochs: 2\n")
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(tmp_path / "recipe.yaml"), "--bf16", "false"])
    with pytest.raises(InputError, match="max_steps and num_train_epochs are both set"):
        parse((TUNE, SFTConfig, BaseModelConfig))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optim sgd --adam_beta1 0.8", "adam_beta1 is 0.8, which optim sgd does not use"),
        ("--optim_args momentum=0.9", "optim_args is 'momentum=0.9', which optim adamw_torch_fused does not use"),
        ("--optim sgd --optim_args foo=1", "optim_args is .* sgd does not use"),
        ("--lr_scheduler_type constant --warmup_steps 3", "warmup_steps is 3.0, which lr_scheduler_type constant does not use"),
        ("--lr_scheduler_type constant --lr_scheduler_kwargs {\"num_cycles\":1}", "lr_scheduler_kwargs is .* constant does not use"),
        ("--loss_type dft --label_smoothing_factor 0.1", "label_smoothing_factor is set, and loss_type dft has none"),
        ("--optim paged_adamw_8bit", "optim is paged_adamw_8bit: .*bitsandbytes|optim is paged_adamw_8bit: .*bnb"),
    ],
)  # fmt: skip
def test_what_the_optimizer_schedule_or_loss_does_not_use_is_refused(monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(RECIPE), "--bf16", "false", *words.split()])
    with pytest.raises(InputError, match=message):
        parse((TUNE, SFTConfig, BaseModelConfig))


# --- accelerate

LAUNCH = "where and how processes start"
ACCELERATE = {
    **dict.fromkeys(
        ("compute_environment", "distributed_type", "use_cpu", "debug", "num_processes", "machine_rank", "num_machines", "gpu_ids",
         "main_process_ip", "main_process_port", "rdzv_backend", "same_network", "main_training_function", "enable_cpu_affinity",
         "mpirun_config", "tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo", "command_file", "commands", "tpu_vm", "tpu_env"),
        LAUNCH),
    "fsdp_config": "acts: test_processes.py", "dynamo_config": "acts: compiles the model, speed alone",
    "deepspeed_config": "acts, but for gradient accumulation", "mixed_precision": "the recipe's, or refused",
    "fp8_config": "refused with mixed_precision: fp8", "parallelism_config": "refused where it cuts rows", "megatron_lm_config": "refused",
    "downcast_bf16": "accelerate refuses it outside of TPUs",
}  # fmt: skip


def test_every_key_of_accelerates_config_is_known():
    assert {field.name for field in dataclasses.fields(ClusterConfig)} == set(ACCELERATE)
    for path in (REPOSITORY / "recipes/accelerate").glob("*.yaml"):
        content = read_yaml(path)
        assert set(content) - {"dynamo_backend"} <= set(ACCELERATE), path
        assert content["mixed_precision"] in ("no", "bf16")
        assert "gradient_accumulation_steps" not in content.get("deepspeed_config", {})


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS to 4, which the training"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "ACCELERATE_MIXED_PRECISION to fp16, .*The recipe has bf16 False"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "ACCELERATE_MIXED_PRECISION to bf16, .*The recipe has bf16 False"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION to fp8"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM to true"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}, "PARALLELISM_CONFIG_CP_SIZE to 2.*would see each other"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, None),
    ],
)  # fmt: skip
def test_what_accelerate_says_is_followed_or_refused(monkeypatch, environment, message):
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(RECIPE), "--bf16", "false"])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if message is None:
        parse((TUNE, SFTConfig, BaseModelConfig))
        return
    with pytest.raises(InputError, match=message):
        parse((TUNE, SFTConfig, BaseModelConfig))


def test_every_key_of_accelerator_config_is_known(tmp_path, monkeypatch):
    """All but how tensors are copied are refused: they change which rows a step has, or nothing."""
    refused = {
        "split_batches": True, "dispatch_batches": True, "even_batches": False, "use_seedable_sampler": False,
        "gradient_accumulation_kwargs": {"num_steps": 2},
    }  # fmt: skip
    followed = {"non_blocking": True, "gradient_accumulation_kwargs": {"sync_each_batch": True}}
    assert {field.name for field in dataclasses.fields(AcceleratorConfig)} - set(refused) == {
        "non_blocking",
        "use_configured_state",  # which transformers refuses by itself: no state is configured before
    }
    recipe = read_yaml(RECIPE)
    for cases, wanted in ((refused, True), (followed, False)):
        for name, value in cases.items():
            (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"accelerator_config": {name: value}}))
            monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(tmp_path / "recipe.yaml"), "--bf16", "false"])
            with pytest.raises(InputError, match=name) if wanted else contextlib.nullcontext():
                parse((TUNE, SFTConfig, BaseModelConfig))
