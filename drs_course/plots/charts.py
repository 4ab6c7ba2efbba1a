"""Figures with axes: Table 1 as a curve, a score over a threshold, a loss, named points."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from drs_course.plots.colors import OKABE_ITO
from drs_course.plots.layout import chart


def table1_curve(table):
    """Table 1 as a curve: mIoU against the constant delta, the learnable controller as a level line; the
    paper's values and the measured ones.

    table: what ``run_table(1)`` or ``reference_table(1)`` returns. Bars: one standard deviation over seeds.
    """
    needed = {"delta", "paper", "measured", "sd"}
    if not needed <= set(table.columns) or table["delta"].notna().sum() == 0:
        raise ValueError(
            f"This is not Table 1, which has {', '.join(sorted(needed))}; found {', '.join(table.columns)}."
        )
    constant = table[table["delta"].notna()].sort_values("delta")
    learnable = table[table["delta"].isna()]
    data = {"critters": "Critters", "voc": "VOC"}.get(table.attrs.get("data"))
    ours = f"measured ({data})" if data else "measured"
    series = [("paper", "the paper (VOC)", "#0072B2", "o"), ("measured", ours, "#D55E00", "s")]
    with chart(7, 3.6) as (figure, ax):
        labels = []
        for column, name, color, marker in series:
            spread = constant["sd"] if column == "measured" and constant["sd"].notna().any() else None
            points = constant["delta"], constant[column], spread
            ax.errorbar(*points, color=color, marker=marker, ms=5, capsize=3)
            labels.append((constant[column].iloc[-1], f"{name}: constant δ", color))
            for level in learnable[column]:
                ax.axhline(level, color=color, linestyle="--", linewidth=1.2)
                labels.append((level, f"{name}: learnable", color))
        ax.set(xlabel="control value δ (smaller: stronger suppression)", ylabel="mIoU (%)")
        ax.set_xticks(constant["delta"], [f"{delta:.2f}" for delta in constant["delta"]])
        ax.margins(y=0.08)
        label_at_right(ax, labels)
    return figure


def threshold_curves(alphas, curves, chosen=None, ylabel="pseudo-label mIoU (%)"):
    """A score over the threshold alpha (on a logarithmic axis), one line for each kind of map.

    alphas: the thresholds. curves: from a name to one score per threshold. chosen: from a name to the
    threshold, one of ``alphas``, at which that kind is read: ringed.
    """
    colors = (OKABE_ITO[3], OKABE_ITO[6], OKABE_ITO[2], OKABE_ITO[4])
    if not curves or len(curves) > len(colors) or any(len(v) != len(alphas) for v in curves.values()):
        raise ValueError(f"expected one to {len(colors)} curves with {len(alphas)} scores each")
    with chart(6.4, 3.2) as (figure, ax):
        labels = []
        for (name, scores), color, marker in zip(curves.items(), colors, "osD^", strict=False):
            ax.plot(alphas, scores, marker=marker, markersize=4, color=color)
            labels.append((scores[-1], name, color))
            if chosen and name in chosen:
                score = scores[list(alphas).index(chosen[name])]
                ax.plot(chosen[name], score, "o", ms=13, mfc="none", mec=color, mew=1.5)
        ax.set_xscale("log")
        ax.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas], rotation=45)
        ax.minorticks_off()
        ax.set(xlabel="threshold α (logarithmic)", ylabel=ylabel)
        ax.margins(y=0.1)
        label_at_right(ax, labels)
    return figure


def labelled_scatter(frame, x, y, label, highlight=()):
    """Points of a table, each with its name beside it; no name covers a point or another name.

    frame: a DataFrame; x, y: its columns to draw, whose names become the axes'; label: the column with the
    names. highlight: names drawn in another colour and marker. Rows without a number are left out.
    """
    frame = frame.dropna(subset=[x, y])
    if frame.empty:
        raise ValueError(f"There is nothing to draw: no row has a number in {x!r} and {y!r}.")
    with chart(6, 4) as (figure, ax):
        ax.set(xlabel=x, ylabel=y)
        ax.margins(0.15)
        names, points = list(frame[label]), frame[[x, y]].to_numpy(float)
        colors = ["#D55E00" if name in highlight else "#0072B2" for name in names]
        for name, point, color in zip(names, points, colors, strict=True):
            ax.plot(*point, "s" if name in highlight else "o", color=color, ms=6)
        _label_points(figure, ax, names, points, colors)
    return figure


def _label_points(figure, ax, names, points, colors):
    """Every name at the nearest free place around its point, with a line to it where that is not close."""
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # or the names would move the axes under them
    renderer, whole = canvas.get_renderer(), figure.bbox
    taken = [Bbox.from_bounds(px - 5, py - 5, 10, 10) for px, py in ax.transData.transform(points)]
    places = [(far, np.pi / 4 * turn) for far in (7, 16, 26, 38, 52, 68, 86, 106) for turn in range(8)]
    for name, point, color in zip(names, points, colors, strict=True):
        text = None
        for far, angle in places:
            if text is not None:
                text.remove()
            dx, dy = (round(d, 6) for d in (np.cos(angle), np.sin(angle)))
            aligned = {
                "ha": ("center", "left", "right")[int(np.sign(dx))],
                "va": ("center", "bottom", "top")[int(np.sign(dy))],
            }
            line = {"arrowstyle": "-", "color": color, "lw": 0.6} if far > 16 else None
            offset = {"xytext": (far * dx, far * dy), "textcoords": "offset points"}
            text = ax.annotate(name, point, color=color, arrowprops=line, **offset, **aligned)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # of the name alone, without the line to it
            inside = box.x0 > ax.bbox.x0 and box.y0 > ax.bbox.y0
            inside = inside and box.x1 < whole.x1 and box.y1 < whole.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def loss_curve(history, title=""):
    """The loss of each epoch, as `Pipeline.history` or a training of `drs_lib.train` returns them."""
    if not history:
        raise ValueError("There is no epoch in this history, so nothing to draw.")
    with chart(4.2, 2.2) as (figure, ax):
        epochs = [entry["epoch"] for entry in history]
        ax.plot(epochs, [entry["loss"] for entry in history], marker="o", markersize=3, color=OKABE_ITO[6])
        ax.set(xlabel="epoch", ylabel="loss, mean of the epoch", title=title)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_ylim(bottom=0)
    return figure


def label_at_right(ax, labels):
    """Direct labels (y, text, colour) right of the axes, moved apart where they would overlap."""
    low, high = ax.get_ylim()
    gap = 0.062 * (high - low)
    at = -np.inf
    for y, text, color in sorted(labels):
        at = max(y, at + gap)
        place = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
        ax.annotate(text, (1.02, at), color=color, **place)
