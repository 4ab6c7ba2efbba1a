"""A kernel that is started again, or dies: the page says so, and a new run brings a working lab."""

import pytest

from browser.conftest import Subject
from browser.pages import Notebook, eventually, write_notebook
from drs_course.labs import DeltaLab

CELL = (
    "from drs_course.notebook import open_course\n"
    "from drs_course.labs import DeltaLab\n"
    "delta_lab = DeltaLab(open_course())\n"
    "delta_lab"
)


@pytest.fixture(scope="module")
def notebook(browser, server, course):
    write_notebook(course / "one-lab.ipynb", CELL)
    notebook = Notebook(browser, server, "one-lab.ipynb")
    yield notebook
    notebook.close()


def restart(notebook):
    notebook.menu("Kernel", "Restart Kernel…")
    notebook.page.locator(".jp-Dialog-button.jp-mod-accept").click()


def die(notebook):
    kernel = notebook.kernel()
    kernel.tell("import os; os._exit(1)")
    kernel.close()


@pytest.mark.parametrize("end", [restart, die])
def test_the_page_says_that_the_lab_is_lost_and_a_new_run_brings_it_back(notebook, library, end):
    lab = notebook.lab(DeltaLab.title)
    if not lab.root.count():
        notebook.run_all(1)
    lost = lab.root.locator(".drs-lost")
    picture = lab.root.locator("img")
    assert not lost.is_visible() and _opacity(picture) == 1
    end(notebook)
    lost.wait_for(timeout=20_000)
    assert "run" in lost.inner_text().lower()
    eventually(lambda: _opacity(picture) < 0.5, "the picture is pale")
    _dismiss(notebook.page)
    notebook.wait_until_idle()
    notebook.run_all(1)
    kernel = notebook.kernel()
    lab = Subject(notebook.page, kernel, "delta_lab", library(DeltaLab))
    assert not lab.on_page.root.locator(".drs-lost").is_visible()
    lab.drag("delta", 0.3)
    lab.follows("delta")
    kernel.close()


def test_a_saved_notebook_opened_without_its_kernel_shows_the_labs_picture(browser, server, course):
    path = course / "saved-lab.ipynb"
    write_notebook(path, CELL)
    notebook = Notebook(browser, server, path.name)
    notebook.run_all(1)
    stored = notebook.page.locator(".drs-stored img")
    assert stored.count() == 1 and not stored.is_visible()
    notebook.menu("File", "Save Notebook")
    eventually(lambda: "widget-view" in path.read_text(encoding="utf-8"), "the notebook is saved")
    notebook.close()
    again = Notebook(browser, server, path.name)
    stored = again.page.locator(".drs-stored img")
    stored.wait_for()
    eventually(lambda: stored.evaluate("image => image.naturalWidth") > 300, "the picture is loaded")
    assert again.page.locator(".drs-lab").count() == 0
    again.close()


def _opacity(element):
    return element.evaluate("element => Number(getComputedStyle(element).opacity)")


def _dismiss(page):
    """Closes what JupyterLab says about a kernel that died."""
    button = page.get_by_role("dialog").get_by_role("button", name="Ok")
    if button.count():
        button.click()
