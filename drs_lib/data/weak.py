"""A data set as a weakly supervised stage may see it: without its masks."""

import torch

FACTS = ("names", "classes", "num_classes", "fingerprint", "split")
METHODS = ("saliency", "mask", "__class__", "__doc__", "__module__", "__reduce__", "__reduce_ex__")


class MaskAccessError(RuntimeError):
    """A stage of the weakly supervised pipeline asked for a mask."""


def _inside(weak):
    return [object.__getattribute__(weak, name) for name in WithoutMasks.__slots__]


class WithoutMasks:
    """What `without_masks` returns. It answers to a fixed list of names, so that the wrapped data set, and
    through it a mask, is not one attribute away.

    labels: float32 (N, C), or None for the data set's own.
    """

    __slots__ = ("_dataset", "_labels")

    def __init__(self, dataset, labels):
        for name, value in zip(WithoutMasks.__slots__, (dataset, labels), strict=True):
            object.__setattr__(self, name, value)

    def __getattribute__(self, name):
        if name == "split":
            return getattr(_inside(self)[0], name, None)
        if name in FACTS:
            return getattr(_inside(self)[0], name)
        if name in METHODS:
            return object.__getattribute__(self, name)
        raise AttributeError(f"a data set without masks has no attribute {name!r}; it answers to {dir(self)}")

    def __setattr__(self, name, value):
        raise AttributeError("a data set without masks can't be changed")

    def __dir__(self):
        return sorted([*FACTS, "saliency", "mask"])

    def __len__(self):
        return len(_inside(self)[0])

    def __getitem__(self, index):
        dataset, labels = _inside(self)
        if labels is None:
            return dataset[index]
        return dataset.image(index), torch.from_numpy(labels[index].copy())

    def saliency(self, index):
        return _inside(self)[0].saliency(index)

    def mask(self, index):
        raise MaskAccessError(
            "masks are for scoring only: this data set was wrapped by without_masks() because a training "
            "stage of the weakly supervised pipeline uses it. Score with the data set itself."
        )

    def __repr__(self):
        return f"without_masks({_inside(self)[0]!r})"

    def __reduce__(self):
        return WithoutMasks, tuple(_inside(self))


def without_masks(dataset):
    """The same data set as a weakly supervised stage may see it: images, image-level labels and saliency;
    ``.mask(i)`` raises MaskAccessError. Applied twice, it returns its argument.

    The labels of a data set that reads them off its masks (`VOC2012(labels="mask")`, through its
    ``image_labels()``) are computed here, once; after that no mask file is opened.
    """
    if type(dataset) is WithoutMasks:
        return dataset
    labels = dataset.image_labels().numpy() if hasattr(dataset, "image_labels") else None
    return WithoutMasks(dataset, labels)
