"""lab.ipynb as Voilà serves it: the labs without any code."""

import pytest

from browser import serving
from browser.conftest import LABS, Subject
from browser.pages import Kernel, listen
from drs_course.labs import DeltaLab


@pytest.fixture(scope="module")
def served(browser, course, store, tmp_path_factory):
    pytest.importorskip("voila", reason="Voilà is not installed: pip install voila")
    folder = tmp_path_factory.mktemp("voila")
    with serving.voila(folder, course / "lab.ipynb", store) as server:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        trouble = listen(page, server.url)
        page.goto(server.url)
        page.locator(".drs-lab img").nth(len(LABS) - 1).wait_for(timeout=90_000)
        yield server, page, trouble
        page.close()


def test_the_page_has_the_labs_and_no_code(served):
    server, page, trouble = served
    for kind in LABS.values():
        assert page.locator(".drs-lab", has_text=kind.title).locator("img").count() == 1
    assert page.locator(".jp-InputArea-editor:visible, .cm-editor:visible").count() == 0
    assert "DeltaLab(" not in page.locator("body").inner_text()
    assert page.locator(".jupyter-widgets-error-widget").count() == 0
    assert page.locator(".drs-stored:visible").count() == 0
    assert trouble == []


def test_a_slider_moves_the_picture_to_what_the_library_draws(served, library):
    server, page, _ = served
    kernel = Kernel(server.kernel_file())
    lab = Subject(page, kernel, "delta_lab", library(DeltaLab))
    before = lab.on_page.settled_picture()
    lab.drag("delta", 0.1, 0.8, 0.25)
    lab.on_page.changes_from(before)
    lab.follows("delta")
    lab.press("delta", "ArrowRight", 3)
    lab.follows("delta")
    kernel.close()
