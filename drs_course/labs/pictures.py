"""What the labs show, drawn without matplotlib: panels, maps, cues, a profile, as arrays and as bytes.

A redraw must be done before the next frame of a drag, and a figure takes matplotlib ten times as long. Panels
are (H, W, 3) uint8; colours are those of `drs_course.plots`.
"""

import io
import textwrap
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from drs_course.plots.colors import colored, painted, rgb

SIDE = 256  # pixels: the longer side of a panel, twice a Critters image
GAP, LINE = 6, 21  # a page may show the sheet at three quarters of its size
INK, PAPER = (40, 40, 40), (255, 255, 255)
RIGHT, WRONG, MISSED = "#0072B2", "#D55E00", "#F0C000"
SUPPRESSED, KEPT = "#E69F00", "#CCCCCC"
PEAK, TAU = "#B0528A", "#0072B2"
NO_CLASS = "image: it shows none of the classes"
DIFFERENCES = "PuOr_r"  # lower is violet, higher is orange; the colour-blind tell them apart


def blank(height, width):
    """A light grey picture (height, width, 3), for where there is nothing to show."""
    return np.full((height, width, 3), 235, np.uint8)


def difference(values):
    """A signed map (H, W) in [-1, 1] in colours: white where nothing changed. Returns uint8 (H, W, 3)."""
    return colored((np.asarray(values, np.float32).clip(-1, 1) + 1) / 2, DIFFERENCES)


def heat(values, top=1.0):
    """A map (H, W) from 0 to ``top`` in `drs_course.plots.MAP_COLORS`. Returns uint8 (H, W, 3)."""
    share = np.asarray(values, np.float32) / top if top > 0 else np.zeros_like(values)
    return colored(share.clip(0, 1))


def compared_cue(image, cue, on_object, ignored):
    """An object cue against the truth, over its image: right, wrong and missed pixels in their colours.

    image: uint8 (H, W, 3); cue, on_object, ignored: bool (H, W), ignored being what the mask leaves open.
    Returns uint8 (H, W, 3).
    """
    kinds = np.select([ignored, cue & on_object, cue, on_object], [0, 1, 2, 3])
    return painted(image, kinds, rgb("black", RIGHT, WRONG, MISSED), 0.7)


def fitted(picture, side=SIDE):
    """A picture resized so that its longer side is ``side``: whole multiples keep their pixels sharp."""
    longest = max(picture.shape[:2])
    how = Image.Resampling.NEAREST if side % longest == 0 else Image.Resampling.BILINEAR
    return np.asarray(ImageOps.contain(Image.fromarray(picture), (side, side), how))


def sheet(*rows, side=SIDE, columns=None):
    """Panels in rows under their captions.

    rows: dicts from a caption to a picture, uint8 (H, W, 3). columns: how many panels wide the sheet is
    (None: as the longest row). Returns uint8 (H, W, 3).
    """
    columns = columns or max(map(len, rows))
    strips = []
    for row in rows:
        panels = [(_written(caption, side), fitted(picture, side)) for caption, picture in row.items()]
        tall = LINE + max(len(picture) for _, picture in panels) + GAP
        strip = np.full((tall, columns * (side + GAP) - GAP, 3), 255, np.uint8)
        for left, (caption, picture) in zip(range(0, strip.shape[1], side + GAP), panels, strict=False):
            strip[:LINE, left : left + side] = caption
            strip[LINE : LINE + len(picture), left : left + picture.shape[1]] = picture
        strips.append(strip)
    return np.concatenate(strips)


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
    left, right, bottom = scale * 10, scale * (width - 135), scale * (height - 28)
    x = left + (right - left) / len(values) * np.arange(len(values) + 1)

    def y(value):
        return bottom - (bottom - scale * 28) * value / (peak or 1)

    def write(across, down, text, color):
        draw.text((across, down), text, color, font(14 * scale), anchor="lm")

    for start, end, value in zip(x[:-1], x[1:], values, strict=True):
        draw.rectangle((start, y(min(value, tau)), end, bottom), fill=KEPT)
        if value > tau:
            draw.rectangle((start, y(value), end, y(tau)), fill=SUPPRESSED)
    steps = np.stack([x[:-1], x[1:]], 1).ravel()
    draw.line([*zip(steps, map(y, np.repeat(values, 2)), strict=True)], fill=INK, width=scale + 1)
    draw.line((left, bottom, right, bottom), fill=INK, width=scale)
    middle = max(y(tau), y(peak) + 18 * scale)
    for level, place, text, color, dash in (
        (peak, y(peak), f"X_max = {peak:.2f}", PEAK, 4 * scale),
        (tau, middle, f"τ = {control:.2f} X_max", TAU, 10 * scale),
    ):
        for start in np.arange(left, right, 2 * dash):
            draw.line((start, y(level), min(start + dash, right), y(level)), fill=color, width=3)
        write(right + 6 * scale, place, text, color)
    legend = (0, "■ kept, min(X, τ)", "#8A8A8A"), (165, "■ suppressed", SUPPRESSED), (295, "▔ X", INK)
    for across, text, color in legend:
        write(left + scale * across, 9 * scale, text, color)
    write(left, scale * (height - 10), "position in the marked row", INK)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX))


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

    def text(words):
        return [_written(line, width, 13, 20) for line in textwrap.wrap(words, width // 8)]

    shown = np.pad(picture, ((GAP, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=255)
    rows = [_written(title, width, 17, 26), _written(description, width, 13, 20), *text(about), shown]
    rows += [_columns(numbers, width)] * bool(numbers) + text(note)
    buffer = io.BytesIO()
    image = Image.fromarray(np.concatenate(rows)).quantize(256, dither=Image.Dither.NONE)
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _columns(rows, width, line=20):
    """A table as pixels: its first column left-justified, the others right-justified."""
    image = Image.new("RGB", (width, line * len(rows) + 4), PAPER)
    draw, left = ImageDraw.Draw(image), 0
    for column, cells in enumerate(zip_longest(*rows, fillvalue="")):
        right = left + max(draw.textlength(cell, font(13)) for cell in cells)
        for number, cell in enumerate(cells, 1):
            at, anchor = (left, "ls") if column == 0 else (right, "rs")
            draw.text((at, line * number - 4), cell, INK, font(13), anchor=anchor)
        left = right + 18
    return np.asarray(image)
