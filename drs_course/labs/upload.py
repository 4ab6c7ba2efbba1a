"""Images that a user uploads: read with suspicion, refused with a sentence."""

import io
import math
import re
import warnings
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps

MOST_PIXELS = 40_000_000
MOST_BYTES = 10_000_000  # a Jupyter server takes no larger message
SMALLEST = 16  # pixels a side
# Of a JPEG's pixels times the passes in which they are coded, about 5 seconds: a progressive JPEG has ten
# passes, a forged one 100,000.
MOST_WORK = 8_000_000_000
# What cameras, browsers and screenshots write; no format that starts another program to be read. Pillow's
# JPEG reads the MPO of cameras too.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# What else is uploaded by mistake, by how it begins: patterns.
OTHERS = {
    rb"\Z": "empty", rb"%PDF": "a PDF", rb"%!PS": "PostScript", rb"II\*\0|MM\0\*": "a TIFF",
    rb"\0\0\x01\0": "an icon", rb"<svg": "an SVG", rb"<\?xml": "XML (an SVG?)", rb"PK": "a ZIP archive",
    rb"....ftyp": "a HEIC or AVIF image or a film", rb"": "damaged or of another kind",
}  # fmt: skip


class ImageRefused(ValueError):
    """An upload that is not used; the message is a sentence for whoever uploaded it."""


def read_image(data, longest):
    """An uploaded file's bytes as a picture, uint8 (H, W, 3), RGB, upright, its longer side at most
    ``longest``.

    Transparent parts are put on white; of a moving picture the first frame is taken. Nothing is decoded
    before the size that the file claims was found small enough.

    Raises:
        ImageRefused: no image, an unknown format, damaged or truncated, too many bytes or pixels, too small.
    """
    if len(data) > MOST_BYTES:
        size = f"{math.ceil(len(data) / 1e5) / 10} MB; at most {MOST_BYTES / 1e6:.0f} MB are read"
        raise ImageRefused(f"The file has {size}. Make a smaller copy of it and upload that.")
    image = _opened(data)
    width, height = image.size
    size = f"{width} x {height} pixels"
    # A pass begins with these two bytes, which coded pixels never hold.
    passes = data.count(b"\xff\xda") if data.startswith(b"\xff\xd8") else 1
    if width * height > MOST_PIXELS:
        raise _too_large(size)
    if min(width, height) < SMALLEST:
        raise ImageRefused(
            f"The image has {size}; both sides must have {SMALLEST} or more. Upload a larger one."
        )
    if width * height * passes > MOST_WORK:
        raise ImageRefused(
            f"The image is coded in {passes} passes, which could take minutes to read. Save it again, as an "
            "ordinary JPEG."
        )
    try:
        picture = np.array(_small(image, longest))
    except Exception as error:
        raise ImageRefused(
            f"The image is damaged or not complete ({error}). Save it again, or upload another."
        ) from None
    if min(picture.shape[:2]) < SMALLEST:
        raise ImageRefused(
            f"The image is a strip of {size}; nothing would be left of its short side. Crop it."
        )
    return picture


def _opened(data):
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes between its limit and twice that; `read_image` checks them.
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise _too_large("far more than 100 million pixels") from None
    except Exception:
        # A damaged header makes Pillow's readers raise errors of almost any kind.
        kind = next(name for start, name in OTHERS.items() if re.match(start, data, re.DOTALL))
        raise ImageRefused(
            f"The file is {kind}, not an image that can be read here. Upload one of {', '.join(FORMATS)}."
        ) from None


def _too_large(size):
    most = f"at most {MOST_PIXELS // 1_000_000} million are read"
    return ImageRefused(f"The image has {size}; {most}. Make a smaller copy of it and upload that.")


def _small(image, longest):
    """The opened image at its final size, RGB and upright. Reduced first: all else is done to few pixels."""
    image.draft("RGB", (2 * longest, 2 * longest))  # a JPEG need not be decoded at full size
    deep = image.mode.startswith("I") or image.mode == "F"
    image.load()  # a PNG may carry its transparency and orientation behind its pixels
    clear = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    image = image.convert("F" if deep else "RGBA" if clear else "RGB")
    image.thumbnail((longest, longest), Image.Resampling.BICUBIC)
    with suppress(Exception), warnings.catch_warnings():  # an image is none the worse for damaged EXIF
        warnings.simplefilter("ignore")
        image = ImageOps.exif_transpose(image)
    if deep:
        values = np.asarray(image) - image.getextrema()[0]
        grey = values * (255 / (values.max() or 1))
        image = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    elif clear:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return image
