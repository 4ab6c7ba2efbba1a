"""Localization maps: where a classifier sees each class (equation 1), and their refined successors.

    M^c = ReLU(F^c) / max F^c                                                                    (1)

F are the class maps of the classifier, the refinement network's output N takes M's place later. Both are made
at the network's resolution, brought to the image's size, and restricted to the classes that the image's
labels name.

    localization_maps, refined_maps    of one batch of normalised images
    iterate_maps                       of a data set, image by image; the network decides which of the two
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import interpolate

from drs_lib.arguments import whole
from drs_lib.data import normalize, resize_square
from drs_lib.runtime import autocast, evaluating, memory_format, move, require_finite

EPSILON = 1e-5
RELEASE_SCALES = (256, 320, 384)


def localization_maps(model, images, labels=None, scales=None, size=None):
    """Localization maps of a classifier, equation 1.

    The class maps are upsampled first (bilinear, corners aligned) and divided by their maximum (+ 1e-5) after
    that, so that a map's largest value is 1 at the output's resolution too. A class map without positive
    values gives zeros.

    Args:
        model: a network with ``class_maps(images) -> (N, C, h, w)``, in any mode; its mode is restored.
        images: (N, 3, H, W) floats, normalised (`drs_lib.data.normalize`), on any device.
        labels: (N, C) multi-hot; maps of absent classes are 0. None: all classes.
        scales: sides in pixels of squares to which the images are resized in turn; the result is the
            element-wise maximum of the maps of all of them, each divided by its own maximum. None: the images
            as they are. The released code uses 256, 320 and 384.
        size: (H, W) or side of the maps; None: the images' size.

    Returns:
        float32 (N, C, H, W) in [0, 1] on the model's device, without a graph.

    Raises:
        ValueError: inputs of another kind, or a network that gives NaN or infinity.
    """
    if not hasattr(model, "class_maps"):
        raise ValueError(
            f"{type(model).__name__} has no class_maps; maps of a refinement network: refined_maps()."
        )
    return _maps_of_batch(model, images, labels, scales, size, refined=False)


def refined_maps(model, images, labels=None, renormalize=False, scales=None, size=None):
    """Maps of a refinement network: upsampled, clipped to [0, 1], restricted to the labels' classes.

    The network is linear at its end and may leave [0, 1]. Trained with the squared error it also flattens:
    its maps are lower than its targets, and a threshold of 0.2 means something else for them.
    ``renormalize=True`` divides each map by its maximum (+ 1e-5), as equation 1 does. The other arguments,
    the result and the errors are those of `localization_maps`.
    """
    return _maps_of_batch(model, images, labels, scales, size, refined=True, renormalize=renormalize)


def keep_largest_class(maps):
    """Maps (..., C, H, W) in which every pixel keeps its largest class only.

    The other classes are 0 there; of equal classes the first stays. The released code's target for the
    refinement network.
    """
    largest, argmax = maps.max(dim=-3, keepdim=True)
    return torch.zeros_like(maps).scatter_(-3, argmax, largest)


def iterate_maps(
    model, dataset, *, batch_size=32, scales=None, resize=None, renormalize=False, indices=None, workers=0,
    precision="float32", present_only=False,
):  # fmt: skip
    """Maps of a whole data set, one image at a time, in order, each at the image's own size.

    Args:
        model: a classifier, which is what has ``class_maps``, or a refinement network; it stays where it is.
        dataset: gives ``(image uint8 (3, H, W), labels (C,))``; masks and saliency are not touched.
        batch_size: images per pass through the network. Images of different sizes are passed separately,
            unless ``resize`` makes them equal.
        scales: as for `localization_maps`.
        resize: side of the square that images are resized to (antialiased) before the network; None: as they
            are.
        renormalize: as for `refined_maps`.
        indices: images to take, in this order; None: all.
        workers: processes that read images (`torch.utils.data.DataLoader`).
        precision: of the network, see `drs_lib.runtime.autocast`; the maps are float32 in any case.
        present_only: make the maps of the labelled classes alone, two of VOC's 20, not all.

    Yields:
        ``(index, labels, maps)``: labels (C,) and maps float32 (C, H, W) in [0, 1], both on the CPU. With
        ``present_only`` maps (n, H, W) of the n classes with a label, in order, on the model's device; an
        image without a label has one map of zeros.

    Raises:
        ValueError: scales or a ``resize`` that are no sizes, ``renormalize`` with a classifier; while
            iterating, what `localization_maps` raises.
    """
    if renormalize and hasattr(model, "class_maps"):
        raise ValueError(
            "renormalize is for refined maps; a classifier's are always divided by their maximum."
        )
    scales = _checked_scales(scales)
    batch_size, workers = whole("batch_size", batch_size), whole("workers", workers, least=0)
    resize = resize if resize is None else whole("resize, the side of a square in pixels,", resize)
    autocast(_device(model), precision)  # refuses an unknown precision now, not later
    loader = torch.utils.data.DataLoader(
        _Inputs(dataset, resize),
        batch_size=batch_size,
        sampler=range(len(dataset)) if indices is None else indices,
        collate_fn=_group_by_size,
        num_workers=workers,
        pin_memory=_device(model).type == "cuda",
        generator=torch.Generator(),  # its own, so that making maps leaves the global random stream alone
    )
    return _iterate(model, loader, scales, renormalize, precision, present_only)


def _iterate(model, loader, scales, renormalize, precision, present_only):
    refined = not hasattr(model, "class_maps")
    for groups in loader:
        results = {}
        for places, indices, images, labels, sizes in groups:
            images = normalize(move(images, _device(model)))
            outputs = _outputs(model, images, refined, scales, precision)
            present = _present(labels, outputs)
            for size, rows in _by_key(map(tuple, sizes)):  # older torch pins a tuple into a list
                chosen = [output[rows] for output in outputs] if len(rows) < len(sizes) else outputs
                maps = _maps(chosen, present[rows], size, refined, renormalize)
                for row, own in zip(rows, maps.split(present[rows].sum(1).tolist()), strict=True):
                    results[places[row]] = indices[row], labels[row], own
        for place in range(len(results)):
            index, labels, maps = results[place]
            if not present_only:
                maps = _of_all_classes(maps.cpu(), labels > 0)
            elif not len(maps):
                maps = maps.new_zeros(1, *maps.shape[1:])
            yield index, labels, maps


class _Inputs(torch.utils.data.Dataset):
    """What the network needs of a data set's images, resized where they are read."""

    def __init__(self, dataset, resize):
        self.dataset, self.resize = dataset, resize

    def __getitem__(self, index):
        image, labels = self.dataset[index]
        return index, resize_square(image, self.resize), labels, tuple(image.shape[-2:])


def _group_by_size(items):
    """A batch as groups of images of equal size; ``places`` are the images' positions in the batch."""
    groups = []
    for _, places in _by_key(image.shape for _, image, _, _ in items):
        indices, images, labels, sizes = zip(*(items[place] for place in places), strict=True)
        groups.append((places, indices, torch.stack(images), torch.stack(labels), sizes))
    return groups


def _by_key(keys):
    """Pairs of a key and the positions at which it is."""
    found = {}
    for position, key in enumerate(keys):
        found.setdefault(key, []).append(position)
    return found.items()


def _maps_of_batch(model, images, labels, scales, size, refined, renormalize=False):
    if not (
        torch.is_tensor(images) and images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point()
    ):
        found = f"{images.dtype} {tuple(images.shape)}" if torch.is_tensor(images) else type(images).__name__
        raise ValueError(
            f"images must be a float tensor (N, 3, H, W), normalised by drs_lib.data.normalize; got {found}."
        )
    size = images.shape[-2:] if size is None else size
    sides = (size, size) if np.ndim(size) == 0 else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"size is (H, W) or the side of a square, in pixels; got {size!r}.")
    size = tuple(whole("size", side) for side in sides)
    outputs = _outputs(model, images.to(_device(model)), refined, _checked_scales(scales))
    present = _present(labels, outputs)
    return _of_all_classes(_maps(outputs, present, size, refined, renormalize), present)


def _outputs(model, images, refined, scales, precision="float32"):
    """The network's maps (N, C, h, w), one per scale, before any upsampling."""
    forward, outputs = model if refined else model.class_maps, []
    with evaluating(model):
        for side in scales or (None,):
            at_scale = images
            if side is not None and images.shape[-2:] != (side, side):
                at_scale = interpolate(images, (side, side), mode="bilinear", align_corners=False)
            at_scale = at_scale.contiguous(memory_format=memory_format(images.device))
            with autocast(images.device, precision):
                output = forward(at_scale)
            if output.ndim != 4:
                raise ValueError(
                    f"{type(model).__name__} gives shape {tuple(output.shape)}, not maps (N, C, h, w); "
                    "maps of a classifier: localization_maps()."
                )
            outputs.append(output.float())
    return outputs


@torch.no_grad()
def _maps(outputs, present, size, refined, renormalize):
    """The maps where ``present``, bool (N, C) on the CPU, is true: float32 (n, H, W), the largest value over
    the scales. Only those are upsampled, one or two of VOC's 20."""
    chosen = move(present.flatten().nonzero().flatten(), outputs[0].device)
    if not len(chosen):
        return outputs[0].new_zeros(0, *size)
    largest = None
    for output in outputs:
        # One image of many channels, because a batch of one-channel images would take a slower kernel.
        output = require_finite(output.flatten(0, 1).index_select(0, chosen)[None])
        upsampled = interpolate(output, size, mode="bilinear", align_corners=True)[0]
        upsampled = upsampled.clamp_(0, 1) if refined else upsampled.relu_()
        if renormalize or not refined:
            upsampled.div_(upsampled.amax(dim=(1, 2), keepdim=True) + EPSILON)
        largest = upsampled if largest is None else torch.maximum(largest, upsampled)
    return largest


def _of_all_classes(maps, present):
    """Maps (n, H, W) of the n classes that are present, bool (..., C), among zeros: (..., C, H, W)."""
    found = maps.new_zeros(*present.shape, *maps.shape[-2:])
    found[present.to(maps.device)] = maps
    return found


def _present(labels, outputs):
    """Which classes are present, bool (N, C) on the CPU, for outputs of that many images and classes."""
    images, classes = outputs[0].shape[:2]
    if labels is None:
        return torch.ones(images, classes, dtype=torch.bool)
    labels = torch.as_tensor(labels)
    if tuple(labels.shape) != (images, classes):
        raise ValueError(f"labels must be (N, C) = ({images}, {classes}); got {tuple(labels.shape)}.")
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("labels must be multi-hot: 1 for the classes an image shows, 0 for the others.")
    return labels > 0


def _checked_scales(scales):
    if scales is None:
        return None
    if np.ndim(scales) != 1 or not len(scales):
        raise ValueError(
            f"scales are sides of squares in pixels, such as (256, 320, 384), or None; got {scales!r}."
        )
    return tuple(whole("scales, sides of squares in pixels,", side) for side in scales)


def _device(model):
    return next(model.parameters()).device
