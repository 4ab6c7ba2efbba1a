"""Algorithm 1's two autograd functions, over the loops of a device: `drs_lib.kernels.cpu` or `.cuda`.

``loops`` is a module with

    extracted(x)                        maxima, their first positions, sums of relu(x), each (N, K)
    clamped(x, tau)                     min(relu(x), tau)
    suppressed(x, control)              both in one go: y, tau, maxima, positions
    gradients(g, y, tau, control, where)    the gradient of x, and that of tau, (N, K)
    average_gradient(y, share, gx)      adds ``share`` to gx wherever y > 0

Only the result y, which the next layer keeps anyway, and a few numbers per channel are saved for the backward
pass: y tells a dead element (0), a passed one (below tau) and a suppressed one (tau) apart.
"""

import torch
from torch.autograd.function import once_differentiable


class _Suppress(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, control, loops):
        y, tau, peak, where = loops.suppressed(x, control)
        ctx.loops = loops
        ctx.save_for_backward(y, tau, control, peak, where)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, tau, control, peak, where = ctx.saved_tensors
        gx, g_tau = ctx.loops.gradients(g, y, tau, control, where)
        return gx, (g_tau * peak).to(control.dtype), None


class _SuppressBy(torch.autograd.Function):
    """The controller runs inside, on the averages, so that x gets one gradient instead of a sum of two."""

    @staticmethod
    def forward(ctx, x, loops, controller, *parameters):
        peak, where, total = loops.extracted(x)
        average = (total / (x.shape[2] * x.shape[3])).float()
        with torch.set_grad_enabled(any(ctx.needs_input_grad)):
            average.requires_grad_(ctx.needs_input_grad[0])
            control = controller(average[:, :, None, None]).to(x.dtype)
        tau = (peak * control.detach()).to(x.dtype)
        y = loops.clamped(x, tau)
        ctx.loops, ctx.average, ctx.control, ctx.parameters = loops, average, control, parameters
        ctx.save_for_backward(y, tau, peak, where)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, tau, peak, where = ctx.saved_tensors
        gx, g_tau = ctx.loops.gradients(g, y, tau, ctx.control.detach(), where)
        wanted = [t for t in (ctx.average, *ctx.parameters) if t.requires_grad]
        g_control = (g_tau * peak).to(ctx.control.dtype)
        found = iter(torch.autograd.grad(ctx.control, wanted, g_control, retain_graph=True))
        if ctx.average.requires_grad:
            ctx.loops.average_gradient(y, next(found) / (y.shape[2] * y.shape[3]), gx)
        return gx, None, None, *(next(found) if p.requires_grad else None for p in ctx.parameters)


def suppress(loops, x, control):
    """`drs_lib.drs.suppress` for an ``x`` that `drs_lib.kernels.for_input` accepts, ``control`` (N, K)."""
    return _Suppress.apply(x, control, loops)


def suppress_by(loops, x, controller):
    """The same with the control values ``controller`` gives for the averages of relu(x), (N, K, 1, 1)."""
    return _SuppressBy.apply(x, loops, controller, *controller.parameters())
