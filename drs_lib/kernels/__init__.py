"""The suppressor, compiled, and the one place that decides when the compiled form is used.

On a processor numba compiles it (`cpu`), on a GPU Triton (`cuda`); `autograd` holds what both share. Nothing
is compiled, and neither is imported, before the first call that can use it. Results and gradients are those
of :func:`drs_lib.drs.suppress_plain` up to rounding.
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

_TYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.float16, torch.bfloat16)}
_disabled = ContextVar("drs_lib.kernels.disabled", default=os.environ.get("DRS_LIB_KERNELS", "1") == "0")


@contextmanager
def disabled():
    """Use the plain composition of library calls inside the ``with`` block, in this thread.

    Setting the environment variable ``DRS_LIB_KERNELS=0`` before the import does the same for a whole
    process. What counts is the forward pass: the backward pass takes the form in which the forward pass
    ran.
    """
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


REMEDIES = {
    "cpu": "pip install numba; if it is there, delete what it stored, the files cpu.*.nb* in "
    f"{Path(__file__).with_name('__pycache__')} or in $NUMBA_CACHE_DIR, and start Python again",
    "cuda": "install PyTorch for Linux, which brings Triton",
}
_checked = {}


def _form_for(device, dtype):
    """The module for a device and a type, once it was found equal to the plain form; None if it isn't.

    What passes, such as a GPU that was full at that moment, is not remembered.
    """
    if (device, dtype) in _checked:
        return _checked[device, dtype]
    module, passing = None, False
    try:
        if device.type == "cpu":
            from drs_lib.kernels import cpu as form
        else:
            from drs_lib.kernels import cuda as form
        # In a thread of its own none of the caller's modes holds: inference, autocast, checkpoints, devices.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(check, form, device, dtype).result()
        module = form
    except Exception as error:
        # numba or Triton may be missing, meet a processor, a GPU or a driver that it does not know, or find
        # damaged what it stored of an earlier compilation, and then fails in many ways.
        passing = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        remedy = "the next call tries again" if passing else REMEDIES[device.type]
        logging.getLogger(__name__).warning(
            "DRS runs uncompiled on %s in %s, and slower: %s: %s. What to do: %s.",
            device, dtype, type(error).__name__, error, remedy,
        )  # fmt: skip
    if not passing:
        _checked[device, dtype] = module
    return module


def _plain(x, control):
    """Algorithm 1 as `drs_lib.drs` has it, for control values (N, K) below 1."""
    features = x.relu()
    tau = (features.flatten(2).max(dim=2).values * control).to(x.dtype)[:, :, None, None]
    return torch.where(features < tau, features, tau)


def _plain_by(x, weight):
    return _plain(x, torch.sigmoid(x.relu().mean((2, 3), dtype=torch.float32) @ weight.T))


def check(form, device, dtype):
    """Compares a compiled form with the plain one: both of its functions with their gradients, both memory
    formats, a small map and one that a GPU cuts into parts.

    Draws no random numbers. Raises RuntimeError where they differ, and whatever the compiler raises.
    """
    exact = dtype == torch.float32
    close = dict(rtol=1e-4, atol=1e-5) if exact else dict(rtol=3e-2, atol=3e-2)
    with torch.device(device):
        layouts = (torch.contiguous_format, torch.channels_last)
        for (n, k, h, w), layout in product(((2, 3, 9, 7), (1, 2, 130, 131)), layouts):
            x = torch.sin(torch.arange(n * k * h * w, dtype=torch.float32) ** 1.1).reshape(n, k, h, w)
            x = x.to(dtype=dtype, memory_format=layout)
            control = torch.linspace(0.3, 0.9, n * k, dtype=torch.float32).reshape(n, k)
            weight = torch.linspace(-3, 3, k * k, dtype=torch.float32).reshape(k, k)
            for name, compiled, plain, other in (
                ("suppress", form.suppress, _plain, control),
                ("suppress_by", form.suppress_by, _plain_by, weight),
            ):
                results = []
                for function in (compiled, plain):
                    inputs = [x.clone().requires_grad_(), other.clone().requires_grad_()]
                    y = function(*inputs)
                    gx, g_other = torch.autograd.grad((y * y.detach().cos()).sum(), inputs)
                    # In sixteen bits several elements are the maximum; the plain form may take another one.
                    results.append((y, gx if exact else gx.float().sum((2, 3)), g_other))
                if not all(torch.allclose(*pair, **close) for pair in zip(*results, strict=True)):
                    raise RuntimeError(f"the compiled form's {name} gives other results than the plain one")


def available() -> bool:
    """Whether the processor's compiled form can be used here."""
    return _form_for(torch.device("cpu"), torch.float32) is not None


class Form(NamedTuple):
    """A compiled form: a module with ``suppress`` and ``suppress_by``, and the device its tensors lie on."""

    name: str
    device: str
    module: ModuleType


def forms() -> list[Form]:
    """Every compiled form that can run on this machine; `for_input` picks among them.

    For whoever checks or times them all: the notebook on the DRS module runs each one in this list.
    """
    devices = {"numba": torch.device("cpu")}
    if torch.cuda.is_available():
        devices["triton"] = torch.device("cuda", torch.cuda.current_device())
    found = [Form(name, d.type, _form_for(d, torch.float32)) for name, d in devices.items()]
    return [form for form in found if form.module is not None]


def for_input(x: torch.Tensor):
    """The module whose ``suppress`` and ``suppress_by`` take ``x``, or None where the plain form is needed.

    The compiled forms cover dense NCHW or channels-last memory, one element or more: float32 on a processor,
    float32, float16 or bfloat16 on a GPU. Anything else, and whatever torch is tracing, compiling or
    transforming, is left to the plain form.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _disabled.get():
        return None
    # What autograd asks before it runs a function that torch.func can't transform; nothing public tells it.
    if torch._C._are_functorch_transforms_active():
        return None
    if type(x) not in (torch.Tensor, torch.nn.Parameter):
        return None
    if x.dtype not in _TYPES.get(x.device.type, ()):
        return None
    if x.layout != torch.strided or x.numel() == 0 or x.numel() // len(x) >= 2**31:
        return None
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return None
    return _form_for(x.device, x.dtype)
