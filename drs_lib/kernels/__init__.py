"""Algorithm 1 compiled, and the decision when the compiled form is used.

On a processor numba compiles it (`cpu`), on a GPU Triton (`cuda`); `autograd` holds what both share. Nothing
is compiled, and neither is imported, before the first call that can use it. Results and gradients are those
of :func:`drs_lib.drs.suppress_plain` up to rounding, and :func:`check` makes sure of it before the first use.
"""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

__all__ = ["Form", "available", "check", "disabled", "for_input", "forms"]

REMEDIES = {
    "cpu": "pip install numba; if it is there, delete what it stored, the files cpu.*.nb* in "
    f"{Path(__file__).with_name('__pycache__')} or in $NUMBA_CACHE_DIR, and start Python again",
    "cuda": "install PyTorch for Linux, which brings Triton",
}
_TYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.float16, torch.bfloat16)}
_checked = {}
_disabled = ContextVar("drs_lib.kernels.disabled", default=os.environ.get("DRS_LIB_KERNELS", "1") == "0")


@contextmanager
def disabled():
    """Use the plain form inside the ``with`` block, in this thread.

    The environment variable ``DRS_LIB_KERNELS=0``, set before the import, does it for a whole process. The
    backward pass runs in the form in which the forward pass ran.
    """
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


def for_input(x: torch.Tensor) -> ModuleType | None:
    """The module, `cpu` or `cuda`, whose compiled functions take ``x``; None where the plain form is needed.

    The compiled forms cover dense NCHW or channels-last memory, one element or more: float32 on a processor,
    float32, float16 or bfloat16 on a GPU. Anything else, and whatever torch is tracing, compiling or
    transforming, is left to the plain form.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _disabled.get():
        return None
    # What autograd asks before it runs a function that torch.func can't transform; nothing public tells it.
    if torch._C._are_functorch_transforms_active():
        return None
    if type(x) not in (torch.Tensor, torch.nn.Parameter) or x.dtype not in _TYPES.get(x.device.type, ()):
        return None
    if x.layout != torch.strided or x.numel() == 0 or x.numel() // len(x) >= 2**31:
        return None
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return None
    return _form_for(x.device, x.dtype)


class Form(NamedTuple):
    """A compiled form: its compiler, the device its tensors lie on, and its module."""

    name: str
    device: str
    module: ModuleType


def forms() -> list[Form]:
    """Every compiled form that can run on this machine, for whoever checks or times them all."""
    found = [Form("numba", "cpu", _form_for(torch.device("cpu"), torch.float32))]
    if torch.cuda.is_available():
        gpu = torch.device("cuda", torch.cuda.current_device())
        found.append(Form("triton", "cuda", _form_for(gpu, torch.float32)))
    return [form for form in found if form.module is not None]


def available() -> bool:
    """Whether the processor's compiled form can be used here."""
    return _form_for(torch.device("cpu"), torch.float32) is not None


def _form_for(device, dtype):
    """The module for a device and a type, or None where it can't be imported or fails `check`.

    The answer is remembered, except where memory ran out: the next call may find some.
    """
    if (device, dtype) in _checked:
        return _checked[device, dtype]
    try:
        if device.type == "cpu":
            from drs_lib.kernels import cpu as form
        else:
            from drs_lib.kernels import cuda as form
        # In a thread of its own none of the caller's modes holds: inference, autocast, checkpoints, devices.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(check, form, device, dtype).result()
    except Exception as error:
        # numba or Triton may be missing, meet a processor, a GPU or a driver that it does not know, or find
        # damaged what it stored of an earlier compilation, and then fails in many ways.
        form = None
        message = "DRS runs uncompiled on %s in %s, and slower: %s: %s. What to do: %s."
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        remedy = "the next call tries again" if full else REMEDIES[device.type]
        logging.getLogger(__name__).warning(message, device, dtype, type(error).__name__, error, remedy)
        if full:
            return None
    _checked[device, dtype] = form
    return form


def check(form, device, dtype):
    """Compares a compiled form with the plain one: both functions and their gradients, both memory formats,
    a small map and one that a GPU cuts into parts.

    Draws no random numbers. Raises RuntimeError where they differ, and whatever the compiler raises.
    """
    exact = dtype == torch.float32
    close = dict(rtol=1e-4, atol=1e-5) if exact else dict(rtol=3e-2, atol=3e-2)
    plain = {"suppress": _plain, "suppress_learnable": _plain_learnable}
    sizes = product(((2, 3, 9, 7), (1, 2, 130, 131)), (torch.contiguous_format, torch.channels_last), plain)
    for (n, k, h, w), layout, name in sizes:
        x = torch.sin(torch.arange(n * k * h * w, dtype=torch.float32, device=device) ** 1.1)
        x = x.reshape(n, k, h, w).to(dtype=dtype, memory_format=layout)
        other = torch.linspace(0.3, 0.9, n * k, dtype=torch.float32, device=device).reshape(n, k)
        if name == "suppress_learnable":
            other = torch.linspace(-3, 3, k * k, dtype=torch.float32, device=device).reshape(k, k)
        results = []
        for function in (getattr(form, name), plain[name]):
            inputs = [x.clone().requires_grad_(), other.clone().requires_grad_()]
            y = function(*inputs)
            gx, g_other = torch.autograd.grad((y * y.detach().cos()).sum(), inputs)
            # In sixteen bits several elements are the maximum; the plain form may take another one.
            results.append((y, gx if exact else gx.float().sum((2, 3)), g_other))
        if not all(torch.allclose(*pair, **close) for pair in zip(*results, strict=True)):
            raise RuntimeError(f"the compiled form's {name} gives other results than the plain one")


def _plain(x, control):
    """Algorithm 1 as `drs_lib.drs` has it, for control values (N, K) below 1."""
    features = x.relu()
    tau = (features.flatten(2).max(dim=2).values * control).to(x.dtype)[:, :, None, None]
    return torch.where(features < tau, features, tau)


def _plain_learnable(x, weight):
    """The same with equation 2, for the weight (K, K) of f."""
    return _plain(x, torch.sigmoid(x.relu().mean((2, 3), dtype=torch.float32) @ weight.T))
