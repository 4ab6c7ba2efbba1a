"""Background cues for Critters: an off-the-shelf salient object detector in small.

The paper takes its background cues from PoolNet, a detector trained with class-agnostic masks of other
images. Here a network of 46 thousand parameters is trained likewise, on the twelve species that the course
does not use (``python -m drs_course pretrain``), and comes along as shipped/saliency.safetensors.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from drs_lib.data.transforms import normalize

WEIGHTS = Path(__file__).parents[1] / "shipped" / "saliency.safetensors"


def _block(in_channels, channels, stride=1, dilation=1):
    conv = nn.Conv2d(in_channels, channels, 3, stride, dilation, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


def _like(maps, other):
    return F.interpolate(maps, other.shape[-2:], mode="bilinear", align_corners=False)


class SaliencyNetwork(nn.Module):
    """The detector: normalised images (N, 3, H, W) -> logits (N, H, W); height and width from 32 on. A
    U-shape down to 1/8 of the size, with two dilated convolutions at the bottom."""

    def __init__(self):
        super().__init__()
        self.to_half, self.to_quarter = _block(3, 12, stride=2), _block(12, 24, stride=2)
        self.bottom = nn.Sequential(
            _block(24, 32, stride=2), _block(32, 32, dilation=2), _block(32, 32, dilation=4)
        )
        self.join_quarter, self.join_half = _block(32 + 24, 24), _block(24 + 12, 16)
        self.head = nn.Conv2d(16, 1, 1)

    def forward(self, x):
        half = self.to_half(x)
        quarter = self.to_quarter(half)
        y = self.join_quarter(torch.cat([_like(self.bottom(quarter), quarter), quarter], 1))
        y = self.join_half(torch.cat([_like(y, half), half], 1))
        return _like(self.head(y), x)[:, 0]


@lru_cache(maxsize=1)
def shipped_identity():
    """Short hash of the shipped weights, which are part of what determines the data set."""
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:12] if WEIGHTS.is_file() else "missing"


@lru_cache(maxsize=1)
def _shipped_network():
    if not WEIGHTS.is_file():
        raise FileNotFoundError(
            f"no weights of the saliency network at {WEIGHTS}; 'python -m drs_course pretrain' trains them"
        )
    network = SaliencyNetwork()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval()


@torch.inference_mode()
def predict(images):
    """Saliency of images uint8 (N, 3, H, W): uint8 array (N, H, W), 0..255 for 0..1."""
    logits = _shipped_network()(normalize(torch.as_tensor(images)))
    return (torch.sigmoid(logits) * 255).round().byte().numpy()
