"""Every notebook on a small tree in VOC's layout, exercises' solutions included: no cell fails.

The tree's images differ in size, its masks have 255, and the networks are the paper's with fewer channels,
for a few steps: the budget "ci". A notebook with trainings that no table needs runs twice: as at the paper's
budget, without them, and then with them.
"""

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image
from tiny import write_voc_tree

from drs_lib.data import VOC2012

# The longest first, so that the two that run at a time end together.
NOTEBOOKS = sorted(
    (Path(__file__).parents[2] / "notebooks").glob("*.ipynb"),
    key=lambda path: (path.name[:2] not in ("03", "04", "06", "07"), path.name),
)
PARAMETERS = """
import sys
sys.path.append({tests!r})
import released
released.thin_vgg16(), released.thin_resnet101()
DATA, BUDGET, VOC_ROOT = "voc", "ci", {tree!r}
"""
OPENING = re.compile(r"^pipeline = open_course\(DATA, BUDGET, VOC_ROOT\)$", re.M)
AS_PAPER = r"\g<0>\npipeline.budget = pipeline.budget.replace(name='paper')"

# What a notebook's variables must hold at its end: 255 is no label, and sizes are each image's own.
AT_THE_END = {
    "03": """
masks = [pipeline.data.val.mask(i) for i in range(len(shares))]
assert np.allclose(shares, [np.isin(mask, range(1, 21)).mean() for mask in masks])""",
    "04": """
assert cases
for (index, c), found in zip(cases, heads, strict=True):
    places, (h, w) = np.nonzero(regions(index, c)["discriminative"]), pipeline.data.val.mask(index).shape
    assert np.isclose(found, max((np.ptp(places[0]) + 1) * 64 / h, (np.ptp(places[1]) + 1) * 64 / w))""",
    "06": """
scored = sum(int((train.mask(i) != 255).sum()) for i in counted)
assert places[0].sum() == sum(len(np.concatenate(values)) for values in covered) == scored
assert all(labels.shape == train.mask(i).shape for i, labels in enumerate(swapped))""",
    "07": """
for i in range(len(train)):
    assert np.array_equal(saliency_of(i) == 255, np.isin(train.mask(i), range(1, 21)))
assert len(rivals) == 3 and "ACoL" in scans""",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_voc_tree(tmp_path_factory.mktemp("voc-notebooks"), train=12, val=8)


@pytest.fixture(scope="module")
def failures(request, tree, tmp_path_factory):
    """Of the notebooks that were asked for: the error of the cell that failed, or None."""
    store = tmp_path_factory.mktemp("voc-runs")
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = [path for path in NOTEBOOKS if {"voc_notebook": path} in parameters]
    with ThreadPoolExecutor(2) as pool:
        yield dict(zip(asked, pool.map(lambda path: failure(path, tree, store), asked), strict=True))
    shutil.rmtree(store)


def failure(path, tree, store):
    notebook = nbformat.read(path, as_version=4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = PARAMETERS.format(tests=str(Path(__file__).parents[1]), tree=str(tree))
    if "TRAIN_MORE" in path.read_text(encoding="utf-8"):
        without = deepcopy(notebook.cells)
        [opening] = [cell for cell in without if OPENING.search(cell.source)]
        opening.source = OPENING.sub(AS_PAPER, opening.source)
        notebook.cells = [*without, nbformat.v4.new_code_cell("%reset -f"), *notebook.cells]
    notebook.cells.append(nbformat.v4.new_code_cell(AT_THE_END.get(path.name[:2], "")))
    environment = os.environ | {"DRS_STORE": str(store), "OMP_NUM_THREADS": "1"}
    folder = {"metadata": {"path": str(path.parent)}}
    try:
        client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=folder)
        client.execute(env=environment)
    except CellExecutionError as error:
        return str(error)
    printed = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())]
    if "TRAIN_MORE" in path.read_text(encoding="utf-8") and not any("Left out: " in text for text in printed):
        return "No training was left out."


def test_the_tree_is_as_varied_as_voc(tree):
    data = [VOC2012(tree, split) for split in ("trainaug", "val")]
    shapes = {tuple(part[i][0].shape[1:]) for part in data for i in range(len(part))}
    assert len(shapes) >= 4 and {height > width for height, width in shapes} == {True, False}
    assert all(255 in np.unique(part.mask(i)) for part in data for i in range(len(part)))
    assert {Image.open(path).mode for path in (tree / "JPEGImages").iterdir()} == {"RGB", "L"}


@pytest.mark.parametrize("voc_notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_cell_fails(voc_notebook, failures):
    assert failures[voc_notebook] is None, failures[voc_notebook]
