"""Normalisation of images, and the augmentation of training: an image and its targets share the random
numbers."""

from functools import lru_cache

import numpy as np
import torch
from torchvision.transforms.v2 import ColorJitter, InterpolationMode
from torchvision.transforms.v2 import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_IGNORED = 255


@lru_cache(maxsize=8)
def _mean_and_std(device):
    """ImageNet's mean and standard deviation in units of 0..255, kept per device: no copy to a GPU at every
    batch."""
    return tuple(
        torch.tensor(values, dtype=torch.float32).mul(255).view(3, 1, 1).to(device)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )


def normalize(images):
    """uint8 RGB images (..., 3, H, W) to what the networks take: float32, (x / 255 - mean) / std of ImageNet.

    Works on any device, alone or in batches; data sets and augmentation stay in uint8 until here.

    Raises:
        ValueError: the images are not uint8 (floats may already be normalised), or not three channels.
    """
    if images.dtype != torch.uint8:
        raise ValueError(
            f"normalize() takes uint8 images with values 0..255, got {images.dtype}; "
            "an image that is already float has probably been normalised before"
        )
    if images.ndim < 3 or images.shape[-3] != 3:
        raise ValueError(f"normalize() takes images of shape (..., 3, H, W), got {tuple(images.shape)}")
    mean, std = _mean_and_std(images.device)
    return images.to(torch.float32).sub_(mean).div_(std)


def _as_tensor(target):
    if isinstance(target, np.ndarray):
        # A read-only array, such as a memory-mapped one, can't back a tensor.
        return torch.from_numpy(target if target.flags.writeable else target.copy())
    return target


class _TrainingTransform:
    """See `training_transform`."""

    def __init__(self, crop, resize, scale, flip, jitter):
        for name, value in (("crop", crop), ("resize", resize)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is a side length in pixels, a positive int or None; got {value!r}")
        if scale is not None:
            scale = tuple(float(s) for s in scale)
            if len(scale) < 2 or min(scale) <= 0 or (len(scale) == 2 and scale[0] > scale[1]):
                raise ValueError(
                    "scale is a range (low, high) with 0 < low <= high, or a list of three or more factors "
                    f"to choose from; got {scale}"
                )
        if jitter is not None and len(jitter) != 4:
            raise ValueError(
                f"jitter is (brightness, contrast, saturation, hue), four numbers; got {jitter!r}"
            )
        self.crop, self.resize, self.scale, self.flip = crop, resize, scale, flip
        self.jitter = None if jitter is None else ColorJitter(*jitter)
        self._fill = torch.tensor(IMAGENET_MEAN).mul(255).round().to(torch.uint8).view(3, 1, 1)

    def __call__(self, image, *extras):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(
                f"the image must be uint8 of shape (3, H, W), got {image.dtype} of shape {tuple(image.shape)}"
            )
        height, width = image.shape[-2:]
        items = [image, *(_as_tensor(extra) for extra in extras)]
        for extra in items[1:]:
            if not (extra.ndim == 2 or (extra.ndim == 3 and extra.is_floating_point())):
                raise ValueError(
                    "a target is a label map (H, W) or float maps (C, H, W), "
                    f"got {extra.dtype} of shape {tuple(extra.shape)}"
                )
            if extra.shape[-2:] != image.shape[-2:]:
                raise ValueError(
                    f"the image is {width} x {height} pixels and a target {extra.shape[-1]} x "
                    f"{extra.shape[-2]}: they must be the same size before augmentation"
                )

        flip, scale, top, left = torch.rand(4).tolist()
        if self.resize is not None:
            height = width = self.resize
        if self.scale is not None:
            factor = self._factor(scale)
            height, width = max(1, round(height * factor)), max(1, round(width * factor))
        items = [self._resized(item, height, width) for item in items]
        if self.crop is not None:
            y = int(top * (max(height - self.crop, 0) + 1))
            x = int(left * (max(width - self.crop, 0) + 1))
            items = [self._cropped(item, y, x) for item in items]
        if self.flip and flip < 0.5:
            items = [item.flip(-1) for item in items]
        if self.jitter is not None:
            items[0] = self.jitter(items[0])
        return tuple(items)

    def _factor(self, u):
        if len(self.scale) == 2:
            low, high = self.scale
            return low + u * (high - low)
        return self.scale[int(u * len(self.scale))]

    def _resized(self, item, height, width):
        if item.shape[-2:] == (height, width):
            return item
        if item.ndim == 3:
            return F.resize(item, [height, width], InterpolationMode.BILINEAR, antialias=True)
        # NEAREST_EXACT takes the pixel under the centre, as bilinear does; plain NEAREST would shift the
        # labels by up to half a pixel against the image.
        return F.resize(item[None], [height, width], InterpolationMode.NEAREST_EXACT)[0]

    def _cropped(self, item, y, x):
        item = item[..., y : y + self.crop, x : x + self.crop]
        height, width = item.shape[-2:]
        if (height, width) == (self.crop, self.crop):
            return item.contiguous()
        padded = item.new_empty((*item.shape[:-2], self.crop, self.crop))
        if item.ndim == 2:
            padded.fill_(_IGNORED)
        elif item.dtype == torch.uint8:
            padded.copy_(self._fill)
        else:
            padded.zero_()
        padded[..., :height, :width] = item
        return padded


def training_transform(crop=None, resize=None, scale=None, flip=True, jitter=None):
    """The random augmentation of a training sample: ``image, *targets = transform(image, *targets)``.

    In this order, each left out when its argument is off:

    - ``resize``: to a square of this side, as the authors' release does;
    - ``scale``: by a random factor: two numbers are a range, three or more the factors to choose from;
    - ``crop``: a random square of this side; an image that is smaller is padded at the right and at the
      bottom;
    - ``flip``: left to right, half of the time;
    - ``jitter``: (brightness, contrast, saturation, hue) as in torchvision's ``ColorJitter``, on the image
      only. It runs last, on as few pixels as possible.

    The image is uint8 (3, H, W) and stays so (`normalize` runs on the batch). A target of shape (H, W), array
    or tensor, is a label map: resized to the nearest pixel, padded with 255. A float target of shape
    (C, H, W) is a set of maps: bilinear, padded with 0. The image is padded with ImageNet's mean colour, 0
    after normalisation. Random numbers come from torch's global generator, which `DataLoader` seeds in every
    worker.

    Raises:
        ValueError: for arguments, images or targets that are none of these, or targets of another size.
    """
    return _TrainingTransform(crop, resize, scale, flip, jitter)
