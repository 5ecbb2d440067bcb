# SPDX-License-Identifier: Apache-2.0
"""The loss in which every row counts alike: on a CPU's compact path, on TRL's, and over accumulated gradients."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from conftest import instruct_tune
from finteam_experts.training.loss import mean_over_rows, row_numbers


def test_each_row_counts_alike_however_long_its_answer():
    torch.manual_seed(0)
    logits, targets = torch.randn(7, 11), torch.randint(11, (7,))
    rows = torch.tensor([0, 0, 0, 0, 0, 3, 3])
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.isclose(mean_over_rows(logits, targets, rows), (losses[:5].mean() + losses[5:].mean()) / 2)


def test_rows_of_padded_and_of_padding_free_batches():
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert row_numbers({"input_ids": ids}).tolist() == [[0, 0, 0], [1, 1, 1]]
    flat = {"input_ids": torch.zeros(1, 5, dtype=torch.long), "position_ids": torch.tensor([[0, 1, 0, 1, 2]])}
    assert row_numbers(flat).tolist() == [[0, 0, 1, 1, 1]]


@pytest.fixture
def trained(new_run):
    """Tunes a copy of the run with other settings, and returns the weights."""

    def train(name, *arguments):
        run_dir = shutil.copytree(new_run, new_run.with_name(name))
        instruct_tune(run_dir, "dense", "--learning_rate", "0.01", *arguments)
        return load_file(run_dir / "dense-instruct" / "model.safetensors")

    return train


def assert_close(one, other):
    assert all(torch.allclose(one[name], other[name], atol=2e-4) for name in one)


def test_the_compact_loss_the_plain_one_padding_and_accumulation_train_the_same(trained):
    compact = trained("compact")
    assert_close(compact, trained("plain", "--cpu_speedups", "false"))
    assert_close(compact, trained("padded", "--padding_free", "false"))
    assert_close(
        compact, trained("accumulated", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2")
    )
    by_token = trained("tokens", "--balance_rows", "false")
    assert not all(torch.allclose(compact[name], by_token[name], atol=2e-4) for name in compact)
