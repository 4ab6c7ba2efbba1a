"""What the labs show, drawn without matplotlib: panels, maps, cues, a profile, as arrays and as bytes.

A redraw must be done before the next frame of a drag, and a figure takes matplotlib ten times as long. Panels
are (H, W, 3) uint8; colours are those of `drs_course.plots`.
"""

import io
import textwrap
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from drs_course.plots import outline
from drs_course.plots.colors import colored

SIDE = 256  # pixels: the longer side of a panel, twice a Critters image
GAP, LINE = 6, 21  # a page may show the sheet at three quarters of its size
INK, PAPER = (40, 40, 40), (255, 255, 255)
RIGHT, WRONG, MISSED = "#0072B2", "#D55E00", "#F0C000"
SUPPRESSED, KEPT = "#E69F00", "#CCCCCC"
PEAK, TAU = "#B0528A", "#0072B2"
DIFFERENCES = "PuOr_r"  # lower is violet, higher is orange; the colour-blind tell them apart


def rgb(color):
    """A matplotlib colour as three integers of 0..255."""
    return tuple(round(255 * part) for part in matplotlib.colors.to_rgb(color))


def difference(values):
    """A signed map (H, W) in [-1, 1] in colours: white where nothing changed. Returns uint8 (H, W, 3)."""
    return colored((np.asarray(values, np.float32).clip(-1, 1) + 1) / 2, DIFFERENCES)


def heat(values, top=1.0):
    """A map (H, W) from 0 to ``top`` in `drs_course.plots.MAP_COLORS`. Returns uint8 (H, W, 3)."""
    share = np.asarray(values, np.float32) / top if top > 0 else np.zeros_like(values)
    return colored(share.clip(0, 1))


def compared_cue(image, cue, on_object, ignored, strength=0.7):
    """An object cue against the truth, over its image: right, wrong and missed pixels in their colours.

    image: uint8 (H, W, 3); cue, on_object, ignored: bool (H, W), ignored being what the mask leaves open.
    Returns uint8 (H, W, 3).
    """
    result = image.astype(np.float32)
    for where, color in (
        (cue & on_object, RIGHT),
        (cue & ~on_object, WRONG),
        (~cue & on_object, MISSED),
    ):
        where = where & ~ignored
        result[where] = (1 - strength) * result[where] + strength * np.array(rgb(color), np.float32)
    return np.round(result).astype(np.uint8)


def outlined(image, region, color=(255, 255, 255)):
    """The image (H, W, 3) with the outline of a region, bool (H, W), drawn on it."""
    result = image.copy()
    result[outline(region)] = color
    return result


def fitted(picture, side=SIDE):
    """A picture resized so that its longer side is ``side``: whole multiples keep their pixels sharp."""
    height, width = picture.shape[:2]
    factor = side / max(height, width)
    if factor == 1:
        return picture
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    how = Image.Resampling.NEAREST if factor == int(factor) else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(picture).resize(size, how))


def sheet(rows, side=SIDE, columns=None):
    """Panels in rows under their captions.

    rows: lists of (caption, picture uint8 (H, W, 3)); a caption may be an empty string. columns: how many
    panels wide the sheet is (None: as the longest row). Returns uint8 (H, W, 3).
    """
    columns = columns or max(map(len, rows))
    strips = []
    for row in rows:
        panels = [_panel(caption, fitted(picture, side), side) for caption, picture in row]
        tall = max(panel.shape[0] for panel in panels)
        strip = np.full((tall + GAP, columns * (side + GAP) - GAP, 3), 255, np.uint8)
        for column, panel in enumerate(panels):
            left = column * (side + GAP)
            strip[: panel.shape[0], left : left + panel.shape[1]] = panel
        strips.append(strip)
    return np.concatenate(strips)


def _panel(caption, picture, side):
    height, width = picture.shape[:2]
    panel = np.full((LINE + height, side, 3), 255, np.uint8)
    panel[LINE:, :width] = picture
    if caption:
        panel[:LINE] = _written(caption, side)
    return panel


@lru_cache(maxsize=512)
def _written(text, width, size=15, height=LINE):
    """A line of text as pixels (height, width, 3); shrunk where it would not fit."""
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    while size > 8 and draw.textlength(text, font(size)) > width:
        size -= 1
    draw.text((0, height - 4), text, INK, font(size), anchor="ls")
    return np.asarray(image)


@lru_cache
def font(size):
    """Matplotlib's own font, so that every machine draws the same letters."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


def profile_picture(values, control, width=2 * SIDE + GAP, height=SIDE):
    """A feature map's row through its maximum: X, X_max and tau, with what lies above tau shaded.

    values: (W,), not negative, with the map's maximum among them; control: G in [0, 1]. Returns uint8
    (height, width, 3).
    """
    values = np.asarray(values, np.float64)
    peak = values.max()
    tau = control * peak
    scale = 2  # drawn at twice the size and reduced, which smooths the lines
    image = Image.new("RGB", (scale * width, scale * height), PAPER)
    draw = ImageDraw.Draw(image)
    left, right, top, bottom = 10, width - 135, 28, height - 28

    def x(position):
        return scale * (left + (right - left) * position / len(values))

    def y(value):
        return scale * (bottom - (bottom - top) * value / (peak or 1))

    for k, value in enumerate(values):
        draw.rectangle((x(k), y(min(value, tau)), x(k + 1), y(0)), fill=rgb(KEPT))
        if value > tau:
            draw.rectangle((x(k), y(value), x(k + 1), y(tau)), fill=rgb(SUPPRESSED))
    stairs = [(x(k + end), y(value)) for k, value in enumerate(values) for end in (0, 1)]
    draw.line(stairs, fill=INK, width=scale + 1)
    draw.line((x(0), y(0), x(len(values)), y(0)), fill=INK, width=scale)
    _dashed(draw, x(0), x(len(values)), y(peak), rgb(PEAK), dash=4 * scale)
    _dashed(draw, x(0), x(len(values)), y(tau), rgb(TAU), dash=10 * scale)
    apart = scale * 18
    middle = y(tau) if y(tau) - y(peak) >= apart else y(peak) + apart
    place = x(len(values)) + scale * 6
    for at, text, color in (
        (y(peak), f"X_max = {peak:.2f}", PEAK),
        (middle, f"τ = {control:.2f} X_max", TAU),
    ):
        draw.text((place, at), text, rgb(color), font(14 * scale), anchor="lm")
    for at, text, color in (
        (0, "■ kept, min(X, τ)", "#8A8A8A"),
        (165, "■ suppressed", SUPPRESSED),
        (295, "▔ X", INK),
    ):
        fill = rgb(color) if isinstance(color, str) else color
        draw.text((scale * (left + at), scale * 9), text, fill, font(14 * scale), anchor="lm")
    draw.text(
        (scale * left, scale * (height - 10)),
        "position in the marked row",
        INK,
        font(14 * scale),
        anchor="lm",
    )
    return np.asarray(image.resize((width, height), Image.Resampling.BOX))


def _dashed(draw, x0, x1, y, color, dash):
    at = x0
    while at < x1:
        draw.line((at, y, min(at + dash, x1), y), fill=color, width=3)
        at += 2 * dash


def jpeg(picture):
    """The picture as the labs send it: small enough for a slow line, quick enough for every frame."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


def snapshot(title, description, about, picture, numbers, note=""):
    """A lab as one PNG for readers without a kernel: title, the state in words, the picture, the numbers.

    numbers: rows of text, the first one the heading. Bytes, in 256 colours.
    """
    width = max(picture.shape[1], 480)
    canvas = np.full((picture.shape[0] + GAP, width, 3), 255, np.uint8)
    canvas[GAP:, : picture.shape[1]] = picture
    rows = [_written(title, width, 17, 26), _written(description, width, 13, 20)]
    rows += [_written(line, width, 13, 20) for line in textwrap.wrap(about, width // 8)]
    rows.append(canvas)
    if numbers:
        rows.append(_columns(numbers, width))
    if note:
        rows += [_written(line, width, 13, 20) for line in textwrap.wrap(note, width // 8)]
    image = Image.fromarray(np.concatenate(rows))
    buffer = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _columns(rows, width, line=20):
    image = Image.new("RGB", (width, line * len(rows) + 4), PAPER)
    draw, left = ImageDraw.Draw(image), 0
    for column in range(max(map(len, rows))):
        cells = [row[column] if column < len(row) else "" for row in rows]
        wide = max(draw.textlength(cell, font(13)) for cell in cells)
        for number, cell in enumerate(cells):
            at, anchor = (left, "ls") if column == 0 else (left + wide, "rs")
            draw.text((at, line * (number + 1) - 4), cell, INK, font(13), anchor=anchor)
        left += wide + 18
    return np.asarray(image)
