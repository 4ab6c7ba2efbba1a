"""Normalisation of images, and the augmentation of training: an image and its targets share the random
numbers."""

from functools import lru_cache

import numpy as np
import torch
from torchvision.transforms.v2 import ColorJitter, InterpolationMode
from torchvision.transforms.v2 import functional as F

from drs_lib.arguments import whole
from drs_lib.data.voc import IGNORED

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@lru_cache(maxsize=8)
def _colours(device):
    """ImageNet's mean and standard deviation in units of 0..255, and the mean in uint8, kept per device: no
    copy to a GPU at every batch."""
    mean, std = (torch.tensor(values).mul(255).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return tuple(values.to(device) for values in (mean, std, mean.round().to(torch.uint8)))


def normalize(images):
    """uint8 RGB images (..., 3, H, W) to what the networks take: float32, (x / 255 - mean) / std of ImageNet.

    Raises:
        ValueError: the images are not uint8 (floats may already be normalised), or not three channels.
    """
    if images.dtype != torch.uint8 or images.ndim < 3 or images.shape[-3] != 3:
        raise ValueError(
            "normalize() takes uint8 images of shape (..., 3, H, W) with values 0..255, got "
            f"{images.dtype} of shape {tuple(images.shape)}; an image that is already float has probably "
            "been normalised before"
        )
    mean, std, _ = _colours(images.device)
    return images.to(torch.float32).sub_(mean).div_(std)


def resize_square(images, side):
    """Images (..., 3, H, W), uint8 or float, resized to a square (bilinear, antialiased), as networks with a
    ``resize`` take them. side: None leaves them as they are."""
    return images if side is None else F.resize(images, [side, side], antialias=True)


def as_tensor(values):
    """A tensor as it is; of an array a copy, since tensors can't share read-only or reversed ones."""
    return values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values, order="C"))


class _TrainingTransform:
    """See `training_transform`."""

    def __init__(self, crop, resize, scale, flip, jitter):
        self.crop, self.resize, self.scale, self.flip, self.jitter = crop, resize, scale, flip, jitter

    def draw(self):
        """All random numbers of one sample: four in [0, 1), and ColorJitter's parameters or None."""
        numbers = torch.rand(4).tolist()
        return numbers, None if self.jitter is None else self.jitter.make_params([])

    def __call__(self, image, *targets, draw=None):
        items = _checked(image, targets)
        (flip, scale, top, left), jitter = self.draw() if draw is None else draw
        height, width = image.shape[-2:] if self.resize is None else (self.resize, self.resize)
        if self.scale is not None:
            low, *between, high = self.scale
            factor = self.scale[int(scale * len(self.scale))] if between else low + scale * (high - low)
            height, width = max(1, round(height * factor)), max(1, round(width * factor))
        items = [_resized(item, height, width) for item in items]
        if self.crop is not None:
            y = int(top * (max(height - self.crop, 0) + 1))
            x = int(left * (max(width - self.crop, 0) + 1))
            items = [_cropped(item, y, x, self.crop) for item in items]
        if self.flip and flip < 0.5:
            items = [F.horizontal_flip(item) for item in items]
        if jitter is not None:
            items[0] = self.jitter.transform(items[0], jitter)
        return tuple(items)

    def batch(self, images, *targets):
        """What calling the transform on one image after the other gives, from the same random numbers.

        images: sequence of N uint8 images (3, H, W), all on one device; nothing waits for it. targets:
        sequences of N targets. Returns the images in one tensor, uint8 (N, 3, h, w), and a list for each of
        ``targets``. Raises ValueError for images that are of different sizes in the end.
        """
        images, *targets = map(list, zip(*map(self, images, *targets), strict=True))
        sizes = sorted({f"{image.shape[-2]}x{image.shape[-1]}" for image in images})
        if len(sizes) > 1:
            raise ValueError(
                f"the images of one batch have different sizes ({', '.join(sizes)}) after augmentation: set "
                "the recipe's crop or resize"
            )
        return (torch.stack(images), *targets)


def _checked(image, targets):
    """The sample as a list of tensors. Raises ValueError for what is none."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"the image must be uint8 of shape (3, H, W), got {image.dtype} of shape {tuple(image.shape)}"
        )
    items = [image, *map(as_tensor, targets)]
    for target in items[1:]:
        maps = target.ndim == 3 and target.is_floating_point()
        if not (target.ndim == 2 or maps) or target.shape[-2:] != image.shape[-2:]:
            raise ValueError(
                "a target is a label map (H, W) or float maps (C, H, W), the same size as the image, "
                f"{tuple(image.shape[1:])}, before augmentation; got {target.dtype} {tuple(target.shape)}"
            )
    return items


def _resized(item, height, width):
    if item.ndim == 3:
        return F.resize(item, [height, width], antialias=True)
    # NEAREST_EXACT takes the pixel under the centre, as bilinear does; plain NEAREST would shift the labels
    # by up to half a pixel against the image.
    return F.resize(item[None], [height, width], InterpolationMode.NEAREST_EXACT)[0]


def _cropped(item, y, x, side):
    """The square of this side at (y, x), padded where the item ends before."""
    item = item[..., y : y + side, x : x + side]
    padded = item.new_empty(*item.shape[:-2], side, side)
    padded[...] = IGNORED if item.ndim == 2 else 0 if item.is_floating_point() else _colours(item.device)[2]
    padded[..., : item.shape[-2], : item.shape[-1]] = item
    return padded


def training_transform(crop=None, resize=None, scale=None, flip=True, jitter=None):
    """The random augmentation of a training sample: ``image, *targets = transform(image, *targets)``, or of a
    batch: ``images, *targets = transform.batch(images, *targets)``.

    An image is uint8 (3, H, W) and stays so (`normalize` runs on the batch). A target of shape (H, W), array
    or tensor, is a label map: resized to the nearest pixel, padded with 255. A float target of shape
    (C, H, W) is a set of maps: bilinear, padded with 0. The image is padded with ImageNet's mean colour, 0
    after normalisation. Random numbers come from torch's global generator. The arguments act in this order,
    each unless it is None or False.

    Args:
        resize: to a square of this side, as the authors' release does.
        scale: by a random factor: two numbers are a range, three or more the factors to choose from.
        crop: a random square of this side; a smaller image is padded at the right and at the bottom.
        flip: left to right, half of the time.
        jitter: (brightness, contrast, saturation, hue) as in torchvision's ``ColorJitter``, on the image
            only. It runs last, on as few pixels as possible.

    Raises:
        ValueError: for arguments, images or targets that are none of these, or targets of another size.
    """
    crop, resize = (
        None if side is None else whole(name, side) for name, side in (("crop", crop), ("resize", resize))
    )
    if scale is not None:
        scale = tuple(float(factor) for factor in scale)
        if len(scale) < 2 or min(scale) <= 0 or (len(scale) == 2 and scale[0] > scale[1]):
            raise ValueError(f"scale is a range, 0 < low <= high, or three or more factors; got {scale}")
    if jitter is not None:
        if len(jitter) != 4:
            raise ValueError(f"jitter is (brightness, contrast, saturation, hue); got {jitter!r}")
        jitter = ColorJitter(*jitter)
    return _TrainingTransform(crop, resize, scale, flip, jitter)
