"""What every lab is built on: controls, one picture that is replaced, numbers beside it, and when to redraw.

A lab is a function from a state to a `View`; this module does the rest. A burst of changes is drawn once,
with its last values; where a drawing takes longer than a moment (VGG-16 on a processor), it waits until the
hand rests. An error is shown in the place of the picture, which would be the wrong one. When the kernel is
gone, the page says so, and readers without a kernel find a picture of the lab in the notebook.
"""

import asyncio
import base64
import html
import logging
import threading
import time
from collections import deque
from contextlib import nullcontext, suppress
from functools import lru_cache, partial
from typing import NamedTuple

import ipywidgets
import numpy as np
from IPython.display import display
from traitlets import TraitError

from drs_course.labs import pictures
from drs_course.labs.scenes import scene

_log = logging.getLogger(__name__)

# Seconds. A queue of changes counts as one while they follow each other this closely, for at most this long.
QUIET, LONGEST_WAIT = 0.004, 0.15
# A drawing that takes longer than SLOW waits until nothing has changed for SETTLED.
SLOW, SETTLED = 0.15, 0.35

LABEL = {"description_width": "initial"}  # a control's label is as wide as its words

STYLE = """<style>
.drs-lab {border: 1px solid #8886; border-radius: 6px; padding: 8px 12px; max-width: 1120px; overflow: hidden}
.drs-lab .drs-picture {flex: 3 1 540px; max-width: 780px; overflow: auto}
.drs-lab .drs-picture .widget-image {width: 100%; min-width: 540px; height: auto}
.drs-lab .drs-side {flex: 1 1 240px; min-width: min-content}
.drs-lab .drs-title {font-size: 115%; font-weight: 600; margin: 0}
.drs-lab .drs-numbers table {border-collapse: collapse; font-variant-numeric: tabular-nums}
.drs-lab .drs-numbers td, .drs-lab .drs-numbers th {padding: 0 10px 0 0; text-align: right; line-height: 1.5}
.drs-lab .drs-numbers td:first-child, .drs-lab .drs-numbers th:first-child {text-align: left}
.drs-lab .widget-html-content {line-height: 1.35}
.drs-lab .drs-lost {display: none}
.drs-lab.jupyter-widgets-disconnected .drs-lost {display: block}
.drs-lab.jupyter-widgets-disconnected .widget-image {opacity: .25}
.drs-lab.jupyter-widgets-disconnected::before,
.drs-lab.jupyter-widgets-disconnected .jupyter-widgets-disconnected::before {display: none}
.drs-lab .drs-alert {background: #fff3cd; color: #4d3800; border-radius: 4px; padding: 4px 8px}
.drs-lab :focus-visible {outline: 2px solid #0072B2; outline-offset: 2px}
.drs-lab .widget-readout:focus-visible {outline-offset: -2px}
</style>"""
LOST = (
    '<div class="drs-alert" role="alert">The kernel that drew this lab is gone, so its controls do nothing. '
    "Run the cell above again, or the whole notebook (<i>Run &gt; Run All Cells</i>).</div>"
)

# A notebook that was saved with a lab and opened again without its kernel has no lab to show. JupyterLab says
# no more than "model not found"; this picture, hidden wherever the lab is there, says the rest.
STORED = """<style>
.drs-stored {{display: none}}
.jp-OutputArea:not(:has(.drs-lab)) .drs-stored {{display: block}}
</style><div class="drs-stored"><p>{text}</p><img alt="{text}" src="data:image/jpeg;base64,{data}"></div>"""


class View(NamedTuple):
    """What a lab shows for a state.

    picture: uint8 (H, W, 3). numbers: a table, its first row the heading, cells text or floats. note: a
    sentence about this state, or nothing. alert: what the user has to be told first.
    """

    picture: np.ndarray
    numbers: list
    note: str = ""
    alert: str = ""


class Lab:
    """The base of the labs. A subclass fills ``self.controls`` (name: widget) before it calls `_build`.

    It has ``title`` and ``about``: what it is, in a line and in a sentence. ``view(state)`` gives the `View`
    of a state, a dict of the controls' values, and ``describe(state)`` puts it into a line of text.
    """

    def __init__(self, pipeline, images=None):
        """images: the data set whose images are looked at; a control "label" follows the control "image"."""
        self.pipeline = pipeline
        self._scene = lru_cache(8)(partial(scene, images))
        self.controls, self.shown, self.drawings = {}, None, 0
        self.drawn = None  # the state of the picture
        self._took = deque(maxlen=2)
        self._adjusting = self._holding = False
        # Jupyter hands a page's changes to a thread of their own while cells run in the main one.
        self._lock = threading.RLock()
        # Of a drawing that waits (None: none does): its loop, its timer, when the first change came.
        self._loop, self._timer, self._since = None, None, 0.0

    def adjust(self, name: str) -> None:
        """Brings the other controls in line: called at the start with "", and with the name of a control that
        was changed, before anything is drawn."""

    @property
    def state(self) -> dict:
        """The controls' values by name."""
        # A page sends 0.2 back as 0.19999999999999996.
        values = {name: control.value for name, control in self.controls.items()}
        return {name: round(v, 9) if isinstance(v, float) else v for name, v in values.items()}

    def set(self, **values) -> "Lab":
        """Sets controls by name and draws at once.

        Raises KeyError for a control that isn't there, TraitError for a value that it does not take.
        """
        unknown = set(values) - set(self.controls)
        if unknown:
            raise KeyError(f"no control {unknown.pop()!r}; there are {', '.join(self.controls)}.")
        with self._lock:
            self._holding = True
            try:
                # Twice: a control may follow another, or have its range from another, that comes later.
                for refusal in (suppress(TraitError), nullcontext()):
                    for name, value in values.items():
                        with refusal:
                            self.controls[name].value = value
            finally:
                self._holding = False
                self.draw()
        return self

    def _build(self, *rows):
        """rows: above the picture, of controls' names and of other widgets; the rest is the same for all."""
        self.adjust("")
        for name, control in self.controls.items():
            control.observe(partial(self._on_change, name), "value")
        self.picture = ipywidgets.Image(format="jpeg")
        self.numbers, self.note, self.busy = (ipywidgets.HTML() for _ in range(3))
        rows = [[self.controls.get(part, part) for part in row] for row in rows]
        rows[-1].append(self.busy)
        picture = ipywidgets.Box([self.picture]).add_class("drs-picture")
        side = ipywidgets.VBox([self.numbers.add_class("drs-numbers"), self.note]).add_class("drs-side")
        self.widget = ipywidgets.VBox(
            [
                ipywidgets.HTML(f'{STYLE}<p class="drs-title">{html.escape(self.title)}</p>'),
                ipywidgets.HTML(LOST).add_class("drs-lost"),
                ipywidgets.HTML(html.escape(self.about)),
                *(_row(row, "center") for row in rows),
                _row([picture, side], "flex-start"),
            ]
        ).add_class("drs-lab")
        self.draw()

    def _on_change(self, name, change):
        with self._lock:
            if self._adjusting:
                return
            self._adjusting = True
            try:
                if name == "image" and "label" in self.controls:
                    self._offer_classes()
                self.adjust(name)
            except Exception:
                # Of an image that can't be read, for example: drawing it fails in the same way, and shows it.
                _log.exception("%s: following %s failed", self.title, name)
            finally:
                self._adjusting = False
            if not self._holding:
                self.request()

    def _offer_classes(self):
        classes, label = self._scene(self.controls["image"].value).classes, self.controls["label"]
        if tuple(label.options) != tuple(classes):  # the same classes leave the choice as it is
            label.options = classes

    def request(self) -> None:
        """Draws soon, once for all that is asked for until then; at once where no event loop runs."""
        with self._lock:
            # A loop may end with its page before it has drawn.
            waits = self._loop is not None and self._loop.is_running()
            if not waits and self.state == self.drawn:
                return
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                loop = None
            if loop is None:
                self.draw()
                return
            now = time.monotonic()
            if waits:
                self._timer.cancel()
            else:
                self._since = now
                if self.slow:
                    self._say("Computing …")
            # A slow drawing waits for the hand to rest, a quick one is not put off for long.
            wait = SETTLED if self.slow else max(0, min(QUIET, self._since + LONGEST_WAIT - now))
            self._loop, self._timer = loop, loop.call_later(wait, self.draw)

    @property
    def slow(self) -> bool:
        """Whether a drawing takes longer than a moment; a single one, such as the first, does not count."""
        return len(self._took) == 2 and min(self._took) > SLOW

    def draw(self) -> None:
        """Draws the state of the controls now."""
        with self._lock:
            self._stop_waiting()
            state, began = self.state, time.perf_counter()
            try:
                self.shown = self.view(state)
            except Exception as error:
                # Nobody sees a callback's exception; the old picture, under the new values, would be a lie.
                _log.exception("%s: drawing %s failed", self.title, state)
                blank = pictures.blank(pictures.SIDE, 2 * pictures.SIDE)
                self.shown, state = View(blank, [], alert=f"{type(error).__name__}: {error}"), None
            self.picture.value = pictures.jpeg(self.shown.picture)
            self.numbers.value, self.note.value = table(self.shown.numbers), html.escape(self.shown.note)
            self._say(self.shown.alert, alert=True)
            self.drawn = state
            if state is not None:
                self.drawings += 1
                self._took.append(time.perf_counter() - began)

    def _stop_waiting(self):
        if self._timer is not None:
            self._timer.cancel()
        self._loop = self._timer = None

    def _say(self, text, alert=False):
        kind = 'class="drs-alert" role="alert"' if alert else 'role="status"'
        self.busy.value = f"<div {kind}>{html.escape(text)}</div>" if text else ""

    def snapshot(self) -> bytes:
        """The lab as it stands, as PNG: for readers without a kernel."""
        with self._lock:
            if self._timer is not None:
                self.draw()
            picture, numbers, note, alert = self.shown
            numbers = [[_cell(cell) for cell in row] for row in numbers]
            texts = self.title, self._described(), self.about
        return pictures.snapshot(*texts, picture, numbers, alert or note)

    def _described(self):
        try:
            return self.describe(self.state)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def close(self) -> None:
        """Removes the lab from the page and from memory."""
        with self._lock:
            self._stop_waiting()
        _close(self.widget)

    def _ipython_display_(self):
        bundle = self._repr_mimebundle_()
        data = base64.b64encode(pictures.jpeg(self.shown.picture)).decode()
        stored = STORED.format(text=html.escape(bundle["text/plain"]), data=data)
        display({"text/html": stored, "text/plain": ""}, raw=True)
        display(bundle, raw=True)

    def _repr_mimebundle_(self, include=None, exclude=None):
        text = f"{self.title}: {self._described()} (run the cell to use the controls)"
        return {**self.widget._repr_mimebundle_(), "text/plain": text, "image/png": self.snapshot()}


def _close(widget):
    """Closes a widget with what it is made of."""
    for part in (*getattr(widget, "children", ()), getattr(widget, "style", None), widget.layout):
        if hasattr(part, "layout"):
            _close(part)
        elif part is not None:
            part.close()
    widget.close()


def show(control, visible):
    """Puts a control on the page, or takes it off."""
    control.layout.display = None if visible else "none"


def _row(children, align):
    layout = {"flex_flow": "row wrap", "align_items": align, "grid_gap": "2px 14px"}
    return ipywidgets.Box(children, layout=layout)


def table(rows):
    """The numbers as an HTML table; the first row is its heading. Without rows: nothing."""
    if not rows:
        return ""
    head, *body = ([html.escape(_cell(cell)) for cell in row] for row in rows)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body)
    return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{lines}</table>"


def _cell(value):
    """Text as it is, shares in percent; what is not defined is a dash."""
    if isinstance(value, str):
        return value
    return "–" if np.isnan(value) else f"{100 * value:.1f}"


def slider(description, value, low, high, step, width="300px"):
    """A slider that reports while it is dragged; arrow keys move it by ``step``."""
    kind = ipywidgets.IntSlider if isinstance(step, int) else ipywidgets.FloatSlider
    limits = {"value": value, "min": low, "max": high, "step": step}
    return kind(description=description, layout={"width": width}, style=LABEL, **limits)


def picker(description, options, **more):
    """A list to choose one from: labels, or (label, value) pairs."""
    return ipywidgets.Dropdown(
        options=options, description=description, layout={"width": "auto"}, style=LABEL, **more
    )


def switch(description, value=False, **more):
    """A check box with its label beside it."""
    layout = {"width": "auto"}
    return ipywidgets.Checkbox(value=value, description=description, indent=False, layout=layout, **more)
