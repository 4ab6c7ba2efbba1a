"""Checks of what notebooks 02 and 03 ask to be written: suppressors and controllers."""

import contextlib
import functools

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from drs_course.checks.functions import Case, call, called, compare, generator, one_number, randn
from drs_course.checks.verdict import Wrong, check, found

# One image, two maps of 2x3: small enough to be printed in a message. The second has no positive value.
_SMALL = torch.tensor([[[[-1.0, 2.0, 0.4], [6.0, 10.0, 1.0]], [[-3.0, -1.0, -2.0], [-0.5, -4.0, -1.5]]]])
# Ties: 8 * 0.5 = 4 and 2 * 0.5 = 1 occur in the maps, the first maximum occurs twice, and there are zeros.
_TIES = torch.tensor([[[[8.0, 4.0, 0.0], [3.0, 8.0, 4.0]], [[2.0, 1.0, 0.0], [0.5, -2.0, 1.0]]]])
_THETA_SMALL = torch.tensor([[0.4, -1.0], [0.2, 0.1]])


def _maps(n, k, h, w, seed, dtype=torch.float32):
    """Random maps of which one is dead, one all positive, and each of another size of values."""
    x = randn(n, k, h, w, seed=seed, dtype=dtype) * torch.linspace(0.5, 3, k, dtype=dtype)[:, None, None]
    x = x * torch.linspace(1, 2, n, dtype=dtype)[:, None, None, None]
    x[0, 0] = -x[0, 0].abs() - 0.1
    x[-1, -1] = x[-1, -1].abs() + 0.1
    return x


_OF_X_AND_DELTA = (
    (_SMALL, 0.5),
    (_maps(3, 4, 5, 7, seed=1), 0.55),
    (_maps(2, 3, 6, 4, seed=2, dtype=torch.float64), 0.3),
    Case((_TIES, 0.5), gradients=False),
    Case((_maps(2, 2, 3, 5, seed=3), 1.0), gradients=False),
)


def _same(x):
    return x


def _over(*dims, by=torch.amax):
    return lambda x: by(x.relu(), dims, keepdim=True)


def _one(x):
    return torch.ones_like(x[:1, :1, :1, :1])


_peak = _over(2, 3)


def _suppressed(x, delta, form=torch.minimum, X=torch.relu, peak=_peak, share=_same, tau=_same):
    """What a module does, form(X, tau); delta may be G, (N, K, 1, 1)."""
    return form(X(x), tau(share(delta) * peak(x)))


def _erase(X, tau):
    return torch.where(X < tau, X, 0)


def _soft(X, tau):
    return tau * torch.tanh(X / tau.clamp(min=1e-12))


# Slips of every module that takes a maximum, and of those that take delta of it.
_WITHOUT_RELU = {"X": _same, "peak": lambda x: x.amax((2, 3), keepdim=True)}
_CONSTANT = {"tau is treated as a constant, so that its gradient is lost": {"tau": torch.detach}}
_PEAKS = {
    "the maximum is taken over the batch too, not of every image": {"peak": _over(0, 2, 3)},
    "all channels of an image share one maximum": {"peak": _over(1, 2, 3)},
    "there is one maximum for the whole batch": {"peak": _over(0, 1, 2, 3)},
    "the maximum is taken over the channels, at every position": {"peak": _over(1)},
    "every row of a map has its own maximum": {"peak": _over(3)},
    "every column of a map has its own maximum": {"peak": _over(2)},
    "the maximum is taken over the images, at every position": {"peak": _over(0)},
    "the mean of a map takes the place of its maximum": {"peak": _over(2, 3, by=torch.mean)},
}
_OF_DELTA = {
    **_PEAKS,
    "the bound is delta itself, without the maximum": {"peak": _one},
    "the share is 1 - delta instead of delta": {"share": lambda delta: 1 - delta},
    "the bound is the maximum itself, without delta": {"share": lambda delta: 1},
    "the ReLU is left out": ({"X": _same}, _WITHOUT_RELU),
    **_CONSTANT,
}
_OTHER_FORMS = {
    "nothing is suppressed: it is a plain ReLU": {"form": lambda X, tau: X},
    "values at or above tau are set to 0: that is erasing, not suppressing": {"form": _erase},
    "the maximum of X and tau is taken": {"form": torch.maximum},
}


@check("02", "B", "a function f(x, delta), x (N, K, H, W): tensor like x")
def suppress(answer):
    """Algorithm 1 with a constant controller, in three lines (02, exercise B).

    x is what a convolution returns, floating-point; delta a number in (0, 1]. What comes back is

        X = relu(x),    tau = delta * max X (of each map),    min(X, tau),

    and x must receive the right gradient, through tau too.
    """
    slips = {
        **_OTHER_FORMS,
        **_OF_DELTA,
        "all of X is multiplied by delta": lambda x, delta: delta * x.relu(),
        "the result is divided by the maximum": lambda x, delta: (
            _suppressed(x, delta) / _peak(x).clamp(min=1e-12)
        ),
    }
    compare(answer, _suppressed, _OF_X_AND_DELTA, slips, wrt=("x",))


@check("02", "3", "a function f(x, delta), x (N, K, H, W): tensor like x")
def erasing(answer):
    """Erasing in place of suppression (02, exercise 3).

    What comes back is X = relu(x) where X < tau, and 0 where X >= tau, with tau = delta * max X of each map.
    x must receive its gradient.
    """
    slips = {
        "only the maximum is erased": {"share": lambda delta: 1},
        **_OF_DELTA,
        "values above tau are cut down to tau: that is suppressing, not erasing": {"form": torch.minimum},
        "values that are equal to tau are kept; X >= tau is erased": {"form": lambda X, tau: X * (X <= tau)},
        "what lies below tau is erased and the rest kept": {"form": lambda X, tau: X * (X >= tau)},
    }
    compare(answer, functools.partial(_suppressed, form=_erase), _OF_X_AND_DELTA, slips, wrt=("x",))


@check("02", "4", "a function f(x, delta), x (N, K, H, W): tensor like x")
def soft_suppressor(answer):
    """The soft suppressor tau * tanh(X / tau) (02, exercise 4).

    X = relu(x) and tau = delta * max X of each map. A map without a positive value gives 0, and no nan, in
    the gradient of x either.
    """
    slips = {
        **_OF_DELTA,
        "tau in front is left out": {"form": lambda X, tau: torch.tanh(X / tau.clamp(min=1e-12))},
        "X is not divided by tau inside of tanh": {"form": lambda X, tau: tau * torch.tanh(X)},
        "nothing guards against 0 / 0 where tau is 0": {"form": lambda X, tau: tau * torch.tanh(X / tau)},
        "the minimum is taken: that is the hard suppressor": {"form": torch.minimum},
        "sigmoid takes the place of tanh": {
            "form": lambda X, tau: tau * torch.sigmoid(X / tau.clamp(min=1e-12))
        },
    }
    compare(answer, functools.partial(_suppressed, form=_soft), _OF_X_AND_DELTA, slips, wrt=("x",))


def _gap(X):
    return X.mean((2, 3))


def _times(pooled, theta):
    return pooled @ theta.T


def _control(features, theta, seen=_same, pool=_gap, f=_times, act=torch.sigmoid):
    """Equation 2."""
    return act(f(pool(seen(features)), theta))


def _sized(x, theta, name="x"):
    """A case that a message describes by its shapes: theta's random numbers would only be in the way."""
    kind = str(x.dtype).removeprefix("torch.")
    return Case((x, theta), f"{name} of shape {tuple(x.shape)} and theta of {tuple(theta.shape)}, {kind}")


@check("03", "A", "a function f(features, theta), (N, K, H, W) and (K, K): tensor (N, K)")
def learnable_controller(answer):
    """The learnable controller, equation 2 (03, exercise A).

    The values of features are >= 0, and theta is laid out like the weight of nn.Linear(K, K). What comes back
    are the control values,

        G = sigmoid(theta GAP(X)),

    and features and theta must receive their gradients.
    """
    double = {"dtype": torch.float64}
    cases = (
        (torch.tensor([[[[1.0, 2.0], [0.0, 5.0]], [[0.0, 0.5], [1.0, 0.5]]]]), _THETA_SMALL),
        _sized(_maps(3, 4, 5, 7, seed=4).relu(), randn(4, 4, seed=5), "features"),
        _sized(_maps(2, 3, 4, 6, seed=6, **double).relu(), randn(3, 3, seed=7, **double), "features"),
    )
    slips = {
        "theta is not transposed: map k then reads column k": {"f": torch.matmul},
        "softmax takes the place of the sigmoid": (
            {"act": lambda z: z.softmax(1)},
            {"act": lambda z: z.softmax(0)},
        ),
        "maps are pooled by their maximum, not their mean": {"pool": lambda X: X.amax((2, 3))},
        "maps are pooled by their sum, not their mean": {"pool": lambda X: X.sum((2, 3))},
        "the sigmoid is left out": {"act": _same},
        "the sigmoid comes before f": {"pool": lambda X: _gap(X).sigmoid(), "act": _same},
        "f is left out": {"f": lambda pooled, theta: pooled},
        "tanh takes the place of the sigmoid": {"act": torch.tanh},
        "only the diagonal of theta is used": {"f": lambda pooled, theta: pooled * theta.diagonal()},
        "the mean is taken over the batch too: each image has its own G": {
            "pool": lambda X: X.mean((0, 2, 3)).expand(len(X), -1)
        },
        "the features are detached: they then receive no gradient from G": {"seen": torch.detach},
    }
    compare(answer, _control, cases, slips, wrt=("features", "theta"))


def _whole(x, theta, seen=torch.relu, pool=_gap, f=_times, act=torch.sigmoid, **parts):
    """A module with the controller of equation 2."""
    return _suppressed(x, _control(x, theta, seen, pool, f, act)[:, :, None, None], **parts)


def _scaled(x, theta):
    return x.relu() * _control(x.relu(), theta)[:, :, None, None]


@check("02", "A", "a function f(x, theta), (N, K, H, W) and (K, K): tensor like x")
def algorithm_1(answer):
    """Algorithm 1 with the learnable controller of equation 2, the whole module (02, exercise A).

    x is what a convolution returns; theta is laid out like the weight of nn.Linear(K, K). What comes back is

        X = relu(x),    tau = max X * sigmoid(theta GAP(X)) (of each map),    min(X, tau),

    and x and theta must receive their gradients.
    """
    cases = (
        (_SMALL, _THETA_SMALL),
        _sized(_maps(3, 4, 5, 7, seed=8), randn(4, 4, seed=9)),
        _sized(_maps(2, 3, 6, 4, seed=10, dtype=torch.float64), randn(3, 3, seed=11, dtype=torch.float64)),
    )
    slips = {
        "GAP is taken of x, before the ReLU, instead of X": {"seen": _same},
        "the ReLU is left out everywhere: X is relu(x)": {**_WITHOUT_RELU, "seen": _same},
        **_PEAKS,
        "all of X is multiplied by G, which is the share that the maximum may keep: tau = G * X_max": _scaled,
        **_OTHER_FORMS,
        "the sigmoid is left out": {"act": _same},
        "the share is 1 - G instead of G": {"share": lambda G: 1 - G},
        "theta is not transposed": {"f": torch.matmul},
        "softmax takes the place of the sigmoid": {"act": lambda z: z.softmax(1)},
        "GAP is a maximum instead of a mean": {"pool": lambda X: X.amax((2, 3))},
        "GAP is a sum instead of a mean": {"pool": lambda X: X.sum((2, 3))},
        "the controller's input is detached": {"seen": lambda x: x.relu().detach()},
        "the control values are detached": {"share": torch.detach},
        **_CONSTANT,
        "the minimum is taken of x, not of relu(x)": {"X": _same},
        "tau is G itself, without the maximum": {"peak": _one},
    }
    compare(answer, _whole, cases, slips, ("x", "theta"), wrt=("x", "theta"))


def _pearson(one, other):
    return np.corrcoef(one, other)[0, 1]


def _correlation(values, shares, of=lambda v, s: _pearson(v.mean(1), s)):
    return float(of(values.double().numpy(), shares.double().numpy()))


@check("03", "3", "a function f(values, shares), (images, K) and (images,): a number in [-1, 1]")
def control_correlation(answer):
    """How an image's mean control value goes with the share of it that is object (03, exercise 3).

    values are the control values of one controller, shares the objects' share of each image, both tensors.
    The number is the correlation of the mean of G over the channels with the share.
    """
    values = torch.sigmoid(randn(12, 5, seed=12))
    shares = (0.4 * values.mean(1) + 0.1 * torch.rand(12, generator=generator(13))).square()
    square = torch.sigmoid(randn(6, 6, seed=14))
    small = torch.tensor([[0.5, 0.6], [0.4, 0.8], [0.7, 0.9], [0.5, 0.4]])
    cases = (
        (small, torch.tensor([0.1, 0.3, 0.2, 0.05])),
        (values, shares),
        (square, 1 - square.mean(1) ** 3 - 0.2 * square[:, 0]),
    )
    slips = {
        "the matrix of np.corrcoef is read at [0, 0]": {"of": lambda v, s: 1},
        "the covariance is taken, which is not scaled": (
            {"of": lambda v, s: np.cov(v.mean(1), s)[0, 1]},
            {"of": lambda v, s: np.cov(v.mean(1), s, ddof=0)[0, 1]},
        ),
        "the correlation is squared: its sign is lost": {"of": lambda v, s: _pearson(v.mean(1), s) ** 2},
        "the correlation's sign is dropped": {"of": lambda v, s: abs(_pearson(v.mean(1), s))},
        "the largest channel takes the place of the mean": {"of": lambda v, s: _pearson(v.max(1), s)},
        "only the first channel is used": {"of": lambda v, s: _pearson(v[:, 0], s)},
        "each channel is correlated by itself and the results are averaged": {
            "of": lambda v, s: np.mean([_pearson(one, s) for one in v.T])
        },
    }
    compare(answer, _correlation, cases, slips, read=one_number)


@contextlib.contextmanager
def _about(text):
    """What a message begins with."""
    try:
        yield
    except Wrong as wrong:
        raise Wrong(f"{text}, {wrong}") from None


def _made(answer, given):
    """The module that the answer makes of what is given."""
    module = call(answer, given)
    if not isinstance(module, nn.Module):
        raise Wrong(f"what was made is {found(module)}; expected an nn.Module")
    return module


def _rounded(values):
    return [round(value, 3) for value in values.flatten().tolist()]


def _rows(G, n, k):
    """Control values as (1, k) or (n, k), or None where they have no shape that a DRS module takes."""
    fits = isinstance(G, torch.Tensor) and tuple(G.shape) in ((k,), (n, k), (n, k, 1, 1))
    return G.detach().reshape(-1, k) if fits else None


def _all_are(rows, row):
    return torch.allclose(rows, row.expand_as(rows), atol=1e-5)


@check("03", "4", "a class (or function) of K that gives an nn.Module with K trainable numbers")
def channel_controller(answer):
    """A controller with one trainable number for each channel, G = sigmoid(theta) (03, exercise 4).

    K is the number of channels. The module's forward(features) takes features (N, K, H, W) and returns
    sigmoid(theta) as (N, K), (K,) or (N, K, 1, 1): the same for all images. Inside a DRS module theta must
    receive a gradient.
    """
    if isinstance(answer, nn.Module):
        raise Wrong(
            "the answer is a module for one K; hand in its class, so that modules for any K can be made"
        )
    called(answer, "the class, not called")

    def with_theta(features, theta):
        n, k = features.shape[:2]
        module = _made(answer, k)
        name, parameter = _only_parameter(module, k)
        replaced = {name: theta.view_as(parameter)}
        others = features + torch.linspace(0, 2, n * k).view(n, k, 1, 1)
        G, other = (functional_call(module, replaced, (given,)) for given in (features, others))
        if _rows(G, n, k) is None:
            raise Wrong(f"forward returned {found(G)}; expected a tensor of shape {(n, k)}")
        if not torch.allclose(other, G):
            raise Wrong("G is another one with other features; it must depend on theta alone")
        return G.reshape(-1, k).expand(n, k)

    cases = []
    for k, n in ((5, 3), (3, 1)):
        theta = torch.linspace(-2, 1.5, k)
        about = f"K = {k}, theta = {_rounded(theta)} and features of shape {(n, k, 4, 6)}"
        cases.append(Case((_maps(n, k, 4, 6, seed=15).relu(), theta), about))
    slips = {
        "G is theta itself, without the sigmoid": {"act": _same},
        "softmax takes the place of the sigmoid: the values of a layer would have to share 1": {
            "act": lambda theta: theta.softmax(0)
        },
        "clamp takes the place of the sigmoid: outside of 0 to 1 it has no gradient": {
            "act": lambda theta: theta.clamp(0, 1)
        },
        "tanh takes the place of the sigmoid": {"act": torch.tanh},
    }
    compare(with_theta, _of_channels, cases, slips, wrt=("theta",), result="G")


def _of_channels(features, theta, act=torch.sigmoid):
    return act(theta).expand(len(features), -1)


def _counted(number, what):
    return f"{number} {what}{'' if number == 1 else 's'}"


def _only_parameter(module, k):
    """The name of the module's trainable numbers, and the numbers."""
    parameters = [named for named in module.named_parameters() if named[1].requires_grad]
    count = sum(parameter.numel() for _, parameter in parameters)
    if count == k and len(parameters) == 1:
        return parameters[0]
    why = {
        0: "A tensor becomes trainable as an nn.Parameter, in __init__ after super().__init__().",
        1: "One number for all channels is a constant controller that is learned.",
        k * k: "K * K is what the controller of equation 2 has.",
        k * k + k: "K * K and a bias is a whole nn.Linear.",
    }.get(count, "")
    counts = f"{_counted(count, 'trainable number')} in {_counted(len(parameters), 'nn.Parameter')}"
    raise Wrong(f"the module has {counts}; expected {k} in 1. {why}".rstrip())


@check("03", "5", "a function f(values) of control values (images, K): an nn.Module")
def fixed_controller(answer):
    """A controller that answers every image with its channels' mean control values (03, exercise 5).

    The values are those of a trained controller, a tensor; a class will do, too. The module is without
    trainable numbers, and its forward(features), features (N, K, H, W), returns the mean over the images as
    (K,), (N, K) or (N, K, 1, 1).
    """
    called(answer, "the function or the class, not called")
    for images, k, n in ((6, 4, 3), (3, 3, 2)):
        values = torch.sigmoid(randn(images, k, seed=17))
        about = f"with values of shape {(images, k)}"
        with _about(about):
            module = _made(answer, values.clone())
            G = call(module, randn(n, k, 4, 6, seed=18).relu())
            if any(parameter.requires_grad for parameter in module.parameters()):
                raise Wrong("the module has trainable numbers; the means are to stay what they are")
        rows, mean = _rows(G, n, k), values.mean(0)
        if rows is None:
            why = _mean_slip(G.detach(), values) if isinstance(G, torch.Tensor) else ""
            raise Wrong(f"{about} and {n} images, forward returned {found(G)}; expected shape {(k,)}{why}")
        if not _all_are(rows, mean):
            why = _mean_slip(rows, values)
            raise Wrong(f"{about}, forward returned {_rounded(rows[0])}; expected {_rounded(mean)}{why}")


def _mean_slip(G, values):
    """What control values are that should be the mean of the values over the images."""
    slips = {
        "the mean over the channels: one number for each image, not for each channel": values.mean(1),
        "one mean for all channels": values.mean()[None],
        "the median, not the mean": values.median(0).values,
        "the values of the first image": values[0],
        "passed through a sigmoid once more; the values are control values already": values.mean(0).sigmoid(),
    }
    for said, row in slips.items():
        if G.ndim <= 2 and G.numel() % len(row) == 0 and torch.allclose(G.reshape(-1, len(row)), row):
            return f". That is {said}"
    return ""
