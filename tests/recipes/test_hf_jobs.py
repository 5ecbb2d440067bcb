# SPDX-License-Identifier: Apache-2.0
"""The road as Hugging Face Jobs: who is submitted when, and what each job runs. A double stands for the `hf` command."""

import ast
import os
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest

from conftest import REPOSITORY, ROLES, shell

HF = """#!/bin/bash
printf '%s\\n' "$*" >> {calls}
[ "$2" != wait ] || [ "$3" != "{broken}" ] || exit 1
for ((i = 1; i <= $#; i++)); do
  case ${{!i}} in
    --name) next=$((i + 1)); echo "id-of-${{!next}}" ;;
    --volume) next=$((i + 1)); code=${{!next}}; ls "${{code%:/code}}" > {code} ;;
  esac
done
"""
OPTIONS = ("--recipes", "recipes/llama3-8b", "--base", "ID", "--bucket", "me/finteam")


@pytest.fixture
def submit(tmp_path):
    """Runs recipes/hf_jobs.sh; returns how it ended and the `hf` commands that it gave."""

    def run(*arguments, broken="", **variables):
        (tmp_path / "bin").mkdir(exist_ok=True)
        double = tmp_path / "bin/hf"
        double.write_text(HF.format(calls=tmp_path / "calls", code=tmp_path / "code", broken=broken))
        double.chmod(0o755)
        environment = (
            os.environ | {"PATH": f"{double.parent}:{os.environ['PATH']}", "HF_TOKEN": "hf_secret"} | variables
        )
        ended = shell("bash", "recipes/hf_jobs.sh", *arguments, env=environment)
        calls = tmp_path / "calls"
        return ended, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_a_stage_is_submitted_when_what_it_reads_is_complete(submit, tmp_path):
    ended, calls = submit(*OPTIONS, "--gpus", "4", "--flavor", "h200x4")
    assert ended.returncode == 0, ended.stderr
    short = [call.split("--name ")[1].split()[0] if " run " in call else call for call in calls]
    experts = [f"finteam-{role}" for role in ROLES]
    assert short == [
        *experts,
        "jobs wait " + " ".join(f"id-of-{name}" for name in experts),
        "finteam-merge",
        "jobs wait id-of-finteam-merge",
        "finteam-team",
        "jobs wait id-of-finteam-team",
        "finteam-dense",
        "jobs wait id-of-finteam-dense",
        "finteam-evaluate",
        "jobs wait id-of-finteam-evaluate",
    ]
    jobs = dict(zip(short, calls, strict=True))
    flavors = {name: call.split("--flavor ")[1].split()[0] for name, call in jobs.items() if " run " in call}
    assert {name for name, flavor in flavors.items() if flavor == "h200"} == {"finteam-merge", "finteam-evaluate"}
    assert {flavor for flavor in flavors.values()} == {"h200", "h200x4"}
    assert all("--secrets HF_TOKEN" in call for call in calls if " run " in call)
    assert "hf_secret" not in "".join(calls)
    assert "fsdp2.yaml --num_processes 4 recipes/instruct_tune.py" in jobs["finteam-team"]
    assert "multi_gpu.yaml --num_processes 4 recipes/train_expert.py" in jobs["finteam-macro"]
    assert "trap 'hf buckets sync run hf://buckets/me/finteam/run' EXIT" in jobs["finteam-macro"]
    named = {word for call in calls for word in call.split() if word.startswith(("recipes/", "scripts/"))}
    assert named
    assert all((REPOSITORY / word).is_file() for word in named)
    assert {"recipes", "scripts", "src", "pyproject.toml"} <= set((tmp_path / "code").read_text().split())


def test_nothing_more_is_submitted_after_a_stage_that_failed(submit):
    ended, calls = submit(*OPTIONS, broken="id-of-finteam-macro")
    assert ended.returncode != 0
    assert not any("finteam-merge" in call for call in calls)


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (OPTIONS[:-2], {}, "--bucket is missing"),
        (OPTIONS, {"HF_TOKEN": ""}, "HF_TOKEN is not set"),
        ((*OPTIONS, "--flavour", "x"), {}, "unknown option '--flavour'"),
    ],
)
def test_nothing_is_submitted_on_bad_input(submit, arguments, variables, message):
    ended, calls = submit(*arguments, **variables)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert not calls


def test_what_a_stage_imports_is_installed_by_its_job(submit):
    """Every import of the scripts that a job runs, of the package's modules that these import, and the recipe's kernels."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    distributions = packages_distributions()
    _, calls = submit(*OPTIONS)
    jobs = [call for call in calls if " run " in call]
    assert len(jobs) == 7
    for job in jobs:
        extras = re.search(r"--editable '\.\[([a-z,]+)\]'", job)[1].split(",")
        wanted = project["dependencies"] + [part for name in extras for part in project["optional-dependencies"][name]]
        installed = {re.match(r"[\w-]+", part)[0].lower().replace("_", "-") for part in wanted}
        installed |= {"numpy", "tqdm"}  # of torch and of transformers
        for name in imported({REPOSITORY / word for word in job.split() if word.endswith(".py")}):
            assert installed & {found.lower().replace("_", "-") for found in distributions[name]}, (name, job[:80])
        for recipe in re.findall(r"--config (recipes/\S+)", job):
            if "kernels-community" in (REPOSITORY / recipe).read_text():
                assert "kernels" in installed


def imported(files):
    """The top-level modules that files import, and those of this package that they import, without the standard library's."""
    names, seen = set(), set()
    while files:
        file = files.pop()
        seen.add(file)
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for module in modules:
                own = REPOSITORY / "src" / f"{module.replace('.', '/')}.py"
                files |= {path for path in (own, own.with_suffix("") / "__init__.py") if path.is_file()} - seen
                names.add(module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"finteam_experts"}
