"""Seed, device, precision and number of threads of a run.

What a training produces depends on its recipe, its data, its seed, the machine, and on two things that are
easy to overlook: the random numbers drawn before it, and the number of threads (sums are split differently,
so the last bits differ). `seeded` and `threads` rule both out.
"""

import os
import random
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

from drs_lib.arguments import whole
from drs_lib.recipes import PRECISIONS


def seed_everything(seed, accelerators=True):
    """Seed Python's, NumPy's and torch's generators, the last on every device unless `accelerators` is False.

    seed: int in [0, 2**32), NumPy's range. Raises ValueError outside it.
    """
    seed = whole("seed", seed, least=0, most=2**32 - 1)
    random.seed(seed)
    np.random.seed(seed)
    if accelerators:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def random_states(accelerators=True):
    """The states of all random generators, as plain values and tensors, for `restore_random_states`."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "cpu": torch.get_rng_state(),
        # A GPU that has not been used has no state worth keeping, and asking for it would start the GPU.
        "cuda": torch.cuda.get_rng_state_all() if accelerators and torch.cuda.is_initialized() else None,
        "mps": torch.mps.get_rng_state() if accelerators and torch.backends.mps.is_available() else None,
    }


def restore_random_states(states):
    """Set all random generators to what `random_states` returned."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state_all(states["cuda"])
    if states["mps"] is not None:
        torch.mps.set_rng_state(states["mps"])


@contextmanager
def preserved_rng(accelerators=True):
    """Give the caller's random generators back as they were, whatever the block draws from them."""
    states = random_states(accelerators)
    try:
        yield
    finally:
        restore_random_states(states)


@contextmanager
def seeded(seed, accelerators=True):
    """Run a block from `seed`, whatever was drawn before, and leave the caller's generators untouched.

    accelerators: False where the block draws on the CPU alone, as in a process that reads images.
    """
    with preserved_rng(accelerators):
        seed_everything(seed, accelerators)
        yield


@contextmanager
def threads(n=None):
    """Run a block with `n` torch threads (None: leave the number alone), then restore the former number.

    The Critters recipes train with one: their layers are too small to gain from more, a table's rows run as
    one process per core instead, and every laptop prints the same table, however many cores it has.
    """
    former = torch.get_num_threads()
    torch.set_num_threads(former if n is None else whole("threads", n))
    try:
        yield
    finally:
        torch.set_num_threads(former)


def pick_device(name=None):
    """The device to compute on: `name`, else the environment variable DRS_DEVICE, else the best there is.

    The best is cuda, then mps, then cpu. Returns a torch.device. Raises ValueError for a name torch doesn't
    know, RuntimeError for a device this machine doesn't have.
    """
    origin = "device"
    if name is None and os.environ.get("DRS_DEVICE"):
        name, origin = os.environ["DRS_DEVICE"], "the environment variable DRS_DEVICE"
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    found = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    try:
        device = torch.device(name)
        there = found[device.type]
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{origin} is {name!r}: expected cpu, cuda, cuda:<number> or mps") from error
    if (device.index or 0) >= there:
        raise RuntimeError(
            f"{origin} asks for {name!r}, but torch finds {there} {device.type} devices on this machine: "
            "leave it out to take the best one there is"
        )
    return device


def autocast(device, precision="float32"):
    """The context in which a forward pass runs: "float32" as it is, "bfloat16" under torch's autocast."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if precision == "float32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


def move(tensor, device):
    """``tensor.to(device)`` that doesn't wait until a CUDA GPU comes to the copy. The tensor may be dropped
    at once: for CUDA, torch keeps what is copied from; for MPS it doesn't, and there the call waits."""
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def memory_format(device):
    """Channels-last where convolutions are faster for it (CPU, CUDA), contiguous elsewhere (MPS)."""
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


@contextmanager
def tuned(device):
    """Let cuDNN time its algorithms inside the block and keep the fastest: for inputs of one size.

    Not under `torch.use_deterministic_algorithms`, nor on other devices.
    """
    former = torch.backends.cudnn.benchmark
    if torch.device(device).type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = former


@contextmanager
def evaluating(model):
    """Evaluation mode without gradients; afterwards every module is back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, training in modes:
            module.training = training


def require_finite(output):
    """A network's output. Raises ValueError if it holds NaN or infinity, which a score would take for an
    answer."""
    if not torch.isfinite(output).all():
        raise ValueError(
            "the network gives NaN or infinity: it has diverged, or its weights are damaged. Train it again, "
            "with a lower learning rate, or load other weights."
        )
    return output
