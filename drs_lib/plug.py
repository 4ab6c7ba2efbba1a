"""`plug_drs`: DRS in place of the ReLUs of a network that somebody else wrote, with a report."""

import logging
import threading
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from drs_lib.drs import DRS, ConstantController

__all__ = ["DRSCalls", "PlugReport", "ReLUCall", "plug_drs"]


def plug_drs(model: nn.Module, layers=None, delta: float | None = None, example: torch.Tensor | None = None):
    """Put DRS in place of the ReLUs of a network, in place ("can be plugged into any network").

    A dry run on the meta device, with the model in eval mode, finds every call of an ``nn.ReLU`` in
    execution order and its number of channels. A ReLU that one block calls several times (torchvision's
    ResNets) becomes a :class:`DRSCalls` with one DRS a call, so every place has its own controller.

    Left alone, and listed in ``model.drs_report`` and in a log warning: ReLUs on vectors or on 1x1 maps
    (squeeze-and-excitation), ReLUs the dry run did not call, other activations, and calls of ReLU functions
    (``F.relu``): write those as ``nn.ReLU`` to have them replaced. DRS does not work in place, even where it
    replaces a ReLU that does. New parameters have the device and type of the model's; make the optimizer
    afterwards.

    Args:
        model: any module from a batch of images to anything.
        layers: positions, from 1 and in execution order, of the ReLUs on feature maps to replace; None: all.
        delta: as in :class:`DRS`.
        example: an input for the dry run; None: one 224x224 image with the channels of the first convolution.

    Returns:
        ``model``, with ``model.drs_report`` (:class:`PlugReport`).

    Raises:
        ValueError: ``delta`` isn't in (0, 1]; no ReLU on feature maps was found; ``layers`` names positions
            that aren't there; the model is itself a ReLU, or has lazy modules that have seen no batch. The
            model is unchanged then.
        RuntimeError: the dry run failed; pass an ``example`` the model accepts.
    """
    if delta is not None:
        ConstantController(delta)  # refuses an impossible one before anything changes
    recorder = _dry_run(model, example)
    calls = _places(model, recorder.calls)
    report = _report(model, calls, recorder.functional)
    wanted = _wanted(model, layers, report)
    calls = {place: replace(call, plugged=call.position in wanted) for place, call in calls.items()}
    _replace_relus(model, calls, delta)
    model.drs_report = report = replace(report, calls=tuple(calls.values()))
    if left := report.left_alone():
        numbers = len(report.plugged), len(calls), type(model).__name__
        message = "plug_drs put DRS in place of %d of %d ReLU calls of %s; left alone: %s"
        logging.getLogger(__name__).warning(message, *numbers, "; ".join(left))
    return model


@dataclass(frozen=True)
class ReLUCall:
    """One place where a network calls an ``nn.ReLU``: its name, its input's shape, what became of it.

    ``position`` counts, from 1 and in execution order, the calls DRS can replace; it is None for the
    others, and ``reason`` says why.
    """

    name: str
    shape: tuple[int, ...]
    position: int | None
    plugged: bool = False
    reason: str = ""

    def __str__(self):
        size = "x".join(map(str, self.shape[1:]))
        number = "-" if self.position is None else self.position
        return f"{number:>3} {self.name} ({size}): {'DRS' if self.plugged else self.reason or 'ReLU'}"


@dataclass(frozen=True)
class PlugReport:
    """What :func:`plug_drs` did: every ``nn.ReLU`` call in execution order, and what it cannot replace."""

    calls: tuple[ReLUCall, ...]
    never_called: tuple[str, ...]
    functional: int
    other_activations: dict[str, int]

    @property
    def plugged(self) -> tuple[ReLUCall, ...]:
        return tuple(call for call in self.calls if call.plugged)

    def left_alone(self) -> list[str]:
        """One line for each thing that stays as it was although nobody asked for that."""
        reasons = {}
        for call in self.calls:
            if call.reason:
                reasons.setdefault(call.reason, []).append(call.name)
        if self.never_called:
            reasons["not called in the dry run"] = self.never_called
        lines = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
        if self.functional:
            lines.append(f"{self.functional} call(s) of a ReLU function, which is no nn.ReLU module")
        others = sorted(self.other_activations.items())
        return lines + [f"{count} {kind}: not a ReLU" for kind, count in others]

    def __str__(self):
        return "\n".join([*map(str, self.calls), *(f"left alone: {line}" for line in self.left_alone())])


class _Count(threading.local):
    """How many calls there were in the forward pass that a thread is in."""

    calls = 0

    def __reduce__(self):  # a copy counts for itself
        return _Count, ()


class DRSCalls(nn.ModuleList):
    """Stands in for a ReLU that one block calls several times in a forward pass: call k gets module k.

    The count belongs to the thread, so that threads may share the network.
    """

    def __init__(self, modules):
        super().__init__(modules)
        self.count = _Count()

    def restart(self, *_):
        """Forward pre-hook of the block: an exception half way through must not shift the next pass."""
        self.count.calls = 0

    def forward(self, x):
        call = self.count.calls
        self.count.calls = call + 1
        return self[call % len(self)](x)


_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_}


class _Recorder(TorchFunctionMode):
    """What a dry run shows: which block calls which ReLU, in which order and on what shape."""

    def __init__(self):
        super().__init__()
        self.stack, self.calls, self.functional = [], [], 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _FUNCTIONS and not (self.stack and isinstance(self.stack[-1][0], nn.ReLU)):
            self.functional += 1
        return func(*args, **(kwargs or {}))

    def _enter(self, module, args):
        if isinstance(module, nn.ReLU):
            caller, seen = self.stack[-1]
            self.calls.append((caller, module, seen[module], tuple(args[0].shape)))
            seen[module] += 1
        self.stack.append((module, Counter()))

    def _leave(self, module, args, output):
        self.stack.pop()

    def run(self, model, example):
        tensors = {name: torch.empty_like(t, device="meta") for name, t in _tensors(model)}
        with ExitStack() as stack:
            for module in model.modules():
                stack.callback(setattr, module, "training", module.training)
                stack.callback(module.register_forward_pre_hook(self._enter).remove)
                stack.callback(module.register_forward_hook(self._leave).remove)
            model.eval()
            with torch.no_grad(), self:
                torch.func.functional_call(model, tensors, (example.to("meta"),))


def _tensors(model):
    return (*model.named_parameters(), *model.named_buffers())


def _dry_run(model, example):
    """The `_Recorder` of a run of the model on the meta device. Raises as `plug_drs` does."""
    if lazy := [name for name, tensor in _tensors(model) if nn.parameter.is_lazy(tensor)]:
        raise ValueError(
            f"{lazy[0]} of {type(model).__name__} is lazy, without a shape as yet: run the model on a batch, "
            "then call plug_drs"
        )
    if isinstance(model, nn.ReLU):
        raise ValueError("the model is itself an nn.ReLU; use DRS(channels, delta) instead")
    if example is None:
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        shape = (1, 3 if first is None else first.in_channels, 224, 224)
        example = torch.empty(shape, dtype=None if first is None else first.weight.dtype, device="meta")
    recorder = _Recorder()
    try:
        recorder.run(model, example)
    except Exception as error:
        raise RuntimeError(
            f"the dry run of {type(model).__name__} on the meta device failed ({error}); pass "
            "example=, a batch the model accepts. A forward that makes tensors on a fixed "
            "device or decides by tensor values can't be dry-run."
        ) from error
    return recorder


def _places(model, recorded):
    """A `ReLUCall` for each (caller, relu, how many calls of it before); a block that runs several times in
    one pass has its places once."""
    names = {module: name for name, module in model.named_modules()}
    often = {(caller, relu) for caller, relu, index, _ in recorded if index > 0}
    calls, positions = {}, count(1)
    for caller, relu, index, shape in recorded:
        known = calls.get((caller, relu, index))
        if known is not None:
            if not known.reason and known.shape[1] != shape[1]:
                raise ValueError(
                    f"{known.name} is called on {known.shape[1]} and on {shape[1]} channels by a "
                    "block that runs several times; give each run its own nn.ReLU"
                )
            continue
        held = _names_in(caller, relu)
        name = ".".join(filter(None, [names[caller], held[0]])) if held else names[relu]
        name += f", call {index + 1}" if (caller, relu) in often else ""
        reason = _why_not(shape, held)
        position = None if reason else next(positions)
        calls[caller, relu, index] = ReLUCall(name, shape, position, reason=reason)
    return calls


def _names_in(caller, child):
    """The attributes (or indices) under which ``caller`` holds ``child``: several where it is shared."""
    inside = caller.named_modules(remove_duplicate=False)
    return [name for name, module in inside if module is child and name and "." not in name]


def _why_not(shape, held):
    if not held:
        return "called by a block that does not hold it as a module"
    if len(shape) != 4:
        return f"on a tensor of {len(shape)} dimensions, not on feature maps"
    if shape[2] * shape[3] == 1:
        return "on 1x1 maps, which DRS would only scale"
    return ""


def _report(model, calls, functional):
    called = {relu for _, relu, _ in calls}
    relus = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    activations = [type(m) for m in model.modules() if type(m).__module__ == nn.ReLU.__module__]
    return PlugReport(
        calls=tuple(calls.values()),
        never_called=tuple(name for name, module in relus if module not in called),
        functional=functional,
        other_activations=dict(Counter(t.__name__ for t in activations if not issubclass(t, nn.ReLU))),
    )


def _wanted(model, layers, report):
    """The positions to replace, a set. Raises ValueError where there are none, or not those."""
    found = {call.position: call for call in report.calls if call.position is not None}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no nn.ReLU on feature maps that DRS could replace; "
            f"what there is: {'; '.join(report.left_alone()) or 'no activation at all'}"
        )
    wanted = set(found if layers is None else layers)
    if missing := wanted - set(found):
        raise ValueError(
            f"layers {sorted(missing, key=str)} are not there; {type(model).__name__} has these "
            "ReLUs on feature maps:\n" + "\n".join(map(str, found.values()))
        )
    return wanted


def _replace_relus(model, calls, delta):
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    blocks = {}
    for (caller, relu, _), call in calls.items():
        blocks.setdefault((caller, relu), []).append(call)
    for (caller, relu), own in blocks.items():
        if not any(call.plugged for call in own):
            continue
        new = [DRS(call.shape[1], delta).to(like) if call.plugged else nn.ReLU(relu.inplace) for call in own]
        new = DRSCalls(new) if len(new) > 1 else new[0]
        if isinstance(new, DRSCalls):
            caller.register_forward_pre_hook(new.restart)
        for name in _names_in(caller, relu):
            setattr(caller, name, new)
        new.train(relu.training)
