"""Images that a user uploads: read with suspicion, refused with a sentence."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

MOST_PIXELS = 40_000_000
MOST_BYTES = 10_000_000  # a Jupyter server takes no larger message
SMALLEST = 16  # pixels a side
# What cameras, browsers and screenshots write; no format that starts another program to be read.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP")


class ImageRefused(ValueError):
    """An upload that is not used; the message is a sentence for whoever uploaded it."""


def read_image(data, longest):
    """An uploaded file's bytes as a picture, uint8 (H, W, 3), RGB, upright, its longer side at most ``longest``.

    Transparent parts are put on white; of a moving picture the first frame is taken. Nothing is decoded before
    the size that the file claims was found small enough.

    Raises:
        ImageRefused: no image, an unknown format, damaged or truncated, too many bytes or pixels, too small.
    """
    if len(data) > MOST_BYTES:
        raise ImageRefused(
            f"The file has {len(data) / 1e6:.0f} MB; at most {MOST_BYTES / 1e6:.0f} MB are read. Make a smaller "
            "copy of it and upload that."
        )
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes between its limit and twice that; the sizes are checked below.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise _too_large("far more than 100 million pixels") from None
    except Exception:
        # A damaged header makes Pillow's readers raise errors of almost any kind.
        raise ImageRefused(
            f"This file is not an image that can be read here. Upload one of {', '.join(FORMATS[:1] + FORMATS[2:])}."
        ) from None
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise _too_large(f"{width} x {height} pixels")
    if min(width, height) < SMALLEST:
        raise ImageRefused(
            f"The image has {width} x {height} pixels; both sides must have {SMALLEST} or more."
        )
    try:
        image.draft("RGB", (2 * longest, 2 * longest))  # a JPEG need not be decoded at full size
        image = ImageOps.exif_transpose(image)
        image = _on_white(image)
        image.thumbnail((longest, longest), Image.Resampling.BICUBIC)
        picture = np.array(image)
    except Exception as error:
        raise ImageRefused(
            f"The image is damaged or not complete ({error}). Save it again, or upload another."
        ) from None
    if min(picture.shape[:2]) < SMALLEST:
        raise ImageRefused(
            f"The image is a strip of {width} x {height} pixels; nothing would be left of its short side. Crop it."
        )
    return picture


def _too_large(size):
    return ImageRefused(
        f"The image has {size}; at most {MOST_PIXELS // 1_000_000} million are read. Make a smaller copy of it and "
        "upload that."
    )


def _on_white(image):
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        span = values.max() - values.min()
        return Image.fromarray(((values - values.min()) * (255 / (span or 1))).astype(np.uint8)).convert(
            "RGB"
        )
    return image.convert("RGB")
