# SPDX-License-Identifier: Apache-2.0
"""Step 1: what a role expert learns, how it resumes, and what it refuses."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from conftest import REPOSITORY, ROLES, SHORT, call, load_script, shell, train_expert
from finteam_experts.data.files import held_out, read_corpus, read_task
from finteam_experts.data.leaks import check_data_dir
from finteam_experts.data.tasks import default_tasks
from finteam_experts.data.trl_datasets import stream_corpus
from finteam_experts.errors import InputError
from finteam_experts.models import MLP_MODULES, as_chats, load_tokenizer
from finteam_experts.runs import read_record, work_folder
from finteam_experts.training.rows import recorded
from finteam_experts.training.trainer import RecipeTrainer

RECIPE = "recipes/sample/train_expert.yaml"


def weights(run_dir, role="macro"):
    return load_file(run_dir / "adapters" / role / "adapter_model.safetensors")


@pytest.mark.parametrize("role", ROLES)
def test_changes_only_the_mlp(done_run, role):
    tensors = weights(done_run, role)
    assert {name.split(".mlp.")[1].split(".")[0] for name in tensors} == set(MLP_MODULES)
    assert all(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    assert read_record(done_run / "adapters" / role)["results"]["steps"] == 4


@pytest.mark.parametrize("role", ROLES)
def test_learns_its_corpus(new_run, role):
    train_expert(new_run, role, "--learn_from", "null")  # of tasks and conversations too, four steps see little of it
    results = read_record(new_run / "adapters" / role)["results"]
    assert results["heldout_perplexity_after"] < results["heldout_perplexity_before"]


def test_nothing_but_the_adapter_is_left(done_run):
    files = {path.name for path in (done_run / "adapters" / "macro").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "finteam.json"}


def test_complete_step_is_skipped_and_another_configuration_refused(copied_run, capsys):
    train_expert(copied_run, "macro")
    assert "macro is complete: skipped" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"settings\.lora_r: recorded 4, now 8"):
        train_expert(copied_run, "macro", "--lora_r", 8)
    with (copied_run / "data/corpora/macro.jsonl").open("a") as file:
        file.write('{"text": "Rates rose."}\n')
    with pytest.raises(InputError, match=r"corpus\.corpus\.macro: recorded"):
        train_expert(copied_run, "macro")


def test_a_stream_is_shuffled_and_shared_by_its_files(new_run, tmp_path):
    for part in range(3):
        texts = [f"Passage {part} {n} of a corpus that is sorted by date." for n in range(40)]
        Dataset.from_dict({"text": texts}).to_parquet(tmp_path / f"part-{part}.parquet")
    held = "Passage 0 5 of a corpus that is sorted by date."
    stream, _ = stream_corpus(f"{tmp_path}/part-*.parquet", "text", 0, lambda text: "a row" if text == held else None)
    texts = [row["text"] for row in stream]
    assert stream.num_shards == 3  # each process can read files of its own
    assert len(texts) == len(set(texts)) == 119  # all but the one that holds a test row
    assert texts != sorted(texts)
    assert texts == [row["text"] for row in stream]
    other, _ = stream_corpus(f"{tmp_path}/part-*.parquet", "text", 1, lambda text: None)
    assert texts != [row["text"] for row in other]


def test_a_corpus_may_be_streamed_from_files_with_another_column(new_run, tmp_path):
    texts = read_corpus(new_run / "data", "macro")
    for part, own in enumerate((texts[:30], texts[30:])):
        Dataset.from_dict({"section_7": ["", *own]}).to_parquet(tmp_path / f"part-{part}.parquet")
    same = ("--packing_strategy", "bfd_split")
    streamed = ("--corpus", tmp_path / "part-*.parquet", "--corpus_column", "section_7")
    train_expert(new_run, "macro", *same, *streamed)
    record = read_record(new_run / "adapters/macro")
    corpus = record["inputs"]["corpus"]
    assert (corpus["files"], corpus["column"]) == ("part-*.parquet", "section_7")  # no folder of this machine
    assert record["results"]["steps"] == 4
    assert record["results"]["heldout_perplexity_after"] < record["results"]["heldout_perplexity_before"]
    with pytest.raises(InputError, match=r"corpus.files: recorded .*part-\*.parquet"):
        train_expert(new_run, "macro", *same, "--corpus", tmp_path / "part-0.parquet", "--corpus_column", "section_7")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--corpus", "{data}/corpora/macro.jsonl", "--max_steps", -1, "--num_train_epochs", 1),
            "its end is not known",
        ),
        (("--corpus", "{data}/corpora/macro.jsonl", "--role", "shared"), "Name a role, and set max_steps"),
        (("--corpus", "{data}/corpora/nothing.jsonl"), "nothing.jsonl can't be read: Unable to find"),
        (("--corpus", "{data}/corpora/macro.jsonl", "--corpus_column", "body"), "no column 'body'; it has "),
    ],
)
def test_a_stream_that_cannot_be_used_is_refused_before_training(new_run, arguments, message):
    with pytest.raises(InputError, match=message):
        train_expert(new_run, "macro", *(str(part).format(data=new_run / "data") for part in arguments))
    assert not (new_run / "adapters").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--role", "makro"), "unknown role 'makro'.*macro, micro, quant.*Did you mean 'macro'"),
        (
            ("--lora_target_modules", "q_proj", "up_proj"),
            "lora_target_modules .* adapts gate_proj, up_proj, down_proj only",
        ),
        (("--learning_rat", "1"), "unknown argument '--learning_rat'.*Did you mean 'learning_rate'"),
        (("--data_dir", "nowhere"), "data_dir nowhere is not a folder"),
        (("--base", "nowhere"), "'nowhere' is neither a model folder .* nor a Hub id"),
        (("--base", "nobody/no-such-model"), "could not be fetched from the Hub"),
    ],
)
def test_bad_arguments(new_run, arguments, message):
    with pytest.raises(InputError, match=message):
        train_expert(new_run, "macro", *arguments)
    assert not (new_run / "adapters").exists()


def test_unknown_yaml_key_ends_the_command_with_a_message(new_run, tmp_path):
    recipe = tmp_path / "typo.yaml"
    recipe.write_text((REPOSITORY / RECIPE).read_text().replace("learning_rate:", "learning_rat:"))
    ended = shell(
        sys.executable, "recipes/train_expert.py", "--config", recipe, "--run_dir", new_run, "--role", "macro"
    )
    assert ended.returncode == 2
    assert "typo.yaml: unknown key 'learning_rat'. Did you mean 'learning_rate'?" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_bases_that_cannot_become_experts(new_run, make_base):
    with pytest.raises(InputError, match="attention_bias is true"):
        train_expert(new_run, "macro", "--base", make_base(attention_bias=True))
    other = make_base()
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(InputError, match="model_type is 'gpt2'.*Choose a Llama, Mistral or Qwen3"):
        train_expert(new_run, "macro", "--base", other)


def test_tokenizer_without_chat_template(new_run):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(new_run / "base")
    tokenizer.chat_template = None
    (new_run / "base/chat_template.jinja").unlink()
    tokenizer.save_pretrained(new_run / "base")
    with pytest.raises(InputError, match="no chat template"):
        train_expert(new_run, "macro")


def test_shared_trunk_is_a_base_for_the_roles(new_run, capsys):
    """It learns from every corpus, attention included, and the experts and the team start from it."""
    all_linear = ("--lora_target_modules", "q_proj", "k_proj", "v_proj", "o_proj", *MLP_MODULES)
    train_expert(new_run, "shared", *all_linear)
    record = read_record(new_run / "trunk")
    assert set(record["inputs"]["corpus"]) == set(ROLES)
    assert record["results"]["heldout_perplexity_after"] < record["results"]["heldout_perplexity_before"]
    assert record["results"]["heldout_passages"] == 3 * 8
    base, trunk = (load_file(new_run / name / "model.safetensors") for name in ("base", "trunk"))
    assert all(torch.equal(base[name], trunk[name]) != ("_proj" in name) for name in base)
    assert not (new_run / "trunk/adapter").exists()
    train_expert(new_run, "shared", *all_linear)
    assert "trunk is complete: skipped" in capsys.readouterr().out

    for role in ROLES:
        train_expert(new_run, role, "--base", new_run / "trunk")
    call("scripts/merge_moe.py", "--run_dir", new_run, "--base", new_run / "trunk")
    moe = load_file(new_run / "moe/model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(moe[name], trunk[name])


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(new_run, tmp_path):
    """SIGKILL right after a checkpoint appears, then the same command: the same weights to the last bit."""
    straight = shutil.copytree(new_run, tmp_path / "straight")
    train_expert(straight, "macro", "--max_steps", 30)

    command = [sys.executable, "recipes/train_expert.py", "--config", RECIPE, "--run_dir", new_run, "--role", "macro",
               "--max_length", "256", *SHORT, "--max_steps", "30"]  # fmt: skip
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = work_folder(new_run / "adapters/macro")
    deadline = time.monotonic() + 120
    while not list(work.glob("checkpoint-*/checkpoint_is_complete")) and time.monotonic() < deadline:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (new_run / "adapters/macro").exists()
    (work / "checkpoint-29").mkdir()  # as if cut off while writing: no complete mark
    (work / "checkpoint-29/adapter_model.safetensors").write_bytes(b"half")

    ended = shell(*command)
    assert ended.returncode == 0, ended.stderr
    assert "Resuming from step" in ended.stdout
    expected, resumed = weights(straight), weights(new_run)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    before, after = (read_record(run / "adapters/macro")["results"] for run in (straight, new_run))
    assert before == after


@pytest.mark.slow
def test_two_processes_under_accelerate(new_run):
    ended = shell(
        "accelerate", "launch", "--cpu", "--num_processes", "2", "recipes/train_expert.py", "--config", RECIPE,
        "--run_dir", new_run, "--role", "macro", "--max_length", "256", "--learn_from", "null", *SHORT,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    results = read_record(new_run / "adapters/macro")["results"]
    assert results["heldout_perplexity_after"] < results["heldout_perplexity_before"]
    assert results["steps"] == 4
    assert not list((new_run / "adapters").glob("*.incomplete"))
    assert "cut off" not in ended.stdout


def test_an_expert_takes_its_steps_for_each_of_its_tasks(new_run):
    own = ("--steps_per_task", 2, "--max_steps", -1)
    for role, tasks in (("macro", 1), ("micro", 2)):
        train_expert(new_run, role, *own)
        assert read_record(new_run / f"adapters/{role}")["results"]["steps"] == 2 * tasks
    with pytest.raises(InputError, match="steps_per_task is 0; it has to be 1 or more"):
        train_expert(new_run, "macro", "--steps_per_task", 0, "--max_steps", -1)


def test_row_limits_hold_for_an_expert_too(new_run, toy_base):
    """A task with many rows doesn't drown the others, and one that is left out takes no steps."""
    script, form = load_script("recipes/train_expert.py"), as_chats(load_tokenizer(toy_base), toy_base)
    limits = {"rows_per_task": 5, "rows_of_task": "{fiqasa: 0, headlines: 3}"}  # headlines are another analyst's
    args = script.ExpertArguments(
        run_dir=str(new_run), role="micro", learn_from="{tasks: 1}", steps_per_task=2, **limits
    )
    config = SFTConfig(output_dir=str(new_run / "work"), use_cpu=True, bf16=False)

    def rows(longest: int = 512) -> tuple[list[list[int]], dict]:
        config.max_length = longest
        dataset, sources = script.rows_to_learn(args, ["micro"], check_data_dir(args.data), config, form, 512)
        return dataset["input_ids"][:], recorded(sources)

    assert len(rows()[0]) == len(rows(16)[0]) == 5  # task rows stay whole
    assert set(rows()[1]["tasks"]) == {"fpb"}
    args.learn_from = {"corpus": 1.0}
    assert max(map(len, rows(16)[0])) == 16
    args.learn_from = {"tasks": 1.0}
    args.set_steps(config, ["micro"])
    assert config.max_steps == 2
    args.rows_of_task = "{fqasa: 0}"
    with pytest.raises(InputError, match="rows_of_task: unknown task 'fqasa'. Did you mean 'fiqasa'"):
        rows()


@pytest.mark.parametrize("steps", [4, 12, 24])
def test_a_short_training_is_not_spent_at_the_end_of_its_decay(steps, tmp_path):
    """transformers counts a decay back from the last step: one of 12 steps had fallen to 0.07 after two of four."""
    trainer = RecipeTrainer.__new__(RecipeTrainer)
    options = {"num_decay_steps": 12}
    trainer.args = SFTConfig(
        tmp_path, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=options, warmup_steps=2, bf16=False
    )
    trainer.lr_scheduler, optimizer = None, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = trainer.create_scheduler(steps, optimizer)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[2] >= 0.5  # the first after the warm-up
    assert rates[-1] < 0.2


def test_validation_rows_are_held_out_of_an_expert(new_run, toy_base):
    """As of a tuning, so that `evaluate.py --split valid` scores rows that no model of the team has seen."""
    script, form = load_script("recipes/train_expert.py"), as_chats(load_tokenizer(toy_base), toy_base)
    scored, found = check_data_dir(new_run / "data"), []
    for hold_out in (False, True):
        config = SFTConfig(output_dir=str(new_run / "work"), use_cpu=True, bf16=False, num_train_epochs=1)
        args = script.ExpertArguments(
            run_dir=str(new_run), role="macro", learn_from="{tasks: 1}", hold_out_validation=hold_out
        )
        rows, _ = script.rows_to_learn(args, ["macro"], scored, config, form, 512)
        found.append(len(rows))
    data, tasks = new_run / "data", {name: task for name, task in default_tasks().items() if task.role == "macro"}
    kept_out = [
        row for name, task in tasks.items() for row in read_task(data, task, "train") if held_out(data, name, row)
    ]
    assert kept_out
    assert found[0] - found[1] == len(kept_out)
