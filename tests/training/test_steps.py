# SPDX-License-Identifier: Apache-2.0
"""The dense baseline takes as many steps as the experts and the team of its run folder, for any number of tasks."""

import json
import shutil

import pytest
from trl import SFTConfig

from conftest import REPOSITORY, SHORT, call, load_script
from finteam_experts.errors import InputError
from finteam_experts.files import read_json
from finteam_experts.runs import RECORD, read_record
from finteam_experts.training.lora import match_steps

DENSE = ("recipes/instruct_tune.py", "--config", REPOSITORY / "recipes/sample/instruct_tune_dense.yaml", "--run_dir")
SHORT_BUT_STEPS = SHORT[2:]


def set_results(folder, **results):
    record = read_record(folder)
    (folder / RECORD).write_text(json.dumps(record | {"results": record["results"] | results}))


def test_the_baseline_takes_the_steps_of_experts_and_team(copied_run, capsys):
    shutil.rmtree(copied_run / "dense-instruct")
    call(*DENSE, copied_run, *SHORT_BUT_STEPS)
    record = read_record(copied_run / "dense-instruct")
    assert record["results"]["steps"] == 16
    assert record["results"]["matched_steps"] == {"experts": {"macro": 4, "micro": 4, "quant": 4}, "team": 4}
    rates = [entry["learning_rate"] for entry in record["results"]["log"]]
    assert 16 - 4 - 6 <= rates.count(max(rates)) <= 16 - 4 - 6 + 1  # four of warm-up, and a decay of two fifths

    shutil.rmtree(copied_run / "dense-instruct")
    call(*DENSE, copied_run, *SHORT)
    assert "--max_steps replaces the recipe's match_steps" in capsys.readouterr().out
    results = read_record(copied_run / "dense-instruct")["results"]
    assert results["steps"] == 4
    assert "matched_steps" not in results


@pytest.mark.parametrize(
    ("experts", "team", "rows", "steps"),
    [
        ((12, 24, 12), 12, (8, 8), 60),  # the sample's four tasks
        ((36, 36, 36), 12, (8, 8), 120),  # nine
        ((400, 400, 400), 400, (8, 8), 1600),
        ((12, 24, 12), 12, (16, 8), 108),  # experts of sixteen rows a step
    ],
)
def test_they_follow_from_the_records(copied_run, tmp_path, experts, team, rows, steps):
    for role, each in zip(("macro", "micro", "quant"), experts, strict=True):
        set_results(copied_run / "adapters" / role, steps=each, rows_per_step=rows[0])
    set_results(copied_run / "moe-instruct", steps=team, rows_per_step=rows[1])
    config = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=8)
    assert match_steps(copied_run, config)["team"] == team
    assert config.max_steps == steps


@pytest.mark.parametrize("missing", ["moe-instruct", "adapters/micro"])
def test_what_is_not_there_yet_is_named(copied_run, missing):
    shutil.rmtree(copied_run / "dense-instruct")
    shutil.rmtree(copied_run / missing)
    with pytest.raises(InputError, match=rf"{missing} does not exist. Run this step first: .*or set --max_steps"):
        call(*DENSE, copied_run, *SHORT_BUT_STEPS)


def test_match_steps_is_for_the_dense_baseline(copied_run):
    with pytest.raises(InputError, match="match_steps is for the dense baseline"):
        call(*DENSE, copied_run, *SHORT_BUT_STEPS, "--as_trunk", "true")


def test_the_quickstart_leaves_the_baselines_steps_to_the_records():
    script = (REPOSITORY / "scripts/quickstart.sh").read_text()
    (dense,) = [line for line in script.splitlines() if "instruct_tune_dense" in line]
    assert '"${matched[@]}"' in dense
    assert script.index('launch "tune: team"') < script.index('launch "tune: dense baseline"')


def test_a_baseline_with_other_steps_is_said_beside_the_difference(done_run, capsys):
    report = read_json(done_run / "reports/evaluation.json")
    load_script("scripts/evaluate.py").print_report(report)
    assert "dense-instruct was not tuned for as many steps" in capsys.readouterr().out
    load_script("scripts/evaluate.py").print_report(report | {"matched_steps": True})
    assert "as many steps" not in capsys.readouterr().out
