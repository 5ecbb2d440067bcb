# SPDX-License-Identifier: Apache-2.0
"""The loss: TRL's own for each of its settings, on every path, and the same step however its rows are cut into micro-batches."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from conftest import REPOSITORY
from finteam_experts.models import load_model, load_tokenizer
from finteam_experts.training.cpu import ATTENTION
from finteam_experts.training.loss import ScoredLabels, count_rows, rows_of_labels, summed_loss
from finteam_experts.training.trainer import RecipeTrainer

LENGTHS = (1, 2, 3, 5, 8, 13, 4, 6)  # of the answers: no two rows count alike by tokens
ROWS = [
    {
        "input_ids": [5 + n] * (4 + 3 * n % 7) + [30 + n] * length,
        "labels": [-100] * (4 + 3 * n % 7) + [30 + n] * length,
    }
    for n, length in enumerate(LENGTHS)
]
SOME_UNLABELLED = [row | {"labels": [-100] * len(row["labels"])} if n in (1, 2) else row for n, row in enumerate(ROWS)]
LOSSES = [{}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.2}]
FAST, TRLS = {"cpu_speedups": True}, {"cpu_speedups": False}


def trainer_of(base, folder, trainer_class=RecipeTrainer, *, rows=ROWS, moe=None, options=None, **settings):
    torch.manual_seed(0)
    defaults = {
        "padding_free": True, "max_length": None, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
        "per_device_train_batch_size": len(ROWS), "gradient_checkpointing": False, "learning_rate": 1.0, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "logging_steps": 1,
        "max_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    model = load_model(base).train()
    model.set_attn_implementation(ATTENTION)
    trainer = trainer_class(
        model=model, args=SFTConfig(str(folder), **(defaults | settings)), train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(base),
    )  # fmt: skip
    for name, value in (options or {}).items():
        setattr(trainer, name, value)
    return trainer


def gradients_of_step(base, folder, **settings):
    """What an optimiser step of plain SGD takes off the weights, and its line of the log."""
    trainer = trainer_of(base, folder, **settings)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    return {name: before[name] - after[name] for name in before}, trainer.state.log_history[0]


def assert_same(one, other, tolerance=1e-6):
    assert one.keys() == other.keys()
    assert max(tensor.abs().max() for tensor in one.values()) > 1e-3
    for name, tensor in one.items():
        assert (other[name] - tensor).abs().max() <= tolerance * max(1.0, tensor.abs().max().item()), name


def test_each_row_counts_alike_however_long_its_answer():
    torch.manual_seed(0)
    losses = torch.rand(7)
    rows = torch.tensor([0, 0, 0, 0, 0, 3, 3])
    scored = ScoredLabels(-losses, losses > 0)
    assert torch.isclose(summed_loss(scored, rows=rows), losses[:5].mean() + losses[5:].mean())
    assert torch.isclose(summed_loss(scored), losses.sum())


def test_rows_of_padded_and_of_padding_free_batches():
    padded = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "labels": torch.tensor([[1, 1, 1], [-100, -100, 1]])}
    assert rows_of_labels(padded).tolist() == [0, 0, 1]
    assert count_rows(padded) == 2
    flat = {
        "input_ids": torch.zeros(1, 7, dtype=torch.long), "position_ids": torch.tensor([[0, 1, 0, 1, 2, 0, 1]]),
        "labels": torch.tensor([[-100, 1, -100, 1, 1, -100, -100]]),
    }  # fmt: skip
    assert rows_of_labels(flat).tolist() == [1, 2, 2]
    assert count_rows(flat) == 2  # the third has no label


@pytest.mark.parametrize("balanced", [False, True], ids=["by token", "by row"])
@pytest.mark.parametrize("settings", LOSSES, ids=str)
def test_every_loss_is_trls_on_every_path(toy_base, tmp_path, settings, balanced):
    """Without `balance_rows` it is TRL's to the last digits; with it, the mean of what TRL gives for each row alone."""

    def loss(trainer, batch, items):
        return trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)

    theirs = trainer_of(toy_base, tmp_path, SFTTrainer, **settings)
    whole = next(iter(theirs.get_train_dataloader()))
    if balanced:
        batches = [theirs.data_collator([row]) for row in ROWS]
        each = [
            loss(theirs, batch, torch.tensor(length)).item() for batch, length in zip(batches, LENGTHS, strict=True)
        ]
        expected, items = sum(each) / len(ROWS), torch.tensor(len(ROWS))
    else:
        items = torch.tensor(sum(LENGTHS))
        expected = loss(theirs, dict(whole), items).item()
    for path in (FAST, TRLS):
        for padding_free in (True, False):
            ours = trainer_of(
                toy_base, tmp_path, options=path | {"balance_rows": balanced}, padding_free=padding_free, **settings
            )
            batch = next(iter(ours.get_train_dataloader()))
            assert loss(ours, batch, items).item() == pytest.approx(expected, rel=4e-7), (path, padding_free)
            own = ours.compute_loss(ours.model, batch).item()  # without being told how many items the step has
            assert own == pytest.approx(expected, rel=4e-7)


@pytest.mark.parametrize("settings", LOSSES, ids=str)
@pytest.mark.parametrize("path", [FAST, TRLS], ids=["fast", "TRL's head"])
def test_a_step_is_the_same_however_its_rows_are_cut(toy_base, tmp_path, settings, path):
    """Eight rows at once, four and four, three and three and two, one by one: a partial micro-batch counts its rows."""
    options = path | {"balance_rows": True}
    whole, line = gradients_of_step(toy_base, tmp_path, options=options, **settings)
    for rows, times in ((4, 2), (3, 3), (1, 8)) if path == FAST else ((3, 3),):
        cut = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": times}
        other, logged = gradients_of_step(toy_base, tmp_path, options=options, **settings, **cut)
        assert_same(whole, other)
        assert logged["loss"] == pytest.approx(line["loss"], abs=1e-4)
        assert logged["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-5)
    padded, _ = gradients_of_step(toy_base, tmp_path, options=options, **settings, padding_free=False)
    assert_same(whole, padded)
    by_token, _ = gradients_of_step(toy_base, tmp_path, options=path, **settings)
    assert any((by_token[name] - whole[name]).abs().max() > 1e-4 for name in whole)


def test_the_auxiliary_loss_is_the_mean_of_the_micro_batches(done_run, tmp_path):
    settings = {"router_aux_loss_coef": 0.5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    plain, _ = gradients_of_step(done_run / "moe", tmp_path, trainer_class=SFTTrainer, **settings)
    for path in (FAST, TRLS):
        by_token, _ = gradients_of_step(done_run / "moe", tmp_path, options=path, **settings)
        assert_same(plain, by_token, 1e-5)
    balanced = [
        gradients_of_step(done_run / "moe", tmp_path, options=path | {"balance_rows": True}, **settings)[0]
        for path in (FAST, TRLS)
    ]
    assert_same(*balanced, 1e-5)


def test_whole_logits_are_never_built_of_a_balanced_loss(toy_base, tmp_path):
    """TRL's fused head gives the log-probabilities, and the vocabulary head itself is never called."""
    trainer = trainer_of(toy_base, tmp_path, options=TRLS | {"balance_rows": True})

    def refuse(*_):
        raise AssertionError("the vocabulary head was called")

    trainer.model.lm_head.register_forward_hook(refuse)
    trainer.train()


def test_each_passage_of_a_packed_corpus_counts_alike(toy_base, tmp_path):
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in ROWS]
    packing = {"packing": True, "max_length": 40, "packing_strategy": "bfd"}
    balanced, _ = gradients_of_step(toy_base, tmp_path, rows=rows, options=FAST | {"balance_rows": True}, **packing)
    apart, _ = gradients_of_step(toy_base, tmp_path, rows=rows, options=FAST | {"balance_rows": True})
    assert_same(balanced, apart)


TWO_PROCESSES = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]
from pathlib import Path
from safetensors.torch import save_file
from test_loss import SOME_UNLABELLED, gradients_of_step
base, folder = Path({base!r}), Path({folder!r})
from accelerate import PartialState
for balanced in (True, False):
    cut = {{"per_device_train_batch_size": {rows}, "gradient_accumulation_steps": {times}}}
    options = {{"balance_rows": balanced, "cpu_speedups": True}}
    gradients, line = gradients_of_step(base, folder / "work", rows=SOME_UNLABELLED, options=options, **cut)
    if PartialState().is_main_process:
        save_file({{"loss": __import__("torch").tensor(line["loss"])}} | gradients, folder / f"{{balanced}}.safetensors")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "times"), [(4, 1), (2, 2)])
def test_two_processes_take_the_step_of_one(toy_base, tmp_path, rows, times):
    """Also where one of them has fewer rows with labels."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = TWO_PROCESSES.format(tests=str(REPOSITORY / "tests"), here=str(REPOSITORY / "tests/training"), base=str(toy_base),
                                folder=str(tmp_path), rows=rows, times=times)  # fmt: skip
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=os.environ | meeting | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    assert [process.wait(timeout=200) for process in started] == [0, 0]
    for balanced in (True, False):
        two = load_file(tmp_path / f"{balanced}.safetensors")
        one, line = gradients_of_step(
            toy_base, tmp_path, rows=SOME_UNLABELLED, options=FAST | {"balance_rows": balanced}
        )
        assert two.pop("loss").item() == pytest.approx(line["loss"], abs=1e-4)
        assert_same(one, two)
