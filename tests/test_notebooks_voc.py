"""Every notebook on a small tree in VOC's layout, exercises' solutions included: no cell fails.

Its images differ in size, its masks have 255, and the networks are the paper's, for a few steps (budget "ci").
Each notebook with trainings that no table needs runs twice: with them, then as at the paper's budget, which leaves
them out.
"""

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import write_voc_tree
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

from drs_lib.data import VOC2012

NOTEBOOKS = {path.stem: path for path in (Path(__file__).parents[1] / "notebooks").glob("*.ipynb")}
OPENING = re.compile(r"^line = open_course\(DATA, BUDGET, VOC_ROOT\)$", re.M)
WITH_SWITCH = [name for name, path in NOTEBOOKS.items() if "TRAIN_MORE" in path.read_text(encoding="utf-8")]
# The longest first, so that the two that run at a time end together.
ORDER = ("06", "03", "04", "07")
RUNS = [(name, "everything") for name in sorted(NOTEBOOKS, key=lambda name: (name[:2] not in ORDER, name))]
RUNS += [(name, "tables only") for name in sorted(WITH_SWITCH)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_voc_tree(tmp_path_factory.mktemp("voc-notebooks"), train=12, val=8)


@pytest.fixture(scope="module")
def outcomes(request, tree, tmp_path_factory):
    """What each of the runs that were asked for ended with: None, or the error of the cell that failed."""
    store = tmp_path_factory.mktemp("voc-runs")
    asked = {item.callspec.params["run"] for item in request.session.items if hasattr(item, "callspec")
             and "run" in item.callspec.params}  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        found = {run: pool.submit(execute, *run, tree, store) for run in RUNS if run in asked}
    yield {run: outcome.result() for run, outcome in found.items()}
    shutil.rmtree(store)  # gigabytes: some forty networks


def execute(name, what, tree, store):
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = f'DATA = "voc"\nBUDGET = "ci"\nVOC_ROOT = {str(tree)!r}'
    if what == "tables only":
        [opening] = [
            cell for cell in notebook.cells if cell.cell_type == "code" and OPENING.search(cell.source)
        ]
        opening.source = OPENING.sub(
            r"\g<0>\nline.budget = line.budget.replace(name='paper')", opening.source
        )
    environment = os.environ | {"DRS_STORE": str(store), "OMP_NUM_THREADS": "1"}
    folder = {"metadata": {"path": str(NOTEBOOKS[name].parent)}}
    try:
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=folder).execute(
            env=environment
        )
    except CellExecutionError as error:
        return str(error)


def test_the_tree_is_as_varied_as_voc(tree):
    train, val = (VOC2012(tree, split) for split in ("trainaug", "val"))
    shapes = {tuple(data[i][0].shape[1:]) for data in (train, val) for i in range(len(data))}
    assert len(shapes) >= 4 and {height > width for height, width in shapes} == {True, False}
    assert all(255 in np.unique(data.mask(i)) for data in (train, val) for i in range(len(data)))
    modes = {Image.open(path).mode for path in (tree / "JPEGImages").iterdir()}
    assert modes == {"RGB", "L"}


@pytest.mark.parametrize("run", RUNS, ids=", ".join)
def test_no_cell_fails(run, outcomes):
    assert outcomes[run] is None, outcomes[run]
