"""A JupyterLab that belongs to the tests, a Chromium, and the library itself to compare with."""

import math
import shutil
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import pytest

from browser import serving
from browser.pages import LabOnPage, Notebook, eventually
from drs_course.labs import CueLab, DeltaLab, FeatureMapLab, ImageLab, LayerLab
from drs_course.paper import Configuration
from drs_course.stages import Pipeline

LABS = {
    "delta_lab": DeltaLab,
    "feature_map_lab": FeatureMapLab,
    "layer_lab": LayerLab,
    "cue_lab": CueLab,
    "image_lab": ImageLab,
}
TRAINED = (0.8, 0.55)  # the classifiers of Table 1 that are in the store


# All fixtures end with this folder: while Playwright runs, its event loop is every other test's running loop.
@pytest.fixture(scope="package")
def browser():
    missing = serving.missing()
    if missing:
        pytest.skip(missing)
    with serving.chromium() as browser:
        yield browser


@pytest.fixture(scope="package")
def store(tmp_path_factory):
    """A run store with the classifiers that the labs look for.

    After the ci budget's one epoch every map is empty, and all states would look alike. So the classes'
    biases are raised, as if the networks were sure of more: the maps then differ with delta, and so do the
    scores.
    """
    from drs_lib import train

    fit = train.train_classifier

    def raised(*args, **options):
        model, history = fit(*args, **options)
        model.head.bias.data += 0.5
        return model, history

    folder = tmp_path_factory.mktemp("runs")
    pipeline = Pipeline("critters", "ci", store=folder)
    with patch("drs_course.stages.train_classifier", raised):
        for options in ({"drs_layers": ()}, {}, *({"delta": delta} for delta in TRAINED)):
            pipeline.classifier(Configuration(**options))
    return folder


@pytest.fixture(scope="package")
def pipeline(store):
    return Pipeline("critters", "ci", store=store)


@pytest.fixture(scope="package")
def library(pipeline):
    """The lab of a class in this process, which computes what the page should show: ``library(DeltaLab)``."""
    return cache(lambda kind: kind(pipeline))


@pytest.fixture(scope="package")
def course(tmp_path_factory):
    """A copy of the notebooks, so that nothing the tests do is stored in them."""
    folder = tmp_path_factory.mktemp("course") / "notebooks"
    shutil.copytree(serving.ROOT / "notebooks", folder, ignore=shutil.ignore_patterns(".*"))
    return folder


@pytest.fixture(scope="package")
def server(browser, course, store, tmp_path_factory):
    with serving.jupyterlab(tmp_path_factory.mktemp("jupyter"), course, store) as server:
        yield server


@pytest.fixture(scope="package")
def opened(browser, server):
    """notebooks/lab.ipynb, run whole, and its kernel."""
    notebook = Notebook(browser, server, "lab.ipynb")
    notebook.run_all(len(LABS))
    kernel = notebook.kernel()
    kernel.run("_first = {name: globals()[name].state for name in " + repr(list(LABS)) + "}")
    yield notebook, kernel
    kernel.close()
    notebook.close()


@pytest.fixture
def page(opened):
    """The page of labs with every lab in its first state."""
    notebook, kernel = opened
    kernel.run(
        "for _name, _state in _first.items():\n"
        "    globals()[_name].set(**{k: v for k, v in _state.items() if k in globals()[_name].controls})"
    )
    return notebook


@pytest.fixture
def kernel(opened, page):
    return opened[1]


class Subject:
    """A lab three times: on the page, in the page's kernel, and in this process, drawn by the library."""

    def __init__(self, page, kernel, name, library):
        self.page, self.kernel, self.name, self.library = page, kernel, name, library
        self.on_page = LabOnPage(page, library.title)

    def label(self, control):
        return self.library.controls[control].description

    def option(self, control, value):
        """The words of a dropdown for a value."""
        options = self.library.controls[control].options
        pairs = [entry if isinstance(entry, tuple) else (entry, entry) for entry in options]
        return next(text for text, meant in pairs if meant == value)

    def state(self):
        return self.kernel.ask(f"{self.name}.state")

    def drag(self, control, *shares, steps=12):
        self.on_page.drag(self.label(control), *shares, steps=steps)

    def press(self, control, key, times=1):
        self.on_page.press(self.label(control), key, times)

    def choose(self, control, value):
        self.on_page.choose(self.label(control), self.option(control, value))

    def tick(self, control, on=True):
        self.on_page.tick(self.label(control), on)

    def slider(self, control):
        return self.on_page.control("slider", self.label(control))

    def readout(self, control):
        return self.on_page.readout(self.label(control))

    def reaches_kernel(self, control):
        """Waits until the kernel has the value that the page shows beside a slider, and has drawn it."""
        drawn = f"({self.name}.drawn or {{}}) == {self.name}.state and {self.name}.state[{control!r}]"
        eventually(
            lambda: abs(self.kernel.ask(drawn) - self.readout(control)) < 1e-6,
            f"{control} is {self.readout(control)} in the kernel, and drawn",
        )

    @contextmanager
    def redrawn(self):
        """What is done inside brings another picture, the library's."""
        before = self.on_page.settled_picture()
        yield
        self.on_page.changes_from(before)
        self.agrees()

    def follows(self, control):
        """The kernel, the picture and the numbers follow a slider."""
        self.reaches_kernel(control)
        self.agrees()

    def agrees(self):
        """Waits until page, kernel and library show one and the same: the picture's bytes and the numbers."""
        state = self.state()
        self.library.set(**{name: state[name] for name in self.library.controls})
        self.on_page.shows(self.library.picture.value)
        wanted = [[_as_shown(cell) for cell in row] for row in self.library.shown.numbers[1:]]
        eventually(lambda: self.on_page.numbers() == wanted, f"the numbers are {wanted}")


def _as_shown(cell):
    if isinstance(cell, str):
        return cell
    return "–" if math.isnan(cell) else f"{100 * cell:.1f}"


@pytest.fixture
def subject(page, kernel, library):
    """``subject(DeltaLab)``: a lab of lab.ipynb."""
    names = {kind: name for name, kind in LABS.items()}
    return lambda kind: Subject(page.page, kernel, names[kind], library(kind))
