"""Scores: mean IoU of label maps, exact-match accuracy of the classifier, quality of localization maps.

The first and the last read masks: they are for scoring, and no training loss is computed here.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from drs_lib.data import IGNORED
from drs_lib.data.transforms import as_tensor
from drs_lib.labels import MAPS_HINT, check_unit


def iou_per_class(confusion):
    """Intersection over union of each label from a (K, K) confusion matrix, rows truth, columns prediction.

    A label that occurs neither in the truth nor in the prediction has no IoU: NaN.
    """
    confusion = np.asarray(confusion, dtype=np.float64)
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(f"a confusion matrix is square, (K, K); got shape {confusion.shape}.")
    if not (confusion >= 0).all():
        raise ValueError("a confusion matrix counts pixels; this one holds NaN or negative numbers.")
    intersection = np.diag(confusion)
    return _ratio(intersection, confusion.sum(axis=0) + confusion.sum(axis=1) - intersection)


def mean_iou(confusion):
    """Mean IoU of a (K, K) confusion matrix over the labels that occur in the truth or the prediction."""
    iou = iou_per_class(confusion)
    if np.isnan(iou).all():
        raise ValueError("the confusion matrix is empty: no pixel was scored. Call update() first.")
    return float(np.nanmean(iou))


class SegmentationScore:
    """Mean IoU over a set of images, from one confusion matrix of all their pixels, as VOC scores it.

    Pixels whose mask is 255 are left out. A prediction may hold 255 too, when it is a pseudo label:
    ``ignored_prediction="background"`` (default) counts such pixels as background, so that
    ignoring hard pixels can't raise the score; ``"exclude"`` leaves them out.

    Args:
        num_classes: number of labels, background included: a data set's ``num_classes`` + 1, 21 for VOC.
    """

    def __init__(self, num_classes, ignored_prediction="background"):
        if ignored_prediction not in ("background", "exclude"):
            raise ValueError(
                f"ignored_prediction must be 'background' or 'exclude'; got {ignored_prediction!r}."
            )
        self.num_classes = num_classes
        self.ignored_prediction = ignored_prediction
        # With a column for pixels without a prediction.
        self._counts = np.zeros((num_classes, num_classes + 1), np.int64)

    def update(self, pred, mask):
        """Add predictions and masks, integer tensors or arrays of equal shape: (H, W) or (N, H, W)."""
        mask = _whole_numbers(mask)
        pred = _whole_numbers(pred).to(mask.device)
        if pred.shape != mask.shape:
            raise ValueError(
                f"prediction {tuple(pred.shape)} and mask {tuple(mask.shape)} differ in size; score at the "
                "image's size."
            )
        end = f"0..{self.num_classes - 1} (background included in num_classes)"
        for name, values in (("the prediction", pred), ("the mask", mask)):
            _check_range(name, values, self.num_classes, end)
        scored, columns = mask != IGNORED, self.num_classes + 1
        places = mask[scored] * columns + pred[scored].clamp(max=self.num_classes)
        counts = torch.bincount(places, minlength=self._counts.size).cpu().numpy()
        self._counts += counts.reshape(self._counts.shape)
        return self

    @property
    def claimed(self):
        """(K, K) integer array, rows truth, columns prediction, of the pixels whose prediction is not 255."""
        return self._counts[:, :-1].copy()

    @property
    def confusion(self):
        """(K, K) integer array, rows truth, columns prediction, that is scored."""
        counts = self._counts.copy()
        if self.ignored_prediction == "background":
            counts[:, 0] += counts[:, -1]
        return counts[:, :-1]

    def compute(self):
        """``miou``, the mean over labels that occur in truth or prediction, and ``iou`` per label (K,)."""
        return {"miou": mean_iou(self.confusion), "iou": iou_per_class(self.confusion)}


def exact_match_accuracy(logits, labels):
    """Fraction of images with every one of the C image-level labels right, at a sigmoid of 0.5 or more.

    The paper gives 72.6 % and 68.7 % "classification accuracy" without a definition; this is the one of the
    released code. Logits and labels are (N, C). Raises ValueError for other shapes, for logits that are not
    finite and for unknown labels.
    """
    logits, labels = torch.as_tensor(logits), known_labels(labels)
    if logits.ndim != 2 or logits.shape != labels.shape or not len(logits):
        raise ValueError(
            f"logits and labels must both be (N, C), N at least 1; got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if not torch.isfinite(logits).all():
        raise ValueError(
            "the logits hold NaN or infinity: the network has diverged; train it again with a lower learning "
            "rate."
        )
    return ((logits >= 0) == (labels > 0).to(logits.device)).all(dim=1).float().mean().item()


def known_labels(labels):
    """Image-level labels as a tensor. Raises ValueError if some are NaN, which is how data sets say that they
    don't know them."""
    labels = torch.as_tensor(labels)
    if torch.isnan(labels).any():
        raise ValueError(
            "the image-level labels are unknown (NaN), as those of a data set with labels='none' are: take "
            "one that has labels."
        )
    return labels


class MapScore:
    """Quality of localization maps against masks, over many images, for the classes that their labels name.

    Every pair of image and present class c compares the map of c with the pixels that the mask gives to c.
    Counts are pooled per class over all images and averaged over classes, as mIoU does; pixels masked 255 are
    left out.
    """

    KEYS = ("recall", "precision", "iou", "on_object", "on_background")

    def __init__(self, alpha=0.2):
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is a threshold and must lie in [0, 1]; got {alpha!r}.")
        self.alpha = alpha
        self._sums = None

    def update(self, maps, masks, labels):
        """Add maps (N, C, H, W) in [0, 1], masks (N, H, W) and image-level labels (N, C).

        Raises ValueError for other shapes or values, NaN among them.
        """
        maps = torch.as_tensor(maps)
        masks = _whole_numbers(masks).to(maps.device)
        labels = (known_labels(labels) > 0).to(maps.device)
        expected = (maps.shape[0], *maps.shape[2:]), maps.shape[:2]
        if maps.ndim != 4 or (masks.shape, labels.shape) != expected:
            raise ValueError(
                "maps (N, C, H, W), masks (N, H, W) and labels (N, C) do not belong together: got "
                f"{tuple(maps.shape)}, {tuple(masks.shape)} and {tuple(labels.shape)}."
            )
        classes = maps.shape[1]
        _check_range("a mask", masks, classes + 1, f"0..{classes}")
        image, c = torch.nonzero(labels, as_tuple=True)
        values, mask = maps[image, c].flatten(1), masks[image].flatten(1)
        check_unit(values, "maps", MAPS_HINT)
        values = values.float()
        if self._sums is None:
            self._sums = torch.zeros(7, classes, dtype=torch.float64)
        elif self._sums.shape[1] != classes:
            raise ValueError(f"maps of {self._sums.shape[1]} classes came before; now {classes}.")

        scored, background = mask != IGNORED, mask == 0
        on_object = mask == (c + 1)[:, None]
        above = (values > self.alpha) & scored
        found = above & on_object
        sums = (
            found.sum(1), above.sum(1), on_object.sum(1), (above | on_object).sum(1), background.sum(1),
            (values * on_object).sum(1), (values * background).sum(1),
        )  # fmt: skip
        # float64 lives on the CPU: MPS has none.
        self._sums.index_add_(1, c.cpu(), torch.stack([total.cpu().double() for total in sums]))
        return self

    def compute(self):
        """The scores as a dict, each the mean over the classes for which it is defined.

        ``recall``, ``precision`` and ``iou`` of "map > alpha"; ``on_object`` and ``on_background``, the mean
        map value on the class's own pixels and on background pixels. ``per_class`` holds the same keys as
        arrays (C,), NaN where undefined (precision: a map never above alpha; recall and ``on_object``: no
        pixel of the class).
        """
        if self._sums is None:
            raise ValueError("no map was scored yet; call update() first.")
        found, above, objects, union, background, object_sum, background_sum = self._sums.numpy()
        parts = found, found, found, object_sum, background_sum
        wholes = objects, above, union, objects, background
        per_class = dict(zip(self.KEYS, map(_ratio, parts, wholes), strict=True))
        return {**{key: _mean(values) for key, values in per_class.items()}, "per_class": per_class}


def _whole_numbers(values):
    tensor = as_tensor(values)
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ValueError(
            f"label maps hold integers; got {tensor.dtype}. Take the argmax of probabilities first."
        )
    return tensor.long()


def _check_range(name, values, count, expected):
    outside = values[(values != IGNORED) & ((values < 0) | (values >= count))]
    if outside.numel():
        raise ValueError(f"{name} holds label {outside[0].item()}; expected {expected} or 255 for ignored.")


def _ratio(part, whole):
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def _mean(values):
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan
