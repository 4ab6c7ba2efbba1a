"""A DRS module at work, drawn from real maps and control values: the paper's Figure 2, and one channel."""

import matplotlib
import numpy as np
import seaborn as sns
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from drs_course.plots.charts import label_at_right
from drs_course.plots.colors import MAP_COLORS, OKABE_ITO, array, as_picture, overlay
from drs_course.plots.layout import DPI, STYLE, WIDTH, NotebookFigure


def figure2(features, control):
    """Figure 2: a DRS module at work, its three parts between the maps that go in and those that come out.

    features: K maps of one image, (K, H, W) with K at most 6, as they reach the module (ReLU is applied).
    control: the control values G, a number or (K,), in [0, 1]. The dots mark the K maximum elements; each
    arrow leads from 1 down to the map's control value, so a long arrow is a strong suppression. Colours are
    relative to each map's own maximum.
    """
    maps = array(features).astype(np.float64).clip(0)
    control = array(control).astype(np.float64)
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

    with matplotlib.rc_context(STYLE):
        figure = NotebookFigure((WIDTH, height), dpi=DPI)
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
            ax.plot(x, y, "o", ms=6, mfc=OKABE_ITO[4], mec="white", mew=1)
        for y, name in ((upper, "max-element\nextractor"), (lower, "suppression\ncontroller")):
            arrow((0.25 + side + 0.04, center), (1.15, center), (1.15, y), (1.4, y))
            box(1.4, y, 1.15, name)
            arrow((2.55, y), (2.85, y))
        numbers(2.9, upper, peak, np.ones(count), r"$X_{\mathrm{max}}$")
        for k, value in enumerate(control):
            y = lower + (count / 2 - 0.5 - k) * strip
            ax.plot((2.9, 3.4), (y, y), color="0.85", linewidth=3, solid_capstyle="butt")
            style = {"arrowstyle": "-|>", "color": OKABE_ITO[6], "linewidth": 1.6}
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
        left.set(xticks=[], yticks=[row], yticklabels=[f"row {row}"], title=title)
        sns.despine(ax=left, left=True, bottom=True)
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
    size = picture.shape[1::-1]
    scale = features.max() or 1
    kept = np.minimum(features, control * features.max())
    enlarged = [
        np.asarray(Image.fromarray((one / scale).astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
        for one in (features, kept)
    ]
    row = features.argmax() // features.shape[1]
    with sns.axes_style("ticks", STYLE), matplotlib.rc_context(STYLE):
        figure = NotebookFigure((WIDTH, 5), dpi=DPI, layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1))
        pictures = {"image": picture, "one channel $X$ of it": overlay(picture, enlarged[0])}
        pictures[rf"after DRS: $\min(X, {control:.2f}\ \max X)$"] = overlay(picture, enlarged[1])
        for ax, (title, shown) in zip(above.subplots(1, 3), pictures.items(), strict=True):
            ax.imshow(shown)
            ax.set(xticks=[], yticks=[], title=title)
            if title != "image":
                ax.axhline((row + 0.5) * len(picture) / len(features), color="white", linewidth=1.2)
            sns.despine(ax=ax, left=True, bottom=True)
        _draw_cut(below.subplots(), features[row], control, "position along the white line, in $X$")
    return figure


def _one_map(features, control):
    """A channel's map after the ReLU, float64, and its control value, both checked."""
    features = array(features).astype(np.float64)
    if features.ndim != 2 or not features.size:
        raise ValueError(f"A feature map is (H, W): one channel of one image; got shape {features.shape}.")
    control = float(array(control))
    if not np.isfinite(features).all() or not 0 <= control <= 1:
        raise ValueError("The feature map must be finite and the control value between 0 and 1.")
    return features.clip(0), control


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
