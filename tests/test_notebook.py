# SPDX-License-Identifier: Apache-2.0
"""The notebook, run from top to bottom on a toy base: every cell but the install."""

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "docs/quickstart.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_has_nothing_of_an_earlier_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code_cells(notebook))


@pytest.mark.slow
def test_the_notebook_runs(toy_base, toy_data, tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = code_cells(notebook)
    cells[0].source += f"\nRUN_DIR = {str(tmp_path)!r}"
    cells[0].source += f'\nSHORTER = "--base {toy_base} --data_dir {toy_data} --max_steps 2 --limit 2"'
    assert cells[1].source.count("%pip install") == 2
    cells[1].source = cells[1].source.replace("%pip install", "# pip install")
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(REPOSITORY / "docs")}}).execute()
    asked, routing = cells[-2], cells[-1]
    written = "".join(output["text"] for output in asked.outputs if output.get("name") == "stdout")
    assert written.count("\n-> ") == 3
    assert "image/png" in routing.outputs[0]["data"]
