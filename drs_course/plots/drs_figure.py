"""A DRS module at work, drawn from real maps and control values: the paper's Figure 2, and one channel."""

import matplotlib
import numpy as np
import seaborn as sns
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from drs_course.plots.charts import label_at_right
from drs_course.plots.colors import MAP_COLORS, OKABE_ITO, array, as_picture, overlay
from drs_course.plots.layout import DPI, STYLE, WIDTH, NotebookFigure, bare

SIDE, STEP = 0.62, 0.7  # inches: a map of Figure 2, and from one to the next


def figure2(features, control):
    """Figure 2: a DRS module at work, its three parts between the maps that go in and those that come out.

    features: K maps of one image, (K, H, W) with K at most 6, as they reach the module (ReLU is applied).
    control: the control values G, a number or (K,), in [0, 1]. The dots mark the K maximum elements; each
    arrow leads from 1 down to the map's control value, so a long arrow is a strong suppression. Colours are
    relative to each map's own maximum.
    """
    maps, control = _checked_maps(features, control)
    peak = maps.max((1, 2))
    tau = peak * control
    count = len(maps)
    room = max(count * STEP, 3.2)
    center, top = 0.4 + room / 2, 0.4 + (room + count * STEP) / 2
    upper, lower = center + room / 4, center - room / 4
    strip = min(0.24, (room / 2 - 0.5) / count)

    with matplotlib.rc_context(STYLE):
        figure = NotebookFigure((WIDTH, room + 0.9), dpi=DPI)
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, WIDTH), ylim=(0, room + 0.9))
        ax.axis("off")
        _column(ax, 0.25, top, maps, peak, "$X$", dots=True)
        for y, name in ((upper, "max-element\nextractor"), (lower, "suppression\ncontroller")):
            _arrow(ax, (0.25 + SIDE + 0.04, center), (1.15, center), (1.15, y), (1.4, y))
            _box(ax, 1.4, y, 1.15, name)
            _arrow(ax, (2.55, y), (2.85, y))
        _numbers(ax, 2.9, upper, strip, peak, np.ones(count), r"$X_{\mathrm{max}}$")
        for k, value in enumerate(control):
            y = lower + (count / 2 - 0.5 - k) * strip
            ax.plot((2.9, 3.4), (y, y), color="0.85", linewidth=3, solid_capstyle="butt")
            _head(ax, (3.4, y), (2.9 + value / 2, y), OKABE_ITO[6], 1.6)
            _text(ax, 3.57, y, f"{value:.2f}", fontsize=7.5)
        _text(ax, 3.15, lower + count * strip / 2 + 0.2, "$G$\n$1 × 1 × K$", fontsize=8)
        for y, left in ((upper, 3.42), (lower, 3.75)):
            _arrow(ax, (left, y), (4.1, y), (4.1, center + (0.13 if y > center else -0.13)))
        _text(ax, 4.1, center, r"$\times$", fontsize=13)
        _arrow(ax, (4.22, center), (4.5, center))
        _numbers(ax, 4.55, center, strip, tau, control, r"$\tau = X_{\mathrm{max}}\, G$")
        _arrow(ax, (5.08, center), (5.5, center))
        _box(ax, 5.5, center, 1.25, "suppressor\n" + r"$\mathrm{min}(X, \tau)$")
        below, middle = top - (count - 1) * STEP - SIDE - 0.04, 0.25 + SIDE / 2
        _arrow(ax, (middle, below), (middle, 0.2), (6.125, 0.2), (6.125, center - 0.34))
        _arrow(ax, (6.75, center), (7.55, center))
        _column(ax, 7.6, top, np.minimum(maps, tau[:, None, None]), peak, r"$\hat{X}$")
    return figure


def profile(features, control, title=""):
    """One feature map before and after suppression, along the row through its maximum.

    features: (H, W), as it reaches a DRS module (ReLU is applied); control: its control value G. Left the
    map X with that row marked; right X along the row, its maximum, and the upper bound tau = G max X, with
    what lies above tau, and is cut off, shaded.
    """
    features, control = _one_map(features, control)
    row = features.argmax() // features.shape[1]
    with sns.axes_style("ticks", STYLE), matplotlib.rc_context(STYLE):
        figure = NotebookFigure((7.4, 2.4), dpi=DPI, layout="constrained")
        left, ax = figure.subplots(1, 2, width_ratios=(1, 2.3))
        left.imshow(features, cmap=MAP_COLORS, vmin=0, interpolation="nearest")
        left.axhline(row, color="white", linewidth=1.2)
        bare(left)
        left.set(yticks=[row], yticklabels=[f"row {row}"], title=title)
        _draw_cut(ax, features[row], control, f"position in row {row}")
    return figure


def suppression(image, features, control):
    """What DRS does, in one picture: a feature map over its image, cut at its bound, and what is left.

    image: uint8 (3, H, W) or (H, W, 3). features: (h, w), one channel's map of that image as it reaches a DRS
    module (ReLU is applied, and it is enlarged to the image's size); control: its control value G. Both maps
    are on one scale, from 0 to the maximum of X. Below them the row through the maximum, as in `profile`.
    """
    features, control = _one_map(features, control)
    picture = as_picture(image)
    row, peak = features.argmax() // features.shape[1], features.max()
    pictures = {"image": picture}
    for title, one in (
        ("one channel $X$ of it", features),
        (rf"after DRS: $\min(X, {control:.2f}\ \max X)$", np.minimum(features, control * peak)),
    ):
        shares = Image.fromarray((one / (peak or 1)).astype(np.float32))
        pictures[title] = overlay(picture, shares.resize(picture.shape[1::-1], Image.Resampling.BILINEAR))
    with sns.axes_style("ticks", STYLE), matplotlib.rc_context(STYLE):
        figure = NotebookFigure((WIDTH, 5), dpi=DPI, layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1))
        for ax, (title, shown) in zip(above.subplots(1, 3), pictures.items(), strict=True):
            ax.imshow(shown)
            bare(ax)
            ax.set_title(title)
            if title != "image":
                ax.axhline((row + 0.5) * len(picture) / len(features), color="white", linewidth=1.2)
        _draw_cut(below.subplots(), features[row], control, "position along the white line, in $X$")
    return figure


def _checked_maps(features, control):
    """K maps after the ReLU, float64, and their control values (K,), both checked."""
    maps, control = (array(values).astype(np.float64) for values in (features, control))
    if maps.ndim != 3 or not maps.size or len(maps) > 6:
        raise ValueError(f"Features are 1 to 6 maps of one image, (K, H, W); got shape {maps.shape}.")
    if control.shape not in ((), maps.shape[:1]):
        raise ValueError(f"{len(maps)} maps need one control value, or one each; got shape {control.shape}.")
    if not np.isfinite(maps).all() or not ((control >= 0) & (control <= 1)).all():
        raise ValueError("The features must be finite and the control values between 0 and 1.")
    return maps.clip(0), np.broadcast_to(control, maps.shape[:1])


def _one_map(features, control):
    """A channel's map after the ReLU, float64, and its control value, both checked."""
    features = array(features)
    if features.ndim != 2 or not features.size:
        raise ValueError(f"A feature map is (H, W): one channel of one image; got shape {features.shape}.")
    maps, (control,) = _checked_maps(features[None], control)
    return maps[0], float(control)


def _column(ax, x, top, maps, peak, title, dots=False):
    """Maps one below the other, each up to its peak; dots: on their maxima."""
    pixel = SIDE / max(maps.shape[1:])
    tall, wide = (pixel * n for n in maps.shape[1:])
    left = x + (SIDE - wide) / 2
    for k, values in enumerate(maps):
        low = top - k * STEP - (SIDE + tall) / 2
        limits = {"vmin": 0, "vmax": peak[k] or 1, "extent": (left, left + wide, low, low + tall)}
        ax.imshow(values, cmap=MAP_COLORS, interpolation="nearest", **limits)
        if dots:
            row, column = np.unravel_index(values.argmax(), values.shape)
            place = left + pixel * (column + 0.5), low + tall - pixel * (row + 0.5)
            ax.plot(*place, "o", ms=6, mfc=OKABE_ITO[4], mec="white", mew=1)
    _text(ax, x + SIDE / 2, top + 0.25, f"{title}\n$H × W × K$")


def _numbers(ax, x, y, strip, values, shares, title):
    """A column of numbers, on the colours of their shares of the maximum."""
    count = len(values)
    for k, (value, share) in enumerate(zip(values, shares, strict=True)):
        low = y + (count / 2 - 1 - k) * strip
        color = matplotlib.colormaps[MAP_COLORS](share)
        ax.add_patch(Rectangle((x, low), 0.5, strip, facecolor=color, edgecolor="white"))
        shade = "black" if share > 0.6 else "white"
        _text(ax, x + 0.25, low + strip / 2, f"{value:.2f}", color=shade, fontsize=7.5)
    _text(ax, x + 0.25, y + count * strip / 2 + 0.2, f"{title}\n$1 × 1 × K$", fontsize=8)


def _text(ax, x, y, what, **options):
    ax.text(x, y, what, ha="center", va="center", **options)


def _box(ax, x, y, width, what):
    shape = FancyBboxPatch((x, y - 0.34), width, 0.68, boxstyle="round,pad=0,rounding_size=0.1")
    shape.set(facecolor="#EEF3F8", edgecolor="0.3")
    ax.add_patch(shape)
    _text(ax, x + width / 2, y, what)


def _arrow(ax, *points):
    ax.plot(*zip(*points[:-1], strict=True), color="0.3", linewidth=1.2, solid_capstyle="butt")
    _head(ax, points[-2], points[-1], "0.3", 1.2)


def _head(ax, start, end, color, linewidth):
    style = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops={**style, "color": color, "linewidth": linewidth})


def _draw_cut(ax, values, control, xlabel):
    """A row through a map's maximum, and what its bound cuts off."""
    peak = values.max()
    tau = peak * control
    edges = np.arange(len(values) + 1) - 0.5
    kept = np.minimum(values, tau)
    ax.stairs(kept, edges, fill=True, color="0.8", label=r"$\hat{X}=\min(X,\tau)$")
    ax.stairs(values, edges, baseline=kept, fill=True, color=OKABE_ITO[0], label="suppressed")
    ax.stairs(values, edges, color="0.25", linewidth=1.2, label="$X$")
    ax.axhline(peak, color=OKABE_ITO[4], linestyle=":", linewidth=1.5)
    ax.axhline(tau, color=OKABE_ITO[6], linestyle="--", linewidth=1.5)
    ax.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.08 * peak or 1), xlabel=xlabel)
    ax.xaxis.get_major_locator().set_params(integer=True)
    sns.despine(ax=ax)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, handlelength=1.2)
    names = (
        (peak, rf"$X_{{\mathrm{{max}}}}$ = {peak:.2f}", OKABE_ITO[4]),
        (tau, rf"$\tau$ = {control:.2f} $X_{{\mathrm{{max}}}}$", OKABE_ITO[6]),
    )
    label_at_right(ax, names)
