"""The suppressor, compiled, and the one place that decides when the compiled form is used.

On a processor numba compiles it (`cpu`), on a GPU Triton (`cuda`); `autograd` holds what both share. Nothing
is compiled, and neither is imported, before the first call that can use it. Results and gradients are those
of :func:`drs_lib.drs.suppress_plain` up to rounding.
"""

import importlib
import logging
import os
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

__all__ = ["Form", "available", "disabled", "for_input", "forms"]

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


@cache
def _cpu_module():
    try:
        return importlib.import_module(f"{__name__}.cpu")
    except ImportError as error:
        logging.getLogger(__name__).warning(
            "DRS runs uncompiled on this machine, a training step takes about twice as long: %s. "
            "`pip install numba` provides the compiled form.",
            error,
        )
        return None


@cache
def _gpu_module(device, dtype):
    try:
        module = importlib.import_module(f"{__name__}.cuda")
        module.check(device, dtype)
    except Exception as error:
        # Triton may be missing, or meet a GPU or a driver that it does not know, or that lacks bfloat16, and
        # then fails in many ways.
        logging.getLogger(__name__).warning(
            "DRS runs uncompiled on %s in %s, and slower: %s: %s. PyTorch for Linux brings the Triton that "
            "compiles it.",
            device,
            dtype,
            type(error).__name__,
            error,
        )
        return None
    return module


def available() -> bool:
    """Whether the compiled form can be used here at all (numba imports)."""
    return _cpu_module() is not None


class Form(NamedTuple):
    """A compiled form: a module with ``suppress`` and ``suppress_by``, and the device its tensors lie on."""

    name: str
    device: str
    module: ModuleType


def forms() -> list[Form]:
    """Every compiled form that can run on this machine; `for_input` picks among them.

    For whoever checks or times them all: the notebook on the DRS module runs each one in this list.
    """
    found = [Form("numba", "cpu", _cpu_module())] if available() else []
    if torch.cuda.is_available():
        module = _gpu_module(torch.device("cuda", torch.cuda.current_device()), torch.float32)
        found += [] if module is None else [Form("triton", "cuda", module)]
    return found


def for_input(x: torch.Tensor):
    """The module whose ``suppress`` and ``suppress_by`` take ``x``, or None where the plain form is needed.

    The compiled forms cover dense NCHW or channels-last memory, one element or more: float32 on a processor,
    float32, float16 or bfloat16 on a GPU. Anything else, and whatever torch is tracing or compiling, is left
    to the plain form.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _disabled.get():
        return None
    if type(x) not in (torch.Tensor, torch.nn.Parameter):
        return None
    if x.dtype not in _TYPES.get(x.device.type, ()):
        return None
    if x.layout != torch.strided or x.numel() == 0 or x.shape[2] * x.shape[3] >= 2**31:
        return None
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return None
    return _cpu_module() if x.device.type == "cpu" else _gpu_module(x.device, x.dtype)
