"""A data set as a weakly supervised stage may see it: without its masks."""

import torch


class MaskAccessError(RuntimeError):
    """A stage of the weakly supervised pipeline asked for a mask."""


class WithoutMasks:
    """What `without_masks` returns. Its attribute access answers to a fixed list of names, so that the
    wrapped data set, and through it a mask, is not one attribute away."""

    _ANSWERS = frozenset(
        {"names", "classes", "num_classes", "fingerprint", "split", "saliency", "mask", "packed", "sizes"}
        | {"__class__", "__doc__", "__reduce__", "__reduce_ex__", "__dir__", "__module__"}
    )

    __slots__ = (
        *("_dataset", "_labels", "names", "classes", "num_classes", "fingerprint", "split"),
        *("packed", "sizes"),  # of decoded images only: neither leads back to the data set
    )

    def __init__(self, dataset, labels):
        put = object.__setattr__
        put(self, "_dataset", dataset)
        put(self, "_labels", labels)
        for name in ("names", "classes", "num_classes", "fingerprint"):
            put(self, name, getattr(dataset, name))
        put(self, "split", getattr(dataset, "split", None))
        for name in ("packed", "sizes"):
            if hasattr(dataset, name):
                put(self, name, getattr(dataset, name))

    def __getattribute__(self, name):
        if name in WithoutMasks._ANSWERS:
            return object.__getattribute__(self, name)
        raise AttributeError(
            f"a data set without masks has no attribute {name!r}; it answers to "
            f"{sorted(n for n in WithoutMasks._ANSWERS if not n.startswith('_'))}"
        )

    def __setattr__(self, name, value):
        raise AttributeError("a data set without masks can't be changed")

    def __dir__(self):
        return sorted(WithoutMasks._ANSWERS)

    def __len__(self):
        return len(object.__getattribute__(self, "_dataset"))

    def __getitem__(self, index):
        dataset, labels = (object.__getattribute__(self, name) for name in ("_dataset", "_labels"))
        if labels is None:
            return dataset[index]
        return dataset.image(index), torch.from_numpy(labels[index].copy())

    def saliency(self, index):
        return object.__getattribute__(self, "_dataset").saliency(index)

    def mask(self, index):
        raise MaskAccessError(
            "masks are for scoring only: this data set was wrapped by without_masks() because a training "
            "stage of the weakly supervised pipeline uses it. Score with the data set itself."
        )

    def __repr__(self):
        return f"without_masks({object.__getattribute__(self, '_dataset')!r})"

    def __reduce__(self):
        dataset, labels = (object.__getattribute__(self, name) for name in ("_dataset", "_labels"))
        return WithoutMasks, (dataset, labels)

    def __reduce_ex__(self, protocol):
        return self.__reduce__()


def without_masks(dataset):
    """The same data set as a weakly supervised stage may see it: images, image-level labels and saliency, no
    masks.

    The labels of a data set that reads them off its masks (`VOC2012(labels="mask")`, through its
    ``image_labels()``) are computed here, once; after that no mask file is opened. Applied twice, it returns
    its argument. The result can be pickled, so it works in `DataLoader` workers.

    Raises:
        MaskAccessError: later, when ``.mask(i)`` of the result is called.
    """
    if type(dataset) is WithoutMasks:
        return dataset
    labels = dataset.image_labels().numpy() if hasattr(dataset, "image_labels") else None
    return WithoutMasks(dataset, labels)
