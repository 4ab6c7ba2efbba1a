"""What a training sees: the images' order, their augmentation, and each stage's targets beside them.

Two ways lead from a data set to batches. Both show the same images in the same order, cropped, flipped and
jittered by the same random numbers:

    files     processes read, decode and augment images one by one, batch after batch, on the CPU
    memory    images are decoded once and kept as bytes, in memory or on the device; a batch is cut out of
              them and augmented on the device, all at once

A GPU that takes a step in milliseconds would wait for the first way.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from drs_lib.data.decoded import decoded, pack
from drs_lib.data.transforms import training_transform
from drs_lib.runtime import move, seeded

IGNORED = 255


class Batch(NamedTuple):
    """Indices (N,) into the data set, images (N, 3, H, W), labels (N, C), and what the stage adds or None."""

    indices: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor
    extra: torch.Tensor | None


class Order(Sampler):
    """Which images make up which batch, epoch after epoch, and the seed of each batch's augmentation.

    With a seed of its own, a batch looks the same whichever process makes it.
    """

    def __init__(self, images, per_epoch, batch, accumulate, seed):
        self.images, self.batch, self.used = images, batch, per_epoch * batch * accumulate
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self):
        order = torch.randperm(self.images, generator=self.generator)[: self.used]
        for indices in order.split(self.batch):
            yield int(torch.randint(2**32, (), generator=self.generator)), indices

    def __len__(self):
        return math.ceil(min(self.images, self.used) / self.batch)


def make_batches(dataset, recipe, extra, seed, device, cache_dir=None):
    """The batches of a recipe, one pass over which is an epoch, and the random streams they draw from.

    extra: `TargetMaps`, `LabelMaps` or None. cache_dir: a folder for decoded images, see
    `drs_lib.data.decoded`; None: they are kept in memory. Returns (iterable of `Batch`, generators).
    """
    per_epoch, _ = recipe.steps(len(dataset))
    transform = training_transform(
        crop=recipe.crop, resize=recipe.resize, scale=recipe.scale, flip=recipe.flip, jitter=recipe.jitter
    )
    order = Order(len(dataset), per_epoch, recipe.batch, recipe.accumulate, seed)
    place = place_of_images(recipe, device)
    if place == "files":
        batches = _from_files(dataset, recipe, transform, extra, order, seed, device)
        return batches, (batches.generator, order.generator)
    batches = _FromMemory(dataset, recipe, transform, extra, order, device, place, cache_dir)
    # The first way's loader has a stream of its own; a checkpoint of one way serves the other.
    return batches, (torch.Generator().manual_seed(seed), order.generator)


def place_of_images(recipe, device):
    """Where a recipe's images are read from on a device: "files", "memory" or "device"."""
    if recipe.images != "auto":
        return recipe.images
    return "device" if device.type == "cuda" else "files"


def _drawn(seed, indices, transform):
    """The random numbers of each image's augmentation."""
    with seeded(seed, accelerators=False):
        return [transform.draw() for _ in indices]


def _from_files(dataset, recipe, transform, extra, order, seed, device):
    return DataLoader(
        _Samples(dataset, transform, extra),
        batch_size=None,
        sampler=order,
        num_workers=recipe.workers,
        persistent_workers=recipe.workers > 0,
        pin_memory=device.type == "cuda",
        # The loader draws a number of its own each epoch; it must not come out of the network's stream.
        generator=torch.Generator().manual_seed(seed),
    )


class _Samples(Dataset):
    """Reads, checks, augments and stacks the images of a batch, with what `extra(i, image)` adds to each."""

    def __init__(self, dataset, transform, extra=None):
        self.dataset, self.transform, self.extra = dataset, transform, extra

    def __getitem__(self, key):
        seed, indices = key
        draws = _drawn(seed, indices, self.transform)
        images, labels = zip(*(self.dataset[i] for i in indices.tolist()), strict=True)
        if self.extra is None:
            (images,), extra = self.transform.batch(images, draws=draws), None
        else:
            extras = [self.extra(i, image) for i, image in zip(indices.tolist(), images, strict=True)]
            images, extras = self.transform.batch(images, extras, draws=draws)
            extra = torch.stack(extras)
        return Batch(indices, images, torch.stack(labels), extra)


class _FromMemory:
    """Batches cut out of decoded images, augmented on the device."""

    def __init__(self, dataset, recipe, transform, extra, order, device, place, cache_dir):
        self.transform, self.extra, self.order, self.device = transform, extra, order, device
        # A target is resized together with its image, so that both have one size before.
        resize = recipe.resize if extra is None else None
        dataset = decoded(dataset, cache_dir=cache_dir, resize=resize)
        self.labels = torch.stack([dataset[i][1] for i in range(len(dataset))]).to(device)
        self.images = _placed(dataset.packed, place, device)
        self.targets = None if extra is None else _placed(extra.packed(dataset), place, device)

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        for seed, indices in self.order:
            draws = _drawn(seed, indices, self.transform)
            images = [move(self.images[i], self.device) for i in indices.tolist()]
            labels = self.labels[move(indices, self.device)]
            if self.extra is None:
                (images,), extra = self.transform.batch(images, draws=draws), None
            else:
                targets = [self.extra.unpack(move(self.targets[i], self.device)) for i in indices.tolist()]
                images, targets = self.transform.batch(images, targets, draws=draws)
                extra = self.extra.stack(targets, indices.tolist())
            yield Batch(indices, images, labels, extra)


def _placed(packed, place, device):
    if device.type != "cuda":
        return packed
    # What earlier trainings gave back is free too, though torch keeps it.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if place == "device" and packed.nbytes < (torch.cuda.mem_get_info(device)[0] + kept) / 3:
        return packed.to(device)
    try:
        return packed.pin_memory()
    except RuntimeError:  # more than the system lets a process pin
        return packed


class TargetMaps:
    """Target localization maps by index, checked, as float32 (C, H, W) at the image's size."""

    def __init__(self, targets, dataset):
        _expect_one_each(targets, dataset, "targets")
        self.targets, self.names, self.classes = targets, dataset.names, dataset.num_classes

    def __call__(self, i, image):
        maps = _tensor(self.targets[i])
        if maps.ndim != 3 or len(maps) != self.classes or not maps.is_floating_point():
            raise ValueError(
                f"the target maps of {self.names[i]} are {maps.dtype} {tuple(maps.shape)}: expected floating "
                f"point ({self.classes}, H, W) in [0, 1]"
            )
        maps = maps.float()
        low, high = (float(value) for value in torch.aminmax(maps))
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"the target maps of {self.names[i]} go from {low:g} to {high:g}: expected [0, 1]"
            )
        if maps.shape[-2:] != image.shape[-2:]:
            maps = resize_maps(maps[None], image.shape[-2:])[0]
        return maps

    def packed(self, dataset):
        """The maps of every image's classes in 8 bits, as the pipeline stores them; `unpack` undoes it."""
        self.present = []

        def stacks():
            with ThreadPoolExecutor() as pool:
                for classes, stack in pool.map(self._stack, range(len(dataset)), dataset.packed):
                    self.present.append(torch.tensor(classes))
                    yield stack

        return pack(stacks(), len(dataset))

    def _stack(self, i, image):
        if hasattr(self.targets, "stack"):
            classes, stack = self.targets.stack(i)
            if stack.shape[-2:] == tuple(image.shape[-2:]):
                return classes, torch.from_numpy(stack)
        maps = self(i, image)
        # An image without any class is one map of zeros.
        classes = maps.amax((1, 2)).nonzero().flatten().tolist() or [0]
        return classes, (maps[classes] * 255).round().byte()

    @staticmethod
    def unpack(stack):
        return stack.float() * (1 / 255)

    def stack(self, stacks, indices):
        """float32 (N, C, H, W) from the maps (c, H, W) of each image's own classes."""
        maps = stacks[0].new_zeros(len(stacks), self.classes, *stacks[0].shape[-2:])
        for one, own, i in zip(maps, stacks, indices, strict=True):
            self.present[i] = self.present[i].to(maps.device)
            one.index_copy_(0, self.present[i], own)
        return maps


class LabelMaps:
    """Segmentation labels by index, checked, as uint8 (H, W)."""

    def __init__(self, labels, dataset):
        _expect_one_each(labels, dataset, "labels")
        self.labels, self.names, self.classes = labels, dataset.names, dataset.num_classes

    def __call__(self, i, image):
        labels = _tensor(self.labels[i])
        if labels.dtype != torch.uint8 or labels.shape != image.shape[-2:]:
            raise ValueError(
                f"the segmentation labels of {self.names[i]} are {labels.dtype} {tuple(labels.shape)}: "
                f"expected uint8 {tuple(image.shape[-2:])}, the image's size"
            )
        wrong = labels[(labels > self.classes) & (labels != IGNORED)]
        if len(wrong):
            raise ValueError(
                f"the segmentation labels of {self.names[i]} hold the value {int(wrong.max())}: expected 0 "
                f"for background, 1 to {self.classes} for the classes, {IGNORED} for ignored pixels"
            )
        return labels

    def packed(self, dataset):
        with ThreadPoolExecutor() as pool:
            labels = pool.map(lambda i: self(i, dataset.packed[i]), range(len(dataset)))
            return pack(labels, len(dataset))

    @staticmethod
    def unpack(labels):
        return labels

    @staticmethod
    def stack(labels, indices):
        return torch.stack(labels)


def resize_maps(maps, size):
    """Maps (N, C, H, W) at another size, on the grid of the localization maps: bilinear, corners aligned."""
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=True)


def _tensor(values):
    # An array is copied: it may be read-only, a memory map for one, and torch has no read-only tensors.
    return values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))


def _expect_one_each(sequence, dataset, what):
    if len(sequence) != len(dataset):
        raise ValueError(f"{len(sequence)} {what} for {len(dataset)} images: expected one each")
