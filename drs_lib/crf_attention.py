"""Mean field in the dense CRF as attention: the engine for a GPU, and the one that needs no pydensecrf.

A kernel exp(-|f_i - f_j|^2 / 2) over all pairs of pixels is attention before its softmax: the exponent is
f_i . f_j - |f_j|^2 / 2 - |f_i|^2 / 2, of which the softmax over j drops the last part. With q = (f, 1) and
k = (f, -|f|^2 / 2), softmax(q k^T) v = K v / D, where D = K 1 are the row sums. pydensecrf normalises
symmetrically, D^-1/2 K D^-1/2 v, which is therefore sqrt(D) attention(q, k, v / sqrt(D)). No matrix over all
pairs is ever held: torch's attention works in tiles, and where it doesn't, the queries go in chunks.

The smoothness kernel, on positions alone, is separable: two one-dimensional Gaussian filters.

pydensecrf approximates the kernels on a lattice and this computes them as they are, so the two agree on
nearly all pixels, not on all.
"""

import math

import torch
from torch.nn.functional import conv1d, pad, scaled_dot_product_attention

# A chunk's pairs of pixels: where attention is computed as a matrix, the matrix takes four bytes of each.
MOST_PAIRS = 1 << 26
REACH = 5  # standard deviations: beyond, a Gaussian is below 4e-6


def mean_field(probabilities, image, config, device):
    """`drs_lib.crf.dense_crf` on a device, for arguments that were checked there.

    probabilities: floats (C, H, W); image: uint8 (H, W, 3). Returns a float32 tensor (C, H, W) on the device.
    """
    with torch.no_grad():
        unary = torch.as_tensor(probabilities, dtype=torch.float32, device=device).clamp(1e-5, 1).log()
        picture = torch.as_tensor(image, device=device).float()
        kernels = []
        if config.gaussian_weight:
            kernels.append((config.gaussian_weight, _Smoothness(unary, config.gaussian_sxy)))
        if config.bilateral_weight:
            appearance = _Appearance(picture, config.bilateral_sxy, config.bilateral_srgb)
            kernels.append((config.bilateral_weight, appearance))
        marginals = unary.softmax(0)
        for _ in range(config.iterations):
            energy = unary.clone()
            for weight, kernel in kernels:
                energy += weight * kernel(marginals)
            marginals = energy.softmax(0)
    return marginals


class _Smoothness:
    """K v for k = exp(-|p_i - p_j|^2 / (2 s^2)), symmetrically normalised, as two passes of a 1-D filter."""

    def __init__(self, like, sxy):
        radius = min(math.ceil(REACH * sxy), max(like.shape[1:]) - 1)
        offsets = torch.arange(-radius, radius + 1, device=like.device, dtype=torch.float32)
        self.taps = (-0.5 * (offsets / sxy) ** 2).exp()
        self.root = self._filter(torch.ones_like(like[:1])).rsqrt()

    def __call__(self, values):
        return self.root * self._filter(self.root * values)

    def _filter(self, values):
        radius = len(self.taps) // 2
        for _ in range(2):
            rows = values.reshape(-1, 1, values.shape[-1])
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                filtered = conv1d(pad(rows, (radius, radius)), self.taps[None, None])
            values = filtered.reshape(values.shape).transpose(1, 2)
        return values


class _Appearance:
    """K v for the kernel on positions and colours, symmetrically normalised, as attention."""

    def __init__(self, picture, sxy, srgb):
        height, width, _ = picture.shape
        self.size = (height, width)
        y, x = torch.meshgrid(
            *(torch.arange(n, device=picture.device, dtype=torch.float32) for n in self.size), indexing="ij"
        )
        features = torch.stack([y / sxy, x / sxy, *(picture.permute(2, 0, 1) / srgb)], dim=-1).flatten(0, 1)
        # Distances stay, and the numbers that float32 has to subtract become small.
        features = features - features.mean(0)
        half = 0.5 * features.square().sum(1, keepdim=True)
        one = torch.ones_like(half)
        self.queries = pad(torch.cat([features, one], 1), (0, 2))
        self.keys = pad(torch.cat([features, -half], 1), (0, 2))
        self.chunk = max(1, MOST_PAIRS // len(features))
        sums = [
            (chunk @ self.keys.T - h).exp().sum(1)
            for chunk, h in zip(self.queries.split(self.chunk), half.split(self.chunk), strict=True)
        ]
        self.root = torch.cat(sums).sqrt()

    def __call__(self, values):
        count = len(values)
        values = values.flatten(1).T / self.root[:, None]
        # torch's tiled attention wants queries, keys and values of one width, a multiple of eight.
        width = max(self.queries.shape[1], -(-count // 8) * 8)
        values = pad(values, (0, width - count))
        queries, keys = (pad(t, (0, width - t.shape[1])) for t in (self.queries, self.keys))
        result = torch.cat(
            [
                scaled_dot_product_attention(
                    chunk[None, None], keys[None, None], values[None, None], scale=1.0
                )[0, 0]
                for chunk in queries.split(len(queries) if _tiled(queries, keys, values) else self.chunk)
            ]
        )
        return (result[:, :count] * self.root[:, None]).T.reshape(count, *self.size)


def _tiled(queries, keys, values):
    """Whether torch's attention on this GPU never holds the matrix. It is given all queries at once, then: it
    works on some sixty at a time in each of the GPU's processors, and a chunk would occupy a few of them."""
    if queries.device.type != "cuda":
        return False
    once = (part[None, None] for part in (queries, keys, values))
    return torch.backends.cuda.can_use_efficient_attention(
        torch.backends.cuda.SDPAParams(*once, None, 0.0, False, False)
    )
