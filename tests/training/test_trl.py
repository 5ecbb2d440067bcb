# SPDX-License-Identifier: Apache-2.0
"""What the trainer reads of TRL that is no public interface: there in the tested version, and asked of the newest one."""

import subprocess
import sys

import pytest

CONTRACT = """
import inspect, sys
import trl
from trl import SFTTrainer
trainer = inspect.getsource(sys.modules[SFTTrainer.__module__])
for name in ("padding_free", "aux_loss_enabled", "router_aux_loss_coef", '_metrics = ', "_total_train_tokens",
             'self.args.loss_type == "dft"', "_signature_columns", 'self._metrics[mode]["aux_loss"]', "fused_lm_head=True",
             'outputs=("log_probs", "entropy", "is_top1")', "outputs.label_mask", 'not in ("nll", "dft")',
             'metrics[mode]["num_tokens"]', 'metrics[mode]["mean_token_accuracy"]', 'metrics[mode]["entropy"]'):
    assert name in trainer, name
for name in ("_set_signature_columns_if_needed", "_load_from_checkpoint", "training_step", "compute_loss", "log", "_get_train_sampler", "get_batch_samples"):
    assert hasattr(SFTTrainer, name), name
wanted = ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
assert list(inspect.signature(SFTTrainer.compute_loss).parameters) == wanted
print(trl.__version__)
"""


def test_the_tested_version_has_what_the_trainer_reads():
    exec(CONTRACT, {})


@pytest.mark.slow
def test_the_newest_version_has_what_the_trainer_reads(tmp_path):
    """A warning for who raises the pin in pyproject.toml; where it fails, that is the list of what to look at."""
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path),
        "--upgrade",
        "trl",
    ]
    subprocess.run(install, check=True)
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    ended = subprocess.run([sys.executable, "-c", CONTRACT], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
