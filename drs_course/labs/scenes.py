"""Images to look at in a lab, with everything that is shown or scored beside them."""

from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch

from drs_course.labs import pictures
from drs_course.labs.lab import View
from drs_lib.data import IGNORED
from drs_lib.metrics import map_quality

SCORES = {"recall": "recall", "precision": "precision", "iou": "IoU"}


class Scene(NamedTuple):
    """One image of a data set.

    image: uint8 tensor (3, H, W); picture: the same as an array (H, W, 3); labels: float (C,); mask: uint8
    (H, W); classes: [(name, index)] of the classes that the image shows.
    """

    image: torch.Tensor
    picture: np.ndarray
    labels: torch.Tensor
    mask: np.ndarray
    classes: list

    def on_object(self, label):
        """bool (H, W): the pixels that the mask gives to a class, an index from 0."""
        return self.mask == label + 1

    @property
    def unlabelled(self):
        """bool (H, W): the pixels about which the mask says nothing."""
        return self.mask == IGNORED


def scene(dataset, index):
    """The `Scene` of an image of a data set that has masks."""
    image, labels = dataset[index]
    picture = image.permute(1, 2, 0).contiguous().numpy()
    classes = [(dataset.classes[c], c) for c in labels.nonzero().flatten().tolist()]
    return Scene(image, picture, labels, np.asarray(dataset.mask(index)), classes)


def scenes(dataset):
    """`scene` of a data set by index; the last few are kept."""
    return lru_cache(8)(partial(scene, dataset))


def offer_classes(control, scene):
    """Lets a list of classes follow the image: the same classes leave the choice as it is."""
    if tuple(control.options) != tuple(scene.classes):
        control.options = scene.classes


def without_classes(scene, note=""):
    """The `View` of an image of which there is no map to show."""
    return View(pictures.sheet({"image: it shows none of the classes": scene.picture}), [], note)


def cue_scores(values, scene, label, alpha):
    """Recall, precision and IoU of "map > alpha" for one class of one image, as `MapScore` defines them."""
    maps = np.zeros((1, len(scene.labels), *values.shape), np.float32)
    maps[0, label] = values
    labels = np.zeros((1, len(scene.labels)), np.float32)
    labels[0, label] = 1
    scores = map_quality(maps, scene.mask[None], labels, alpha)["per_class"]
    return {name: float(scores[key][label]) for key, name in SCORES.items()}


def score_table(maps, scene, label, alpha):
    """Rows for a lab's numbers: `cue_scores` of maps, a dict from a heading to a map (H, W)."""
    scores = [cue_scores(values, scene, label, alpha) for values in maps.values()]
    rows = [[name, *(column[name] for column in scores)] for name in SCORES.values()]
    return [["in % of this image", *maps], *rows]
