# SPDX-License-Identifier: Apache-2.0
"""What the documents name exists, every recipe is one that its script reads, and every command shows its help."""

import re
import shlex
import sys

import pytest
import yaml
from trl import SFTConfig

from conftest import REPOSITORY, load_script, shell
from finteam_experts.arguments import BaseModelConfig, parse
from finteam_experts.comparison import read_comparison

COMPARISONS = sorted((REPOSITORY / "recipes").rglob("comparison*.yaml"))
RECIPES = sorted(
    {*(REPOSITORY / "recipes").rglob("*.yaml")} - {*COMPARISONS} - {*REPOSITORY.glob("recipes/accelerate/*")}
)
DOCUMENTS = [
    REPOSITORY / name for name in ("README.md", "recipes/README.md", "scripts/quickstart.sh", "moe_merge.yaml")
]
SCRIPTS = sorted((REPOSITORY / "scripts").glob("*.py"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_recipe_parses_strictly_with_its_own_script(recipe, monkeypatch):
    """The script is the one that the recipe's name begins with; the file starts with its launch command."""
    scripts = [path for path in (REPOSITORY / "recipes").glob("*.py") if recipe.name.startswith(path.stem)]
    assert len(scripts) == 1
    module = load_script(f"recipes/{scripts[0].name}")
    own = {"train_expert": "ExpertArguments", "instruct_tune": "TuneArguments"}[scripts[0].stem]
    content = yaml.safe_load(recipe.read_text())
    here = [] if "use_cpu" in content else ["--use_cpu", "true"]  # bf16 is refused where there is no GPU
    monkeypatch.setattr("sys.argv", [scripts[0].name, "--config", str(recipe), *here])
    parsed = parse((getattr(module, own), SFTConfig, BaseModelConfig))
    for key, value in content.items():
        value = [] if (key, value) == ("report_to", "none") else value  # how transformers keeps it
        assert value in [getattr(group, key) for group in parsed if key in vars(group)], key
    assert f"--config {recipe.relative_to(REPOSITORY)}" in recipe.read_text()


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_comparison_names_recipes_that_are_there(path):
    comparison = read_comparison(path)
    named = {comparison.expert_recipe, comparison.accelerate_config}
    named |= {contestant.recipe for contestant in (*comparison.contestants, *comparison.levers) if contestant.recipe}
    assert all((REPOSITORY / name).is_file() for name in named)
    assert f"scripts/compare.py --config {path.relative_to(REPOSITORY)}" in path.read_text()


@pytest.mark.parametrize("recipes", ["sample", "smollm2-135m"])
def test_team_and_dense_model_are_tuned_alike(recipes):
    moe, dense = (
        yaml.safe_load((REPOSITORY / f"recipes/{recipes}/instruct_tune_{name}.yaml").read_text())
        for name in ("moe", "dense")
    )
    different = {key for key in moe | dense if moe.get(key) != dense.get(key)}
    assert different == {"start_from", "router_aux_loss_coef", "routing_steps", "routing_passages", "learning_rate"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_paths_exist(document):
    text = document.read_text()
    named = set(re.findall(r"(?<![\w/.])(?:recipes|scripts|space|src|tests|docs|results)/[\w./-]*[\w/]", text))
    assert named
    missing = {name for name in named if not (REPOSITORY / name).exists()}
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS[:2], ids=lambda path: path.name)
def test_make_targets_and_options_exist(document):
    text = document.read_text()
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"`?make (quick\w*|test|style|space)\b", text)) <= targets
    blocks = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", text, flags=re.S)]
    commands = [line for block in blocks for line in block.splitlines() if "scripts/" in line]
    assert commands
    for command in commands:
        words = shlex.split(command, comments=True)
        for script in [word for word in words if word.startswith("scripts/") and word.endswith((".py", ".sh"))]:
            source = (REPOSITORY / script).read_text()
            options = [word for word in words[words.index(script) :] if word.startswith("--")]
            assert all(f"{option}" in source for option in options), command


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_shows_help(script):
    ended = shell(sys.executable, script, "--help")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.startswith("usage: ")


def test_quickstart_trains_the_roles_of_the_merge():
    ended = shell(sys.executable, "-m", "finteam_experts.merge_config", "moe_merge.yaml")
    assert ended.stdout == "macro micro quant\n"


def test_quickstart_refuses_what_it_does_not_know():
    for arguments, message in ((["--steps", "4"], "unknown option '--steps'"), (["--limit"], "--limit needs a value")):
        ended = shell("bash", "scripts/quickstart.sh", *arguments)
        assert ended.returncode == 2
        assert message in ended.stderr
