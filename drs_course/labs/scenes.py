"""Images to look at in a lab, with everything that is shown or scored beside them."""

from typing import NamedTuple

import numpy as np
import torch

from drs_lib.data import IGNORED
from drs_lib.metrics import MapScore

SCORES = {"recall": "recall", "precision": "precision", "iou": "IoU"}


class Scene(NamedTuple):
    """One image of a data set.

    image: uint8 tensor (3, H, W); picture: the same as an array (H, W, 3); mask: uint8 (H, W); classes:
    [(name, index)] of the classes that the image shows.
    """

    image: torch.Tensor
    picture: np.ndarray
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
    return Scene(image, picture, np.asarray(dataset.mask(index)), classes)


def score_table(maps, scene, label, alpha):
    """Rows for a lab's numbers: recall, precision and IoU of "map > alpha" for one class, as `MapScore`
    defines them. maps: from a heading to a map (H, W)."""
    mask = np.where(scene.unlabelled, IGNORED, scene.on_object(label)).astype(np.uint8)[None]
    present = np.ones((1, 1))
    scores = [MapScore(alpha).update(one[None, None], mask, present).compute() for one in maps.values()]
    rows = [[name, *(score[key] for score in scores)] for key, name in SCORES.items()]
    return [["in % of this image", *maps], *rows]
