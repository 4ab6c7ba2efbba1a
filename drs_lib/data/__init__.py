"""Data sets: images with image-level labels, saliency maps, and masks for scoring only.

Every data set is map-style and answers to the same names::

    ds[i]            (image uint8 tensor (3, H, W) RGB, labels float32 tensor (C,), multi-hot)
    ds.saliency(i)   uint8 array (H, W), 0..255 for saliency 0..1
    ds.mask(i)       uint8 array (H, W), 0 background, 1..C classes, 255 ignored: for scoring only
    ds.names, ds.classes, ds.num_classes, ds.fingerprint, len(ds)

`without_masks` takes the masks away.
"""

from drs_lib.data.critters import Critters
from drs_lib.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize, resize_square, training_transform
from drs_lib.data.voc import IGNORED, VOC2012, VOC_CLASSES, save_indexed_png, voc_palette
from drs_lib.data.weak import MaskAccessError, without_masks

__all__ = [
    "IGNORED",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "VOC2012",
    "VOC_CLASSES",
    "Critters",
    "MaskAccessError",
    "normalize",
    "resize_square",
    "save_indexed_png",
    "training_transform",
    "voc_palette",
    "without_masks",
]
