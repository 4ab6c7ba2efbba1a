"""What a training sees: the images' order, their augmentation, and each stage's targets beside them.

Two ways lead from a data set to batches. Both show the same images in the same order, cropped, flipped and
jittered by the same random numbers:

    files     processes read, decode and augment images one by one, batch after batch, on the CPU
    memory    images are decoded once and kept as bytes, on the device if it has room; a batch is cut out of
              them and augmented on the device, all at once

A GPU that takes a step in milliseconds would wait for the first way.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from drs_lib.data import IGNORED, resize_square, training_transform
from drs_lib.data.transforms import as_tensor
from drs_lib.losses import resize_maps
from drs_lib.runtime import move, seeded


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

    def __init__(self, images, recipe, seed):
        per_epoch, _ = recipe.steps(images)
        self.images, self.batch = images, recipe.batch
        self.used = per_epoch * recipe.batch * recipe.accumulate
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self):
        order = torch.randperm(self.images, generator=self.generator)[: self.used]
        for indices in order.split(self.batch):
            yield int(torch.randint(2**32, (), generator=self.generator)), indices

    def __len__(self):
        return math.ceil(min(self.images, self.used) / self.batch)


def make_batches(dataset, recipe, extra, seed, device):
    """The batches of a recipe, one pass over which is an epoch, and the random streams they draw from.

    extra: `TargetMaps`, `LabelMaps` or None. Returns (iterable of `Batch`, generators).
    """
    transform = training_transform(recipe.crop, recipe.resize, recipe.scale, recipe.flip, recipe.jitter)
    order = Order(len(dataset), recipe, seed)
    # The loader draws a number of its own each epoch; it must not come out of the network's stream. The other
    # way has the stream too: a checkpoint of one way serves the other.
    generator = torch.Generator().manual_seed(seed)
    if recipe.images == "memory" or (recipe.images == "auto" and device.type == "cuda"):
        # A target is resized together with its image, so that both have one size before.
        resize = recipe.resize if extra is None else None
        batches = _FromMemory(dataset, transform, extra, order, device, resize)
    else:
        files = _FromFiles(dataset, transform, extra)
        reading = dict(num_workers=recipe.workers, persistent_workers=recipe.workers > 0)
        pinned = device.type == "cuda"
        batches = DataLoader(files, None, sampler=order, pin_memory=pinned, generator=generator, **reading)
    return batches, (generator, order.generator)


class _FromFiles(Dataset):
    """Reads, checks, augments and stacks the images of a batch, with what `extra(i, image)` adds to each."""

    def __init__(self, dataset, transform, extra):
        self.dataset, self.transform, self.extra = dataset, transform, extra

    def __getitem__(self, key):
        seed, indices = key
        images, labels = zip(*(self.dataset[i] for i in indices.tolist()), strict=True)
        targets = []
        if self.extra is not None:
            targets = [[self.extra(i, image) for i, image in zip(indices.tolist(), images, strict=True)]]
        with seeded(seed, accelerators=False):
            images, *targets = self.transform.batch(images, *targets)
        extra = torch.stack(*targets) if targets else None
        return Batch(indices, images, torch.stack(labels), extra)


class _FromMemory:
    """Batches cut out of decoded images, augmented on the device."""

    def __init__(self, dataset, transform, extra, order, device, resize):
        self.transform, self.extra, self.order, self.device = transform, extra, order, device

        def read(i):
            image, labels = dataset[i]
            target = None if extra is None else extra.as_bytes(i, image)
            return resize_square(image, resize), labels, target

        with ThreadPoolExecutor() as pool:
            images, labels, targets = zip(*pool.map(read, range(len(dataset))), strict=True)
        self.labels, self.images = torch.stack(labels).to(device), _placed(images, device)
        self.targets = None if extra is None else _placed(targets, device)

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        for seed, indices in self.order:
            places = indices.tolist()
            images, targets = [move(self.images[i], self.device) for i in places], []
            if self.extra is not None:
                targets = [[self.extra.unpack(move(self.targets[i], self.device)) for i in places]]
            with seeded(seed, accelerators=False):
                images, *targets = self.transform.batch(images, *targets)
            extra = self.extra.stack(*targets, places) if targets else None
            yield Batch(indices, images, self.labels[move(indices, self.device)], extra)


def _placed(arrays, device):
    """uint8 tensors on a GPU that has room for three times as many bytes, else as they are."""
    if device.type == "cuda":
        # What earlier trainings gave back is free too, though torch keeps it.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if sum(map(torch.numel, arrays)) < (torch.cuda.mem_get_info(device)[0] + kept) / 3:
            return [array.to(device) for array in arrays]
    return arrays


class _Targets:
    """One target for each image, by index: ``targets(i, image)`` checks it and gives it as a tensor.

    ``as_bytes`` makes it uint8, to be kept; ``unpack`` brings that back; ``stack`` makes a batch of them.
    """

    what = None

    def __init__(self, values, dataset):
        if len(values) != len(dataset):
            raise ValueError(f"{len(values)} {self.what} for {len(dataset)} images: expected one each")
        self.values, self.names, self.classes = values, dataset.names, dataset.num_classes
        self.present = [None] * len(dataset)


class TargetMaps(_Targets):
    """Target localization maps by index, checked, as float32 (C, H, W) at the image's size.

    As bytes, they are the maps of the image's classes, as the pipeline stores them; ``present`` names these.
    """

    what = "targets"

    def __call__(self, i, image):
        maps = as_tensor(self.values[i])
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

    def as_bytes(self, i, image):
        if hasattr(self.values, "stack"):
            self.present[i], stack = self.values.stack(i)
            if stack.shape[-2:] == tuple(image.shape[-2:]):
                return torch.from_numpy(stack)
        maps = self(i, image)
        # An image without any class is one map of zeros.
        self.present[i] = maps.amax((1, 2)).nonzero().flatten().tolist() or [0]
        return (maps[self.present[i]] * 255).round().byte()

    def unpack(self, stack):
        return stack.float() * (1 / 255)

    def stack(self, stacks, indices):
        """float32 (N, C, H, W) from the maps (c, H, W) of each image's own classes."""
        batch = stacks[0].new_zeros(len(stacks), self.classes, *stacks[0].shape[-2:])
        for maps, stack, i in zip(batch, stacks, indices, strict=True):
            for label, one in zip(self.present[i], stack, strict=True):
                maps[label] = one
        return batch


class LabelMaps(_Targets):
    """Segmentation labels by index, checked, as uint8 (H, W)."""

    what = "labels"

    def __call__(self, i, image):
        labels = as_tensor(self.values[i])
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

    as_bytes = __call__

    def unpack(self, labels):
        return labels

    def stack(self, labels, indices):
        return torch.stack(labels)
