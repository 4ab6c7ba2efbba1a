"""Discriminative region suppression: Algorithm 1 of the paper, its two controllers, the module that plugs in.

``suppress`` is Algorithm 1 on relu(x); ``DRS`` takes the place of a ReLU in a network; ``plug_drs`` does
so for the ReLUs of a network somebody else wrote.
"""

import logging
import numbers
import threading
import weakref
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from . import kernels

__all__ = [
    "DRS",
    "ConstantController",
    "LearnableController",
    "PlugReport",
    "ReLUCall",
    "plug_drs",
    "suppress",
    "suppress_plain",
]


def _checked_delta(delta):
    if not isinstance(delta, numbers.Real) or isinstance(delta, bool) or not 0 < delta <= 1:
        raise ValueError(f"delta is {delta!r}; it must be a number with 0 < delta <= 1 (1 is a plain ReLU)")
    return float(delta)


def _checked_features(x):
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; DRS works on feature maps of shape (N, K, H, W)")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; DRS works on floating-point feature maps, convert with x.float()")


def _checked_control(x, control):
    """``control`` as a float, or as a tensor (N, K) like x."""
    _checked_features(x)
    if not isinstance(control, torch.Tensor):
        return _checked_delta(control)
    n, k = x.shape[:2]
    if control.shape not in ((k,), (n, k), (n, k, 1, 1)):
        raise ValueError(
            f"control has shape {tuple(control.shape)}; for x of shape {tuple(x.shape)} it must "
            f"be a number or have shape ({k},), ({n}, {k}) or ({n}, {k}, 1, 1)"
        )
    if control.device != x.device:
        raise ValueError(f"control is on {control.device}, x on {x.device}; move one with .to(device)")
    if control.ndim == 1:
        control = control.expand(n, k)
    # Not x's type: in bfloat16 a control value would have 8 bits.
    return control.reshape(n, k).to(_at_least_float32(x))


def _at_least_float32(x):
    return torch.promote_types(x.dtype, torch.float32)


def _suppressor(features, control):
    """Algorithm 1 for features >= 0: extractor, upper bound tau, element-wise minimum."""
    if features.numel() == 0:
        return features
    peak = features.flatten(2).max(dim=2).values
    tau = (peak * control).to(features.dtype)[:, :, None, None]
    # torch.minimum halves the gradient where both are equal; here an element at its upper bound counts as
    # suppressed, so that the gradient at a control value of 1 continues the one below 1.
    return torch.where((features < tau) | (features == 0), features, tau)


def suppress_plain(x: torch.Tensor, control) -> torch.Tensor:
    """:func:`suppress` as a composition of library calls: any floating-point type, memory format, device."""
    control = _checked_control(x, control)
    if isinstance(control, float) and control == 1:
        return F.relu(x)
    return _suppressor(F.relu(x), control)


# torch.fx traces a network with stand-ins for tensors, of which nothing can be asked: what is wrapped stays a
# call.
@torch.fx.wrap
def suppress(x: torch.Tensor, control) -> torch.Tensor:
    """Algorithm 1 on X = relu(x): min(X, tau) with tau = X_max * G, X_max the maximum of each map.

    Args:
        x: feature maps (N, K, H, W), floating point.
        control: G, the share of its maximum that a map may keep: a number in (0, 1], or a tensor of shape
            (K,), (N, K) or (N, K, 1, 1) with values in [0, 1].

    Returns:
        Suppressed maps of the shape, type and memory format of ``x``, all >= 0.

    Gradients reach ``x`` at the elements below tau and, through tau, at the maximum (among equal maxima
    at the first), and ``control`` if it is a tensor. The number 1 makes it a ReLU. NaN in a map spreads
    to all its positive elements, since its maximum is unknown.

    Where it applies (see :mod:`drs_lib.kernels`), a compiled form runs, on a processor and on a GPU. It can't
    be differentiated twice nor transformed by ``torch.func``; :func:`suppress_plain` can.

    Raises:
        ValueError: ``x`` isn't four-dimensional or floating point; the number isn't in (0, 1]; the tensor has
            another shape or lies on another device.
    """
    control = _checked_control(x, control)
    if isinstance(control, float):
        if control == 1:
            return F.relu(x)
        kernel = kernels.for_input(x)
        if kernel is not None:
            control = torch.full(x.shape[:2], control, dtype=torch.float32, device=x.device)
    else:
        kernel = kernels.for_input(x)
    return _suppressor(F.relu(x), control) if kernel is None else kernel.suppress(x, control)


@torch.fx.wrap
def _suppress_by(x, weight):
    """Algorithm 1 with the control values of equation 2, f being ``weight`` (K, K)."""
    kernel = kernels.for_input(x)
    if kernel is not None and type(weight) in (torch.Tensor, nn.Parameter):
        return kernel.suppress_by(x, weight)
    features = F.relu(x)
    return _suppressor(features, _control_values(features, lambda a: F.linear(a, weight.to(a.dtype))))


def _control_values(features, f):
    """Equation 2, G = sigmoid(f(GAP(X))): (N, K), in float32 whatever the type of the maps (N, K, H, W)."""
    average = features.mean(dim=(2, 3), dtype=_at_least_float32(features))
    kind = features.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        return torch.sigmoid(f(average))


class ConstantController(nn.Module):
    """The non-learnable controller: G = delta for every map.

    Raises:
        ValueError: ``delta`` isn't a number in (0, 1].
    """

    def __init__(self, delta: float):
        super().__init__()
        self.delta = _checked_delta(delta)

    def forward(self, features: torch.Tensor) -> float:
        return self.delta

    def extra_repr(self):
        return f"delta={self.delta:g}"


class LearnableController(nn.Module):
    """G = sigmoid(f(GAP(X))), equation 2, with f one bias-free linear layer K -> K started at N(0, 0.01).

    Takes non-negative maps (N, K, H, W), or their averages as (N, K, 1, 1); returns control values (N, K) in
    [0, 1], which start near 0.5.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.f = nn.Linear(channels, channels, bias=False)
        nn.init.normal_(self.f.weight, std=0.01)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return _control_values(features, lambda average: self.f(average.to(self.f.weight.dtype)))


def _weight_of(controller):
    """The weight of a `LearnableController` that is equation 2 and nothing else, for the compiled form.

    None where somebody listens to the controller or has put something else in the place of a part of it.
    """
    if type(controller) is not LearnableController or type(controller.f) is not nn.Linear:
        return None
    if controller.f.bias is not None or any(map(_is_watched, (controller, controller.f))):
        return None
    return controller.f.weight


def _is_watched(module):
    # There is no public question; these are what a module's own call looks at.
    forward = module._forward_hooks or module._forward_pre_hooks
    backward = module._backward_hooks or module._backward_pre_hooks
    return forward or backward or "forward" in vars(module) or nn.modules.module._has_any_global_hook()


@torch.fx.wrap
def _with_channels(x, channels):
    _checked_features(x)
    if x.shape[1] != channels:
        raise ValueError(
            f"x has {x.shape[1]} channels (shape {tuple(x.shape)}); this DRS was made for {channels}"
        )
    return x


class DRS(nn.Module):
    """Discriminative region suppression in place of a ReLU: maps (N, K, H, W) in, maps (N, K, H, W) out.

    ``delta=None`` learns the control values (K * K parameters), ``0 < delta <= 1`` fixes them (none);
    ``delta=1`` is a ReLU. ``.controller`` may be replaced by any module from maps X = relu(x) to control
    values.

    Raises:
        ValueError: ``delta`` isn't in (0, 1]; the input isn't four-dimensional or has other than
        ``channels`` maps.
    """

    def __init__(self, channels: int, delta: float | None = None):
        super().__init__()
        self.channels = channels
        self.controller = LearnableController(channels) if delta is None else ConstantController(delta)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = _with_channels(x, self.channels)
        if type(self.controller) is ConstantController:
            return suppress(x, self.controller(x))
        weight = _weight_of(self.controller)
        if weight is not None:
            return _suppress_by(x, weight)
        features = F.relu(x)
        return suppress(features, self.controller(features))

    def extra_repr(self):
        return str(self.channels)


@dataclass(frozen=True)
class ReLUCall:
    """One place where a network calls an ``nn.ReLU``: its name, its input's shape, what became of it.

    ``position`` counts, from 1 and in execution order, the calls DRS can replace; it is None for the
    others, and ``reason`` says why.
    """

    name: str
    shape: tuple[int, ...]
    position: int | None
    plugged: bool
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
        lines += [f"{count} {kind}: not a ReLU" for kind, count in sorted(self.other_activations.items())]
        return lines

    def __str__(self):
        return "\n".join([*map(str, self.calls), *(f"left alone: {line}" for line in self.left_alone())])


class _Place:
    """Whose calls are counted: a copy of a :class:`DRSCalls` gets one of its own, a replica shares it."""


class _Counts(threading.local):
    """How many calls of each place there were in the forward pass that a thread is in."""

    def __init__(self):
        self.of = weakref.WeakKeyDictionary()


_counts = _Counts()


class DRSCalls(nn.ModuleList):
    """Stands in for a ReLU that one block calls several times in a forward pass: call k gets module k.

    The count belongs to the thread, so that threads may share the network.
    """

    def __init__(self, modules):
        super().__init__(modules)
        self.place = _Place()

    def restart(self, *_):
        """Forward pre-hook of the block: an exception half way through must not shift the next pass."""
        _counts.of[self.place] = 0

    def forward(self, x):
        call = _counts.of.get(self.place, 0)
        _counts.of[self.place] = call + 1
        return self[call % len(self)](x)


_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_}


def _tensors(model):
    return (*model.named_parameters(), *model.named_buffers())


class _Recorder(TorchFunctionMode):
    """A dry run's witness: which block calls which ReLU, in which order and on what shape."""

    def __init__(self, model):
        super().__init__()
        self.model, self.stack, self.calls, self.functional = model, [], [], 0

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

    def run(self, example):
        modes = {module: module.training for module in self.model.modules()}
        tensors = {name: torch.empty_like(t, device="meta") for name, t in _tensors(self.model)}
        with ExitStack() as stack:
            for module, mode in modes.items():
                stack.callback(setattr, module, "training", mode)
                stack.callback(module.register_forward_pre_hook(self._enter).remove)
                stack.callback(module.register_forward_hook(self._leave).remove)
            self.model.eval()
            with torch.no_grad(), self:
                torch.func.functional_call(self.model, tensors, (example.to("meta"),))
        return self


def _example(model):
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if convolution is None:
        return torch.empty(1, 3, 224, 224)
    return convolution.weight.new_empty((1, convolution.in_channels, 224, 224), device="meta")


@dataclass(eq=False)
class _Site:
    caller: nn.Module
    relu: nn.Module
    name: str
    shape: tuple[int, ...]
    reason: str
    position: int | None = None

    def described(self, wanted=()):
        return ReLUCall(self.name, self.shape, self.position, self.position in wanted, self.reason)


def _names_in(caller, child):
    """The attributes (or indices) under which ``caller`` holds ``child``: several where it is shared."""
    return [
        name
        for name, module in caller.named_modules(remove_duplicate=False)
        if module is child and name and "." not in name
    ]


def _why_not(shape, held):
    if not held:
        return "called by a block that does not hold it as a module"
    if len(shape) != 4:
        return f"on a tensor of {len(shape)} dimensions, not on feature maps"
    if shape[2] * shape[3] == 1:
        return "on 1x1 maps, which DRS would only scale"
    return ""


def _sites(model, calls):
    """The places that call a ReLU; a block that runs several times in one pass has its places once."""
    block_names = {module: name for name, module in model.named_modules()}
    often = {(caller, relu) for caller, relu, index, _ in calls if index > 0}
    sites = {}
    for caller, relu, index, shape in calls:
        if (caller, relu, index) in sites:
            site = sites[caller, relu, index]
            if site.shape[1] != shape[1] and not site.reason:
                raise ValueError(
                    f"{site.name} is called on {site.shape[1]} and on {shape[1]} channels by a "
                    "block that runs several times; give each run its own nn.ReLU"
                )
            continue
        held = _names_in(caller, relu)
        name = ".".join(filter(None, [block_names[caller], held[0]])) if held else block_names[relu]
        name += f", call {index + 1}" if (caller, relu) in often else ""
        sites[caller, relu, index] = _Site(caller, relu, name, shape, _why_not(shape, held))
    found = [site for site in sites.values() if not site.reason]
    for position, site in enumerate(found, start=1):
        site.position = position
    return list(sites.values()), found


def _report(model, sites, functional, wanted=()):
    called = {site.relu for site in sites}
    others = Counter(
        type(m).__name__
        for m in model.modules()
        if type(m).__module__ == nn.ReLU.__module__ and not isinstance(m, nn.ReLU)
    )
    return PlugReport(
        calls=tuple(site.described(wanted) for site in sites),
        never_called=tuple(n for n, m in model.named_modules() if isinstance(m, nn.ReLU) and m not in called),
        functional=functional,
        other_activations=dict(others),
    )


def _replace(caller, relu, sites, wanted, delta, like):
    modules = [
        DRS(site.shape[1], delta).to(like) if site.position in wanted else nn.ReLU(relu.inplace)
        for site in sites
    ]
    new = modules[0] if len(modules) == 1 else DRSCalls(modules)
    if isinstance(new, DRSCalls):
        caller.register_forward_pre_hook(new.restart)
    for name in _names_in(caller, relu):
        setattr(caller, name, new)
    new.train(relu.training)


def plug_drs(model: nn.Module, layers=None, delta: float | None = None, example: torch.Tensor | None = None):
    """Put DRS in place of the ReLUs of a network, in place ("can be plugged into any network").

    A dry run on the meta device, with the model in eval mode, finds every call of an ``nn.ReLU`` in
    execution order and its number of channels. A ReLU that one block calls several times (torchvision's
    ResNets) becomes a :class:`DRSCalls` with one DRS a call, so every place has its own controller.

    Left alone, and listed in ``model.drs_report`` and in a log warning: ReLUs on vectors (fully connected
    layers) or on 1x1 maps (squeeze-and-excitation), ReLUs the dry run did not call, other activations
    (ReLU6, Hardswish, ...), and calls of ReLU functions (``F.relu``, ``torch.relu``): write those as
    ``nn.ReLU`` to have them replaced. DRS does not work in place, even where it replaces a ReLU that
    does. New parameters have the device and type of the model's; make the optimizer afterwards.

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
        delta = _checked_delta(delta)
    if lazy := [name for name, p in _tensors(model) if nn.parameter.is_lazy(p)]:
        raise ValueError(
            f"{lazy[0]} of {type(model).__name__} is lazy, without a shape as yet: run the model on a batch, "
            "then call plug_drs"
        )
    if isinstance(model, nn.ReLU):
        raise ValueError("the model is itself an nn.ReLU; use DRS(channels, delta) instead")
    recorder = _Recorder(model)
    try:
        recorder.run(_example(model) if example is None else example)
    except Exception as error:
        raise RuntimeError(
            f"the dry run of {type(model).__name__} on the meta device failed ({error}); pass "
            "example=, a batch the model accepts. A forward that makes tensors on a fixed "
            "device or decides by tensor values can't be dry-run."
        ) from error

    sites, found = _sites(model, recorder.calls)
    report = _report(model, sites, recorder.functional)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no nn.ReLU on feature maps that DRS could replace; "
            f"what there is: {'; '.join(report.left_alone()) or 'no activation at all'}"
        )
    wanted = set(range(1, len(found) + 1)) if layers is None else set(layers)
    if missing := wanted - set(range(1, len(found) + 1)):
        raise ValueError(
            f"layers {sorted(missing, key=str)} are not there; {type(model).__name__} has these "
            "ReLUs on feature maps:\n" + "\n".join(str(site.described()) for site in found)
        )

    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    blocks = {}
    for site in sites:
        blocks.setdefault((site.caller, site.relu), []).append(site)
    report = _report(model, sites, recorder.functional, wanted)
    for (caller, relu), block in blocks.items():
        if any(site.position in wanted for site in block):
            _replace(caller, relu, block, wanted, delta, like)
    model.drs_report = report
    if left := report.left_alone():
        logging.getLogger(__name__).warning(
            "plug_drs put DRS in place of %d of %d ReLU calls of %s; left alone: %s",
            len(report.plugged),
            len(sites),
            type(model).__name__,
            "; ".join(left),
        )
    return model
