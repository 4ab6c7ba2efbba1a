"""Several labs on one page do not disturb each other."""

import pytest

from browser.conftest import Subject
from browser.pages import Notebook, write_notebook
from drs_course.labs import CueLab, DeltaLab

CELLS = (
    "from drs_course.notebook import open_course\n"
    "from drs_course.labs import CueLab, DeltaLab\n"
    "pipeline = open_course()",
    "first = DeltaLab(pipeline)\nfirst",
    "second = DeltaLab(pipeline)\nsecond",
    "cue = CueLab(pipeline)\ncue",
)


@pytest.fixture(scope="module")
def labs(browser, server, course, library):
    """Two delta labs and a cue lab on one page."""
    write_notebook(course / "two-labs.ipynb", *CELLS)
    notebook = Notebook(browser, server, "two-labs.ipynb")
    notebook.run_all(3)
    kernel = notebook.kernel()
    yield (
        Subject(notebook.page, kernel, "first", library(DeltaLab), 0),
        Subject(notebook.page, kernel, "second", library(DeltaLab), 1),
        Subject(notebook.page, kernel, "cue", library(CueLab)),
    )
    kernel.close()
    notebook.close()


@pytest.mark.parametrize(("mover", "control"), [(0, "delta"), (1, "delta"), (2, "alpha")])
def test_moving_one_leaves_the_others_alone(labs, mover, control):
    moving = labs[mover]
    others = [lab for lab in labs if lab is not moving]
    before = moving.on_page.settled_picture()
    still = [(lab.on_page.settled_picture(), _source(lab), lab.state(), _drawings(lab)) for lab in others]
    moving.drag(control, 0.2, 0.45)
    moving.on_page.changes_from(before)
    moving.reaches_kernel(control)
    moving.agrees()
    assert still == [(lab.on_page.picture(), _source(lab), lab.state(), _drawings(lab)) for lab in others]


def test_moved_in_turn_each_ends_in_its_own_state(labs):
    first, second, cue = labs
    for _ in range(4):
        for lab, control, key in (
            (first, "delta", "ArrowLeft"),
            (second, "delta", "PageDown"),
            (cue, "alpha", "ArrowRight"),
        ):
            lab.press(control, key)
    for lab, control in ((first, "delta"), (second, "delta"), (cue, "alpha")):
        lab.reaches_kernel(control)
        lab.agrees()
    assert first.readout("delta") != second.readout("delta")


def _source(lab):
    return lab.on_page.root.locator("img").get_attribute("src")


def _drawings(lab):
    return lab.kernel.ask(f"{lab.name}.drawings")
