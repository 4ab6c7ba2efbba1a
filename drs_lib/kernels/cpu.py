"""Algorithm 1 on a processor: a few short loops, compiled by numba.

A map is read once for its maximum and average and once more to be clamped, while it is still in the cache
where the control values are known beforehand. Every loop works on a matrix (positions, channels) whose inner
index is contiguous, so that the compiler vectorises across channels. In channels-last memory that is a map as
it lies there, (N, H W, K): loops ..._last. In NCHW memory, (N K, H W), a plane is read as rows of ``LANES``
neighbours, and the lanes are reduced at the end: loops ..._planes. Maps, maxima, control values and bounds
are float32, positions int32; sums are float32 within a block of positions and float64 across blocks.

The loops release the GIL and run over parts of the batch in a pool of threads, in at most as many at a time
as torch uses. numba's own threads won't do: its portable layer aborts when two threads call at once.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import numba
import numpy as np
import torch

from drs_lib.kernels import autograd

LANES = 32
BLOCK = 64
SMALLEST_PART = 1 << 16  # elements: below this, handing a part to a thread costs more than it saves


def _compiled(function):
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # numba finds no folder to write its cache to: compile anew in each process
        return numba.njit(function, **options)


@_compiled
def _extract(x, peak, argmax, total, part):
    """Of x (positions, lanes), for each lane: the maximum of relu(x), its first position, the sum. ``part``
    is room for the sums of a block, float32 (lanes,)."""
    positions, lanes = x.shape
    for c in range(lanes):
        peak[c] = np.float32(0)
        argmax[c] = np.int32(0)
        total[c] = 0.0
    for start in range(0, positions, BLOCK):
        for c in range(lanes):
            part[c] = np.float32(0)
        for p in range(start, min(start + BLOCK, positions)):
            for c in range(lanes):
                v = x[p, c]
                larger = (v > peak[c]) | (v != v)
                peak[c] = v if larger else peak[c]
                argmax[c] = np.int32(p) if larger else argmax[c]
                part[c] += np.float32(0) if v <= 0 else v
        for c in range(lanes):
            total[c] += part[c]


@_compiled
def _tau(peak, control):
    """The upper bound; -0.0 in place of 0.0, so that what it suppresses can be told from what was dead."""
    tau = np.float32(peak * control)
    return tau if tau != 0 else np.float32(-0.0)


@_compiled
def _dead(y):
    """Whether x was 0 or less where the result is y, float32."""
    return (y <= 0) & (not np.signbit(y))


@_compiled
def _backward(g, y, tau, gx, total, part):
    """Of g and y (positions, lanes): the gradient below tau, in gx, and its sum above, in total."""
    positions, lanes = g.shape
    for c in range(lanes):
        total[c] = 0.0
    for start in range(0, positions, BLOCK):
        for c in range(lanes):
            part[c] = np.float32(0)
        for p in range(start, min(start + BLOCK, positions)):
            for c in range(lanes):
                alive = np.float32(0) if _dead(y[p, c]) else g[p, c]
                passed = y[p, c] < tau[c]
                gx[p, c] = alive if passed else np.float32(0)
                part[c] += np.float32(0) if passed else alive
        for c in range(lanes):
            total[c] += part[c]


@_compiled
def extract_last(x, peak, argmax, total):
    part = np.empty(x.shape[2], np.float32)
    for i in range(x.shape[0]):
        _extract(x[i], peak[i], argmax[i], total[i], part)


@_compiled
def clamp_last(x, peak, control, tau, y):
    for i in range(x.shape[0]):
        for c in range(x.shape[2]):
            tau[i, c] = _tau(peak[i, c], control[i, c])
        for p in range(x.shape[1]):
            for c in range(x.shape[2]):
                v = x[i, p, c]
                low = v if v < tau[i, c] else tau[i, c]
                y[i, p, c] = np.float32(0) if v <= 0 else low


@_compiled
def suppress_last(x, control, peak, argmax, total, tau, y):
    for i in range(x.shape[0]):
        one = slice(i, i + 1)
        extract_last(x[one], peak[one], argmax[one], total[one])
        clamp_last(x[one], peak[one], control[one], tau[one], y[one])


@_compiled
def backward_last(y, g, tau, control, argmax, gx, total):
    part = np.empty(g.shape[2], np.float32)
    for i in range(g.shape[0]):
        _backward(g[i], y[i], tau[i], gx[i], total[i], part)
        for c in range(g.shape[2]):
            gx[i, argmax[i, c], c] += np.float32(control[i, c] * total[i, c])


@_compiled
def spread_last(y, share, gx):
    for i in range(y.shape[0]):
        for p in range(y.shape[1]):
            for c in range(y.shape[2]):
                gx[i, p, c] += np.float32(0) if _dead(y[i, p, c]) else share[i, c]


@_compiled
def _pieces(plane):
    """A plane as rows of LANES neighbours, and the rest as one short row."""
    body = plane.size // LANES * LANES
    return plane[:body].reshape(body // LANES, LANES), plane[body:].reshape(1, plane.size - body)


@_compiled
def extract_planes(x, peak, argmax, total):
    peaks, argmaxes = np.empty(LANES, np.float32), np.empty(LANES, np.int32)
    totals, part = np.empty(LANES, np.float64), np.empty(LANES, np.float32)
    for i in range(x.shape[0]):
        peak[i], argmax[i], total[i] = np.float32(0), np.int32(0), 0.0
        offset = 0
        for piece in _pieces(x[i]):
            _extract(piece, peaks, argmaxes, totals, part)
            for c in range(piece.shape[1]):
                at = np.int32(offset + argmaxes[c] * LANES + c)
                first = (peaks[c] == peak[i]) & (at < argmax[i])
                if (peaks[c] > peak[i]) | (peaks[c] != peaks[c]) | first:
                    peak[i], argmax[i] = peaks[c], at
                total[i] += totals[c]
            offset += piece.size


@_compiled
def clamp_planes(x, peak, control, tau, y):
    for i in range(x.shape[0]):
        t = tau[i] = _tau(peak[i], control[i])
        for p in range(x.shape[1]):
            v = x[i, p]
            low = v if v < t else t
            y[i, p] = np.float32(0) if v <= 0 else low


@_compiled
def suppress_planes(x, control, peak, argmax, total, tau, y):
    for i in range(x.shape[0]):
        one = slice(i, i + 1)
        extract_planes(x[one], peak[one], argmax[one], total[one])
        clamp_planes(x[one], peak[one], control[one], tau[one], y[one])


@_compiled
def backward_planes(y, g, tau, control, argmax, gx, total):
    taus, totals, part = np.empty(LANES, np.float32), np.empty(LANES, np.float64), np.empty(LANES, np.float32)
    for i in range(g.shape[0]):
        taus[:], total[i] = tau[i], 0.0
        gs, ys, gxs = _pieces(g[i]), _pieces(y[i]), _pieces(gx[i])
        for k in range(2):
            _backward(gs[k], ys[k], taus, gxs[k], totals, part)
            for c in range(gs[k].shape[1]):
                total[i] += totals[c]
        gx[i, argmax[i]] += np.float32(control[i] * total[i])


@_compiled
def spread_planes(y, share, gx):
    for i in range(y.shape[0]):
        s = share[i]
        for p in range(y.shape[1]):
            gx[i, p] += np.float32(0) if _dead(y[i, p]) else s


@cache
def _pool(process):
    """The threads of a process, by its number: a fork has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="drs_lib")


def _run(loop, *arrays):
    """``loop`` over the first axis of ``arrays``, split between threads where that pays."""
    parts = min(torch.get_num_threads(), len(arrays[0]), arrays[0].size // SMALLEST_PART)
    if parts < 2:
        loop(*arrays)
        return
    cut = [np.array_split(array, parts) for array in arrays]
    list(_pool(os.getpid()).map(loop, *cut))  # the list waits for all, and raises what a part raised


def _call(loops, like, *tensors):
    """One of two loops, for NCHW and for channels-last, on maps ``like`` and other maps or values (N, K)."""
    n, k, height, width = like.shape
    last = k > 1 and like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format

    def array(tensor):
        tensor = tensor.detach()
        if tensor.ndim == 2:
            return tensor.contiguous().numpy().reshape((n, k) if last else n * k)
        tensor = tensor.contiguous(memory_format=layout)
        if last:
            return tensor.permute(0, 2, 3, 1).numpy().reshape(n, height * width, k)
        return tensor.numpy().reshape(n * k, height * width)

    _run(loops[last], array(like), *map(array, tensors))


def _per_channel(x, *types):
    """Empty (N, K) of each type."""
    return [x.new_empty(x.shape[:2], dtype=dtype) for dtype in types]


def extracted(x):
    """Maximum (float32), its first position (int32) and the sum (float64) of relu(x), each (N, K)."""
    found = _per_channel(x, torch.float32, torch.int32, torch.float64)
    _call((extract_planes, extract_last), x, *found)
    return found


def clamped(x, peak, control):
    """min(relu(x), tau) and tau = peak * control, float32 (N, K)."""
    y, (tau,) = torch.empty_like(x), _per_channel(x, torch.float32)
    _call((clamp_planes, clamp_last), x, peak, control, tau, y)
    return y, tau


def suppressed(x, control):
    """y, tau, the maxima and their positions, for control values (N, K) that are known beforehand."""
    y, (tau,) = torch.empty_like(x), _per_channel(x, torch.float32)
    peak, argmax, total = _per_channel(x, torch.float32, torch.int32, torch.float64)
    _call((suppress_planes, suppress_last), x, control, peak, argmax, total, tau, y)
    return y, tau, peak, argmax


def gradients(g, y, tau, control, argmax):
    """The gradient that reaches x through the suppressor and the maximum, and the one that reaches tau."""
    gx, (total,) = torch.empty_like(y), _per_channel(y, torch.float64)
    _call((backward_planes, backward_last), y, g, tau, control, argmax, gx, total)
    return gx, total.float()


def average_gradient(y, share, gx):
    """Adds ``share`` (N, K) to gx wherever x was positive."""
    _call((spread_planes, spread_last), y, share, gx)


suppress = partial(autograd.Suppress.apply, sys.modules[__name__])
suppress_learnable = partial(autograd.SuppressLearnable.apply, sys.modules[__name__])
