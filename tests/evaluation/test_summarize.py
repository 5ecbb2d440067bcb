# SPDX-License-Identifier: Apache-2.0
"""The last screen of a run, and its page."""

import re
import shutil

import pytest

from conftest import call
from finteam_experts.errors import InputError
from finteam_experts.files import read_json, write_json


def test_everything_is_on_one_screen_and_one_page(copied_run, capsys):
    (copied_run / "reports/quickstart.jsonl").write_text(
        '{"title": "merge", "seconds": 30, "peak_gib": 1.5}\n{"title": "merge", "seconds": 6, "peak_gib": 0.5}\n'
    )
    call("scripts/summarize.py", "--run_dir", copied_run)
    screen = capsys.readouterr().out
    for title in (
        "Tasks: main score",
        "Whose tokens",
        "Three questions to the team",
        "Time and peak memory",
        "FiQA sentiment",
    ):
        assert title in screen
    assert re.search(r"merge\s+│\s+0.5 │\s+1.5", screen)  # the run that did the work, not the one that skipped it
    page = (copied_run / "reports/summary.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # nothing is loaded from elsewhere
    assert "Three questions to the team" in page


def test_what_is_missing_is_named(copied_run):
    report = copied_run / "reports/evaluation.json"
    content = read_json(report)
    write_json(report, content | {"inputs": {"models": {"base": content["inputs"]["models"]["base"]}}})
    with pytest.raises(InputError, match="evaluation.json is not of the moe-instruct that is there now"):
        call("scripts/summarize.py", "--run_dir", copied_run)
    report.unlink()
    with pytest.raises(InputError, match="evaluation.json does not exist. Make it: python scripts/evaluate.py"):
        call("scripts/summarize.py", "--run_dir", copied_run)
    shutil.rmtree(copied_run / "moe-instruct")
    with pytest.raises(InputError, match="moe-instruct does not exist. Run this step first"):
        call("scripts/summarize.py", "--run_dir", copied_run)
