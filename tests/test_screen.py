# SPDX-License-Identifier: Apache-2.0
"""Tables show what models and data files write as it is."""

import pytest
from rich.table import Table

from conftest import REPOSITORY
from finteam_experts.screen import screen


def test_text_that_looks_like_markup_is_shown_as_it_is(capsys):
    table = Table("label", "answer")
    table.add_row("[positive]", "Sales rose. [/INST] :x:")
    screen(80).print(table)
    shown = capsys.readouterr().out
    assert "[positive]" in shown
    assert "Sales rose. [/INST] :x:" in shown


@pytest.mark.parametrize("folder", ["scripts", "recipes", "experiments", "benchmarks"])
def test_nothing_prints_past_that(folder):
    assert not [path.name for path in (REPOSITORY / folder).rglob("*.py") if "Console(" in path.read_text()]
