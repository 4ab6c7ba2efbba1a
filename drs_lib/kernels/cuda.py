"""Algorithm 1 on a GPU, in Triton: float32, float16 and bfloat16, both memory formats, any height and width.

A tile is a block of positions of a block of channels. Where all positions of a few channels fit into one
tile, one program reads them once, finds their maxima, and writes the result: X is read once and written
once, and the backward pass is one pass too. Larger maps are cut into parts along their positions: one
kernel leaves the maxima of each part, one puts the parts together, one clamps; no atomics, so the same input
gives the same bits. Arithmetic is float32 within a tile; tau is rounded to the maps' own type before it is
compared, so that the backward pass, which looks at the result alone, sees exactly who was suppressed.

With ``TRITON_INTERPRET=1`` set before the import, everything here runs on the CPU, slowly: for tests.
"""

import math
import sys
from contextlib import nullcontext
from itertools import product

import torch
import triton
import triton.language as tl

from drs_lib.kernels import autograd

TILE = 16_384  # elements: what the registers of a program hold
PART = 4_096  # elements of a tile where the maps are cut into parts
SECTOR = 32  # bytes: what memory delivers at least; a row of a tile is no shorter


@triton.jit
def _places(n, k, p, channels, positions, LAST: tl.constexpr):
    """Offsets of positions p (P,) of channels k (B,) of image n: (P, B)."""
    base = n.to(tl.int64) * channels * positions
    if LAST:
        return base + p.to(tl.int64)[:, None] * channels + k[None, :]
    return base + k.to(tl.int64)[None, :] * positions + p[:, None]


@triton.jit
def _maxima(v, p, there, positions):
    """Of a tile v (P, B): the maximum of its ReLU (NaN if there is one), its first position, the sum."""
    positive = tl.where(there & (v > 0), v, 0.0)
    peak = tl.max(positive, axis=0)
    broken = tl.max(tl.where(there & (v != v), 1, 0), axis=0) > 0
    first = tl.min(tl.where(there & (positive == peak[None, :]), p[:, None], positions), axis=0)
    total = tl.sum(positive, axis=0)
    return tl.where(broken, float("nan"), peak), first, tl.where(broken, float("nan"), total)


@triton.jit
def _clamp(v, tau):
    return tl.where(v <= 0, 0.0, tl.where(v < tau[None, :], v, tau[None, :]))


@triton.jit
def _suppress_tile(
    x, control, y, tau, peak, where,
    channels, positions, P: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    n, k, p = tl.program_id(0), tl.program_id(1) * B + tl.arange(0, B), tl.arange(0, P)
    real = k < channels
    there = (p < positions)[:, None] & real[None, :]
    at = _places(n, k, p, channels, positions, LAST)
    v = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    highest, first, _ = _maxima(v, p, there, positions)
    entry = n * channels + k
    share = tl.load(control + entry, mask=real, other=0.0).to(tl.float32)
    bound = (highest * share).to(tau.dtype.element_ty)
    tl.store(peak + entry, highest, mask=real)
    tl.store(where + entry, tl.minimum(first, positions - 1), mask=real)
    tl.store(tau + entry, bound, mask=real)
    tl.store(y + at, _clamp(v, bound.to(tl.float32)).to(y.dtype.element_ty), mask=there)


@triton.jit
def _extract_part(
    x, peaks, firsts, totals,
    images, channels, positions, P: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    n, k = tl.program_id(0), tl.program_id(1) * B + tl.arange(0, B)
    part = tl.program_id(2)
    p = part * P + tl.arange(0, P)
    real = k < channels
    there = (p < positions)[:, None] & real[None, :]
    v = tl.load(x + _places(n, k, p, channels, positions, LAST), mask=there, other=0.0).to(tl.float32)
    highest, first, total = _maxima(v, p, there, positions)
    entry = (part * images + n) * channels + k
    tl.store(peaks + entry, highest, mask=real)
    tl.store(firsts + entry, first, mask=real)
    tl.store(totals + entry, total, mask=real)


@triton.jit
def _combine(peaks, firsts, totals, peak, where, total, parts, entries, positions, E: tl.constexpr):
    e = tl.program_id(0) * E + tl.arange(0, E)
    real = e < entries
    highest, first = tl.zeros((E,), tl.float32), tl.full((E,), 0, tl.int32)
    broken, sums = tl.zeros((E,), tl.int32), tl.zeros((E,), tl.float32)
    for part in range(parts):
        at = part * entries + e
        one = tl.load(peaks + at, mask=real, other=0.0)
        # The first part of all decides where nothing is positive; later ones only if they are higher.
        larger = (one > highest) | (part == 0)
        first = tl.where(larger, tl.load(firsts + at, mask=real, other=0), first)
        highest = tl.where(larger, one, highest)
        broken = broken | tl.where(one != one, 1, 0)
        sums += tl.load(totals + at, mask=real, other=0.0)
    tl.store(peak + e, tl.where(broken > 0, float("nan"), highest), mask=real)
    tl.store(where + e, tl.minimum(first, positions - 1), mask=real)
    tl.store(total + e, sums, mask=real)


@triton.jit
def _clamp_part(x, tau, y, channels, positions, P: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr):
    n, k = tl.program_id(0), tl.program_id(1) * B + tl.arange(0, B)
    p = tl.program_id(2) * P + tl.arange(0, P)
    real = k < channels
    there = (p < positions)[:, None] & real[None, :]
    at = _places(n, k, p, channels, positions, LAST)
    v = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    bound = tl.load(tau + n * channels + k, mask=real, other=0.0).to(tl.float32)
    tl.store(y + at, _clamp(v, bound).to(y.dtype.element_ty), mask=there)


@triton.jit
def _gradient_part(
    g, y, tau, control, where, gx, totals,
    images, channels, positions, P: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A part's gradient of x below tau, and its sum above; WHOLE: the part is all, so the maximum gets its
    share here."""
    n, k = tl.program_id(0), tl.program_id(1) * B + tl.arange(0, B)
    part = tl.program_id(2)
    p = part * P + tl.arange(0, P)
    real = k < channels
    there = (p < positions)[:, None] & real[None, :]
    at = _places(n, k, p, channels, positions, LAST)
    result = tl.load(y + at, mask=there, other=0.0).to(tl.float32)
    incoming = tl.load(g + at, mask=there, other=0.0).to(tl.float32)
    entry = n * channels + k
    bound = tl.load(tau + entry, mask=real, other=0.0).to(tl.float32)
    alive = tl.where(result <= 0, 0.0, incoming)
    passed = result < bound[None, :]
    total = tl.sum(tl.where(passed, 0.0, alive), axis=0)
    tl.store(totals + (part * images + n) * channels + k, total, mask=real)
    gradient = tl.where(passed, alive, 0.0)
    if WHOLE:
        first = tl.load(where + entry, mask=real, other=0)
        share = tl.load(control + entry, mask=real, other=0.0).to(tl.float32) * total
        gradient += tl.where(p[:, None] == first[None, :], share[None, :], 0.0)
    tl.store(gx + at, gradient.to(gx.dtype.element_ty), mask=there)


@triton.jit
def _finish(
    totals, control, where, gx, total,
    parts, channels, positions, entries, E: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Sums over the parts, and one add per channel: what reaches x through the maximum."""
    e = tl.program_id(0) * E + tl.arange(0, E)
    real = e < entries
    sums = tl.zeros((E,), tl.float32)
    for part in range(parts):
        sums += tl.load(totals + part * entries + e, mask=real, other=0.0)
    tl.store(total + e, sums, mask=real)
    n, k = (e // channels).to(tl.int64), e % channels
    first = tl.load(where + e, mask=real, other=0).to(tl.int64)
    base = n * channels * positions
    if LAST:
        at = base + first * channels + k
    else:
        at = base + k.to(tl.int64) * positions + first
    share = tl.load(control + e, mask=real, other=0.0).to(tl.float32) * sums
    before = tl.load(gx + at, mask=real, other=0.0).to(tl.float32)
    tl.store(gx + at, (before + share).to(gx.dtype.element_ty), mask=real)


@triton.jit
def _spread_part(y, share, gx, channels, positions, P: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr):
    n, k = tl.program_id(0), tl.program_id(1) * B + tl.arange(0, B)
    p = tl.program_id(2) * P + tl.arange(0, P)
    real = k < channels
    there = (p < positions)[:, None] & real[None, :]
    at = _places(n, k, p, channels, positions, LAST)
    result = tl.load(y + at, mask=there, other=0.0)
    more = tl.load(share + n * channels + k, mask=real, other=0.0).to(tl.float32)
    before = tl.load(gx + at, mask=there, other=0.0).to(tl.float32)
    after = before + tl.where(result <= 0, 0.0, more[None, :])
    tl.store(gx + at, after.to(gx.dtype.element_ty), mask=there)


class _Cut:
    """How maps (N, K, H, W) are cut into tiles: their memory format, the tile's size, the number of parts."""

    def __init__(self, like):
        self.images, self.channels, height, width = like.shape
        self.device = like.device
        self.positions = height * width
        self.last = self.channels > 1 and like.is_contiguous(memory_format=torch.channels_last)
        self.format = torch.channels_last if self.last else torch.contiguous_format
        few = SECTOR // like.element_size() if self.last else 1
        whole = triton.next_power_of_2(self.positions)
        self.whole = whole * few <= TILE
        if self.whole:
            self.block, self.rows = few, whole
        else:
            self.block = min(64, triton.next_power_of_2(self.channels)) if self.last else 1
            # The parts are a grid's third dimension, which ends at 65,535.
            self.rows = max(PART // self.block, triton.next_power_of_2(triton.cdiv(self.positions, 65_535)))
        self.parts = triton.cdiv(self.positions, self.rows)
        self.grid = (self.images, triton.cdiv(self.channels, self.block), self.parts)
        self.shape = {"P": self.rows, "B": self.block, "LAST": self.last}
        self.warps = 8 if self.rows * self.block >= 8192 else 4

    def run(self, kernel, *arguments, grid=None, **options):
        """Triton launches on the current device, which need not be the one that the tensors lie on."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            kernel[grid or self.grid](*arguments, **options)

    def lay(self, x):
        return x.detach().contiguous(memory_format=self.format)

    def channel_values(self, *lead, dtype=torch.float32, like):
        return torch.empty(*lead, self.images, self.channels, dtype=dtype, device=like.device)


def extracted(x):
    """Maximum, its first position and the sum of relu(x), each (N, K)."""
    cut = _Cut(x)
    x = cut.lay(x)
    peaks, totals = (cut.channel_values(cut.parts, like=x) for _ in range(2))
    firsts = cut.channel_values(cut.parts, dtype=torch.int32, like=x)
    cut.run(
        _extract_part, x, peaks, firsts, totals, cut.images, cut.channels, cut.positions,
        **cut.shape, num_warps=cut.warps,
    )  # fmt: skip
    peak, total = (cut.channel_values(like=x) for _ in range(2))
    where = cut.channel_values(dtype=torch.int32, like=x)
    entries = peak.numel()
    cut.run(
        _combine, peaks, firsts, totals, peak, where, total, cut.parts, entries, cut.positions,
        grid=(triton.cdiv(entries, 128),), E=128,
    )  # fmt: skip
    return peak, where, total


def clamped(x, tau):
    """min(relu(x), tau), with tau (N, K) of x's type."""
    cut = _Cut(x)
    x, tau = cut.lay(x), tau.contiguous()
    y = torch.empty_like(x)
    cut.run(_clamp_part, x, tau, y, cut.channels, cut.positions, **cut.shape, num_warps=cut.warps)
    return y


def suppressed(x, control):
    """y, tau, the maxima and their positions, for control values (N, K) that are known beforehand."""
    cut = _Cut(x)
    if not cut.whole:
        peak, where, _ = extracted(x)
        tau = (peak * control).to(x.dtype)
        return clamped(x, tau), tau, peak, where
    x, control = cut.lay(x), control.detach().contiguous()
    y, peak = torch.empty_like(x), cut.channel_values(like=x)
    tau, where = (cut.channel_values(dtype=dtype, like=x) for dtype in (x.dtype, torch.int32))
    cut.run(
        _suppress_tile, x, control, y, tau, peak, where, cut.channels, cut.positions,
        grid=cut.grid[:2], **cut.shape, num_warps=cut.warps,
    )  # fmt: skip
    return y, tau, peak, where


def gradients(g, y, tau, control, where):
    """The gradient that reaches x through the suppressor and the maximum, and the one that reaches tau."""
    cut = _Cut(y)
    g, control = cut.lay(g), control.detach().contiguous()
    gx, totals = torch.empty_like(y), cut.channel_values(cut.parts, like=y)
    cut.run(
        _gradient_part, g, y, tau, control, where, gx, totals, cut.images, cut.channels, cut.positions,
        **cut.shape, WHOLE=cut.whole, num_warps=cut.warps,
    )  # fmt: skip
    if cut.whole:
        return gx, totals[0]
    total = cut.channel_values(like=y)
    entries = total.numel()
    cut.run(
        _finish, totals, control, where, gx, total, cut.parts, cut.channels, cut.positions, entries,
        grid=(triton.cdiv(entries, 128),), E=128, LAST=cut.last,
    )  # fmt: skip
    return gx, total


def average_gradient(y, share, gx):
    """Adds ``share`` (N, K) to gx wherever y > 0."""
    cut = _Cut(y)
    share = share.contiguous()
    cut.run(_spread_part, y, share, gx, cut.channels, cut.positions, **cut.shape, num_warps=cut.warps)


def suppress(x, control):
    """See `drs_lib.kernels.autograd.suppress`."""
    return autograd.suppress(sys.modules[__name__], x, control)


def suppress_by(x, controller):
    """See `drs_lib.kernels.autograd.suppress_by`."""
    return autograd.suppress_by(sys.modules[__name__], x, controller)


def check(device="cuda", dtype=torch.float32):
    """Compares `suppress` with the plain form on two inputs, one whole in a tile and one cut into parts, in
    both memory formats; done once for each type before this form is used on a GPU.

    Draws no random numbers. Raises RuntimeError where they differ, and whatever Triton raises.
    """
    from drs_lib.drs import suppress_plain

    whole = dtype == torch.float32
    close = dict(rtol=1e-4, atol=1e-5) if whole else dict(rtol=3e-2, atol=3e-2)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(torch.device(device).type, enabled=False),
    ):
        layouts = (torch.contiguous_format, torch.channels_last)
        for shape, layout in product(((2, 3, 9, 7), (1, 2, 130, 131)), layouts):
            x = torch.sin(torch.arange(float(math.prod(shape)), device=device) ** 1.1)
            control = torch.linspace(0.3, 0.9, shape[0] * shape[1], device=device)
            x, control = x.reshape(shape).to(dtype), control.reshape(shape[:2]).to(dtype)
            results = []
            for form in (suppress, suppress_plain):
                inputs = [
                    x.contiguous(memory_format=layout).requires_grad_(),
                    control.clone().requires_grad_(),
                ]
                y = form(*inputs)
                gx, g_control = torch.autograd.grad((y * y.detach().cos()).sum(), inputs)
                # In sixteen bits several elements are the maximum, of which the plain form may take another.
                gx = gx if whole else gx.float().sum((2, 3))
                results.append((y, gx, g_control))
            for found, expected in zip(*results, strict=True):
                if not torch.allclose(found, expected, **close):
                    raise RuntimeError("the compiled form's results are not those of the plain one")
