# SPDX-License-Identifier: Apache-2.0
"""The installed package: everything that its modules read is in the wheel, and it works in a folder without the repository."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import REPOSITORY, shell

EVERYTHING = """
import importlib, pkgutil
import finteam_experts
for module in pkgutil.walk_packages(finteam_experts.__path__, "finteam_experts."):
    importlib.import_module(module.name)
from finteam_experts.data.tasks import default_tasks
from finteam_experts.publishing import cards

TASKS = default_tasks()
print(finteam_experts.__file__, sorted(TASKS), sorted(cards._ENVIRONMENT.list_templates()))
"""


@pytest.mark.slow
def test_the_wheel_works_without_the_repository(tmp_path):
    ended = shell(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, REPOSITORY)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    listed = subprocess.check_output(["git", "ls-files", "src"], cwd=REPOSITORY, text=True).split()
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert inside == {str(Path(name).relative_to("src")) for name in listed}

    packages = tmp_path / "packages"
    shell(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, wheel)
    ended = subprocess.run(
        [sys.executable, "-c", EVERYTHING], cwd=tmp_path, env={"PYTHONPATH": str(packages), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert str(packages) in ended.stdout
    assert "fpb" in ended.stdout
    assert "moe-instruct.md" in ended.stdout
