"""Discriminative region suppression: Algorithm 1 of the paper, its two controllers, and the module DRS.

Algorithm 1 is ``_suppressor``, equation 2 ``_control_values``. ``suppress`` runs the same compiled, where it
can (`drs_lib.kernels`). ``DRS`` takes the place of a ReLU in a network; `drs_lib.plug` puts it into a network
that somebody else wrote.
"""

import numbers
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from drs_lib import kernels

__all__ = ["DRS", "ConstantController", "LearnableController", "suppress", "suppress_plain"]


@torch.fx.wrap  # fx must not trace into this: its stand-ins for tensors have no shape
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

    Where a compiled form runs (see :mod:`drs_lib.kernels`), the result can't be differentiated twice; that of
    :func:`suppress_plain` can.

    Raises:
        ValueError: ``x`` isn't four-dimensional or floating point; the number isn't in (0, 1]; the tensor has
            another shape or lies on another device.
    """
    control = _checked_control(x, control)
    kernel = None if _is_one(control) else kernels.for_input(x)
    if kernel is None:
        return _suppressor(F.relu(x), control)
    if isinstance(control, float):
        control = torch.full(x.shape[:2], control, dtype=torch.float32, device=x.device)
    return kernel.suppress(x, control)


def suppress_plain(x: torch.Tensor, control) -> torch.Tensor:
    """:func:`suppress` as a composition of library calls: any floating-point type, memory format, device."""
    return _suppressor(F.relu(x), _checked_control(x, control))


def _suppressor(features, control):
    """Algorithm 1 for features X >= 0 (N, K, H, W): extractor (maximum), tau, suppressor (minimum)."""
    if _is_one(control) or features.numel() == 0:
        return features
    peak = features.flatten(2).max(dim=2).values
    tau = (peak * control).to(features.dtype)[:, :, None, None]
    # torch.minimum halves the gradient where both are equal; here an element at its upper bound counts as
    # suppressed, so that the gradient at a control value of 1 continues the one below 1. A dead
    # element never does, not even where tau is 0.
    return torch.where((features < tau) | (features == 0), features, tau)


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


def _control_values(features, f):
    """Equation 2, G = sigmoid(f(GAP(X))): (N, K), in float32 whatever the type of the maps (N, K, H, W)."""
    average = features.mean(dim=(2, 3), dtype=_at_least_float32(features))
    kind = features.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        return torch.sigmoid(f(average))


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
        x = _checked_features(x, self.channels)
        if type(self.controller) is ConstantController:
            return suppress(x, self.controller(x))
        weight = _weight_of(self.controller)
        if weight is not None:  # the compiled form computes equation 2 too
            return _suppress_learnable(x, weight)
        features = F.relu(x)
        return suppress(features, self.controller(features))

    def extra_repr(self):
        return str(self.channels)


@torch.fx.wrap
def _suppress_learnable(x, weight):
    """Algorithm 1 with the control values of equation 2, f being ``weight`` (K, K)."""
    kernel = kernels.for_input(x)
    if kernel is not None and type(weight) in (torch.Tensor, nn.Parameter):
        return kernel.suppress_learnable(x, weight)
    features = F.relu(x)
    return _suppressor(features, _control_values(features, lambda a: F.linear(a, weight.to(a.dtype))))


def _weight_of(controller):
    """The weight of a `LearnableController` that is equation 2 and nothing else; None for any other
    controller, and where a hook or another part was added to it."""
    if type(controller) is not LearnableController or type(controller.f) is not nn.Linear:
        return None
    if controller.f.bias is not None or any(map(_is_watched, (controller, controller.f))):
        return None
    return controller.f.weight


def _is_watched(module):
    # torch has no public way to ask; this is what a module's own call looks at.
    forward = module._forward_hooks or module._forward_pre_hooks
    backward = module._backward_hooks or module._backward_pre_hooks
    return forward or backward or "forward" in vars(module) or nn.modules.module._has_any_global_hook()


def _is_one(control):
    return isinstance(control, float) and control == 1


def _at_least_float32(x):
    return torch.promote_types(x.dtype, torch.float32)


def _checked_delta(delta):
    if not isinstance(delta, numbers.Real) or isinstance(delta, bool) or not 0 < delta <= 1:
        raise ValueError(f"delta is {delta!r}; it must be a number with 0 < delta <= 1 (1 is a plain ReLU)")
    return float(delta)


@torch.fx.wrap
def _checked_features(x, channels=None):
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; DRS works on feature maps of shape (N, K, H, W)")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; DRS works on floating-point feature maps, convert with x.float()")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(
            f"x has {x.shape[1]} channels (shape {tuple(x.shape)}); this DRS was made for {channels}"
        )
    return x


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
