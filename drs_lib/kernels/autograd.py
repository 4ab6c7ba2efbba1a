"""Algorithm 1's two autograd functions, over the loops of a device: `drs_lib.kernels.cpu` or `.cuda`.

``loops`` is a module with

    extracted(x)                             maxima, their first positions, sums of relu(x), each (N, K)
    clamped(x, peak, control)                min(relu(x), tau), and tau = peak * control, (N, K)
    suppressed(x, control)                   both in one go: y, tau, maxima, positions
    gradients(g, y, tau, control, argmax)    the gradient of x, and that of tau, (N, K)
    average_gradient(y, share, gx)           adds ``share`` to gx wherever x was positive

Only the result y, which the next layer keeps anyway, and a few numbers per channel are saved for the backward
pass: y tells a dead element (0), a passed one (below tau) and a suppressed one (tau) apart. Where tau is 0,
because the control value is or the product is too small, it is the negative zero: equal to 0, with a sign.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class Suppress(torch.autograd.Function):
    """`drs_lib.drs.suppress` for an ``x`` (N, K, H, W) that `drs_lib.kernels.for_input` accepts and control
    values (N, K) of float32."""

    @staticmethod
    def forward(ctx, loops, x, control):
        y, tau, peak, argmax = loops.suppressed(x, control)
        ctx.loops = loops
        ctx.save_for_backward(y, tau, control, peak, argmax)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, tau, control, peak, argmax = ctx.saved_tensors
        gx, g_tau = ctx.loops.gradients(g, y, tau, control, argmax)
        return None, gx, (g_tau * peak).to(control.dtype)


class SuppressLearnable(torch.autograd.Function):
    """The same with the control values of equation 2, f being ``weight`` (K, K). Equation 2 runs inside, on
    the averages, so that x gets one gradient instead of a sum of two."""

    @staticmethod
    def forward(ctx, loops, x, weight):
        peak, argmax, total = loops.extracted(x)
        average = (total / (x.shape[2] * x.shape[3])).float()
        with torch.autocast(x.device.type, enabled=False):
            control = torch.sigmoid(F.linear(average, weight.float()))
        y, tau = loops.clamped(x, peak, control)
        ctx.loops = loops
        ctx.save_for_backward(y, tau, control, peak, argmax, average, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, tau, control, peak, argmax, average, weight = ctx.saved_tensors
        gx, g_tau = ctx.loops.gradients(g, y, tau, control, argmax)
        g_f = g_tau * peak * (1 - control) * control
        with torch.autocast(y.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                ctx.loops.average_gradient(y, g_f @ weight.float() / (y.shape[2] * y.shape[3]), gx)
            return None, gx, (average.T @ g_f).T.to(weight.dtype) if ctx.needs_input_grad[2] else None
