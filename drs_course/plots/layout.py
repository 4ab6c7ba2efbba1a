"""How a figure is laid out, shown by a notebook and written to a file."""

import io
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import seaborn as sns
from IPython.display import display
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from drs_course.plots.colors import MAP_COLORS, array, label_colors
from drs_lib.data import IGNORED
from drs_lib.files import atomic_path

WIDTH = 8.6  # inches: a README column at 100 pixels an inch, where 9 points stay readable
DPI = 130
# Above this size, a notebook's picture is stored smaller and in 256 colours.
NOTEBOOK_BYTES, NOTEBOOK_DPI = 150_000, 100
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 9}


class NotebookFigure(Figure):
    """Shown by a notebook as it is; a plain ``Figure`` needs pyplot for that, which keeps all it makes."""

    def _repr_png_(self):
        data = png(self, self.dpi)
        # Photographs and maps fill a notebook quickly, and it is to stay small.
        return data if len(data) <= NOTEBOOK_BYTES else png(self, NOTEBOOK_DPI, colors=256)

    def _ipython_display_(self):
        # The only way that goes before pyplot's own, which a notebook may have switched on for all figures.
        display({"image/png": self._repr_png_(), "text/plain": "<Figure>"}, raw=True)


class Panel(NamedTuple):
    """One picture of a grid, (H, W, 3) uint8 or a map (H, W) in [0, 1]; title above it, label at its left."""

    picture: np.ndarray
    title: str = ""
    label: str = ""


def picture_grid(rows, panel_width=None, cmap=MAP_COLORS, scale=None, legend=None):
    """Panels in rows; None leaves a place empty. ``scale`` names what a colour bar of `MAP_COLORS` stands
    for, ``legend`` is a list of patches.

    Placed by hand, in inches: a layout engine that keeps the pictures' aspect leaves gaps between them.
    """
    if not rows or not rows[0]:
        raise ValueError("There is nothing to draw: no image was given.")
    columns = list(zip_longest(*rows))
    gap, line, margin = 0.05, 0.16, 0.09
    gutters = [0.2 if any(p and p.label for p in column) else 0 for column in columns]
    fixed = sum(gutters) + gap * (len(columns) - 1) + 2 * margin + (0.7 if scale else 0)
    side = (WIDTH - fixed) / len(columns) if panel_width is None else panel_width
    width = side * len(columns) + fixed
    titles = [
        max((line * (1 + p.title.count("\n")) + 0.03) if p and p.title else 0 for p in row) for row in rows
    ]
    heights = [side * max(p.picture.shape[0] / p.picture.shape[1] for p in row if p) for row in rows]
    # As many names a line as fit if all were of VOC's longest kind.
    per_line = max(1, int(width / 1.2))
    footer = 0.2 * -(-len(legend) // per_line) + 0.06 if legend else 0
    height = sum(titles) + sum(heights) + gap * (len(rows) - 1) + 2 * margin + footer

    with sns.axes_style("white", STYLE), matplotlib.rc_context(STYLE):
        figure = NotebookFigure((width, height), dpi=DPI)
        top = margin
        for row, title, tall in zip(rows, titles, heights, strict=True):
            top, left = top + title, margin
            for panel, gutter in zip(row, gutters, strict=False):
                left += gutter
                if panel:
                    _draw_panel(_axes(figure, left, top, side, tall), panel, cmap)
                left += side + gap
            top += tall + gap
        if scale:
            top = margin + titles[0]
            bar = _axes(figure, width - margin - 0.6, top, 0.12, height - margin - top - footer)
            colors = ScalarMappable(Normalize(0, 1), MAP_COLORS)
            figure.colorbar(colors, cax=bar, label=scale, ticks=[0, 0.5, 1])
        if legend:
            places = {"loc": "lower center", "borderaxespad": 0.2, "borderpad": 0, "frameon": False}
            spaces = {"ncols": min(per_line, len(legend)), "handlelength": 1, "columnspacing": 1.2}
            figure.legend(handles=legend, **places, **spaces)
    return figure


def _axes(figure, left, top, width, height):
    """Axes at a place in inches, from the upper left corner."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def _draw_panel(ax, panel, cmap):
    ax.imshow(panel.picture, cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    bare(ax)
    ax.set_title(panel.title, pad=3)
    ax.set_ylabel(panel.label, labelpad=3)


def bare(ax):
    """Takes ticks and frame off the axes of a picture."""
    ax.set(xticks=[], yticks=[])
    sns.despine(ax=ax, left=True, bottom=True)


@contextmanager
def chart(width, height):
    """A figure of a size in inches with one pair of axes: (figure, axes), in the style of the course."""
    with sns.axes_style("ticks", STYLE), matplotlib.rc_context(STYLE):
        figure = NotebookFigure((width, height), dpi=DPI, layout="constrained")
        ax = figure.subplots()
        sns.despine(ax=ax)
        yield figure, ax


def class_handles(classes, maps):
    """A legend's patches for the labels that occur in label maps (H, W)."""
    found = np.unique(np.concatenate([array(one).ravel() for one in maps]))
    names = {0: "background", **dict(enumerate(classes, 1)), IGNORED: "ignored"}
    return handles(label_colors(len(classes))[found] / 255, [names[label] for label in found])


def handles(colors, names):
    """A legend's patches."""
    return [Patch(fc=color, ec="0.5", label=name) for color, name in zip(colors, names, strict=True)]


def save_figure(figure, path, dpi=DPI, max_bytes=300_000):
    """Writes a figure as PNG of at most ``max_bytes``, atomically; the same figure gives the same bytes.

    A larger one is drawn with fewer dots per inch, and, where a README's width would no longer be filled,
    in 256 colours.
    """
    path = Path(path)
    for share in (1, 0.9, 0.8):
        data = png(figure, share * dpi)
        if len(data) <= max_bytes:
            break
    while len(data) > max_bytes:
        data = png(figure, share * dpi, colors=256)
        share *= min(0.9, (max_bytes / len(data)) ** 0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return path


def png(figure, dpi, colors=None):
    """A figure as PNG, in as many colours as there are or in ``colors``."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    if colors is None:
        return buffer.getvalue()
    image = Image.open(buffer).convert("RGB")
    # In two steps because Pillow dithers only towards a given palette, and colour bars need it.
    image = image.quantize(palette=image.quantize(colors), dither=Image.Dither.FLOYDSTEINBERG)
    reduced = io.BytesIO()
    image.save(reduced, "PNG", optimize=True)
    return reduced.getvalue()
