# SPDX-License-Identifier: Apache-2.0
"""Experts that are tuned apart and joined: their own MLPs, the mean of all else, the router that the MoE had."""

import json
import shutil

import pytest
import torch

from conftest import ROLES, call, instruct_tune
from finteam_experts.errors import InputError
from finteam_experts.fingerprints import fingerprint
from finteam_experts.merging.gates import get_gates
from finteam_experts.models import load_model
from finteam_experts.runs import RECORD, read_record

TOKENS = torch.arange(5, 45).view(2, 20)


@pytest.fixture(scope="module")
def tuned_apart(tmp_path_factory, done_run):
    """A run whose experts are tuned. Do not write into it: use `run`."""
    folder = shutil.copytree(done_run, tmp_path_factory.mktemp("apart") / "run")
    shutil.rmtree(folder / "moe-instruct")
    for role in ROLES:
        instruct_tune(folder, "dense", "--start_from", "expert", "--role", role)
    return folder


@pytest.fixture
def run(tmp_path, tuned_apart):
    return shutil.copytree(tuned_apart, tmp_path / "run")


def test_each_expert_learns_from_the_same_rows_in_an_order_of_its_own(tuned_apart):
    records = [read_record(tuned_apart / "experts-instruct" / role) for role in ROLES]
    settings = [record["inputs"]["settings"] for record in records]
    assert len({own.pop("data_seed") for own in settings}) == len(ROLES)
    assert settings[0] == settings[1] == settings[2]
    assert records[0]["inputs"]["tasks"] == records[1]["inputs"]["tasks"]
    first = [record["results"]["log"][0]["num_tokens"] for record in records]
    assert len(set(first)) > 1  # other rows come first


def test_joined(run):
    call("scripts/join_experts.py", "--run_dir", run)
    team, moe = load_model(run / "moe-instruct"), load_model(run / "moe")
    assert torch.equal(get_gates(team), get_gates(moe))
    experts = [load_model(run / "experts-instruct" / role).state_dict() for role in ROLES]
    weights = team.state_dict()
    for name in experts[0]:
        own = [expert[name] for expert in experts]
        if ".mlp." not in name:
            torch.testing.assert_close(weights[name], sum(own) / len(own))
            continue
        prefix, _, matrix = name.rpartition("mlp.")
        for place, tensor in enumerate(own):
            if matrix == "down_proj.weight":
                assert torch.equal(weights[f"{prefix}mlp.experts.down_proj"][place], tensor)
            else:
                halves = weights[f"{prefix}mlp.experts.gate_up_proj"][place].chunk(2)
                assert torch.equal(halves[matrix == "up_proj.weight"], tensor)
    assert read_record(run / "moe-instruct")["team"] == read_record(run / "moe")["team"]
    call("scripts/evaluate.py", "--run_dir", run, "--models", "moe-instruct", "--limit", 4, "--name", "joined")


def test_average_is_a_dense_model_with_the_mean_of_all_weights(run):
    call("scripts/join_experts.py", "--run_dir", run, "--average")
    average = load_model(run / "average-instruct").state_dict()
    experts = [load_model(run / "experts-instruct" / role).state_dict() for role in ROLES]
    for name, tensor in average.items():
        torch.testing.assert_close(tensor, sum(expert[name] for expert in experts) / len(experts))
    assert not (run / "moe-instruct").exists()


def test_three_times_the_same_expert_is_that_expert(run):
    """The invariant of every merge; the records say that the copies belong there."""
    first = run / "experts-instruct" / ROLES[0]
    for role in ROLES[1:]:
        shutil.rmtree(run / "experts-instruct" / role)
        shutil.copytree(first, run / "experts-instruct" / role)
        path = run / "experts-instruct" / role / RECORD
        record = json.loads(path.read_text())
        record["inputs"]["model"] = fingerprint(run / "experts" / role)
        path.write_text(json.dumps(record))
    call("scripts/join_experts.py", "--run_dir", run)
    torch.testing.assert_close(
        load_model(run / "moe-instruct")(TOKENS).logits, load_model(first)(TOKENS).logits, rtol=0, atol=1e-4
    )


def test_what_is_missing_or_another_experts_is_refused(run):
    shutil.rmtree(run / "experts-instruct/micro")
    with pytest.raises(
        InputError, match="micro does not exist. Run this step first: .*--start_from expert --role micro"
    ):
        call("scripts/join_experts.py", "--run_dir", run)
    shutil.copytree(run / "experts-instruct/macro", run / "experts-instruct/micro")
    with pytest.raises(InputError, match="was tuned from another expert than .*experts/micro"):
        call("scripts/join_experts.py", "--run_dir", run)
    assert not (run / "moe-instruct").exists()


@pytest.mark.parametrize("arguments", [("--start_from", "expert"), ("--role", "macro")])
def test_a_role_names_an_expert_and_nothing_else(run, arguments):
    with pytest.raises(InputError, match="a role names the expert that is tuned by itself"):
        instruct_tune(run, "dense", *arguments)
