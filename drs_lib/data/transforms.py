"""Normalisation of images, and the augmentation of training: an image and its targets share the random
numbers."""

from functools import lru_cache

import numpy as np
import torch
from torchvision.transforms.v2 import ColorJitter, InterpolationMode
from torchvision.transforms.v2 import functional as F

from drs_lib.arguments import whole
from drs_lib.runtime import move

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


@lru_cache(maxsize=8)
def _fill(device):
    """ImageNet's mean colour in uint8, kept per device like the above."""
    return torch.tensor(IMAGENET_MEAN).mul(255).round().to(torch.uint8).view(3, 1, 1).to(device)


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
        crop, resize = (
            value if value is None else whole(name, value)
            for name, value in (("crop", crop), ("resize", resize))
        )
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

    def __call__(self, image, *extras):
        items = self._checked(image, extras)
        numbers, jitter = self.draw()
        image, *extras = self._placed(items, *numbers)
        if jitter is not None:
            image = self.jitter.transform(image, jitter)
        return (image, *extras)

    def batch(self, images, *targets, draws=None):
        """``images, *targets = transform.batch(images, *targets)``: what calling the transform on one image
        after the other gives, from the same random numbers.

        Args:
            images: sequence of N uint8 images (3, H, W) of any sizes, all on one device, where the work is
                done.
            targets: sequences of N targets, on any device.
            draws: the random numbers of each image, from `draw`; None: drawn now.

        Returns:
            The images in one tensor, uint8 (N, 3, h, w), and a list for each of ``targets``. On a CPU all of
            it is equal to the single transforms', bit for bit. On a GPU the whole batch is jittered at once,
            each image by its own factors in its own order: a grey level may differ here and there. Nothing
            waits for the device.

        Raises:
            ValueError: what a single image raises; no images; not as many targets as images; images that are
                of different sizes in the end.
        """
        for values in (images, *targets):
            if not len(images) or len(values) != len(images):
                raise ValueError(
                    f"a batch is one or more images and as many of each target, got {len(images)} images and "
                    f"targets for {', '.join(str(len(target)) for target in targets) or 'none'}"
                )
        samples = [self._checked(image, extras) for image, *extras in zip(images, *targets, strict=True)]
        draws = [self.draw() for _ in samples] if draws is None else draws
        placed = [self._placed(items, *numbers) for items, (numbers, _) in zip(samples, draws, strict=True)]
        images, *targets = (list(items) for items in zip(*placed, strict=True))
        if any(image.shape != images[0].shape for image in images):
            sizes = sorted({f"{image.shape[-2]}x{image.shape[-1]}" for image in images})
            raise ValueError(
                f"the images of one batch have different sizes ({', '.join(sizes)}) after augmentation: set "
                "the recipe's crop or resize"
            )
        if self.jitter is not None:
            jitters = [jitter for _, jitter in draws]
            if images[0].device.type != "cpu":
                return (_jittered(torch.stack(images), jitters), *targets)
            images = [self.jitter.transform(*each) for each in zip(images, jitters, strict=True)]
        return (torch.stack(images), *targets)

    def _checked(self, image, extras):
        """The sample as a list of tensors. Raises ValueError for what is none."""
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(
                f"the image must be uint8 of shape (3, H, W), got {image.dtype} of shape {tuple(image.shape)}"
            )
        items = [image, *(_as_tensor(extra) for extra in extras)]
        for extra in items[1:]:
            if not (extra.ndim == 2 or (extra.ndim == 3 and extra.is_floating_point())):
                raise ValueError(
                    "a target is a label map (H, W) or float maps (C, H, W), "
                    f"got {extra.dtype} of shape {tuple(extra.shape)}"
                )
            if extra.shape[-2:] != image.shape[-2:]:
                raise ValueError(
                    f"the image is {image.shape[-1]} x {image.shape[-2]} pixels and a target "
                    f"{extra.shape[-1]} x {extra.shape[-2]}: they must be the same size before augmentation"
                )
        return items

    def draw(self):
        """All random numbers of one sample: four in [0, 1), and ColorJitter's parameters or None."""
        numbers = torch.rand(4).tolist()
        return numbers, None if self.jitter is None else self.jitter.make_params([])

    def _placed(self, items, flip, scale, top, left):
        """The items resized, cropped and flipped by random numbers in [0, 1)."""
        height, width = items[0].shape[-2:]
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
        return items

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
            padded.copy_(_fill(item.device))
        else:
            padded.zero_()
        padded[..., :height, :width] = item
        return padded


_OPERATIONS = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")


def _jittered(images, jitters):
    """uint8 images (N, 3, H, W), each through the operations that ColorJitter drew for it, in its order.

    Brightness, contrast and saturation mix an image with black, with the mean of its grey version and with
    its grey version: one formula with three weights per image does all of them, and nothing, (1, 0, 0). Hue
    comes once per image, so that the operations before it and after it make up to three mixtures each,
    however the N orders differ. Every operation ends in whole grey levels, as torchvision's do.
    """
    count, parts, hues = len(jitters), ([], []), []
    for jitter in jitters:
        names = [_OPERATIONS[k] for k in jitter["fn_idx"].tolist() if jitter[_OPERATIONS[k]] is not None]
        place = names.index("hue_factor") if "hue_factor" in names else len(names)
        hues.append(jitter["hue_factor"] or 0.0)
        for part, chosen in zip(parts, (names[:place], names[place + 1 :]), strict=True):
            part.append([_weights(name, jitter[name]) for name in chosen])
    # One small table crosses to the device: a row of N per weight.
    lengths = [max(map(len, part)) for part in parts]
    table = [
        [row[k][w] if k < len(row) else (1.0, 0.0, 0.0)[w] for row in part]
        for part, length in zip(parts, lengths, strict=True)
        for k in range(length)
        for w in range(3)
    ]
    turning = any(jitter["hue_factor"] is not None for jitter in jitters)
    table += [[sector + 6 * hue for hue in hues] for sector in (5, 3, 1)]
    table = torch.tensor(table, dtype=torch.float32)
    if images.is_cuda:
        table = table.pin_memory()
    table = move(table, images.device).view(-1, count, 1, 1, 1)
    mixtures = table[:-3].unflatten(0, (-1, 3)) if len(table) > 3 else []
    for weights in mixtures[: lengths[0]]:
        images = _mixed(images, *weights)
    if turning:
        images = _turned(images, table[-3:, :, 0].transpose(0, 1))
    for weights in mixtures[lengths[0] :]:
        images = _mixed(images, *weights)
    return images


def _weights(name, factor):
    """Weights of the image, of its mean grey and of its grey version."""
    return {
        "brightness_factor": (factor, 0.0, 0.0),
        "contrast_factor": (factor, 1.0 - factor, 0.0),
        "saturation_factor": (factor, 0.0, 1.0 - factor),
    }[name]


def _mixed(images, own, of_mean, of_grey):
    """own * image + of_mean * mean grey + of_grey * grey, cut to 0..255; the weights are (N, 1, 1, 1)."""
    grey = F.rgb_to_grayscale(images).float()
    mixed = (images * own).addcmul_(grey, of_grey)
    mixed.add_(grey.mean((1, 2, 3), keepdim=True).mul_(of_mean))
    return mixed.clamp_(0, 255).to(torch.uint8)


def _turned(images, shift):
    """The hue turned round the hexagon of HSV, whose six sides have length 1.

    shift: (N, 3, 1, 1), the turn in sides plus the place of red, green and blue. With value V, chroma C and
    hue h a channel is V - C * clamp(min(k, 4 - k), 0, 1) where k = (h + place) mod 6.
    """
    colours = images.float()
    red, green, blue = colours.unbind(1)
    value = colours.amax(1)
    chroma = value - colours.amin(1)
    side = chroma.clamp(min=1)  # grey has no hue, any will do
    hue = torch.where(
        value == red,
        (green - blue) / side,
        torch.where(value == green, (blue - red) / side + 2, (red - green) / side + 4),
    )
    place = (hue.unsqueeze(1) + shift).remainder_(6)
    depth = torch.minimum(place, 4 - place).clamp_(0, 1).mul_(chroma.unsqueeze(1))
    # 0..1 becomes 0..255 by this factor and truncation in torchvision.
    return (value.unsqueeze(1) - depth).mul_(255.999 / 255).to(torch.uint8)


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

    ``transform.batch(images, *targets)`` does the same for a batch, on the images' device.

    Raises:
        ValueError: for arguments, images or targets that are none of these, or targets of another size.
    """
    return _TrainingTransform(crop, resize, scale, flip, jitter)
