"""The paper's Figure 2: a DRS module at work, drawn from real maps and control values."""

import matplotlib
import numpy as np
from matplotlib.patches import FancyBboxPatch, Rectangle

from drs_lib.plots.colors import MAP_COLORS, OKABE_ITO, array
from drs_lib.plots.layout import DPI, STYLE, WIDTH, NotebookFigure


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
