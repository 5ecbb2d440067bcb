# SPDX-License-Identifier: Apache-2.0
"""A team that changes: who stays keeps every bit, the router is that of the sums, and what does not fit is refused."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROLES, call, train_expert
from finteam_experts import runs
from finteam_experts.data.files import corpus_file
from finteam_experts.errors import InputError
from finteam_experts.families import family_of
from finteam_experts.files import read_json
from finteam_experts.merging.gates import read_gates
from finteam_experts.merging.sums import load_sums, save_sums, solve_gates
from finteam_experts.models import MLP_MODULES, load_model
from finteam_experts.publishing.cards import Cards
from finteam_experts.publishing.repositories import PublishedRun

MIXTRAL = family_of("mixtral")


def change(run, kind, role, *arguments):
    call("scripts/change_team.py", kind, role, "--run_dir", run, "--base", run / "base", *arguments)


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def four(done_run, tmp_path_factory):
    """A copy of the toy run, in which a credit analyst was trained by itself and has joined."""
    run = tmp_path_factory.mktemp("four") / "run"
    shutil.copytree(done_run, run, symlinks=True)
    train_expert(run, "credit")  # moe_merge.yaml does not list it
    call(
        "scripts/router_sums.py",
        "--run_dir",
        run,
        "--base",
        run / "base",
        "--role",
        "credit",
        "--tokens_per_role",
        "1500",
    )
    change(run, "add", "credit", "--limit", "4")
    return run


@pytest.fixture
def changing(four, tmp_path):
    """A copy of it to change."""
    shutil.copytree(four, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def test_who_was_there_stays_bit_for_bit(four):
    before, after, joined = weights(four / "moe"), weights(four / "moe-add-credit"), weights(four / "experts/credit")
    added = {MIXTRAL.expert_tensor(layer, 3, matrix) for layer in range(2) for matrix in MLP_MODULES}
    assert after.keys() - before.keys() == added
    for name in before.keys() - {MIXTRAL.gate_tensor(layer) for layer in range(2)}:
        assert torch.equal(before[name], after[name])
    for layer in range(2):
        for matrix in MLP_MODULES:
            assert torch.equal(
                after[MIXTRAL.expert_tensor(layer, 3, matrix)], joined[f"model.layers.{layer}.mlp.{matrix}.weight"]
            )
    assert load_model(four / "moe-add-credit").config.num_local_experts == 4
    record = runs.read_record(four / "moe-add-credit")
    assert [member["name"] for member in record["team"]] == [*ROLES, "credit"]
    assert set(record["results"]["scores"]["after"]) == {"fiqasa", "fpb", "headlines", "stock_movement"}


def test_the_router_is_that_of_everyones_sums(four):
    team = [load_sums(four / f"moe-add-credit/router_sums/{name}.safetensors") for name in (*ROLES, "credit")]
    assert torch.allclose(read_gates(four / "moe-add-credit"), 8 * solve_gates(team, 0.01), rtol=1e-5)


def test_who_leaves_leaves_nothing(changing):
    change(changing, "remove", "credit", "--model", "moe-add-credit", "--output", "again", "--limit", "0")
    before, after = weights(changing / "moe"), weights(changing / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.allclose(tensor, after[name], rtol=1e-5)
        assert torch.equal(tensor, after[name]) or name.endswith("gate.weight")
    change(changing, "remove", "micro", "--limit", "0")
    assert [member["name"] for member in runs.read_record(changing / "moe-remove-micro")["team"]] == ["macro", "quant"]
    quant = weights(changing / "moe-remove-micro")[MIXTRAL.expert_tensor(0, 1, "up_proj")]
    assert torch.equal(quant, before[MIXTRAL.expert_tensor(0, 2, "up_proj")])
    with pytest.raises(InputError, match="without quant it would be one dense model"):
        change(changing, "remove", "quant", "--model", "moe-remove-micro")


def test_a_replaced_analyst_keeps_its_place(changing):
    change(changing, "replace", "macro", "--expert", changing / "experts/credit", "--output", "moe", "--limit", "0")
    assert [member["name"] for member in runs.read_record(changing / "moe")["team"]] == list(ROLES)
    own = weights(changing / "moe")[MIXTRAL.expert_tensor(1, 0, "down_proj")]
    assert torch.equal(own, weights(changing / "experts/credit")["model.layers.1.mlp.down_proj.weight"])


def test_an_adapter_takes_a_place_too(changing):
    adapter = changing / "adapters/credit"
    shutil.copyfile(changing / "experts/credit/router_sums.safetensors", adapter / "router_sums.safetensors")
    change(changing, "replace", "quant", "--expert", adapter, "--limit", "0")
    own = weights(changing / "moe-replace-quant")[MIXTRAL.expert_tensor(1, 2, "down_proj")]
    assert torch.equal(own, weights(changing / "experts/credit")["model.layers.1.mlp.down_proj.weight"])
    assert (changing / "experts/quant").is_dir()  # who was replaced is still there


def test_an_adapter_that_peft_saved_takes_a_place(changing, tmp_path, capsys):
    adapter = tmp_path / "peft"
    shutil.copytree(changing / "adapters/credit", adapter)
    shutil.copyfile(changing / "experts/credit/router_sums.safetensors", adapter / "router_sums.safetensors")
    (adapter / runs.RECORD).unlink()
    change(changing, "replace", "quant", "--expert", adapter, "--limit", "0")
    assert "peft has no finteam.json: it says that its base is" in capsys.readouterr().out
    own = weights(changing / "moe-replace-quant")[MIXTRAL.expert_tensor(1, 2, "down_proj")]
    assert torch.equal(own, weights(changing / "experts/credit")["model.layers.1.mlp.down_proj.weight"])
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor.repeat(1, 2) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(InputError, match="It was trained on a model of another size, or with other ranks"):
        change(changing, "replace", "macro", "--expert", adapter, "--limit", "0")


def test_a_tuned_team_changes_too_and_its_card_says_what_it_is(changing, capsys):
    change(changing, "remove", "micro", "--model", "moe-instruct", "--output", "moe-instruct", "--limit", "4")
    assert "was tuned as a whole after its router was fitted" in capsys.readouterr().out
    record = runs.read_record(changing / "moe-instruct")
    assert [task["name"] for task in record["tasks"]] == ["headlines", "stock_movement"]  # not those of micro
    shutil.rmtree(changing / "reports")  # of the team before
    published = PublishedRun(changing, "me", "Team", "me/base")
    tried = {"output": "", "seconds": 1.0, "peak_gib": 1.0, "cores": 2}
    card = Cards(published, "apache-2.0", "v1", {}).render(published.repos(["moe-instruct"])[0], tried).decode()
    assert "Its analysts came one by one" in card
    assert "Stock movement" in card
    assert "FiQA" not in card


def test_what_does_not_fit_is_refused(changing, tmp_path):
    expert, sums = changing / "experts/credit", changing / "experts/credit/router_sums.safetensors"
    with pytest.raises(InputError, match="has an analyst 'macro'. Replace that one"):
        change(changing, "add", "macro", "--expert", expert)
    for name in ("../credit", "general", "credit_heldout", ""):
        with pytest.raises(InputError, match=f"no analyst can be called '{name}'"):
            change(changing, "add", name, "--expert", expert)
    for limit in ("1", "-1"):
        with pytest.raises(InputError, match=f"--limit is {limit}; it has to be 2 or more"):
            change(changing, "remove", "macro", "--limit", limit)
    with pytest.raises(InputError, match=r"no analyst 'marco', only macro, micro, quant. Did you mean 'macro'"):
        change(changing, "remove", "marco")
    with pytest.raises(InputError, match="--expert is for an analyst that joins"):
        change(changing, "remove", "macro", "--expert", expert)
    with pytest.raises(InputError, match="could not be fetched from the Hub. If it is private"):
        change(changing, "add", "other", "--expert", "nobody/private-expert")
    other, loaded = tmp_path / "other.safetensors", load_sums(sums)
    save_sums(replace(loaded, trunk="0" * 16), other)
    with pytest.raises(InputError, match="was computed with a model of another trunk"):
        change(changing, "add", "other", "--expert", expert, "--sums", other)
    save_sums(replace(loaded, inputs=loaded.inputs[:1], targets=loaded.targets[:1]), other)
    with pytest.raises(InputError, match="has sums of 1 layers of 32, and the team has 2 layers of 32"):
        change(changing, "add", "other", "--expert", expert, "--sums", other)
    with pytest.raises(InputError, match="a router needs the sums of who joins"):
        change(changing, "add", "other", "--expert", expert, "--sums", tmp_path / "none")
    tensors = weights(expert)
    tensors["model.layers.0.self_attn.q_proj.weight"] += 1
    save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="has other attention, norms or embeddings than"):
        change(changing, "add", "other", "--expert", expert)
    assert not (changing / "moe-add-other").exists()


def test_a_team_that_has_changed_has_its_routing_reported(changing):
    change(changing, "add", "credit", "--limit", "4", "--output", "moe", "--expert", changing / "experts/credit")
    shutil.rmtree(changing / "experts")  # all of them are in the team
    for heldout in (False, True):
        shutil.copyfile(
            corpus_file(changing / "data", "macro", heldout=heldout),
            corpus_file(changing / "data", "credit", heldout=heldout),
        )
    call("scripts/report_routing.py", "--run_dir", changing, "--name", "changed")
    report = read_json(changing / "reports/changed.json")
    assert report["roles"] == [*ROLES, "credit"]
    assert [name for name in report["gates"] if "," not in name] == ["random", "fitted"]
