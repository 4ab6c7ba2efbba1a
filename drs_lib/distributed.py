"""One training on several processes, one for each GPU, by Hugging Face Accelerate.

All processes run the same program and take the same steps; each passes its part of every batch through the
network, and the gradients are averaged. `accelerate launch -m drs_course tables ...` starts them from a command
line, `accelerate.notebook_launcher` from a notebook. The batch is the recipe's, whatever the number of
processes: each takes its share of it, so that the steps are those of one process but for rounding. What is
not training is done by the first process, and the others read it from the run store.

Without several processes, every function here is that of a world of one, and Accelerate is not imported.
"""

import os
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import lru_cache

INSTALL_HINT = 'several processes need Hugging Face Accelerate: pip install "accelerate>=1.0"'
# How long a process waits for another. The first scores and runs the CRF while the others wait.
PATIENCE = timedelta(days=2)


def world_size():
    """How many processes train together: 1, but under Accelerate's (or torchrun's) launcher."""
    # Both variables are the launchers'; one alone may stem from elsewhere.
    if "LOCAL_RANK" not in os.environ:
        return 1
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """This process's number, from 0; that of the process which writes is 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


@contextmanager
def alone():
    """In the block this process, and those that it starts, wait for none of the others."""
    held = os.environ.pop("LOCAL_RANK", None)
    try:
        yield
    finally:
        if held is not None:
            os.environ["LOCAL_RANK"] = held


@lru_cache(maxsize=1)
def _accelerate():
    """The package, once the processes have found each other."""
    try:
        import accelerate
    except ImportError as error:
        raise RuntimeError(f"this is process {rank()} of {world_size()}, and {INSTALL_HINT}") from error
    state = accelerate.PartialState(cpu=os.environ.get("DRS_DEVICE") == "cpu", timeout=PATIENCE)
    if state.num_processes != world_size():
        raise RuntimeError(
            f"Accelerate found {state.num_processes} processes, the environment says {world_size()}: start "
            "the program with 'accelerate launch', see docs/voc.md"
        )
    return accelerate


def device():
    """The device of this process among several: a GPU of its own, or the CPU (with DRS_DEVICE=cpu)."""
    return _accelerate().PartialState().device


def agree(value):
    """The first process's `value` (anything that pickles), in all processes."""
    if world_size() == 1:
        return value
    return _accelerate().utils.broadcast_object_list([value])[0]


def gather(value):
    """A list of every process's `value`, by rank, in all processes."""
    if world_size() == 1:
        return [value]
    return _accelerate().utils.gather_object([value])


def share(mean, count):
    """A mean over `count` items of this process as its share of the mean over the items of all processes.

    mean: scalar tensor with a graph. count: number or tensor. The average of the shares over all processes,
    which is what the gradients are averaged to, is the mean over all items.
    """
    if world_size() == 1:
        return mean
    import torch

    # A number is written on the device, not copied there: a copy would wait for all that the GPU has to do.
    count = count.detach().to(mean.dtype) if torch.is_tensor(count) else mean.new_full((), count)
    total = _sum(count.clone())
    return mean * (count * world_size() / total.clamp(min=1))


def average(values):
    """The average of a tensor over all processes, in all of them."""
    return values if world_size() == 1 else _sum(values.clone()) / world_size()


def _sum(tensor):
    import torch

    _accelerate()
    torch.distributed.all_reduce(tensor)
    return tensor


def objective(model, loss):
    """``loss(model, batch)`` as a function of the batch, and a context in which its gradients stay local.

    With several processes, the gradients of a backward pass are averaged over them, except inside the context
    (for all batches of an accumulated step but the last).
    """
    if world_size() == 1:
        return (lambda batch: loss(model, batch)), nullcontext
    from torch import nn

    class Objective(nn.Module):
        """The loss as a forward pass: it is there that the gradients of several processes are averaged."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return loss(self.model, batch)

    # Precision is the recipe's affair.
    accelerator = _accelerate().Accelerator(cpu=device().type == "cpu", mixed_precision="no")
    wrapped = accelerator.prepare_model(Objective())
    return wrapped, wrapped.no_sync


def synchronised_norms(model):
    """The model with batch norm over the whole batch instead of each process's part, where torch can (GPUs).

    On the CPU each process normalises by its own part's statistics; nothing the paper trains has batch norm
    that isn't frozen, the course's small networks do.
    """
    if world_size() > 1 and device().type == "cuda":
        from torch import nn

        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def reseed(epoch, seed):
    """Other random numbers (dropout) in every process but the first, whose images differ as well; the same
    ones after a resumed training."""
    if rank() > 0:
        import torch

        torch.manual_seed((seed * 1_000_003 + epoch * 1009 + rank()) % 2**63)
