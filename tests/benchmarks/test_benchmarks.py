# SPDX-License-Identifier: Apache-2.0
"""Every benchmark runs to its end on the toy run and prints its figures; what they are is not a test's business."""

import re

import pytest

from conftest import call

pytestmark = pytest.mark.slow


def test_training(done_run, capsys):
    call("benchmarks/training.py", "--run_dir", done_run, "--steps", 10, "--rounds", 1)
    printed = capsys.readouterr().out
    assert printed.count("tokens/s") >= 6
    assert re.search(r"The team costs [\d.]+ times as much per token as the dense model", printed)


def test_merge(done_run, tmp_path, capsys):
    call("benchmarks/merge.py", "--run_dir", tmp_path / "merge", "--tokenizer", done_run / "base", "--shape", "135m")
    assert re.search(r"135m: wrote [\d.]+ GB in .*\npeak of its own memory \d+ MiB", capsys.readouterr().out)
    assert not (tmp_path / "merge").exists()


def test_gpu(capsys):
    small = ("--sequences", 2, "--tokens", 32, "--labelled", 4, "--new_tokens", 3, "--steps", 1)
    call("benchmarks/gpu.py", "--shapes", "toy", *small)
    printed = capsys.readouterr().out
    assert printed.count("│ toy ") == 5
    assert "GiB planned" in printed
