# SPDX-License-Identifier: Apache-2.0
"""Step 2c: the report compares the routers, the ladder compares the models, and a team can be of any size."""

import json
import math
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import REPOSITORY, ROLES, call, fit_router, train_expert
from finteam_experts import runs
from finteam_experts.data.files import read_corpus
from finteam_experts.errors import InputError
from finteam_experts.evaluation.heldout import heldout_loss
from finteam_experts.evaluation.routing import Routing
from finteam_experts.merging.gates import forced_expert
from finteam_experts.models import load_model, load_tokenizer


def report_routing(run_dir, *arguments):
    call("scripts/report_routing.py", "--run_dir", run_dir, *arguments)


def test_report(done_run):
    report = json.loads((done_run / "reports/routing.json").read_text())
    assert report["roles"] == list(ROLES)
    assert [name for name in report["gates"] if ", " not in name] == ["hidden", "random", "fitted"]
    for part in report["gates"].values():
        assert torch.tensor(part["own_role_tokens"]).shape == (2, 3)
        assert torch.tensor(part["mean_weights"]).shape == (2, 3, 3)
        for rows in (part["load"], part["confusion"]):
            assert torch.tensor(rows).sum(-1).tolist() == pytest.approx([1] * len(rows), abs=1e-3)
        diagonal = torch.tensor(part["confusion"]).diagonal().mean().item()
        assert part["summary"]["own_role_tokens"] == pytest.approx(diagonal, abs=1e-3)
    shares = {name: part["summary"]["own_role_tokens"] for name, part in report["gates"].items()}
    assert shares["fitted"] > max(shares["hidden"], shares["random"])
    assert (done_run / "reports/routing.png").stat().st_size > 30_000
    assert not list((done_run / "reports").glob("*.incomplete"))


def test_ladder(done_run):
    ladder = json.loads((done_run / "reports/routing.json").read_text())["ladder"]
    assert set(ladder) == {
        "base", "expert: macro", "expert: micro", "expert: quant", "weight average", "moe, hidden router",
        "moe, random router", "moe, fitted router", "oracle: own expert",
    }  # fmt: skip
    assert all(math.isfinite(loss) for losses in ladder.values() for loss in losses.values())
    texts = read_corpus(done_run / "data", "quant", heldout=True)
    tokenizer, model = load_tokenizer(done_run / "moe"), load_model(done_run / "moe")
    for name, folder in (("base", "base"), ("expert: quant", "experts/quant")):
        own = heldout_loss(load_model(done_run / folder), tokenizer, texts, max_tokens=160)
        assert ladder[name]["quant"] == pytest.approx(own, abs=1e-6)
    losses = []
    for text in texts:  # the oracle in the MoE itself, passage by passage
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=160)["input_ids"]])
        with torch.no_grad(), forced_expert(model, 2):
            logits = model(ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    assert ladder["oracle: own expert"]["quant"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)


def test_the_weight_average_is_the_mean_of_the_experts(done_run):
    experts = [load_model(done_run / "experts" / role) for role in ROLES]
    average, texts = experts[0], read_corpus(done_run / "data", "micro", heldout=True)
    with torch.no_grad():
        for name, tensor in average.state_dict().items():
            tensor.copy_(sum(expert.state_dict()[name] for expert in experts) / 3)
    found = heldout_loss(average, load_tokenizer(done_run / "moe"), texts, max_tokens=160)
    ladder = json.loads((done_run / "reports/routing.json").read_text())["ladder"]
    assert ladder["weight average"]["micro"] == pytest.approx(found, abs=1e-5)


def test_summary_of_a_known_routing():
    """One layer, two roles: the first role's tokens all go to its expert, the second's half and half."""
    counts = torch.tensor([[[8.0, 0.0], [2.0, 2.0]]])
    routing = Routing(
        counts,
        counts,
        torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]),
        torch.tensor([8.0, 4.0]),
        torch.zeros(2),
        torch.tensor([[0.0, 6.0, 0.0], [0.0, 1.0, 1.0]]),
        torch.tensor([[0.0, 8.0, 0.0], [0.0, 2.0, 2.0]]),
    )
    summary = routing.summary()
    assert summary["own_role_tokens"] == pytest.approx(0.75)
    assert routing.spans() == {"own_role_question": pytest.approx(0.7), "own_role_answer": pytest.approx(0.5)}
    assert summary["own_role_passages"] == pytest.approx(0.5)
    assert summary["load_entropy"] == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))
    assert summary["dead_experts"] == 0
    dead = Routing(counts * torch.tensor([1.0, 0.0]), counts, counts, torch.tensor([8.0, 2.0]), torch.zeros(2),
                   torch.zeros(2, 3), torch.zeros(2, 3))  # fmt: skip
    assert dead.summary()["dead_experts"] == 1


def test_a_role_without_text_is_in_no_mean():
    """Two roles have text and split it as their own; a third has none, and its expert is neither dead nor in the load."""
    counts = torch.tensor([[[8.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.0]]])
    passages = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])
    routing = Routing(counts, counts, passages, torch.tensor([8.0, 4.0, 0.0]), torch.zeros(3), *torch.zeros(2, 3, 3))
    summary = routing.summary()
    assert summary["own_role_tokens"] == summary["own_role_passages"] == summary["own_role_weight"] == 1
    assert summary["load_entropy"] == pytest.approx(1)
    assert summary["dead_experts"] == 0
    assert routing.details()["confusion"][2] == [0, 0, 0]


def test_report_is_skipped_refused_or_named(copied_run, capsys):
    report_routing(copied_run)
    assert "routing.json is complete: skipped" in capsys.readouterr().out
    with pytest.raises(InputError, match="settings.passages: recorded 16, now 4"):
        report_routing(copied_run, "--passages", 4)
    report_routing(copied_run, "--passages", 4, "--name", "routing_tuned", "--tuned")
    report = json.loads((copied_run / "reports/routing_tuned.json").read_text())
    assert "tuned" in report["gates"]
    assert "moe-instruct, tuned router" in report["ladder"]


def test_an_analyst_more_and_a_generalist_by_data_alone(copied_run, tmp_path, capsys):
    """A run of three becomes one of five: only the new expert is trained, the MoE merged and the router fitted anew."""
    team = yaml.safe_load((REPOSITORY / "moe_merge.yaml").read_text())
    team["experts"] += [
        {"source_model": "experts/credit", "positive_prompts": ["The covenant is breached."]},
        {"source_model": "base", "positive_prompts": ["How long does soup take?"]},
    ]
    path = tmp_path / "five.yaml"
    path.write_text(yaml.safe_dump(team))
    with pytest.raises(InputError, match="unknown role 'base': .* lists macro, micro, quant, credit"):
        train_expert(copied_run, "base", "--merge_config", path)
    train_expert(copied_run, "credit", "--merge_config", path)
    with pytest.raises(InputError, match="moe was made with other inputs"):
        call("scripts/merge_moe.py", "--run_dir", copied_run, "--merge_config", path)
    capsys.readouterr()
    call("scripts/merge_moe.py", "--run_dir", copied_run, "--merge_config", path, "--overwrite")
    printed = capsys.readouterr().out
    assert printed.count("is complete: skipped") == 4  # the experts: that of credit was merged by the refused call
    fit_router(copied_run)
    shutil.rmtree(copied_run / "reports")
    capsys.readouterr()
    report_routing(copied_run)
    assert "no held-out task prompts of credit, base: measured on those of the others" in capsys.readouterr().out

    model = load_model(copied_run / "moe")
    assert model.config.num_local_experts == 5
    base = load_file(copied_run / "base/model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj[4], base)
    assert [member["name"] for member in runs.read_record(copied_run / "moe")["team"]] == [*ROLES, "credit", "base"]
    report = json.loads((copied_run / "reports/routing.json").read_text())
    assert report["roles"] == [*ROLES, "credit", "base"]
    assert "expert: base" not in report["ladder"]
    oracle, base = (report["ladder"][name]["base"] for name in ("oracle: own expert", "base"))
    assert oracle == pytest.approx(base, abs=1e-5)
    shares = {name: part["summary"]["own_role_tokens"] for name, part in report["gates"].items()}
    assert shares["fitted"] > shares["hidden"] + 0.1
    prompts = report["gates"]["fitted, task prompts"]["summary"]
    assert 0 < prompts["own_role_tokens"] <= 1
