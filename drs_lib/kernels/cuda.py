"""Algorithm 1 on a GPU, in Triton: float32, float16 and bfloat16, both memory formats, any height and width.

A tile is a block of positions of a block of channels. Where all positions of a few channels fit into one
tile, one program reads them once, finds their maxima, and writes the result: X is read once and written
once, and the backward pass is one pass too. Larger maps are cut into parts along their positions: a kernel
finds the maxima of each part, torch puts the parts together, another kernel clamps. There are no atomics, so
the same input gives the same bits. Arithmetic is float32 within a tile. tau is rounded to the maps' own type
before it is compared, so that the backward pass can tell from the result alone what was suppressed.

With ``TRITON_INTERPRET=1`` set before the import, everything here runs on the CPU, slowly: for tests.
"""

import sys
from contextlib import nullcontext
from functools import partial

import torch
import triton
import triton.language as tl

from drs_lib.kernels import autograd

TILE = 16_384  # elements: what the registers of a program hold
PART = 4_096  # elements of a tile where the maps are cut into parts
SECTOR = 32  # bytes: what memory delivers at least; a row of a tile is no shorter


@triton.jit
def _tile(channels, positions, P: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr):
    """What a program works on: positions, int32 (P,); whether they lie inside a map, bool (P, B); places in
    an array (N, K), int32 (B,), and whether they exist, bool (B,); the offset of the image, int64, and those
    of the elements within it, int32 (P, B)."""
    n, k = tl.program_id(0), tl.program_id(1) * B + tl.arange(0, B)
    p = tl.program_id(2) * P + tl.arange(0, P)
    real = k < channels
    inside = (p < positions)[:, None] & real[None, :]
    if LAST:
        at = p[:, None] * channels + k[None, :]
    else:
        at = k[None, :] * positions + p[:, None]
    return p, inside, n * channels + k, real, n.to(tl.int64) * channels * positions, at


@triton.jit
def _maxima(v, p, inside, positions):
    """Of a tile v (P, B): the maximum of its ReLU (NaN if there is one), its first position, the sum."""
    positive = tl.where(inside & (v > 0), v, 0.0)
    peak = tl.max(positive, axis=0)
    broken = tl.max(tl.where(inside & (v != v), 1, 0), axis=0) > 0
    first = tl.min(tl.where(inside & (positive == peak[None, :]), p[:, None], positions), axis=0)
    total = tl.sum(positive, axis=0)
    nan = float("nan")
    return tl.where(broken, nan, peak), tl.minimum(first, positions - 1), tl.where(broken, nan, total)


@triton.jit
def _tau(peak, control, kind: tl.constexpr):
    """The upper bound (B,), rounded to the maps' type; -0.0 in place of 0.0, so that what it suppresses can
    be told from what was dead."""
    tau = (peak * control).to(kind).to(tl.float32)
    return tl.where(tau == 0, -1.0 * tau, tau)  # Triton reads the constant -0.0 as 0.0


@triton.jit
def _clamp(v, tau):
    """min(relu(v), tau) of a tile v (P, B) and bounds (B,), all float32."""
    return tl.where(v <= 0, 0.0, tl.where(v < tau[None, :], v, tau[None, :]))


@triton.jit
def _dead(y):
    """Whether x was 0 or less, bool (P, B), where the result is y, float32 (P, B)."""
    return (y <= 0) & (y.to(tl.int32, bitcast=True) >= 0)


@triton.jit
def _suppress_tile(
    x, control, y, tau, peak, argmax,
    channels, positions, P: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """All positions of B maps: reads x, writes y, x's type (N, K, H, W); control, tau, peak are float32 and
    argmax int32 (N, K)."""
    p, inside, entry, real, image, at = _tile(channels, positions, P, B, LAST)
    v = tl.load(x + image + at, mask=inside, other=0.0).to(tl.float32)
    highest, first, _ = _maxima(v, p, inside, positions)
    bound = _tau(highest, tl.load(control + entry, mask=real, other=0.0), y.dtype.element_ty)
    tl.store(peak + entry, highest, mask=real)
    tl.store(argmax + entry, first, mask=real)
    tl.store(tau + entry, bound, mask=real)
    tl.store(y + image + at, _clamp(v, bound).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _extract_part(
    x, peaks, argmaxes, totals,
    images, channels, positions, P: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """P positions of B maps: their maxima and sums float32, first positions int32, each (parts, N, K)."""
    p, inside, entry, real, image, at = _tile(channels, positions, P, B, LAST)
    v = tl.load(x + image + at, mask=inside, other=0.0).to(tl.float32)
    highest, first, total = _maxima(v, p, inside, positions)
    entry += tl.program_id(2) * images * channels
    tl.store(peaks + entry, highest, mask=real)
    tl.store(argmaxes + entry, first, mask=real)
    tl.store(totals + entry, total, mask=real)


@triton.jit
def _clamp_part(
    x, peak, control, y, tau,
    channels, positions, P: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """P positions of B maps: reads x, writes y, x's type (N, K, H, W), and tau, float32 (N, K)."""
    p, inside, entry, real, image, at = _tile(channels, positions, P, B, LAST)
    v = tl.load(x + image + at, mask=inside, other=0.0).to(tl.float32)
    highest = tl.load(peak + entry, mask=real, other=0.0)
    bound = _tau(highest, tl.load(control + entry, mask=real, other=0.0), y.dtype.element_ty)
    tl.store(tau + entry, bound, mask=real)  # the same from every part
    tl.store(y + image + at, _clamp(v, bound).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_part(
    g, y, tau, control, argmax, gx, totals,
    images, channels, positions, P: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Of P positions of B maps: the gradient below tau, in gx, x's type (N, K, H, W), and its sum above, in
    totals, float32 (parts, N, K). WHOLE: the part is all, so the maximum gets its share here."""
    p, inside, entry, real, image, at = _tile(channels, positions, P, B, LAST)
    result = tl.load(y + image + at, mask=inside, other=0.0).to(tl.float32)
    incoming = tl.load(g + image + at, mask=inside, other=0.0).to(tl.float32)
    bound = tl.load(tau + entry, mask=real, other=0.0)
    alive = tl.where(_dead(result), 0.0, incoming)
    passed = result < bound[None, :]
    total = tl.sum(tl.where(passed, 0.0, alive), axis=0)
    tl.store(totals + tl.program_id(2) * images * channels + entry, total, mask=real)
    gradient = tl.where(passed, alive, 0.0)
    if WHOLE:
        first = tl.load(argmax + entry, mask=real, other=0)
        share = tl.load(control + entry, mask=real, other=0.0) * total
        gradient += tl.where(p[:, None] == first[None, :], share[None, :], 0.0)
    tl.store(gx + image + at, gradient.to(gx.dtype.element_ty), mask=inside)


@triton.jit
def _spread_part(y, share, gx, channels, positions, P: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr):
    """Adds share, float32 (N, K), to gx, x's type (N, K, H, W), wherever x was positive."""
    p, inside, entry, real, image, at = _tile(channels, positions, P, B, LAST)
    result = tl.load(y + image + at, mask=inside, other=0.0).to(tl.float32)
    more = tl.load(share + entry, mask=real, other=0.0)
    before = tl.load(gx + image + at, mask=inside, other=0.0).to(tl.float32)
    after = before + tl.where(_dead(result), 0.0, more[None, :])
    tl.store(gx + image + at, after.to(gx.dtype.element_ty), mask=inside)


class _Cut:
    """How maps (N, K, H, W) are cut into tiles: their memory format, the tile's size, the number of parts."""

    def __init__(self, like):
        self.images, self.channels, height, width = like.shape
        self.device = like.device
        self.positions = height * width
        self.last = self.channels > 1 and like.is_contiguous(memory_format=torch.channels_last)
        few = SECTOR // like.element_size() if self.last else 1
        whole = triton.next_power_of_2(self.positions)
        self.whole = whole * few <= TILE
        if self.whole:
            block, self.rows = few, whole
        else:
            block = min(64, triton.next_power_of_2(self.channels)) if self.last else 1
            # The parts are a grid's third dimension, which ends at 65,535.
            self.rows = max(PART // block, triton.next_power_of_2(triton.cdiv(self.positions, 65_535)))
        self.parts = triton.cdiv(self.positions, self.rows)
        self.grid = (self.images, triton.cdiv(self.channels, block), self.parts)
        # 32 elements a thread at the most: more would not fit into its registers.
        warps = max(4, self.rows * block // 1024)
        self.options = {"P": self.rows, "B": block, "LAST": self.last, "num_warps": warps}

    def run(self, kernel, *tensors, **options):
        """A program for each tile. ``tensors`` may be followed by the number of images."""
        # Triton launches on the current device, which need not be the one that the tensors lie on.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            kernel[self.grid](*tensors, self.channels, self.positions, **self.options, **options)

    def lay(self, x):
        layout = torch.channels_last if self.last else torch.contiguous_format
        return x.detach().contiguous(memory_format=layout)

    def empty(self, *parts, dtype=torch.float32):
        """(N, K), or (parts, N, K)."""
        return torch.empty(*parts, self.images, self.channels, dtype=dtype, device=self.device)


def extracted(x):
    """Maximum (float32), its first position (int32) and the sum (float32) of relu(x), each (N, K)."""
    cut = _Cut(x)
    peaks, totals = cut.empty(cut.parts), cut.empty(cut.parts)
    argmaxes = cut.empty(cut.parts, dtype=torch.int32)
    cut.run(_extract_part, cut.lay(x), peaks, argmaxes, totals, cut.images)
    if cut.parts == 1:
        return peaks[0], argmaxes[0], totals[0]
    peak, part = peaks.max(dim=0)  # of equal maxima the first part's, since max gives the first
    return peak, argmaxes.gather(0, part[None])[0], totals.sum(0)


def clamped(x, peak, control):
    """min(relu(x), tau) and tau = peak * control, rounded to x's type, as float32 (N, K)."""
    cut = _Cut(x)
    x, control = cut.lay(x), control.detach().contiguous()
    y, tau = torch.empty_like(x), cut.empty()
    cut.run(_clamp_part, x, peak, control, y, tau)
    return y, tau


def suppressed(x, control):
    """y, tau, the maxima and their positions, for control values (N, K) that are known beforehand."""
    cut = _Cut(x)
    if not cut.whole:
        peak, argmax, _ = extracted(x)
        return *clamped(x, peak, control), peak, argmax
    x, control = cut.lay(x), control.detach().contiguous()
    y, tau, peak, argmax = torch.empty_like(x), cut.empty(), cut.empty(), cut.empty(dtype=torch.int32)
    cut.run(_suppress_tile, x, control, y, tau, peak, argmax)
    return y, tau, peak, argmax


def gradients(g, y, tau, control, argmax):
    """The gradient that reaches x through the suppressor and the maximum, and the one that reaches tau."""
    cut = _Cut(y)
    g, control = cut.lay(g), control.detach().contiguous()
    gx, totals = torch.empty_like(y), cut.empty(cut.parts)
    cut.run(_gradient_part, g, y, tau, control, argmax, gx, totals, cut.images, WHOLE=cut.whole)
    if cut.whole:
        return gx, totals[0]
    total = totals.sum(0)
    flat, first = gx.view(*control.shape, -1), argmax[:, :, None].long()
    through_maximum = (control * total)[:, :, None]
    flat.scatter_(2, first, (flat.gather(2, first) + through_maximum).to(gx.dtype))
    return gx, total


def average_gradient(y, share, gx):
    """Adds ``share`` (N, K) to gx wherever x was positive."""
    _Cut(y).run(_spread_part, y, share.contiguous(), gx)


suppress = partial(autograd.Suppress.apply, sys.modules[__name__])
suppress_learnable = partial(autograd.SuppressLearnable.apply, sys.modules[__name__])
