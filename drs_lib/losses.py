"""The losses of the three trainings: each gives a scalar for a network and a `drs_lib.batches.Batch`."""

import torch.nn.functional as F

from drs_lib.data import IGNORED


def classification_loss(model, batch):
    """Binary cross-entropy of P = sigmoid(GAP(F)) against the image's labels ("Implementation Details").

    Args:
        model: images (N, 3, H, W) -> logits (N, C), whose sigmoid is P.
        batch: with ``labels`` float32 (N, C), 0 or 1.

    Returns:
        the mean over images and classes, a float32 scalar.
    """
    return F.binary_cross_entropy_with_logits(model(batch.images).float(), batch.labels)


def refinement_loss(model, batch, size="map", label_mask=False):
    """Mean-squared error of refined maps N against localization maps M ("Localization Map Refinement
    Learning").

    Args:
        model: images -> N (N, C, h, w), linear.
        batch: with ``extra``, M of equation 1, float32 (N, C, H, W) in [0, 1].
        size: "map": M is sampled at N's size, by the grid on which the localization maps were upsampled, so
            that an uncropped map comes back unchanged. "image": N is upsampled instead.
        label_mask: the mean is over the channels of the image's own classes.
    """
    refined, target = model(batch.images).float(), batch.extra
    if size == "map":
        target = resize_maps(target, refined.shape[-2:])
    else:
        refined = resize_maps(refined, target.shape[-2:])
    if not label_mask:
        return F.mse_loss(refined, target)
    error = (refined - target).square().mean((2, 3)) * batch.labels
    return error.sum() / batch.labels.sum().clamp(min=1)


def segmentation_loss(model, batch, size="logits"):
    """Cross-entropy against pseudo labels, over the pixels that have one ("Weakly-Supervised Semantic
    Segmentation").

    Args:
        model: ``training_logits(images)``, whose losses are summed: one map (N, C + 1, h, w) for LargeFOV,
            three scales and their maximum for ASPP.
        batch: with ``extra``, labels uint8 (N, H, W): 0 background, 1..C classes, 255 ignored.
        size: "logits": the labels are sampled, nearest, at the size of each map. "image": the logits are
            upsampled.
    """
    logits = model.training_logits(batch.images)
    return sum(_cross_entropy(scale.float(), batch.extra, size) for scale in logits)


def _cross_entropy(logits, labels, size):
    if size == "image":
        logits = resize_logits(logits, labels.shape[-2:])
    else:
        labels = F.interpolate(labels[:, None].float(), logits.shape[-2:], mode="nearest-exact")[:, 0]
    labels = labels.long()
    # A batch of crops may hold no labelled pixel at all, and the mean over none of them is NaN.
    labelled = (labels != IGNORED).sum()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / labelled.clamp(min=1)


def resize_maps(maps, size):
    """Maps (N, C, H, W) at another size, on the grid of the localization maps: bilinear, corners aligned."""
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=True)


def resize_logits(logits, size):
    """Logits (N, C, h, w) at another size, bilinear, without aligned corners: a logit stands for a cell of
    the image, the same cell from which the nearest label is taken."""
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)
