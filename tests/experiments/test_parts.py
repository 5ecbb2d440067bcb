# SPDX-License-Identifier: Apache-2.0
"""Fields that arrive one after another: which ways there are, what they see again, and the table of their scores."""

import random

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import REPOSITORY, call, load_script
from finteam_experts.data.tasks import default_tasks
from finteam_experts.errors import InputError
from finteam_experts.files import read_yaml, write_json
from finteam_experts.models import load_model

FIELDS = {"macro": ["headlines"], "micro": ["fpb", "fiqasa"], "quant": ["stock_movement"]}
TASKS = default_tasks()


@pytest.fixture
def config(tmp_path):
    """A toy experiment of three fields."""
    known = read_yaml(REPOSITORY / "experiments/parts/parts.yaml")
    known |= {
        "fields": FIELDS,
        "orders": {"o": list(FIELDS)},
        "rows": 16,
        "limit": 8,
        "run_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "parts.yaml"
    path.write_text(yaml.safe_dump(known))
    return path


@pytest.fixture
def order(config, toy_data, toy_base):
    parts = load_script("experiments/parts/parts.py")
    return parts.Order(parts.Parts.model_validate(read_yaml(config)), "o", 0, toy_data, toy_base)


def test_both_settings_differ_in_the_order_of_rows_alone():
    random, stratified = (read_yaml(REPOSITORY / f"experiments/parts/{name}.yaml") for name in ("parts", "stratified"))
    assert random["overrides"].pop("stratify_rows") is False
    assert {key for key in random if random[key] != stratified[key]} == {"run_dir", "results"}


def test_every_way_and_the_rows_it_is_trained_on(order):
    found = {(way.name, way.arrivals): way for way in load_script("experiments/parts/ways.py").ways(order)}
    assert found["joint", 3].rows == 48  # everything again
    assert found["in-turn", 3].rows == found["team", 3].rows == 16
    assert found["replay-0.1", 3].rows == 19  # a tenth of two earlier fields
    assert found["team", 3].trained == "adapters/quant" and found["joint", 3].trained == "joint-3/dense-instruct"
    assert {name for name, _ in found if name.startswith("without")} == {f"without-{field}" for field in FIELDS}


def test_a_way_costs_what_its_last_training_took(order, toy_base, done_run):
    module = load_script("experiments/parts/ways.py")
    way = next(way for way in module.ways(order) if (way.name, way.arrivals) == ("team", 3))
    record = {"step": "train_expert", "inputs": {}, "results": {"train_tokens": 77}}
    write_json(order.folder / "adapters/quant/finteam.json", record)
    found = module.cost(order, way, done_run / "moe", None)
    assert found["tokens"] == 77
    assert found["parameters"]["total"] > found["parameters"]["active"]
    base = next(way for way in module.ways(order) if way.name == "base")
    dense = module.cost(order, base, toy_base, None)
    assert dense["tokens"] == 0 and dense["parameters"]["total"] == dense["parameters"]["active"]


def test_every_task_of_a_field_has_an_equal_part_of_its_rows(order):
    counts = {path.name: len(path.read_text().splitlines()) for path in (order.data / "tasks").glob("*_train.jsonl")}
    assert counts == {f"{task}_train.jsonl": 16 // len(own) for own in FIELDS.values() for task in own}


def test_second_questions_are_answered_by_every_way(order, toy_base, monkeypatch):
    two_fields = load_script("experiments/parts/two_fields.py")
    asked = list(two_fields.conversations(order, 4))
    assert len(asked) == 3 * 2 * 4
    assert {own.fields for own in asked} == {(a, b) for a in FIELDS for b in FIELDS if a != b}
    for own in asked:
        assert own.turns[1]["content"] in own.turns[0]["content"]  # the first answer is one of the labels asked for
        assert own.label in own.labels and own.turns[2]["role"] == "user"
    for make in ("make_joint", "make_in_turn", "make_team", "make_expert"):
        monkeypatch.setattr(order, make, lambda *_: toy_base)
    found = two_fields.measure(order, 4)
    assert {len(right) for right in found.values()} == {24}
    assert len({sum(right) for right in found.values()}) == 1  # every way is the same model here
    joint = {"team": [True] * 24, "joint": [False] * 4 + [True] * 20}  # wrong where micro follows macro
    gaps = two_fields.gaps_by_question(joint, "joint", list(FIELDS))
    assert gaps.tolist() == [0.0] * 4 + [0.5] * 4 + [0.0] * 4


@pytest.mark.slow
def test_its_trainings_run_with_the_recipes_of_today(order):
    first, second = order.make_expert("macro"), order.make_expert("micro")
    assert (second / "router_sums.safetensors").is_file()
    trunk = load_file(order.trunk / "model.safetensors")
    own, other = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(own, trunk)  # the first analyst is the trunk
    assert not torch.allclose(other[name], trunk[name])


@pytest.mark.slow
def test_a_team_whose_router_is_fitted_on_text_differs_in_its_gates_alone(order):
    from_sums = load_model(order.make_team(3)).state_dict()
    from_text = load_model(order.make_team_from_text()).state_dict()
    differ = {name for name in from_sums if not torch.equal(from_sums[name], from_text[name])}
    assert differ == {"model.layers.1.mlp.gate.weight"}  # the first layer reads a token before any expert has
    again = load_model(order.make_team_from_text()).state_dict()  # complete: neither merged nor fitted again
    assert all(torch.equal(again[name], from_text[name]) for name in from_text)


def test_the_table_says_how_far_the_team_is_from_every_way(config, toy_data, tmp_path, capsys):
    """Also from one that was made in one of two runs alone: in that one."""
    rng = random.Random(0)
    scores = {"base": 0.1, "joint": 0.7, "in-turn": 0.3, "team": 0.6, "arrow": 0.4}
    parts = [(way, n) for way in ("joint", "in-turn", "team") for n in (2, 3)]
    parts = [("base", 0), ("arrow", 3), *parts, *((f"expert-{field}", 1) for field in FIELDS)]
    for seed, gain in (("0", 0), ("1-again", 0.2)):
        results = tmp_path / f"results/o-seed{seed}"
        results.mkdir(parents=True)
        for way, n in (part for part in parts if seed == "0" or part[0] != "arrow"):
            digits = {name: "".join(str(rng.randrange(len(TASKS[name].labels))) for _ in range(8)) for name in TASKS}
            about = {"way": way, "arrivals": n, "rows": 16, "tokens": 320, "parameters": {"total": 2e6, "active": 1e6}}
            scored = dict.fromkeys(TASKS, scores.get(way, 0.5) + gain)
            write_json(results / f"{way}-{n}.json", about | {"scores": scored, "predictions": digits})
    call("experiments/parts/report.py", "--config", config, "--data_dir", toy_data)
    table, means = capsys.readouterr().out.split("| all tasks after every arrival")
    lines = {line.split(" | ")[0]: line.split(" | ") for line in table.splitlines()}
    assert "| one model, tuned in turn | 2 | 0.400, 0.300 | 0.400, 0.300 |" in means  # mean and lowest run
    assert lines["| one model, tuned again on everything"][1:4] == ["2", "0.800", "0.700"]
    assert lines["| adapters, Arrow routing"][1:4] == ["1", "0.400", "0.600"]
    assert lines["| **team, one expert per token**"][1:5] == ["2", "0.700", "0.700", "-"]
    assert lines["| **team, one expert per token**"][5] == "+0.100"  # its first field: .5 by its own expert, .6 now
    assert lines["| **team, one expert per token**"][6:] == ["16, 320", "2M, 1M |"]
    assert lines["| one model, tuned in turn"][5] == "-0.200"
    assert lines["| each row to the expert of its field"][2] == "0.600"
    assert (tmp_path / "parts.md").read_text().count("\n") > 8
    assert (tmp_path / "parts.png").stat().st_size > 1000


def test_runs_without_a_team_are_left_out_of_conversations(config, toy_data, toy_base, tmp_path, capsys):
    config.write_text(config.read_text().replace("seeds:\n- 0\n- 1", "seeds:\n- 0"))
    where = ("--config", config, "--data_dir", toy_data, "--base", toy_base)
    with pytest.raises(InputError, match="run has no team"):
        call("experiments/parts/two_fields.py", *where)
    right = {way: [True] * 12 for way in load_script("experiments/parts/two_fields.py").TITLES}
    write_json(tmp_path / "results/two_fields/o-seed0.json", right | {"first expert": [False] * 12})
    call("experiments/parts/two_fields.py", *where)
    assert "| the expert of the first question | 0.000 | +1.000" in capsys.readouterr().out
