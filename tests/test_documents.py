# SPDX-License-Identifier: Apache-2.0
"""What documents, docstrings and recipes say: their files exist, their commands have these options, their figures are published."""

import ast
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from trl import SFTConfig

from conftest import REPOSITORY, call, load_script, shell
from finteam_experts.data.tasks import default_tasks
from finteam_experts.training.arguments import BaseModelConfig, parse

RECIPES = sorted({*REPOSITORY.glob("recipes/*/*.yaml")} - {*REPOSITORY.glob("recipes/accelerate/*")})
SCRIPTS = sorted(
    path for folder in ("scripts", "experiments", "benchmarks") for path in REPOSITORY.glob(f"{folder}/*.py")
)
SCRIPTS = [path for path in SCRIPTS if "def main()" in path.read_text()]
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("*/README.md")])
TEXTS = DOCUMENTS + RECIPES + SCRIPTS + sorted(REPOSITORY.glob("recipes/*.*h")) + sorted(
    REPOSITORY.glob("recipes/*.py")) + [REPOSITORY / "moe_merge.yaml", REPOSITORY / "scripts/quickstart.sh"]  # fmt: skip
OURS = r"(?:recipes|scripts|experiments|benchmarks)/[\w/]+\.(?:py|sh)"


def commands_of(path: Path) -> list[list[str]]:
    """The words of each command that starts one of our files: in bash blocks, docstrings and comments."""
    text = path.read_text()
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S))
    elif path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        text = "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    starts = re.compile(rf"(?:[A-Z]\w+:\s+)?((?:\w+=\S+ )*(?:python|bash|accelerate launch)\b.*{OURS}.*)")
    found = [starts.fullmatch(line.strip()) for line in lines]
    return [shlex.split(match[1].replace(" ...", " "), comments=True) for match in found if match]


@pytest.fixture(scope="session")
def helps():
    """The help of a script, asked once."""
    known = {}

    def ask(script: str, capsys) -> str:
        if script not in known:
            capsys.readouterr()
            with pytest.raises(SystemExit) as ended:
                call(script, "--help")
            known[script] = capsys.readouterr().out
            assert ended.value.code == 0
        return known[script]

    return ask


@pytest.mark.parametrize("script", [str(path.relative_to(REPOSITORY)) for path in SCRIPTS])
def test_script_shows_help(script, helps, capsys):
    assert helps(script, capsys).startswith("usage: ")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_command_names_files_and_options_that_exist(path, helps, capsys):
    for words in commands_of(path):
        script = next(word for word in words if re.fullmatch(OURS, word))
        if "launch" in words and (set(words) & {"recipes/accelerate/cpu.yaml"} or "--config_file" not in words):
            assert "--quiet" in words, f"{words}: below an error of ours, accelerate would print its traceback"
        assert (REPOSITORY / script).is_file(), script
        if script.endswith(".sh"):
            text = (REPOSITORY / script).read_text()
            names = {
                *" ".join(re.findall(r"read_options '([\w ]+)'", text)).split(),
                *re.findall(r"--(\w+)", " ".join(re.findall(r"^ +(--[\w| -]+)\)", text, flags=re.M))),
            }
            known = {f"--{name}" for name in names}
        else:
            known = {"--config"} | set(re.findall(r"--[\w-]*\w", helps(script, capsys)))
        own = words[words.index(script) :]
        own = own[: own.index("--")] if "--" in own else own  # then comes another command
        used = {word.split("=")[0] for word in own if word.startswith("--") and " " not in word}
        assert used <= known, (words, used - known)
        for option in ("--config", "--config_file", "--sources", "--recipes"):
            if option in words:
                assert (REPOSITORY / words[words.index(option) + 1]).exists(), words


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_named_paths_exist(path):
    text = path.read_text()
    folders = "recipes|scripts|space|src|tests|docs|experiments|benchmarks"
    named = set(re.findall(rf"(?<![\w/.$-])(?:{folders})/[\w./-]*[\w/]", text))
    named = {name for name in named if "NAME" not in name}  # what a reader puts there
    assert {name for name in named if not (REPOSITORY / name).exists()} == set()
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", text) if path.suffix == ".md" else ():
        assert (path.parent / link).exists(), link


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), flags=re.M))
    for path in DOCUMENTS:
        assert set(re.findall(r"^make (\w+)", path.read_text(), flags=re.M)) <= targets, path


def test_figures_of_the_readme_are_published():
    """Every figure of the section on teams is in the results of an experiment."""
    _, _, section = (REPOSITORY / "README.md").read_text().partition("## When one model, when a team?")
    section = section.partition("\n## ")[0]
    evidence = ("experiments/real_data/results/README.md", "experiments/parts/stratified.md")
    published = "".join((REPOSITORY / path).read_text() for path in evidence)
    figures = re.findall(r"[-+]?0\.\d{3}", section)
    assert len(figures) > 4
    assert [figure for figure in figures if figure not in published] == []


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


def recipe(path):
    return yaml.safe_load((REPOSITORY / "recipes" / path).read_text())


def test_the_samples_dense_model_has_the_steps_and_rows_of_experts_and_team():
    expert, moe, dense = (
        recipe(f"sample/{name}.yaml") for name in ("train_expert", "instruct_tune_moe", "instruct_tune_dense")
    )
    assert dense["match_steps"] is True
    assert len(default_tasks()) * expert["steps_per_task"] + moe["max_steps"] == 60  # as its header says
    assert "60 on the sample data" in (REPOSITORY / "recipes/sample/instruct_tune_dense.yaml").read_text()
    for key in ("per_device_train_batch_size", "lora_r", "lora_alpha", "balance_rows"):
        assert expert[key] == moe[key] == dense[key]


def test_quickstart_trains_the_roles_of_the_merge():
    ended = shell(sys.executable, "-m", "finteam_experts.merging.config", "moe_merge.yaml")
    assert ended.stdout == "macro micro quant\n"


def test_quickstart_refuses_what_it_does_not_know():
    for arguments, message in ((["--steps", "4"], "unknown option '--steps'"), (["--limit"], "--limit needs a value")):
        ended = shell("bash", "scripts/quickstart.sh", *arguments)
        assert ended.returncode == 2
        assert message in ended.stderr


def test_every_file_of_the_library_is_packaged():
    package = REPOSITORY / "src/finteam_experts"
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = {path for pattern in settings["finteam_experts"] for path in package.glob(pattern)}
    found = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert found == packaged
