# SPDX-License-Identifier: Apache-2.0
"""A setting has its effect in all that follows, or is refused by name before any work; a run that diverges stops."""

import json
import shutil

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file, save_file
from trl import SFTConfig, SFTTrainer

from conftest import REPOSITORY, call, form_of, instruct_tune, load_script, train_expert
from finteam_experts.data.files import corpus_file, task_file, write_rows
from finteam_experts.data.mixture import tuning_rows
from finteam_experts.data.tasks import default_tasks, render
from finteam_experts.errors import InputError, NotFiniteError
from finteam_experts.models import load_model, load_tokenizer
from finteam_experts.runs import read_record
from finteam_experts.training.trainer import RecipeTrainer

TASKS = default_tasks()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--chat_template_path", "mine.jinja"),
            "chat_template_path is 'mine.jinja', which a recipe can't set. .*base's folder",
        ),
        (("--eos_token", "<|endoftext|>"), "eos_token is .*which a recipe can't set"),
        (("--eval_strategy", "steps"), "eval_strategy is .*scripts/evaluate.py scores"),
        (("--save_strategy", "best"), "save_strategy is 'best'"),
        (("--assistant_only_loss", "true"), "assistant_only_loss is True"),
        (("--push_to_hub", "true"), "push_to_hub is True.*scripts/publish.py"),
        (("--auto_find_batch_size", "true"), "auto_find_batch_size is True"),
        (("--model_revision", "v2"), "model_revision is 'v2'.*hf download"),
        (("--lora_modules_to_save", "lm_head"), "lora_modules_to_save is lm_head"),
        (("--lora_target_modules", "gate_proj", "lm_head"), "lora_target_modules"),
        (("--use_peft", "false"), "use_peft is false"),
        (("--max_length", "2048"), "max_length is 2048 tokens, and the model has 512 positions"),
        (("--rows_per_step", "0"), "rows_per_step is 0"),
        (("--learning_rate", "-0.001"), "learning_rate is -0.001; it has to be above 0"),
        (("--learning_rate", "nan"), "learning_rate is nan"),
        (("--max_steps", "0"), "max_steps is 0"),
        (("--save_steps", "0"), "save_steps is 0"),
        (("--per_device_train_batch_size", "0"), "per_device_train_batch_size is 0"),
        (("--gradient_accumulation_steps", "-2"), "gradient_accumulation_steps is -2"),
        (("--weight_decay", "-0.1"), "weight_decay is -0.1; it has to be 0 or more"),
        (("--lora_r", "0"), "lora_r is 0"),
        (("--lora_dropout", "1.5"), "lora_dropout is 1.5; it has to be 0 or more and below 1"),
        (("--adam_beta2", "1.0"), "adam_beta2 is 1.0; it has to be 0 or more and below 1"),
        (("--seed", "-1"), "seed is -1"),
        (("--seed", "4294967296"), "seed is 4294967296; it has to be 0 or more and below 4294967296"),
        (("--learning_rate", "inf"), "learning_rate is inf; it has to be above 0"),
        (("--max_length", "-1"), "max_length is -1; it has to be above 0"),
        (("--label_smoothing_factor", "nan"), "label_smoothing_factor is nan; it has to be 0 or more and below 1"),
        (("--neftune_noise_alpha", "-1"), "neftune_noise_alpha is -1.0; it has to be 0 or more"),
        (("--warmup_steps", "nan"), "warmup_steps is nan; it has to be 0 or more"),
        (("--lr_scheduler_kwargs", "{num_decay_steps: 1}"), "value {num_decay_steps: 1} is not JSON: .*double quotes"),
        (
            ("--lr_scheduler_type", "linear", "--lr_scheduler_kwargs", '{"num_decay_steps": 1}'),
            "lr_scheduler_type is linear: .*num_decay_steps.* It goes with lr_scheduler_kwargs, warmup_steps: set them together",
        ),
    ],
)
@pytest.mark.parametrize("recipe", ["expert", "dense"])
def test_settings_without_effect_are_refused_before_any_work(new_run, recipe, arguments, message):
    with pytest.raises(InputError, match=message):
        train_expert(new_run, "macro", *arguments) if recipe == "expert" else instruct_tune(
            new_run, "dense", *arguments
        )
    assert not (new_run / "adapters").exists()
    assert not list(new_run.glob("dense*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rows_per_task", "-5"), "rows_per_task is -5; it must be a whole number from 1"),
        (("--rows_per_task", "0"), "rows_per_task is 0"),
        (("--rows_of_task", "{stock_movement: -1}"), "rows_of_task, stock_movement is -1"),
        (("--rows_of_task", "{stock_movements: 4}"), "unknown task 'stock_movements'. Did you mean 'stock_movement'"),
        (("--rows_of_task", "160"), "rows_of_task is 160; write it as"),
        (("--rows_of_task", "{stock_movement: 160"), "rows_of_task is .* write it as"),
        (("--rows_of_task", "{fpb: 0, fiqasa: 0, headlines: 0, stock_movement: 0}"), "leaves no row"),
        (("--max_length", "20"), "none of its 112 rows has 20 tokens or fewer: shorten them, raise max_length"),
    ],
)
def test_bad_numbers_of_rows(new_run, arguments, message):
    with pytest.raises(InputError, match=message):
        instruct_tune(new_run, "dense", *arguments)
    assert not list(new_run.glob("dense*"))


def test_rows_of_task_as_the_help_writes_it(new_run):
    instruct_tune(new_run, "dense", "--rows_of_task", "{stock_movement: 2, fpb: 1}", "--max_steps", 1)
    assert (
        read_record(new_run / "dense-instruct")["inputs"]["settings"]["rows_of_task"] == "{stock_movement: 2, fpb: 1}"
    )


def test_a_base_for_a_tuning_that_starts_from_the_team(copied_run):
    with pytest.raises(InputError, match=r"model_name_or_path \(--base\) is .* start_from moe tunes what was merged"):
        instruct_tune(copied_run, "moe", "--base", copied_run / "base")


RECIPES = {
    "seed: 1.5": "seed is 1.5",
    "max_steps: 80.0": "max_steps is 80.0; it must be a whole number",
    "learning_rate: fast": "learning_rate is 'fast'",
    "start_from: mo": "start_from is 'mo'; it is one of .*Did you mean 'moe'",
    "lora_r: [16]": r"lora_r is \[16\]",
    "bf16: maybe": "bf16 is 'maybe'",
    "learning_rat: 1.0e-3": "unknown key 'learning_rat'. Did you mean 'learning_rate'",
    "base: outputs/other": "unknown key 'base'. Did you mean 'model_name_or_path'",
    "lora_r:\t16": "line 1: not YAML",
    "a: b: c": "line 1: not YAML",
    "- 1": "expected a mapping",
    "max_steps: 3\nmax_steps: 4": "line 2: the key 'max_steps' is there twice",
}


@pytest.mark.parametrize("content", RECIPES)
def test_a_wrong_recipe_names_file_and_key(new_run, tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"recipe.yaml.*{RECIPES[content]}"):
        call("recipes/instruct_tune.py", "--config", path, "--run_dir", new_run)


def test_a_recipe_that_is_not_utf8(new_run, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes("# größer\nmax_steps: 4\n".encode("latin1"))
    with pytest.raises(InputError, match="recipe.yaml, line 1: not UTF-8"):
        call("recipes/instruct_tune.py", "--config", path, "--run_dir", new_run)
    with pytest.raises(InputError, match="--config needs a recipe"):
        call("recipes/instruct_tune.py", "--run_dir", new_run, "--config")


def test_one_target_module_is_a_list_of_one(new_run, tmp_path):
    recipe = yaml.safe_load((REPOSITORY / "recipes/sample/train_expert.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(recipe | {"lora_target_modules": "gate_proj", "max_steps": 2, "steps_per_task": None})
    )
    call("recipes/train_expert.py", "--config", tmp_path / "recipe.yaml", "--run_dir", new_run, "--role", "macro")
    names = load_file(new_run / "adapters/macro/adapter_model.safetensors")
    assert all(".gate_proj." in name for name in names)


# --- nothing is cut or left out in silence


def test_the_rest_of_a_long_passage_is_trained_on(new_run):
    """Not its first `max_length` tokens alone: 32 passages of three and more sequences are an epoch of about 100 steps."""
    text = " ".join(f"Rates rose to {n} percent." for n in range(20))
    write_rows(corpus_file(new_run / "data", "macro"), [{"text": f"{text} {n}"} for n in range(32)])
    train_expert(new_run, "macro", "--learn_from", "null", "--max_length", 64, "--max_steps", -1, "--num_train_epochs", 1,
                 "--save_steps", 1000, "--lr_scheduler_type", "constant", "--per_device_train_batch_size", 1)  # fmt: skip
    assert read_record(new_run / "adapters/macro")["results"]["steps"] > 2 * 32


def test_rows_that_are_cut_or_left_out_are_counted(new_run, capsys):
    with task_file(new_run / "data", "fpb", "train").open("a") as file:
        file.write(json.dumps({"text": "Sales rose. " * 400, "label": "positive"}) + "\n")
    instruct_tune(new_run, "dense", "--max_length", 120)
    printed = capsys.readouterr().out
    assert printed.count("fpb: 1 of 29 texts are cut to their first 256 tokens (max_text_tokens)") == 1
    assert "of 113 rows are left out: they have more than 120 tokens" in printed


def test_prompts_longer_than_the_model_are_refused(new_run, toy_base):
    config = json.loads((new_run / "base/config.json").read_text())
    (new_run / "base/config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    with pytest.raises(InputError, match="its longest prompt and an answer are .* the model has 40 positions"):
        call("scripts/evaluate.py", "--run_dir", new_run, "--models", "base")
    assert not (new_run / "reports/evaluation.json").exists()


# --- TRL's other losses


@pytest.mark.parametrize("options", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.2}])
def test_another_loss_is_trl_s_own(toy_base, tmp_path, options):
    rows = [{"prompt": "Rates rose in " + "March " * n, "completion": "positive" * (n + 1)} for n in range(4)]

    def loss(trainer_class):
        torch.manual_seed(0)
        args = SFTConfig(output_dir=str(tmp_path), padding_free=True, max_length=None, use_cpu=True, bf16=False,
                         per_device_train_batch_size=4, report_to="none", gradient_checkpointing=False, **options)  # fmt: skip
        trainer = trainer_class(model=load_model(toy_base).train(), args=args, train_dataset=Dataset.from_list(rows),
                                processing_class=load_tokenizer(toy_base))  # fmt: skip
        batch = next(iter(trainer.get_train_dataloader()))
        return trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(37))

    assert loss(RecipeTrainer).item() == pytest.approx(loss(SFTTrainer).item())


# --- figures that are not finite


def test_a_training_that_diverges_stops_and_can_be_started_again(new_run):
    with pytest.raises(
        NotFiniteError, match=r"step 2: .* is not finite. No checkpoint had been saved.*Lower learning_rate"
    ):
        train_expert(new_run, "macro", "--learning_rate", "1e30", "--warmup_steps", 0)
    assert not (new_run / "adapters/macro").exists()
    train_expert(new_run, "macro")
    assert (new_run / "adapters/macro").is_dir()


def test_the_last_good_checkpoint_is_kept(new_run, monkeypatch):
    step = RecipeTrainer.compute_loss

    def diverge(trainer, *args, **kwargs):
        return step(trainer, *args, **kwargs) * (float("nan") if trainer.state.global_step == 3 else 1)

    with monkeypatch.context() as patched:
        patched.setattr(RecipeTrainer, "compute_loss", diverge)
        with pytest.raises(
            NotFiniteError, match="step 4: the loss is not finite. The checkpoint of step 2 is kept in"
        ):
            train_expert(new_run, "macro")
    kept = new_run / "adapters/macro.incomplete/checkpoint-2"
    assert all(tensor.isfinite().all() for tensor in load_file(kept / "adapter_model.safetensors").values())
    train_expert(new_run, "macro")


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(new_run, monkeypatch):
    def spoil(trainer, *args, **kwargs):
        loss = step(trainer, *args, **kwargs)
        if trainer.state.global_step == 2:
            next(p for p in trainer.model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        return loss

    step = RecipeTrainer.training_step
    monkeypatch.setattr(RecipeTrainer, "training_step", spoil)
    with pytest.raises(
        NotFiniteError, match=r"step 3: the gradient of .*lora_A.* is not finite. The checkpoint of step 2"
    ):
        train_expert(new_run, "macro")


def spoil_base(run_dir):
    path = run_dir / "base/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_base_that_is_not_finite(new_run):
    spoil_base(new_run)
    with pytest.raises(NotFiniteError, match="step 1: the loss is not finite.*look at the base's weights"):
        train_expert(new_run, "macro")
    with pytest.raises(NotFiniteError, match=r"base: the log-likelihood of an answer is not finite"):
        call("scripts/evaluate.py", "--run_dir", new_run, "--models", "base")
    assert not (new_run / "reports/evaluation.json").exists()


def test_an_adapter_that_is_not_finite_is_named_by_the_merge(copied_run):
    for name in ("moe", "moe-instruct", "experts"):
        shutil.rmtree(copied_run / name)
    path = copied_run / "adapters/micro/adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        NotFiniteError, match="adapters/micro/adapter_model.safetensors: .* its training diverged. Train it again"
    ):
        call("scripts/merge_moe.py", "--run_dir", copied_run)


# --- rows and their tokens


def test_the_recipe_trains_on_what_trl_would_make_of_the_conversations(toy_base, toy_data, tmp_path):
    """For a template without surprises, TRL's own preparation of prompt and completion has the same ids and labels."""
    form, script = form_of(toy_base), load_script("recipes/instruct_tune.py")
    args = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None, padding_free=True
    )
    arguments = script.TuneArguments(data_dir=str(toy_data), rows_per_task=3)
    ours, _ = script.rows_to_tune(arguments, TASKS, None, args, form, 512)
    rows = tuning_rows(toy_data, TASKS, 42, arguments.limits(TASKS), hold_out=False)
    asked = [
        {
            "prompt": form.messages(render(TASKS[task], row, form.tokenizer)),
            "completion": [{"role": "assistant", "content": row["label"]}],
        }
        for task, row in rows
    ]
    trainer = SFTTrainer(
        model=load_model(toy_base), args=args, train_dataset=Dataset.from_list(asked), processing_class=form.tokenizer
    )
    for row, theirs in zip(ours, trainer.train_dataset, strict=True):
        assert row["input_ids"] == theirs["input_ids"]
        last = len(row["input_ids"]) - row["input_ids"][::-1].index(form.stop_id)  # what follows is never generated
        assert row["labels"] == theirs["labels"][:last] + [-100] * (len(row["labels"]) - last)
