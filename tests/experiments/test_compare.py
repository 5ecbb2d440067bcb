# SPDX-License-Identifier: Apache-2.0
"""The comparison: read strictly, made and resumed run by run, reported with reference scores and intervals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from comparison import read_comparison
from conftest import REPOSITORY, SHORT, call, load_script
from finteam_experts.data.tasks import default_tasks
from finteam_experts.errors import InputError
from finteam_experts.evaluation.metrics import majority_vote, paired_difference
from finteam_experts.models import empty_model, parameter_counts, read_config
from report import bag_of_words, digest

TASKS = default_tasks()

PUBLISHED = sorted((REPOSITORY / "experiments").rglob("comparison.yaml"))
DENSE, MOE = (str(REPOSITORY / f"recipes/sample/instruct_tune_{kind}.yaml") for kind in ("dense", "moe"))


def comparison_file(folder: Path, **changes) -> Path:
    """A comparison of toy models, with every kind of initial model."""
    short = dict(
        zip((option.removeprefix("--") for option in SHORT[::2]), map(yaml.safe_load, SHORT[1::2]), strict=True)
    )
    content = {
        "run_dir": str(folder / "run"),
        "results": str(folder / "results"),
        "accelerate_config": str(REPOSITORY / "recipes/accelerate/cpu.yaml"),
        "expert_recipe": str(REPOSITORY / "recipes/sample/train_expert.yaml"),
        "overrides": {"use_cpu": True},
        "limit": 10,
        "validation_limit": 6,
        "heldout_passages": 4,
        "heldout_tokens": 48,
        "team": "team",
        "baselines": ["dense"],
        "teams": {"half": {"trunk_steps": 2, "expert_steps": 2}, "union": {"trunk_steps": 4, "expert_steps": 0}},
        "models": [
            {"name": "base", "title": "base", "initial_model": "base"},
            {
                "name": "dense",
                "title": "dense",
                "initial_model": "base",
                "recipe": DENSE,
                "overrides": short,
                "seeds": [0, 1],
            },
            {"name": "union", "title": "union", "initial_model": "union/trunk"},
            {"name": "average", "title": "average", "initial_model": "half/average"},
            {"name": "hidden", "title": "hidden", "initial_model": "half/moe-hidden"},
            {
                "name": "team",
                "title": "team",
                "initial_model": "half/moe",
                "recipe": MOE,
                "overrides": short,
                "keep": True,
            },
            {
                "name": "apart",
                "title": "apart",
                "initial_model": "half/moe",
                "recipe": DENSE,
                "overrides": short,
                "experts": "joined",
                "router": {"scale": 8, "chat_share": 0.5},
            },
            {
                "name": "soup",
                "title": "soup",
                "initial_model": "half/moe",
                "recipe": DENSE,
                "overrides": short,
                "experts": "averaged",
            },
        ],
        "ablations": [{"name": "all-three", "title": "all three", "initial_model": "half/moe-top3"}],
    }
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


@pytest.fixture(scope="module")
def compared(tmp_path_factory, toy_base, toy_data) -> Path:
    """The folder of a finished toy comparison, made with steps in this process."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        compare(folder, toy_base, toy_data, patch)
        compare(folder, toy_base, toy_data, patch, "--only", "all-three")
    return folder


def compare(folder: Path, base: Path, data: Path, patch: pytest.MonkeyPatch, *arguments) -> None:
    """Run compare.py; the steps it launches run in this process, which saves their imports."""
    config = comparison_file(folder) if not (folder / "comparison.yaml").exists() else folder / "comparison.yaml"
    script = load_script("experiments/compare.py")

    def in_process(command):
        command = list(map(str, command))
        start = next(place for place, part in enumerate(command) if part.endswith(".py"))
        extra = ["--max_length", "256"] if command[start].endswith("train_expert.py") else []
        extra += ["--tokens_per_role", "1500"] if command[start].endswith("fit_router.py") else []
        call(command[start], *command[start + 1 :], *extra)

    patch.setattr("steps.call", in_process)
    argv = ["compare.py", "--config", str(config), "--data_dir", str(data), "--base", str(base), *map(str, arguments)]
    patch.setattr("sys.argv", argv)
    script.main()


def report(folder: Path, *arguments) -> None:
    call("experiments/report.py", "--config", folder / "comparison.yaml", *arguments)


@pytest.mark.slow
def test_every_model_leaves_its_figures(compared, toy_data):
    comparison = read_comparison(compared / "comparison.yaml")
    for model in comparison.models:
        for seed in model.seeds:
            result = json.loads((compared / f"results/{model.name}-seed{seed}.json").read_text())
            assert set(result["test"]["tasks"]) == set(TASKS)
            assert all(len(part["predictions"]) == part["n"] == 10 for part in result["test"]["tasks"].values())
            assert ("valid" in result) == (seed == 0 and model.name in ("team", "dense"))
            assert (result["tuning"] is None) == (model.recipe is None)
            assert ("routing" not in result["test"]) == (model.name not in ("hidden", "team", "apart"))
    team = json.loads((compared / "results/team-seed0.json").read_text())
    assert team["tuning"]["steps"] == 4
    assert team["tuning"]["train_tokens"] > 0
    assert team["parameters"]["active"] < team["parameters"]["total"]
    apart, soup, dense = (
        json.loads((compared / f"results/{name}-seed0.json").read_text()) for name in ("apart", "soup", "dense")
    )
    assert apart["tuning"] == soup["tuning"] | {"seconds": apart["tuning"]["seconds"]}  # the experts were tuned once
    assert apart["tuning"]["steps"] == dense["tuning"]["steps"]
    assert apart["tuning"]["trainable_parameters"] == 3 * dense["tuning"]["trainable_parameters"]
    assert apart["router"] == {"scale": 8, "chat_share": 0.5}
    assert apart["tuning"]["train_tokens"] > 2 * dense["tuning"]["train_tokens"]
    assert (apart["parameters"], soup["parameters"]) == (team["parameters"], dense["parameters"])
    assert (compared / "run/runs/team-seed0/moe-instruct").is_dir()
    assert not (compared / "run/runs/dense-seed0/dense-instruct").exists()  # scored, and not to be kept
    matrix = json.loads((compared / "results/perplexity.json").read_text())
    assert set(matrix) == {"base", "union/trunk", "half/average", "half/moe-hidden", "half/moe", "half/moe-top3"}
    assert matrix["base"]["tokens"] == 0
    assert matrix["half/moe"]["tokens"] > matrix["union/trunk"]["tokens"] > 0  # 2 + 3 x 2 steps, and 4
    assert team["tokens_before_tuning"] == matrix["half/moe"]["tokens"]


@pytest.mark.slow
def test_an_ablation_is_scored_on_validation_rows(compared):
    ablation = json.loads((compared / "results/ablations/all-three-seed0.json").read_text())
    assert "test" not in ablation
    assert all(part["n"] <= 6 for part in ablation["valid"]["tasks"].values())
    assert (
        parameter_counts(empty_model(read_config(compared / "run/half/moe-top3")))["active"]
        == ablation["parameters"]["total"]
    )


@pytest.mark.slow
def test_what_has_a_result_is_not_made_again(compared, toy_base, toy_data, tmp_path, capsys, monkeypatch):
    copy = shutil.copytree(compared, tmp_path / "copy")
    content = yaml.safe_load((copy / "comparison.yaml").read_text())
    content |= {"run_dir": str(copy / "nothing-here"), "results": str(copy / "results")}
    (copy / "comparison.yaml").write_text(yaml.safe_dump(content))
    compare(copy, toy_base, toy_data, monkeypatch)
    assert capsys.readouterr().out.count("exists: skipped") == 9
    assert not (copy / "nothing-here").exists()

    content["models"][1]["overrides"]["lora_r"] = 8  # of dense: its results would be another recipe's
    (copy / "comparison.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(
        InputError, match=r"dense-seed0.json was made with other inputs:\n  overrides.lora_r: recorded 4, now 8"
    ):
        compare(copy, toy_base, toy_data, monkeypatch, "--only", "dense")
    recipe = tmp_path / "edited.yaml"
    recipe.write_text(Path(MOE).read_text() + "seed: 7\n")
    content["models"][5]["recipe"] = str(recipe)
    (copy / "comparison.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match="recipe_file: recorded"):
        compare(copy, toy_base, toy_data, monkeypatch, "--only", "team")


@pytest.mark.slow
def test_report(compared, toy_data, tmp_path):
    copy = shutil.copytree(compared, tmp_path / "copy")
    content = yaml.safe_load((copy / "comparison.yaml").read_text())
    (copy / "comparison.yaml").write_text(yaml.safe_dump(content | {"results": str(copy / "results")}))
    with pytest.raises(InputError, match="Name them with --data_dir"):
        report(copy)
    report(copy, "--data_dir", toy_data)
    text = (copy / "results/README.md").read_text()
    for part in ("| **team** |", "| team − dense |", "| majority |", "all three", "half/moe-hidden"):
        assert part in text
    assert (copy / "results/comparison.png").stat().st_size > 10_000
    team = json.loads((copy / "results/team-seed0.json").read_text())["test"]["tasks"]["fpb"]
    (row,) = (line for line in text.splitlines() if line.startswith("| team, fpb |"))
    assert f" {team['accuracy']:.3f} | {team['macro_f1']:.3f} " in row

    path = copy / "results/team-seed0.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 3'))
    with pytest.raises(InputError, match="made from other results"):
        report(copy)
    other = shutil.copytree(toy_data, tmp_path / "other")
    rows = (other / "tasks/fpb_test.jsonl").read_text().splitlines(keepends=True)
    (other / "tasks/fpb_test.jsonl").write_text("".join(rows[:-1]))
    with pytest.raises(InputError, match="was scored on another fpb_test.jsonl"):
        report(copy, "--data_dir", other)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_published_intervals_are_of_the_published_results(path):
    comparison = read_comparison(path)
    summary = json.loads((comparison.results / "summary.json").read_text())
    assert summary["results"] == digest(comparison.read_results(comparison.models))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 1}, "limit: Input should be greater than or equal to 2, found 1"),
        ({"colour": 1}, "colour: Extra inputs are not permitted"),
        ({"team": "nobody"}, "'nobody' is to be compared but is no model"),
        (
            {"models": [{"name": "team", "title": "", "initial_model": "quarter/moe"}], "baselines": []},
            "starts from 'quarter",
        ),
        (
            {
                "models": [{"name": "team", "title": "", "initial_model": "half/moe", "router": {"scale": 8}}],
                "baselines": [],
            },
            "team has options of a router",
        ),
    ],
)
def test_errors_name_file_and_key(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        read_comparison(comparison_file(tmp_path, **changes))
    assert "comparison.yaml" in str(error.value)


def test_unknown_model(tmp_path, toy_data, toy_base, monkeypatch):
    with pytest.raises(InputError, match="no such model. Did you mean 'dense'"):
        compare(tmp_path, toy_base, toy_data, monkeypatch, "--only", "dens")


def test_interval_covers_a_true_difference():
    """Two sides that are right in 80 % and 70 % of rows: the interval holds .10, is no wider than chance, and is signed."""
    rng = np.random.default_rng(0)
    true = rng.integers(2, size=600)
    sides = [np.array([np.where(rng.random(600) < share, true, 1 - true) for _ in range(3)]) for share in (0.8, 0.7)]
    arguments = ({"t": true}, {"t": np.arange(600)}, {"t": sides[0]}, {"t": sides[1]}, {"t": 2}, {"t": "accuracy"})
    found = paired_difference(*arguments)["t"]
    assert found["low"] < 0.10 < found["high"]
    assert 0.03 < found["high"] - found["low"] < 0.12
    accuracy = [(side == true).mean() for side in sides]
    assert found["difference"] == pytest.approx(accuracy[0] - accuracy[1])
    swapped = paired_difference(*arguments[:2], *reversed(arguments[2:4]), *arguments[4:])
    assert swapped["t"]["difference"] == -found["difference"]
    assert swapped["average"]["high"] < 0
    same = paired_difference(*arguments[:3], arguments[2], *arguments[4:])["t"]
    assert same["difference"] == 0
    assert same["low"] < 0 < same["high"]  # by the seeds alone
    shared = paired_difference(*arguments[:3], arguments[2], *arguments[4:], shared_seeds=True)["t"]
    assert shared["low"] == shared["high"] == 0


def test_rows_that_share_a_text_are_drawn_together():
    rng = np.random.default_rng(1)
    true = np.repeat(rng.integers(2, size=50), 8)
    ours = np.repeat(np.where(rng.random(50) < 0.8, 1, 0), 8)
    ours = np.where(ours == 1, true, 1 - true)[None]
    theirs = (1 - true)[None]
    width = {}
    for name, units in (("rows", np.arange(400)), ("texts", np.repeat(np.arange(50), 8))):
        found = paired_difference({"t": true}, {"t": units}, {"t": ours}, {"t": theirs}, {"t": 2}, {"t": "accuracy"})[
            "t"
        ]
        width[name] = found["high"] - found["low"]
    assert width["texts"] > 2 * width["rows"]


def test_the_first_model_decides_a_tied_vote():
    predictions = np.array([[2, 2, 0, 1], [1, 0, 0, 1], [1, 1, 2, 0], [2, 0, 0, 0]])
    assert majority_vote(predictions, 3).tolist() == [2, 0, 0, 1]


def test_the_bag_of_words_answers_each_question():
    train = [{"text": f"profit {word} {number}", "label": label, "question": question}
             for number in range(20) for word, label in (("rose", "Yes"), ("fell", "No")) for question in ("up?", "down?")]  # fmt: skip
    for row in train:
        if row["question"] == "down?":
            row["label"] = "No" if row["label"] == "Yes" else "Yes"
    test = [
        {"text": "profit rose", "label": "Yes", "question": "up?"},
        {"text": "profit rose", "label": "No", "question": "down?"},
    ]
    assert bag_of_words(train, test) == ["Yes", "No"]
    assert bag_of_words(train[::4], test[:1]) == ["Yes"]  # one label only
