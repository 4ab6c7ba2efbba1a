"""How a figure is laid out, shown by a notebook and written to a file."""

import io
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from drs_course.plots.colors import MAP_COLORS, label_colors
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
        from IPython.display import display

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
    columns = max(len(row) for row in rows)
    gap, line, margin = 0.05, 0.16, 0.09
    gutters = [
        0.2 if any(len(row) > c and row[c] and row[c].label for row in rows) else 0 for c in range(columns)
    ]
    fixed = sum(gutters) + gap * (columns - 1) + 2 * margin + (0.7 if scale else 0)
    side = (WIDTH - fixed) / columns if panel_width is None else panel_width
    width = side * columns + fixed
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

        def axes(left, top, width_, height_):
            return figure.add_axes(
                (left / width, 1 - (top + height_) / height, width_ / width, height_ / height)
            )

        top = margin
        for row, title, tall in zip(rows, titles, heights, strict=True):
            top, left = top + title, margin
            for panel, gutter in zip(row, gutters, strict=False):
                left += gutter
                if panel:
                    ax = axes(left, top, side, tall)
                    ax.imshow(panel.picture, cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
                    ax.set(xticks=[], yticks=[])
                    sns.despine(ax=ax, left=True, bottom=True)
                    ax.set_title(panel.title, pad=3)
                    ax.set_ylabel(panel.label, labelpad=3)
                left += side + gap
            top += tall + gap
        if scale:
            bar = axes(
                width - margin - 0.6, margin + titles[0], 0.12, height - 2 * margin - titles[0] - footer
            )
            colors = ScalarMappable(Normalize(0, 1), MAP_COLORS)
            figure.colorbar(colors, cax=bar, label=scale, ticks=[0, 0.5, 1])
        if legend:
            legend_below(figure, legend, per_line)
    return figure


def class_handles(classes, found):
    colors = label_colors(len(classes)) / 255
    names = {0: "background", **dict(enumerate(classes, 1)), IGNORED: "ignored"}
    return [Patch(facecolor=colors[label], edgecolor="0.5", label=names[label]) for label in sorted(found)]


def legend_below(figure, handles, per_line):
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=min(per_line, len(handles)),
        frameon=False,
        handlelength=1,
        columnspacing=1.2,
        borderaxespad=0.2,
        borderpad=0,
    )


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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    if colors is None:
        return buffer.getvalue()
    image = Image.open(buffer).convert("RGB")
    reduced = io.BytesIO()
    # In two steps because Pillow dithers only towards a given palette, and colour bars need it.
    image.quantize(palette=image.quantize(colors), dither=Image.Dither.FLOYDSTEINBERG).save(
        reduced, "PNG", optimize=True
    )
    return reduced.getvalue()
