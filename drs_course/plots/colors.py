"""Colours of maps, labels and cues, and images under them, as arrays; matplotlib draws nothing here.

What images, maps and label maps are: see `drs_course.plots`.
"""

from functools import lru_cache

import matplotlib
import numpy as np
import torch

from drs_lib.data.voc import IGNORED, voc_palette

# Perceptually uniform and safe for the colour-blind; dark where a map is low, so an overlay is a spotlight.
MAP_COLORS = "inferno"
# Okabe and Ito's colours for the colour-blind, in the order that keeps neighbours apart.
OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#F0E442", "#0072B2")
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
CHANGE_COLORS = ("#000000", "#BBBBBB", "#0072B2", "#D55E00", "#56B4E9", "#F0C000")


def label_colors(num_classes):
    """Colours of label maps: uint8 (256, 3), indexed by the label; 0 is background, 255 ignored pixels.

    Up to seven classes: Okabe and Ito's, which the colour-blind can tell apart. More: the PASCAL VOC palette.
    """
    if num_classes > len(OKABE_ITO):
        return voc_palette()
    colors = np.full((256, 3), 200, np.uint8)
    colors[0] = 30
    colors[1 : 1 + len(OKABE_ITO)] = rgb(*OKABE_ITO)
    return colors


def rgb(*colors):
    """Matplotlib's colours as numbers, uint8 (number of colours, 3)."""
    return np.round(255 * matplotlib.colors.to_rgba_array(colors)[:, :3]).astype(np.uint8)


def overlay(image, values):
    """A localization map laid over its image.

    image: uint8 (3, H, W) or (H, W, 3); values: (H, W), clipped to [0, 1]. Returns uint8 (H, W, 3). Raises
    ValueError for sizes that differ and for NaN.
    """
    picture, values = as_picture(image), as_map(values)
    check_same_size(picture, values, "map")
    return blend(picture, colored(values), 0.6)


def overlay_labels(image, labels, num_classes):
    """A label map laid over its image: objects in `label_colors`, background as it is, ignored pixels greyed.

    image: uint8 (3, H, W) or (H, W, 3); labels: uint8 (H, W). Returns uint8 (H, W, 3).
    """
    picture, labels = as_picture(image), as_labels(labels, num_classes)
    check_same_size(picture, labels, "label map")
    return painted(picture, labels, label_colors(num_classes), 0.65)


def cue_changes(before, after, mask, label):
    """What becomes of each pixel when the object cue ``after`` takes the place of ``before``.

    before, after: bool (H, W), such as a map above its threshold. mask: the truth, uint8 (H, W); label: the
    class that the cues are of. Returns uint8 (H, W), an index into `CHANGES`: "right" where the change agrees
    with the mask. Pixels masked 255 are 0. Raises ValueError for other types and sizes.
    """
    before, after, mask = array(before), array(after), array(mask)
    same = before.shape == after.shape == mask.shape
    if not (same and mask.ndim == 2 and before.dtype == after.dtype == bool):
        got = ", ".join(f"{one.dtype} {one.shape}" for one in (before, after, mask))
        raise ValueError(f"cues are bool (H, W), the mask is (H, W): got {got}")
    on_object, new, gone = mask == label, after & ~before, before & ~after
    kinds = [mask == IGNORED, before & after, new & on_object, new, gone & ~on_object, gone]
    return np.select(kinds, range(6)).astype(np.uint8)


def overlay_changes(image, changes, on_object=None):
    """`cue_changes` laid over their image; ``on_object``, bool (H, W), is outlined in black.

    Returns uint8 (H, W, 3). Raises ValueError for sizes that differ.
    """
    picture, changes = as_picture(image), array(changes)
    check_same_size(picture, changes, "map of changes")
    result = painted(picture, changes, rgb(*CHANGE_COLORS), 0.75)
    return result if on_object is None else outlined(result, array(on_object), 0)


def outlined(picture, region, color=255):
    """A picture (H, W, 3) with the `outline` of a region, bool (H, W), drawn on it in a grey or a colour."""
    return np.where(outline(region)[..., None], np.uint8(color), picture)


def outline(region):
    """The pixels of a region, bool (H, W), with a neighbour (of four) outside it; the border is none."""
    padded = np.pad(region, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return region & ~inner


def layer_mean(features):
    """A layer's features (K, h, w) averaged over channels and scaled to [0, 1], as in the paper's Figure 5.

    Features without any contrast give zeros. Raises ValueError for another shape and for NaN.
    """
    features = array(features).astype(np.float64)
    if features.ndim != 3 or not features.size:
        raise ValueError(f"Features of one image are (channels, height, width); got shape {features.shape}.")
    mean = features.mean(0)
    if not np.isfinite(mean).all():
        raise ValueError("The features contain NaN or infinity: the network they come from has diverged.")
    span = mean.max() - mean.min()
    return (mean - mean.min()) / span if span > 0 else np.zeros_like(mean)


def array(values):
    return values.detach().cpu().numpy() if torch.is_tensor(values) else np.asarray(values)


def as_picture(image):
    image = array(image)
    if image.dtype == np.uint8 and image.ndim == 3 and image.size:
        if image.shape[2] == 3:
            return image
        if image.shape[0] == 3:
            return image.transpose(1, 2, 0)
    raise ValueError(
        f"An image is uint8, (3, H, W) or (H, W, 3); got {image.dtype} {image.shape}. "
        "Show the data set's image, not the normalised one."
    )


def as_map(values):
    values = array(values)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"A map is (H, W): one class of one image; got shape {values.shape}.")
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("The map contains NaN or infinity: the network it comes from has diverged.")
    return values.clip(0, 1)


def as_labels(labels, num_classes):
    labels = array(labels)
    if labels.ndim != 2 or labels.dtype != np.uint8 or not labels.size:
        raise ValueError(f"A label map is uint8 (H, W); got {labels.dtype} {labels.shape}.")
    if ((labels > num_classes) & (labels != IGNORED)).any():
        raise ValueError(
            f"A label map has 0 (background), 1..{num_classes} and 255 (ignored); "
            f"this one has {np.unique(labels)}."
        )
    return labels


def check_same_size(picture, values, what):
    if picture.shape[:2] != values.shape:
        size, own = ("x".join(map(str, one.shape[:2])) for one in (values, picture))
        raise ValueError(f"The {what} is {size} and its image {own}: bring it to the image's size first.")


def colored(values, name=MAP_COLORS):
    """Values (H, W) in [0, 1] in the colours of a matplotlib map, uint8 (H, W, 3)."""
    return _table(name)[(255 * values).round().astype(np.uint8)]


@lru_cache
def _table(name):
    return (255 * matplotlib.colormaps[name](np.arange(256))[:, :3]).round().astype(np.uint8)


def painted(picture, kinds, colors, strength):
    """A picture under the colours of its pixels' kinds, integers (H, W) from 0; kind 0 is left as it is."""
    return np.where((kinds == 0)[..., None], picture, blend(picture, colors[kinds], strength))


def blend(picture, colors, strength):
    """A picture under colours, both (..., 3); strength: the colours' share, from 0 to 1."""
    return np.round((1 - strength) * picture + strength * colors.astype(np.float32)).astype(np.uint8)
