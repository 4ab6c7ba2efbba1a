"""The course's figures, as functions of arrays that return a matplotlib ``Figure``.

    figure1   image, CAM, DRS, DRS with refinement               paper, Figure 1
    figure2   a DRS module at work                                paper, Figure 2
    figure4   one image under every controller                   paper, Figure 4
    figure5   mean features of every layer, CAM above DRS        paper, Figure 5
    figure6   image, truth, segmentations                        paper, Figure 6
    profile   one feature map, cut through its maximum, before and after suppression
    table1_curve   Table 1 as a curve over delta
    panels    pictures, maps and label maps in rows
    cue_figure     what one object cue recovers and removes of another
    threshold_curves   a score over the threshold alpha
    labelled_scatter   points with their names, none covering another

Images are uint8, as a data set gives them (3, H, W) or as a picture (H, W, 3); maps are (H, W) in [0, 1];
label maps are uint8 (H, W), 0 background, 1..C classes, 255 ignored. Each may be a tensor or an array.

    python -m drs_lib.plots      draws figures/ from the stored runs (`make figures`)
"""

import argparse
import io
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import seaborn as sns
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from drs_lib.data.voc import voc_palette
from drs_lib.files import atomic_path

# Perceptually uniform and safe for the colour-blind; dark where a map is low, so an overlay is a spotlight.
MAP_COLORS = "inferno"
WIDTH = 8.6  # inches: a README column at 100 pixels an inch, where 9 points stay readable
DPI = 130
# Above this size, a notebook's picture is stored smaller and in 256 colours.
NOTEBOOK_BYTES, NOTEBOOK_DPI = 150_000, 100
# Okabe and Ito's colours for the colour-blind, in the order that keeps neighbours apart.
_OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#F0E442", "#0072B2")
# What becomes of a pixel when one object cue takes another's place; the indices that `cue_changes` returns.
# Blue is an improvement and orange is not, dark was added and light taken away.
CHANGES = (
    "in neither cue",
    "kept",
    "recovered, right",
    "recovered, wrong",
    "removed, right",
    "removed, wrong",
)
_CHANGE_COLORS = ("#000000", "#BBBBBB", "#0072B2", "#D55E00", "#56B4E9", "#F0C000")
_STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 9}


class _Figure(Figure):
    """Shown by a notebook as it is; a plain ``Figure`` needs pyplot for that, which keeps all it makes."""

    def _repr_png_(self):
        data = _png(self, self.dpi)
        # Photographs and maps fill a notebook quickly, and it is to stay small.
        return data if len(data) <= NOTEBOOK_BYTES else _png(self, NOTEBOOK_DPI, colors=256)

    def _ipython_display_(self):
        # The only way that goes before pyplot's own, which a notebook may have switched on for all figures.
        from IPython.display import display

        display({"image/png": self._repr_png_(), "text/plain": "<Figure>"}, raw=True)


class Panel(NamedTuple):
    """One picture of a grid, (H, W, 3) uint8 or a map (H, W) in [0, 1]; title above it, label at its left."""

    picture: np.ndarray
    title: str = ""
    label: str = ""


def label_colors(num_classes):
    """Colours of label maps: uint8 (256, 3), indexed by the label; 0 is background, 255 ignored pixels.

    Up to seven classes: Okabe and Ito's, which the colour-blind can tell apart. More: the PASCAL VOC palette.
    """
    if num_classes > len(_OKABE_ITO):
        return voc_palette()
    colors = np.full((256, 3), 200, np.uint8)
    colors[0] = 30
    for label, color in enumerate(_OKABE_ITO, 1):
        colors[label] = np.round(255 * np.array(matplotlib.colors.to_rgb(color)))
    return colors


def overlay(image, values, strength=0.6):
    """A localization map laid over its image.

    image: uint8 (3, H, W) or (H, W, 3); values: (H, W), clipped to [0, 1]; strength: the map's share.
    Returns uint8 (H, W, 3). Raises ValueError for sizes that differ and for NaN.
    """
    picture, values = _picture(image), _map(values)
    _same_size(picture, values, "map")
    return _blend(picture, _colored(values), strength)


def overlay_labels(image, labels, num_classes, strength=0.65):
    """A label map laid over its image: objects in `label_colors`, background as it is, ignored pixels greyed.

    image: uint8 (3, H, W) or (H, W, 3); labels: uint8 (H, W). Returns uint8 (H, W, 3).
    """
    picture, labels = _picture(image), _labels(labels, num_classes)
    _same_size(picture, labels, "label map")
    blended = _blend(picture, label_colors(num_classes)[labels], strength)
    return np.where((labels == 0)[..., None], picture, blended)


def cue_changes(before, after, mask, label):
    """What becomes of each pixel when the object cue ``after`` takes the place of ``before``.

    before, after: bool (H, W), such as a map above its threshold. mask: the truth, uint8 (H, W); label: the
    class that the cues are of. Returns uint8 (H, W), an index into `CHANGES`: "right" where the change agrees
    with the mask. Pixels masked 255 are 0. Raises ValueError for other types and sizes.
    """
    before, after, mask = _array(before), _array(after), _array(mask)
    if not (
        before.dtype == after.dtype == bool and before.shape == after.shape == mask.shape and mask.ndim == 2
    ):
        raise ValueError(
            "cues are bool (H, W), the mask is (H, W): got "
            + ", ".join(f"{one.dtype} {one.shape}" for one in (before, after, mask))
        )
    on_object = mask == label
    changes = np.where(before & after, 1, 0)
    changes = np.where(after & ~before, np.where(on_object, 2, 3), changes)
    changes = np.where(before & ~after, np.where(on_object, 5, 4), changes)
    return np.where(mask == 255, 0, changes).astype(np.uint8)


def overlay_changes(image, changes, on_object=None, strength=0.75):
    """`cue_changes` laid over their image; ``on_object``, bool (H, W), is outlined in black.

    Returns uint8 (H, W, 3). Raises ValueError for sizes that differ.
    """
    picture, changes = _picture(image), _array(changes)
    _same_size(picture, changes, "map of changes")
    colors = np.array([matplotlib.colors.to_rgb(color) for color in _CHANGE_COLORS])
    blended = _blend(picture, 255 * colors[changes], strength)
    result = np.where((changes == 0)[..., None], picture, blended)
    if on_object is not None:
        result[outline(_array(on_object))] = 0
    return result


def outline(region):
    """The pixels of a region, bool (H, W), with a neighbour (of four) outside it; the border is none."""
    padded = np.pad(region, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return region & ~inner


def layer_mean(features):
    """A layer's features (K, h, w) averaged over channels and scaled to [0, 1], as in the paper's Figure 5.

    Features without any contrast give zeros. Raises ValueError for another shape and for NaN.
    """
    features = _array(features).astype(np.float64)
    if features.ndim != 3 or not features.size:
        raise ValueError(f"Features of one image are (channels, height, width); got shape {features.shape}.")
    mean = features.mean(0)
    if not np.isfinite(mean).all():
        raise ValueError("The features contain NaN or infinity: the network they come from has diverged.")
    span = mean.max() - mean.min()
    return (mean - mean.min()) / span if span > 0 else np.zeros_like(mean)


def show_samples(dataset, indices=range(6), masks=True):
    """Images of a data set over their saliency maps and, where ``masks``, their true label maps.

    dataset: as in `drs_lib.data` (for one made by ``without_masks``, pass ``masks=False``).
    """
    indices = list(indices)
    if not indices:
        raise ValueError("There is nothing to show: no index was given.")
    rows, found = [[], [], []], set()
    for column, i in enumerate(indices):
        image, labels = dataset[i]
        names = [name for name, there in zip(dataset.classes, labels, strict=True) if there]
        first = column == 0
        rows[0].append(Panel(_picture(image), "\n".join(names), "image" if first else ""))
        rows[1].append(Panel(_map(_array(dataset.saliency(i)) / 255), "", "saliency" if first else ""))
        if masks:
            mask = _labels(dataset.mask(i), dataset.num_classes)
            found |= set(np.unique(mask).tolist())
            rows[2].append(Panel(label_colors(dataset.num_classes)[mask], "", "truth" if first else ""))
    return (
        _grid(rows, cmap="gray", legend=_class_handles(dataset.classes, found))
        if masks
        else _grid(rows[:2], cmap="gray")
    )


def figure1(images, cam, drs, refined, names=None):
    """Figure 1: localization maps of the plain classifier (CAM), of DRS, and of DRS with refinement (DRS†).

    images: N images; cam, drs, refined: N maps (H, W) each, of the class that ``names`` may name.
    """
    names = [""] * len(images) if names is None else names
    titles = ("image", "CAM", "DRS", "DRS†")
    rows = []
    for row, (image, name, *maps) in enumerate(zip(images, names, cam, drs, refined, strict=True)):
        pictures = [_picture(image), *(overlay(image, values) for values in maps)]
        rows.append(
            [
                Panel(picture, titles[column] if row == 0 else "", name if column == 0 else "")
                for column, picture in enumerate(pictures)
            ]
        )
    return _grid(rows, panel_width=1.8, scale="localization map")


def figure2(features, control):
    """Figure 2: a DRS module at work, its three parts between the maps that go in and those that come out.

    features: K maps of one image, (K, H, W) with K at most 6, as they reach the module (ReLU is applied).
    control: the control values G, a number or (K,), in [0, 1]. The dots mark the K maximum elements; each
    arrow leads from 1 down to the map's control value, so a long arrow is a strong suppression. Colours are
    relative to each map's own maximum.
    """
    maps = _array(features).astype(np.float64).clip(0)
    control = _array(control).astype(np.float64)
    if maps.ndim != 3 or not maps.size or len(maps) > 6:
        raise ValueError(f"Features are 1 to 6 maps of one image, (K, H, W); got shape {maps.shape}.")
    if control.shape not in ((), maps.shape[:1]):
        raise ValueError(f"{len(maps)} maps need one control value, or one each; got shape {control.shape}.")
    control = np.broadcast_to(control, maps.shape[:1])
    if not np.isfinite(maps).all() or not ((control >= 0) & (control <= 1)).all():
        raise ValueError("The features must be finite and the control values between 0 and 1.")
    peak = maps.max((1, 2))
    tau = peak * control
    count, side, step = len(maps), 0.62, 0.7
    room = max(count * step, 3.2)
    height = room + 0.9
    center, top = 0.4 + room / 2, 0.4 + (room + count * step) / 2
    upper, lower = center + room / 4, center - room / 4
    strip = min(0.24, (room / 2 - 0.5) / count)
    pixel = side / max(maps.shape[1:])
    tall, wide = (pixel * n for n in maps.shape[1:])

    with matplotlib.rc_context(_STYLE):
        figure = _Figure((WIDTH, height), dpi=DPI)
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, WIDTH), ylim=(0, height))
        ax.axis("off")

        def text(x, y, what, **options):
            ax.text(x, y, what, **{"ha": "center", "va": "center", **options})

        def box(x, y, width, what):
            shape = FancyBboxPatch((x, y - 0.34), width, 0.68, boxstyle="round,pad=0,rounding_size=0.1")
            shape.set(facecolor="#EEF3F8", edgecolor="0.3")
            ax.add_patch(shape)
            text(x + width / 2, y, what)

        def arrow(*points):
            ax.plot(*zip(*points[:-1], strict=True), color="0.3", linewidth=1.2, solid_capstyle="butt")
            style = {"arrowstyle": "-|>", "color": "0.3", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
            ax.annotate("", points[-1], points[-2], arrowprops=style)

        def column(x, values, title):
            for k, value in enumerate(values):
                left, low = x + (side - wide) / 2, top - k * step - (side + tall) / 2
                extent = (left, left + wide, low, low + tall)
                limits = {"vmin": 0, "vmax": peak[k] or 1}
                ax.imshow(value, cmap=MAP_COLORS, extent=extent, interpolation="nearest", **limits)
            text(x + side / 2, top + 0.25, f"{title}\n$H × W × K$")

        def numbers(x, y, values, shares, title):
            for k, (value, share) in enumerate(zip(values, shares, strict=True)):
                low = y + (count / 2 - 1 - k) * strip
                color = matplotlib.colormaps[MAP_COLORS](share)
                ax.add_patch(Rectangle((x, low), 0.5, strip, facecolor=color, edgecolor="white"))
                shade = "black" if share > 0.6 else "white"
                text(x + 0.25, low + strip / 2, f"{value:.2f}", color=shade, fontsize=7.5)
            text(x + 0.25, y + count * strip / 2 + 0.2, f"{title}\n$1 × 1 × K$", fontsize=8)

        column(0.25, maps, "$X$")
        for k, one in enumerate(maps):
            row, place = np.unravel_index(one.argmax(), one.shape)
            x = 0.25 + (side - wide) / 2 + pixel * (place + 0.5)
            y = top - k * step - (side - tall) / 2 - pixel * (row + 0.5)
            ax.plot(x, y, "o", ms=6, mfc=_OKABE_ITO[4], mec="white", mew=1)
        for y, name in ((upper, "max-element\nextractor"), (lower, "suppression\ncontroller")):
            arrow((0.25 + side + 0.04, center), (1.15, center), (1.15, y), (1.4, y))
            box(1.4, y, 1.15, name)
            arrow((2.55, y), (2.85, y))
        numbers(2.9, upper, peak, np.ones(count), r"$X_{\mathrm{max}}$")
        for k, value in enumerate(control):
            y = lower + (count / 2 - 0.5 - k) * strip
            ax.plot((2.9, 3.4), (y, y), color="0.85", linewidth=3, solid_capstyle="butt")
            style = {"arrowstyle": "-|>", "color": _OKABE_ITO[6], "linewidth": 1.6}
            ax.annotate("", (2.9 + value / 2, y), (3.4, y), arrowprops={**style, "shrinkA": 0, "shrinkB": 0})
            text(3.57, y, f"{value:.2f}", fontsize=7.5)
        text(3.15, lower + count * strip / 2 + 0.2, "$G$\n$1 × 1 × K$", fontsize=8)
        for y, left in ((upper, 3.42), (lower, 3.75)):
            arrow((left, y), (4.1, y), (4.1, center + (0.13 if y > center else -0.13)))
        text(4.1, center, r"$\times$", fontsize=13)
        arrow((4.22, center), (4.5, center))
        numbers(4.55, center, tau, control, r"$\tau = X_{\mathrm{max}}\, G$")
        arrow((5.08, center), (5.5, center))
        box(5.5, center, 1.25, "suppressor\n" + r"$\mathrm{min}(X, \tau)$")
        below = top - (count - 1) * step - side - 0.04
        arrow((0.25 + side / 2, below), (0.25 + side / 2, 0.2), (6.125, 0.2), (6.125, center - 0.34))
        arrow((6.75, center), (7.55, center))
        column(7.6, np.minimum(maps, tau[:, None, None]), r"$\hat{X}$")
    return figure


def figure4(image, maps, columns=5):
    """Figure 4: one image's localization map under every controller.

    maps: from a title (``"learnable"``, ``"δ = 0.90"``) to the map (H, W), in the order of the panels.
    """
    panels = [Panel(_picture(image), "image")]
    panels += [Panel(overlay(image, values), title) for title, values in maps.items()]
    columns = min(columns, len(panels))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    return _grid(rows, scale="localization map")


def figure5(image, cam, drs):
    """Figure 5: the mean of every layer's features, of the plain classifier above that with DRS.

    cam, drs: for each layer the features (K, h, w) of the image, as `Classifier.layer_outputs` gives them.
    """
    if len(cam) != len(drs) or not cam:
        raise ValueError(f"Both classifiers must have the same layers; got {len(cam)} and {len(drs)}.")
    cam, drs = ([layer_mean(features) for features in network] for network in (cam, drs))
    rows = [[Panel(_picture(image), "image")], [None]]
    for row, label, network in ((0, "CAM", cam), (1, "DRS", drs)):
        for layer, mean in enumerate(network, 1):
            rows[row].append(Panel(mean, f"layer {layer}" if row == 0 else "", label if layer == 1 else ""))
    return _grid(rows, scale="mean feature, scaled per panel")


def figure6(images, truth, drs, refined, classes):
    """Figure 6: segmentations after training on DRS's pseudo labels, without and with refinement (DRS†).

    images: N images; truth, drs, refined: N label maps (H, W) each; classes: names, without background.
    """
    titles = ("image", "ground truth", "DRS", "DRS†")
    colors = label_colors(len(classes))
    rows, found = [], set()
    for row, (image, *labels) in enumerate(zip(images, truth, drs, refined, strict=True)):
        labels = [_labels(one, len(classes)) for one in labels]
        found |= {int(label) for one in labels for label in np.unique(one)}
        pictures = [_picture(image), *(colors[one] for one in labels)]
        rows.append([Panel(p, titles[column] if row == 0 else "") for column, p in enumerate(pictures)])
    return _grid(rows, panel_width=1.95, legend=_class_handles(classes, found))


def cue_figure(images, before, after, masks, labels, titles=("cue before", "cue after")):
    """What one object cue recovers and removes of another, image by image, coloured against the mask.

    images: N images; before, after: N cues, bool (H, W) each; masks: N true label maps; labels: the class of
    each image's cues. titles: what the cues are called. See `cue_changes`.
    """
    rows = []
    for row, (image, first, second, mask, label) in enumerate(
        zip(images, before, after, masks, labels, strict=True)
    ):
        changes, on_object = cue_changes(first, second, mask, label), _array(mask) == label
        kept = [overlay_changes(image, _array(cue).astype(np.uint8), on_object) for cue in (first, second)]
        pictures = [_picture(image), *kept, overlay_changes(image, changes, on_object)]
        names = ("image", *titles, "what changed")
        rows.append([Panel(p, n if row == 0 else "") for p, n in zip(pictures, names, strict=True)])
    handles = [
        Patch(facecolor=color, edgecolor="0.5", label=name)
        for color, name in zip(_CHANGE_COLORS[1:], CHANGES[1:], strict=True)
    ]
    return _grid(rows, panel_width=1.95, legend=handles)


def panels(rows, classes=(), cmap=MAP_COLORS):
    """Pictures in rows.

    rows: a list of dicts from a title to a picture, a map (floats (H, W) in [0, 1], coloured by ``cmap``) or
    a label map (uint8 (H, W), in `label_colors`); None leaves a place empty. A title that repeats the one
    above it is left out. classes: the names of the labels, without background; needed for label maps.
    """
    colors, grid, found, above = label_colors(len(classes)), [], set(), []
    for row in rows:
        line = []
        for column, (title, picture) in enumerate(row.items()):
            if picture is not None:
                picture = _array(picture)
                if picture.ndim == 2 and picture.dtype == np.uint8:
                    labels = _labels(picture, len(classes))
                    found |= set(np.unique(labels).tolist())
                    picture = colors[labels]
                picture = _map(picture) if picture.ndim == 2 else _picture(picture)
                title = "" if column < len(above) and above[column] == title else title
            line.append(None if picture is None else Panel(picture, title))
        grid.append(line)
        above = list(row)
    legend = _class_handles(classes, found) if found else None
    width = None if grid and max(map(len, grid)) > 4 else 1.95
    return _grid(grid, panel_width=width, cmap=cmap, legend=legend)


def threshold_curves(alphas, curves, chosen=None, ylabel="pseudo-label mIoU (%)"):
    """A score over the threshold alpha (on a logarithmic axis), one line for each kind of map.

    alphas: the thresholds. curves: from a name to one score per threshold. chosen: from a name to the
    threshold, one of ``alphas``, at which that kind is read: ringed.
    """
    colors = (_OKABE_ITO[3], _OKABE_ITO[6], _OKABE_ITO[2], _OKABE_ITO[4])
    if not curves or len(curves) > len(colors) or any(len(v) != len(alphas) for v in curves.values()):
        raise ValueError(f"expected one to {len(colors)} curves with {len(alphas)} scores each")
    with sns.axes_style("ticks", _STYLE), matplotlib.rc_context(_STYLE):
        figure = _Figure((6.4, 3.2), dpi=DPI, layout="constrained")
        ax = figure.subplots()
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
        sns.despine(ax=ax)
        _label_at_right(ax, labels)
    return figure


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
    with sns.axes_style("ticks", _STYLE), matplotlib.rc_context(_STYLE):
        figure = _Figure((7, 3.6), dpi=DPI, layout="constrained")
        ax = figure.subplots()
        labels = []
        for column, name, color, marker in series:
            spread = constant["sd"] if column == "measured" and constant["sd"].notna().any() else None
            ax.errorbar(
                constant["delta"], constant[column], spread, color=color, marker=marker, ms=5, capsize=3
            )
            labels.append((constant[column].iloc[-1], f"{name}: constant δ", color))
            for level in learnable[column]:
                ax.axhline(level, color=color, linestyle="--", linewidth=1.2)
                labels.append((level, f"{name}: learnable", color))
        ax.set(xlabel="control value δ (smaller: stronger suppression)", ylabel="mIoU (%)")
        ax.set_xticks(constant["delta"], [f"{delta:.2f}" for delta in constant["delta"]])
        ax.margins(y=0.08)
        sns.despine(ax=ax)
        _label_at_right(ax, labels)
    return figure


def labelled_scatter(frame, x, y, label, highlight=()):
    """Points of a table, each with its name beside it; no name covers a point or another name.

    frame: a DataFrame; x, y: its columns to draw, whose names become the axes'; label: the column with the
    names. highlight: names drawn in another colour and marker. Rows without a number are left out.
    """
    frame = frame.dropna(subset=[x, y])
    if frame.empty:
        raise ValueError(f"There is nothing to draw: no row has a number in {x!r} and {y!r}.")
    with sns.axes_style("ticks", _STYLE), matplotlib.rc_context(_STYLE):
        figure = _Figure((6, 4), dpi=DPI, layout="constrained")
        ax = figure.subplots()
        ax.set(xlabel=x, ylabel=y)
        ax.margins(0.15)
        names, points = list(frame[label]), frame[[x, y]].to_numpy(float)
        colors = ["#D55E00" if name in highlight else "#0072B2" for name in names]
        for name, point, color in zip(names, points, colors, strict=True):
            ax.plot(*point, "s" if name in highlight else "o", color=color, ms=6)
        sns.despine(ax=ax)
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
            text = ax.annotate(
                name,
                point,
                (far * dx, far * dy),
                textcoords="offset points",
                color=color,
                ha=("center", "left", "right")[int(np.sign(dx))],
                va=("center", "bottom", "top")[int(np.sign(dy))],
                arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6} if far > 16 else None,
            )
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
    with matplotlib.rc_context(_STYLE):
        figure = _Figure(figsize=(4.2, 2.2), dpi=DPI, layout="constrained")
        ax = figure.subplots()
        epochs = [entry["epoch"] for entry in history]
        ax.plot(epochs, [entry["loss"] for entry in history], marker="o", markersize=3, color=_OKABE_ITO[6])
        ax.set(xlabel="epoch", ylabel="loss, mean of the epoch", title=title)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_ylim(bottom=0)
        sns.despine(figure)
    return figure


def profile(features, control, title=""):
    """One feature map before and after suppression, along the row through its maximum.

    features: (H, W), as it reaches a DRS module (ReLU is applied); control: its control value G. Left the
    map X with that row marked; right X along the row, its maximum, and the upper bound tau = G max X, with
    what lies above tau, and is cut off, shaded.
    """
    features = _array(features).astype(np.float64)
    if features.ndim != 2 or not features.size:
        raise ValueError(f"A feature map is (H, W): one channel of one image; got shape {features.shape}.")
    control = float(_array(control))
    if not np.isfinite(features).all() or not 0 <= control <= 1:
        raise ValueError("The feature map must be finite and the control value between 0 and 1.")
    features = features.clip(0)
    peak = features.max()
    row = features.argmax() // features.shape[1]
    values, tau = features[row], peak * control
    edges = np.arange(len(values) + 1) - 0.5
    with sns.axes_style("ticks", _STYLE), matplotlib.rc_context(_STYLE):
        figure = _Figure((7.4, 2.4), dpi=DPI, layout="constrained")
        left, ax = figure.subplots(1, 2, width_ratios=(1, 2.3))
        left.imshow(features, cmap=MAP_COLORS, vmin=0, interpolation="nearest")
        left.axhline(row, color="white", linewidth=1.2)
        left.set(xticks=[], yticks=[row], yticklabels=[f"row {row}"], title=title)
        sns.despine(ax=left, left=True, bottom=True)
        kept = np.minimum(values, tau)
        ax.stairs(kept, edges, fill=True, color="0.8", label=r"$\hat{X}=\min(X,\tau)$")
        ax.stairs(values, edges, baseline=kept, fill=True, color=_OKABE_ITO[0], label="suppressed")
        ax.stairs(values, edges, color="0.25", linewidth=1.2, label="$X$")
        ax.axhline(peak, color=_OKABE_ITO[4], linestyle=":", linewidth=1.5)
        ax.axhline(tau, color=_OKABE_ITO[6], linestyle="--", linewidth=1.5)
        ax.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.08 * peak or 1), xlabel=f"position in row {row}")
        ax.xaxis.get_major_locator().set_params(integer=True)
        sns.despine(ax=ax)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, handlelength=1.2)
        names = (
            (peak, rf"$X_{{\mathrm{{max}}}}$ = {peak:.2f}", _OKABE_ITO[4]),
            (tau, rf"$\tau$ = {control:.2f} $X_{{\mathrm{{max}}}}$", _OKABE_ITO[6]),
        )
        _label_at_right(ax, names)
    return figure


def _label_at_right(ax, labels):
    """Direct labels (y, text, colour) right of the axes, moved apart where they would overlap."""
    low, high = ax.get_ylim()
    gap = 0.062 * (high - low)
    at = -np.inf
    for y, text, color in sorted(labels):
        at = max(y, at + gap)
        ax.annotate(
            text,
            (1.02, at),
            xycoords=("axes fraction", "data"),
            color=color,
            va="center",
            annotation_clip=False,
        )


def _grid(rows, panel_width=None, cmap=MAP_COLORS, scale=None, legend=None):
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

    with sns.axes_style("white", _STYLE), matplotlib.rc_context(_STYLE):
        figure = _Figure((width, height), dpi=DPI)

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
            _legend(figure, legend, per_line)
    return figure


def _class_handles(classes, found):
    colors = label_colors(len(classes)) / 255
    names = {0: "background", **dict(enumerate(classes, 1)), 255: "ignored"}
    return [Patch(facecolor=colors[label], edgecolor="0.5", label=names[label]) for label in sorted(found)]


def _legend(figure, handles, per_line):
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


def _array(values):
    return values.detach().cpu().numpy() if torch.is_tensor(values) else np.asarray(values)


def _picture(image):
    image = _array(image)
    if image.dtype == np.uint8 and image.ndim == 3 and image.size:
        if image.shape[2] == 3:
            return image
        if image.shape[0] == 3:
            return image.transpose(1, 2, 0)
    raise ValueError(
        f"An image is uint8, (3, H, W) or (H, W, 3); got {image.dtype} {image.shape}. "
        "Show the data set's image, not the normalised one."
    )


def _map(values):
    values = _array(values)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"A map is (H, W): one class of one image; got shape {values.shape}.")
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("The map contains NaN or infinity: the network it comes from has diverged.")
    return values.clip(0, 1)


def _labels(labels, num_classes):
    labels = _array(labels)
    if labels.ndim != 2 or labels.dtype != np.uint8 or not labels.size:
        raise ValueError(f"A label map is uint8 (H, W); got {labels.dtype} {labels.shape}.")
    if ((labels > num_classes) & (labels != 255)).any():
        raise ValueError(
            f"A label map has 0 (background), 1..{num_classes} and 255 (ignored); "
            f"this one has {np.unique(labels)}."
        )
    return labels


def _same_size(picture, values, what):
    if picture.shape[:2] != values.shape:
        raise ValueError(
            f"The {what} is {values.shape[0]}x{values.shape[1]} and its image "
            f"{picture.shape[0]}x{picture.shape[1]}: "
            "bring it to the image's size first."
        )


def _colored(values):
    lut = (255 * matplotlib.colormaps[MAP_COLORS](np.arange(256))[:, :3]).round().astype(np.uint8)
    return lut[(255 * values).round().astype(np.uint8)]


def _blend(picture, colors, strength):
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is between 0 (only the image) and 1 (only the colours); got {strength}.")
    return np.round((1 - strength) * picture + strength * colors.astype(np.float32)).astype(np.uint8)


def save_figure(figure, path, dpi=DPI, max_bytes=300_000):
    """Writes a figure as PNG of at most ``max_bytes``, atomically; the same figure gives the same bytes.

    A larger one is drawn with fewer dots per inch, and, where a README's width would no longer be filled,
    in 256 colours.
    """
    path = Path(path)
    for share in (1, 0.9, 0.8):
        data = _png(figure, share * dpi)
        if len(data) <= max_bytes:
            break
    while len(data) > max_bytes:
        data = _png(figure, share * dpi, colors=256)
        share *= min(0.9, (max_bytes / len(data)) ** 0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return path


def _png(figure, dpi, colors=None):
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


def make_figures(out_dir, store=None, data="critters", budget=None, seed=0, voc_root=None, seeds=None):
    """Draws the course's figures from the networks in the run store and writes them to ``out_dir`` as PNG.

    The images are the first of the validation set that show one class, no class twice (figure 6: the first
    of all): none was picked for its looks. Nothing is trained: a figure whose networks are not in the store
    is left out and named on the terminal.

    Args:
        store: a `RunStore` or its folder; data, budget, voc_root: as for `run_table`.
        seed: whose networks are shown; seeds: over which Table 1's curve averages (None: that one).
    Returns:
        the paths of the files written.
    """
    from drs_lib.paper import Configuration, table_rows
    from drs_lib.pipeline import Pipeline

    pipeline = Pipeline(data, budget, seed=seed, voc_root=voc_root, store=store)
    seeds = (seed,) if seeds is None else tuple(seeds)
    cam, learnable, refined = Configuration(drs_layers=()), Configuration(), Configuration(refine=True)
    controllers = {row.label.removeprefix("non-learnable with "): row.configuration for row in table_rows(1)}
    singles = _first_of_each_class(pipeline.data.val, 3)

    def draw_figure1():
        maps = [_val_maps(pipeline, c, singles) for c in (cam, learnable, refined)]
        images, names = zip(*(_image_and_class(pipeline.data.val, i) for i in singles), strict=True)
        return figure1(images, *maps, names)

    def draw_figure4():
        maps = {label: _val_maps(pipeline, c, singles[:1])[0] for label, c in controllers.items()}
        return figure4(pipeline.data.val[singles[0]][0], maps)

    def draw_figure5():
        image = pipeline.data.val[singles[0]][0]
        return figure5(image, *(_features(pipeline.classifier(c), image) for c in (cam, learnable)))

    def draw_figure6():
        from drs_lib.train import predict_segmentation

        val = pipeline.data.val
        first = torch.utils.data.Subset(val, range(min(4, len(val))))
        networks = [pipeline.segmentation_network(c) for c in (learnable, refined)]
        labels = [[one for _, one in predict_segmentation(network, first)] for network in networks]
        images, masks = [image for image, _ in first], [val.mask(i) for i in first.indices]
        return figure6(images, masks, *labels, val.classes)

    def draw_table1():
        from drs_lib.experiments import run_table

        options = dict(
            budget=budget, seeds=seeds, voc_root=voc_root, store=pipeline.store, progress=False, jobs=1
        )
        return table1_curve(run_table(1, data, **options))

    drawings = {
        "samples": (lambda: show_samples(pipeline.data.val, range(min(6, len(pipeline.data.val)))), []),
        "figure1": (draw_figure1, [("classify", cam), ("classify", learnable), ("refine", refined)]),
        "figure4": (draw_figure4, [("classify", c) for c in controllers.values()]),
        "figure5": (draw_figure5, [("classify", cam), ("classify", learnable)]),
        "figure6": (draw_figure6, [("segment", learnable), ("segment", refined)]),
        "table1": (draw_table1, None),
    }
    written = []
    for name, (draw, needs) in drawings.items():
        missing = _missing_rows(pipeline, seeds) if needs is None else _missing_stages(pipeline, needs)
        if missing:
            print(f"{name} is left out: the run store has no {missing}. `python -m drs_lib course` makes it.")
        else:
            written.append(save_figure(draw(), Path(out_dir) / f"{name}.png"))
    return written


def _missing_stages(pipeline, needs):
    from drs_lib.pipeline import STAGE_VERSIONS

    for name, configuration in needs:
        stage = pipeline.stage(name, configuration)
        if pipeline.store.get(stage.name, stage.config, stage.inputs, STAGE_VERSIONS[stage.name]) is None:
            return stage.title
    return None


def _missing_rows(pipeline, seeds):
    from drs_lib.paper import table_rows
    from drs_lib.pipeline import Pipeline

    for seed in seeds:
        of_seed = Pipeline(pipeline.data, pipeline.budget, seed=seed, store=pipeline.store)
        for row in table_rows(1):
            if of_seed.stored_scores(row.configuration, ("miou", "accuracy", "labels")) is None:
                return f"score of Table 1's row {row.label!r} with seed {seed}"
    return None


def _first_of_each_class(dataset, count):
    found = {}
    for i in range(len(dataset)):
        labels = dataset[i][1]
        if labels.sum() == 1:
            found.setdefault(int(labels.argmax()), i)
        if len(found) == count:
            break
    if not found:
        raise ValueError(
            "No image of the validation set shows a single class, so there is none for the figures."
        )
    return sorted(found.values())


def _image_and_class(dataset, index):
    image, labels = dataset[index]
    return image, dataset.classes[int(labels.argmax())]


def _val_maps(pipeline, configuration, indices):
    """The localization map of each image's only class, made as the budget makes them for pseudo labels."""
    maps = pipeline.maps(configuration, pipeline.data.val, indices)
    return [of_image[int(labels.argmax())] for _, labels, of_image in maps]


@torch.no_grad()
def _features(model, image):
    from drs_lib.data import normalize

    images = normalize(image[None].to(next(model.parameters()).device))
    return [features[0] for features in model.layer_outputs(images)]


def main(arguments=None):
    """The command line: ``python -m drs_lib.plots``."""
    parser = argparse.ArgumentParser(
        prog="python -m drs_lib.plots", description="Draw the figures from the stored runs."
    )
    parser.add_argument("--out", default="figures", metavar="DIR", help="default: figures")
    parser.add_argument("--store", metavar="DIR", help="the run store; default: $DRS_STORE, else ./runs")
    parser.add_argument("--data", choices=("critters", "voc"), default="critters")
    parser.add_argument("--voc-root", metavar="DIR", help="the folder VOC 2012 is in")
    parser.add_argument("--budget", choices=("ci", "laptop", "paper"), help="default: laptop; paper for voc")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="N", help="the networks shown are the first's"
    )
    options = vars(parser.parse_args(arguments))
    for path in make_figures(options.pop("out"), seed=options["seeds"][0], **options):
        print(path)


if __name__ == "__main__":
    main()
