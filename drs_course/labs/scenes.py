"""Images to look at in a lab, with everything that is shown or scored beside them."""

from typing import NamedTuple

import numpy as np

from drs_lib.data import IGNORED
from drs_lib.metrics import map_quality

SCORES = {"recall": "recall", "precision": "precision", "iou": "IoU"}


class Scene(NamedTuple):
    """One image of a data set.

    image: uint8 tensor (3, H, W); picture: the same as an array (H, W, 3); labels: float (C,); mask: uint8
    (H, W); classes: [(name, index)] of the classes that the image shows.
    """

    image: object
    picture: np.ndarray
    labels: object
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


def offer_classes(control, scene):
    """Lets a list of classes follow the image: the same classes leave the choice as it is."""
    if tuple(control.options) != tuple(scene.classes):
        control.options = scene.classes


def cue_scores(values, scene, label, alpha):
    """Recall, precision and IoU of "map > alpha" for one class of one image, as `MapScore` defines them."""
    maps = np.zeros((1, len(scene.labels), *values.shape), np.float32)
    maps[0, label] = values
    labels = np.zeros((1, len(scene.labels)), np.float32)
    labels[0, label] = 1
    scores = map_quality(maps, scene.mask[None], labels, alpha)["per_class"]
    return {name: float(scores[key][label]) for key, name in SCORES.items()}


def score_table(columns):
    """Rows for a lab's numbers; columns: from a heading to the scores of one cue."""
    rows = [["in % of this image", *columns]]
    return rows + [[name, *(scores[name] for scores in columns.values())] for name in SCORES.values()]
