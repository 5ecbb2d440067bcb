# SPDX-License-Identifier: Apache-2.0
"""A process takes the cores that it may use, and its threads are told how to wait before torch is imported."""

import os
import sys

import pytest

from conftest import REPOSITORY, shell
from finteam_experts import threads


@pytest.mark.parametrize(
    ("affinity", "quota", "expected"),
    [({0, 1, 2, 3}, "max 100000", 4), ({0, 1, 2, 3}, "150000 100000", 2), ({5}, "800000 100000", 1), ({0, 1}, "1000 100000", 1),
     ({0, 1}, None, 2)],
)  # fmt: skip
def test_cores_by_affinity_and_quota(monkeypatch, tmp_path, affinity, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: affinity, raising=False)
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    if quota:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert threads.available_cores() == expected


ENTRIES = [
    "recipes/train_expert.py",
    "recipes/instruct_tune.py",
    "scripts/evaluate.py",
    "scripts/fit_router.py",
    "scripts/report_routing.py",
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_threads_are_told_how_to_wait_before_torch_is_there(entry):
    """OpenMP reads it once, when torch brings it in."""
    code = (
        "import os, sys, importlib.abc\n"
        "class Watch(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            print('spins', os.environ.get('GOMP_SPINCOUNT'))\n"
        "            sys.exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import runpy; runpy.run_path('{entry}', run_name='checked')\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    ended = shell(sys.executable, "-c", code, env=environment)
    assert ended.stdout.strip() == "spins 10000", ended.stderr[-500:]


def test_the_space_tells_its_threads_too():
    source = (REPOSITORY / "space/app.py").read_text()
    assert source.index("from gpu import") < source.index("from team import")
    assert "GOMP_SPINCOUNT" in (REPOSITORY / "space/gpu.py").read_text()
