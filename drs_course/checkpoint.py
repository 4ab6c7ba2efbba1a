"""A training that was killed goes on after its last finished epoch, to the weights it would have had anyway.

A checkpoint is one file: weights, optimiser, scheduler, history, and the states of all random streams, those
of Python, NumPy and torch and those from which the order of the images is drawn. It is written beside its
place and renamed, so that whenever the process is killed there is a whole one, or none. Of the GPUs it keeps
the state of the one that trained, so that the training may go on on another, beside any number of others.
"""

import copy
import logging
import os
import platform
from contextlib import suppress
from pathlib import Path

import torch

from drs_lib.runtime import random_states, restore_random_states

_log = logging.getLogger(__name__)


class Checkpoint:
    """The state of one training in the file ``path``; `drs_lib.train.fit` writes it after every epoch.

    run: the name of a run that trains again what is in the store. It goes on from its own checkpoints alone:
    another's may be of older code.

    For both methods, ``streams`` are further torch generators whose states belong to the training, in a fixed
    order.
    """

    def __init__(self, path, run=None):
        self.path, self.run = Path(path), run

    def save(self, progress, streams=(), **parts):
        """progress: plain values (step, history, ...). parts: objects with ``state_dict``.

        Where the file can't be written there is a warning: the training itself needs no checkpoint.
        """
        state = {"run": self.run, "progress": progress} | _state(parts, streams)
        # A machine trains a stage once at a time: what a killed process of it left there is written over.
        temporary = self.path.with_name(f".{self.path.name}.{platform.node()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path)
            finally:
                temporary.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            _log.warning("No checkpoint could be written to %s: %s", self.path, error)

    def restore(self, streams=(), **parts):
        """Puts a saved state into the same objects and returns its progress, or None if there is none, or
        none of this run.

        A damaged file, or one of another torch or kind of device, is set aside with a warning: the training
        begins anew.
        """
        if not self.path.exists():
            return None
        before = copy.deepcopy(_state(parts, streams))
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if self.run is not None and state.get("run") != self.run:
                return None
            if state["made_by"] != before["made_by"]:
                raise ValueError(f"it was written by {state['made_by']}, and this is {before['made_by']}")
            if state["parts"].keys() != parts.keys() or len(state["streams"]) != len(streams):
                raise ValueError("it is of another training")
            _put(state, parts, streams)
        except Exception as error:  # unpickling a damaged file raises errors of almost any kind
            _put(before, parts, streams)  # some of it may have been loaded
            aside = self.path.with_suffix(".unusable")
            with suppress(FileNotFoundError):  # on another machine the same training has just been finished
                os.replace(self.path, aside)
            _log.warning("The training begins anew: its checkpoint, now %s, can't be used: %s", aside, error)
            return None
        return state["progress"]

    def remove(self):
        self.path.unlink(missing_ok=True)


def _device(parts):
    """Where the training takes place: the device of its first tensor."""
    tensors = (v for part in parts.values() for v in part.state_dict().values() if torch.is_tensor(v))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _state(parts, streams):
    device, random = _device(parts), random_states()
    # None of devices on which nothing was trained.
    random["cuda"] = random["cuda"][device.index] if device.type == "cuda" else None
    random["mps"] = random["mps"] if device.type == "mps" else None
    return {
        "made_by": f"torch {torch.__version__} on {device.type}",
        "random": random,
        "streams": [stream.get_state() for stream in streams],
        "parts": {name: part.state_dict() for name, part in parts.items()},
    }


def _put(state, parts, streams):
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    for stream, saved in zip(streams, state["streams"], strict=True):
        stream.set_state(saved)
    restore_random_states(state["random"] | {"cuda": None})
    device = _device(parts)
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["random"]["cuda"], device)
