"""Checks of what notebooks 02 and 03 ask to be written: suppressors and controllers."""

import numpy as np
import torch
from torch import nn

from drs_lib.drs import suppress_plain

from .functions import Case, Slip, Task, call, compare, generator, one_number, randn, sheltered
from .verdict import Wrong, check, found

# One image, two maps of 2x3: small enough to be printed in a message. The second has no positive value.
SMALL = torch.tensor([[[[-1.0, 2.0, 0.4], [6.0, 10.0, 1.0]], [[-3.0, -1.0, -2.0], [-0.5, -4.0, -1.5]]]])


def _maps(n, k, h, w, seed, dtype=torch.float32):
    """Random maps of which one is dead, one all positive, and each of another size of values."""
    x = randn(n, k, h, w, seed=seed, dtype=dtype) * torch.linspace(0.5, 3, k, dtype=dtype)[:, None, None]
    x = x * torch.linspace(1, 2, n, dtype=dtype)[:, None, None, None]
    x[0, 0] = -x[0, 0].abs() - 0.1
    x[-1, -1] = x[-1, -1].abs() + 0.1
    return x


def _peak(x, dims=(2, 3)):
    return x.relu().amax(dims, keepdim=True)


# Ties: 8 * 0.5 = 4 and 2 * 0.5 = 1 occur in the maps, the first maximum occurs twice, and there are zeros.
TIES = torch.tensor([[[[8.0, 4.0, 0.0], [3.0, 8.0, 4.0]], [[2.0, 1.0, 0.0], [0.5, -2.0, 1.0]]]])

_OF_X_AND_DELTA = (
    Case((SMALL, 0.5)),
    Case((_maps(3, 4, 5, 7, seed=1), 0.55)),
    Case((_maps(2, 3, 6, 4, seed=2, dtype=torch.float64), 0.3)),
    Case((TIES, 0.5), gradients=False),
    Case((_maps(2, 2, 3, 5, seed=3), 1.0), gradients=False),
)


# Wrong maxima: over which dimensions, and what to say of it.
_PEAKS = (
    ((0, 2, 3), "the maximum is taken over the batch too, not of every image"),
    ((1, 2, 3), "all channels of an image share one maximum"),
    ((0, 1, 2, 3), "there is one maximum for the whole batch"),
    ((1,), "the maximum is taken over the channels, at every position"),
    ((3,), "every row of a map has its own maximum"),
    ((2,), "every column of a map has its own maximum"),
    ((0,), "the maximum is taken over the images, at every position"),
)
_MEAN_FOR_PEAK = "the mean of a map takes the place of its maximum"


def _mean(x):
    return x.relu().mean((2, 3), keepdim=True)


def _peak_slips(form):
    """The slips of any module that takes a maximum; form(X, tau) is what it does with its bound."""

    def of(peak):
        return lambda x, delta: form(x.relu(), delta * peak(x))

    return (
        *(Slip(of(lambda x, dims=dims: _peak(x, dims)), sentence) for dims, sentence in _PEAKS),
        Slip(of(_mean), _MEAN_FOR_PEAK),
        Slip(
            of(lambda x: torch.ones_like(x[:1, :1, :1, :1])), "the bound is delta itself, without the maximum"
        ),
        Slip(
            lambda x, delta: form(x.relu(), (1 - delta) * _peak(x)), "the share is 1 - delta instead of delta"
        ),
        Slip(lambda x, delta: form(x.relu(), _peak(x)), "the bound is the maximum itself, without delta"),
    )


def _raw_peak(x):
    return x.amax((2, 3), keepdim=True)


@check("02", "B", "a function f(x, delta), x (N, K, H, W): tensor like x")
def suppress(answer):
    """Algorithm 1 with a constant controller, in three lines (02, exercise B).

    The answer is a function f(x, delta): x what a convolution returns, a floating-point tensor (N, K, H, W);
    delta a number in (0, 1]. It returns a tensor like x,

        X = relu(x),    tau = delta * max X (of each map),    min(X, tau),

    and x must receive the right gradient, through tau too.
    """
    slips = (
        Slip(lambda x, delta: x.relu(), "nothing is suppressed: it is a plain ReLU"),
        *_peak_slips(torch.minimum),
        Slip(lambda x, delta: torch.minimum(x, delta * _raw_peak(x)), "the ReLU is left out"),
        Slip(
            lambda x, delta: torch.minimum(x.relu(), delta * _peak(x).detach()),
            "tau is treated as a constant, so that its gradient is lost",
        ),
        Slip(
            lambda x, delta: torch.where(x.relu() < delta * _peak(x), x.relu(), 0),
            "values at or above tau are set to 0: that is erasing, not suppressing",
        ),
        Slip(lambda x, delta: torch.maximum(x.relu(), delta * _peak(x)), "the maximum of X and tau is taken"),
        Slip(lambda x, delta: delta * x.relu(), "all of X is multiplied by delta"),
        Slip(
            lambda x, delta: torch.minimum(x.relu(), delta * _peak(x)) / _peak(x).clamp(min=1e-12),
            "the result is divided by the maximum",
        ),
    )
    compare(answer, Task(("x", "delta"), suppress_plain, _OF_X_AND_DELTA, slips, wrt=("x",)))


def _erase(X, tau):
    return torch.where(X < tau, X, torch.zeros_like(X))


@check("02", "3", "a function f(x, delta), x (N, K, H, W): tensor like x")
def erasing(answer):
    """Erasing in place of suppression (02, exercise 3).

    The answer is a function f(x, delta), x (N, K, H, W), that returns a tensor like x: X = relu(x) where
    X < tau, and 0 where X >= tau, with tau = delta * max X of each map. x must receive its gradient.
    """
    slips = (
        Slip(lambda x, delta: torch.where(x.relu() < _peak(x), x.relu(), 0), "only the maximum is erased"),
        *_peak_slips(_erase),
        Slip(suppress_plain, "values above tau are cut down to tau: that is suppressing, not erasing"),
        Slip(
            lambda x, delta: torch.where(x.relu() <= delta * _peak(x), x.relu(), 0),
            "values that are equal to tau are kept; X >= tau is erased",
        ),
        Slip(
            lambda x, delta: torch.where(x.relu() < delta * _peak(x), 0, x.relu()),
            "what lies below tau is erased and the rest kept",
        ),
        Slip(lambda x, delta: torch.where(x < delta * _peak(x), x, 0), "the ReLU is left out"),
        Slip(lambda x, delta: torch.where(x < delta * _raw_peak(x), x, 0), "the ReLU is left out"),
    )
    right = Task(
        ("x", "delta"), lambda x, delta: _erase(x.relu(), delta * _peak(x)), _OF_X_AND_DELTA, slips, ("x",)
    )
    compare(answer, right)


def _soft(X, tau):
    safe = tau.clamp(min=1e-12)
    return tau * torch.tanh(X / safe)


@check("02", "4", "a function f(x, delta), x (N, K, H, W): tensor like x")
def soft_suppressor(answer):
    """The soft suppressor tau * tanh(X / tau) (02, exercise 4).

    The answer is a function f(x, delta), x (N, K, H, W), that returns a tensor like x, with X = relu(x) and
    tau = delta * max X of each map. A map without a positive value gives 0, and no nan, in the gradient of x
    either.
    """
    slips = (
        *_peak_slips(_soft),
        Slip(
            lambda x, delta: torch.tanh(x.relu() / (delta * _peak(x)).clamp(min=1e-12)),
            "tau in front is left out",
        ),
        Slip(
            lambda x, delta: delta * _peak(x) * torch.tanh(x.relu()), "X is not divided by tau inside of tanh"
        ),
        Slip(
            lambda x, delta: delta * _peak(x) * torch.tanh(x.relu() / (delta * _peak(x))),
            "nothing guards against 0 / 0 where tau is 0",
        ),
        Slip(
            lambda x, delta: _soft(x.relu(), delta * _peak(x).detach()),
            "tau is treated as a constant, so that its gradient is lost",
        ),
        Slip(lambda x, delta: _soft(x, delta * _peak(x)), "the ReLU is left out"),
        Slip(lambda x, delta: _soft(x, delta * _raw_peak(x)), "the ReLU is left out"),
        Slip(suppress_plain, "the minimum is taken: that is the hard suppressor"),
        Slip(
            lambda x, delta: delta * _peak(x) * torch.sigmoid(x.relu() / (delta * _peak(x)).clamp(min=1e-12)),
            "sigmoid takes the place of tanh",
        ),
    )
    right = Task(
        ("x", "delta"), lambda x, delta: _soft(x.relu(), delta * _peak(x)), _OF_X_AND_DELTA, slips, ("x",)
    )
    compare(answer, right)


def _control(X, theta):
    return torch.sigmoid(X.mean((2, 3)) @ theta.T)


_THETA_SMALL = torch.tensor([[0.4, -1.0], [0.2, 0.1]])


def _sized(x, theta, name="x"):
    """A case that a message describes by its shapes: theta's random numbers would only be in the way."""
    kind = str(x.dtype).removeprefix("torch.")
    return Case((x, theta), f"{name} of shape {tuple(x.shape)} and theta of {tuple(theta.shape)}, {kind}")


@check("03", "A", "a function f(features, theta), (N, K, H, W) and (K, K): tensor (N, K)")
def learnable_controller(answer):
    """The learnable controller, equation 2 (03, exercise A).

    The answer is a function f(features, theta): features a tensor (N, K, H, W) of values >= 0, theta (K, K),
    laid out like the weight of nn.Linear(K, K). It returns the control values, (N, K),

        G = sigmoid(theta GAP(X)),

    and features and theta must receive their gradients.
    """
    cases = (
        Case((torch.tensor([[[[1.0, 2.0], [0.0, 5.0]], [[0.0, 0.5], [1.0, 0.5]]]]), _THETA_SMALL)),
        _sized(_maps(3, 4, 5, 7, seed=4).relu(), randn(4, 4, seed=5), "features"),
        _sized(
            _maps(2, 3, 4, 6, seed=6, dtype=torch.float64).relu(),
            randn(3, 3, seed=7, dtype=torch.float64),
            "features",
        ),
    )
    gap = lambda X: X.mean((2, 3))  # noqa: E731
    slips = (
        Slip(lambda X, t: torch.sigmoid(gap(X) @ t), "theta is not transposed: map k then reads column k"),
        Slip(lambda X, t: torch.softmax(gap(X) @ t.T, 1), "softmax takes the place of the sigmoid"),
        Slip(lambda X, t: torch.softmax(gap(X) @ t.T, 0), "softmax takes the place of the sigmoid"),
        Slip(
            lambda X, t: torch.sigmoid(X.amax((2, 3)) @ t.T),
            "maps are pooled by their maximum, not their mean",
        ),
        Slip(lambda X, t: torch.sigmoid(X.sum((2, 3)) @ t.T), "maps are pooled by their sum, not their mean"),
        Slip(lambda X, t: gap(X) @ t.T, "the sigmoid is left out"),
        Slip(lambda X, t: torch.sigmoid(gap(X)) @ t.T, "the sigmoid comes before f"),
        Slip(lambda X, t: torch.sigmoid(gap(X)), "f is left out"),
        Slip(lambda X, t: torch.tanh(gap(X) @ t.T), "tanh takes the place of the sigmoid"),
        Slip(lambda X, t: torch.relu(gap(X) @ t.T), "a ReLU takes the place of the sigmoid"),
        Slip(lambda X, t: torch.sigmoid(gap(X) * t.diagonal()), "only the diagonal of theta is used"),
        Slip(
            lambda X, t: torch.sigmoid(X.mean((0, 2, 3)) @ t.T).expand(len(X), -1),
            "the mean is taken over the batch too: each image has its own G",
        ),
        Slip(
            lambda X, t: torch.sigmoid(gap(X).detach() @ t.T),
            "the features are detached: they then receive no gradient from G",
        ),
    )
    compare(answer, Task(("features", "theta"), _control, cases, slips, wrt=("features", "theta")))


def _algorithm_1(x, theta, features=None):
    return suppress_plain(x, _control(x.relu() if features is None else features, theta))


@check("02", "A", "a function f(x, theta), (N, K, H, W) and (K, K): tensor like x")
def algorithm_1(answer):
    """Algorithm 1 with the learnable controller of equation 2, the whole module (02, exercise A).

    The answer is a function f(x, theta): x what a convolution returns, (N, K, H, W), theta (K, K) laid out
    like the weight of nn.Linear(K, K). It returns a tensor like x,

        X = relu(x),    tau = max X * sigmoid(theta GAP(X)) (of each map),    min(X, tau),

    and x and theta must receive their gradients.
    """
    cases = (
        Case((SMALL, _THETA_SMALL)),
        _sized(_maps(3, 4, 5, 7, seed=8), randn(4, 4, seed=9)),
        _sized(_maps(2, 3, 6, 4, seed=10, dtype=torch.float64), randn(3, 3, seed=11, dtype=torch.float64)),
    )

    def with_form(form, peak=_peak):
        """form(X, tau): what the module does with its bound."""
        return lambda x, t: form(x.relu(), peak(x) * _control(x.relu(), t)[:, :, None, None])

    def with_peak(peak):
        return with_form(torch.minimum, peak)

    def with_control(control):
        return lambda x, t: torch.minimum(x.relu(), _peak(x) * control(x.relu(), t)[:, :, None, None])

    def without_relu(x, t):
        return torch.minimum(x, _raw_peak(x) * _control(x, t)[:, :, None, None])

    slips = (
        Slip(lambda x, t: x.relu(), "nothing is suppressed: it is a plain ReLU"),
        Slip(lambda x, t: _algorithm_1(x, t, x), "GAP is taken of x, before the ReLU, instead of X"),
        Slip(without_relu, "the ReLU is left out everywhere: X is relu(x)"),
        *(Slip(with_peak(lambda x, dims=dims: _peak(x, dims)), sentence) for dims, sentence in _PEAKS),
        Slip(with_peak(_mean), _MEAN_FOR_PEAK),
        Slip(
            lambda x, t: x.relu() * _control(x.relu(), t)[:, :, None, None],
            "all of X is multiplied by G, which is the share that the maximum may keep: tau = G * X_max",
        ),
        Slip(with_form(_erase), "values at or above tau are set to 0: that is erasing, not suppressing"),
        Slip(with_form(torch.maximum), "the maximum of X and tau is taken"),
        Slip(with_control(lambda X, t: X.mean((2, 3)) @ t.T), "the sigmoid is left out"),
        Slip(with_control(lambda X, t: 1 - _control(X, t)), "the share is 1 - G instead of G"),
        Slip(with_control(lambda X, t: torch.sigmoid(X.mean((2, 3)) @ t)), "theta is not transposed"),
        Slip(
            with_control(lambda X, t: torch.softmax(X.mean((2, 3)) @ t.T, 1)),
            "softmax takes the place of the sigmoid",
        ),
        Slip(
            with_control(lambda X, t: torch.sigmoid(X.amax((2, 3)) @ t.T)),
            "GAP is a maximum instead of a mean",
        ),
        Slip(with_control(lambda X, t: torch.sigmoid(X.sum((2, 3)) @ t.T)), "GAP is a sum instead of a mean"),
        Slip(with_control(lambda X, t: _control(X.detach(), t)), "the controller's input is detached"),
        Slip(with_control(lambda X, t: _control(X, t).detach()), "the control values are detached"),
        Slip(
            with_form(lambda X, tau: torch.minimum(X, tau.detach())),
            "tau is treated as a constant, so that its gradient is lost",
        ),
        Slip(
            lambda x, t: torch.minimum(x, _peak(x) * _control(x.relu(), t)[:, :, None, None]),
            "the minimum is taken of x, not of relu(x)",
        ),
        Slip(
            lambda x, t: torch.minimum(x.relu(), _control(x.relu(), t)[:, :, None, None]),
            "tau is G itself, without the maximum",
        ),
    )
    compare(answer, Task(("x", "theta"), _algorithm_1, cases, slips, wrt=("x", "theta")))


def _correlation(values, shares):
    return np.corrcoef(values.mean(1), shares)[0, 1]


@check("03", "3", "a function f(values, shares), (images, K) and (images,): a number in [-1, 1]")
def control_correlation(answer):
    """How an image's mean control value goes with the share of it that is object (03, exercise 3).

    The answer is a function f(values, shares): values the control values of one controller, a tensor
    (images, K); shares the objects' share of each image, a tensor (images,). It returns one number, the
    correlation of the mean of G over the channels with the share.
    """
    values = torch.sigmoid(randn(12, 5, seed=12))
    shares = (0.4 * values.mean(1) + 0.1 * torch.rand(12, generator=generator(13))).square()
    square = torch.sigmoid(randn(6, 6, seed=14))
    cases = (
        Case(
            (
                torch.tensor([[0.5, 0.6], [0.4, 0.8], [0.7, 0.9], [0.5, 0.4]]),
                torch.tensor([0.1, 0.3, 0.2, 0.05]),
            )
        ),
        Case((values, shares)),
        Case((square, 1 - square.mean(1) ** 3 - 0.2 * square[:, 0])),
    )

    def slip(function):
        return lambda values, shares: float(function(values.double().numpy(), shares.double().numpy()))

    slips = (
        Slip(
            slip(lambda v, s: np.corrcoef(v.mean(1), s)[0, 0]), "the matrix of np.corrcoef is read at [0, 0]"
        ),
        Slip(slip(lambda v, s: np.cov(v.mean(1), s)[0, 1]), "the covariance is taken, which is not scaled"),
        Slip(
            slip(lambda v, s: np.cov(v.mean(1), s, ddof=0)[0, 1]),
            "the covariance is taken, which is not scaled",
        ),
        Slip(
            slip(lambda v, s: np.corrcoef(v.mean(1), s)[0, 1] ** 2),
            "the correlation is squared: its sign is lost",
        ),
        Slip(slip(lambda v, s: abs(np.corrcoef(v.mean(1), s)[0, 1])), "the correlation's sign is dropped"),
        Slip(
            slip(lambda v, s: np.corrcoef(v.max(1), s)[0, 1]),
            "the largest channel takes the place of the mean",
        ),
        Slip(slip(lambda v, s: np.corrcoef(v[:, 0], s)[0, 1]), "only the first channel is used"),
        Slip(
            slip(lambda v, s: np.mean([np.corrcoef(one, s)[0, 1] for one in v.T])),
            "each channel is correlated by itself and the results are averaged",
        ),
    )
    right = slip(_correlation)
    compare(answer, Task(("values", "shares"), right, cases, slips, read=one_number))


@check("03", "4", "a class (or function) of K that gives an nn.Module with K trainable numbers")
def channel_controller(answer):
    """A controller with one trainable number for each channel, G = sigmoid(theta) (03, exercise 4).

    The answer is a class, or a function, of the number of channels K; called, it gives an nn.Module with K
    trainable numbers, whose forward(features) takes features (N, K, H, W) and returns sigmoid(theta) as
    (N, K), (K,) or (N, K, 1, 1): the same for all images. Inside a DRS module theta must receive a gradient.
    """
    if isinstance(answer, nn.Module):
        raise Wrong(
            "the answer is a module for one K; hand in its class, so that modules for any K can be made"
        )
    if not callable(answer):
        raise Wrong(f"the answer is {found(answer)}; hand in the class, not called")
    for k, n in ((5, 3), (3, 1)):
        _try_channel_controller(answer, k, n)


def _counted(number, what):
    return f"{number} {what}{'' if number == 1 else 's'}"


def _try_channel_controller(answer, k, n):
    about = f"with K = {k}"
    try:
        module = call(answer, k)
    except Wrong as wrong:
        raise Wrong(f"{about}, {wrong}") from None
    if not isinstance(module, nn.Module):
        raise Wrong(f"{about}, what was made is {found(module)}; expected an nn.Module")
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in parameters)
    if count != k or len(parameters) != 1:
        why = {
            0: "A tensor becomes trainable as an nn.Parameter, in __init__ after super().__init__().",
            1: "One number for all channels is a constant controller that is learned.",
            k * k: "K * K is what the controller of equation 2 has.",
            k * k + k: "K * K and a bias is a whole nn.Linear.",
        }.get(count, "")
        raise Wrong(
            f"{about}, the module has {_counted(count, 'trainable number')} in "
            f"{_counted(len(parameters), 'nn.Parameter')}; expected {k} in 1. {why}".rstrip()
        )
    [theta] = parameters
    with torch.no_grad():
        theta.copy_(torch.linspace(-2, 1.5, k).view_as(theta))
    features = _maps(n, k, 4, 6, seed=15).relu()
    about += (
        f", theta = {[round(value, 3) for value in theta.flatten().tolist()]} and features of shape "
        f"{(n, k, 4, 6)}"
    )
    try:
        before = features.clone()
        G = call(module, features)
        other = call(module, features + torch.linspace(0, 2, n * k).view(n, k, 1, 1))
    except Wrong as wrong:
        raise Wrong(f"{about}, {wrong}") from None
    if not torch.equal(before, features):
        raise Wrong(f"{about}, the features are other ones after the call: the module writes into them")
    if not isinstance(G, torch.Tensor) or tuple(G.shape) not in ((k,), (n, k), (n, k, 1, 1)):
        raise Wrong(f"{about}, forward returned {found(G)}; expected a tensor of shape {(n, k)}")
    values, flat = G.detach().reshape(-1, k), theta.detach().flatten()
    expected = torch.sigmoid(flat)
    if not torch.allclose(values, expected.expand_as(values), atol=1e-5, equal_nan=False):
        rows = [
            (flat, "theta itself, without the sigmoid"),
            (flat.softmax(0), "softmax in place of the sigmoid: the values of a layer would have to share 1"),
            (flat.clamp(0, 1), "clamp in place of the sigmoid: outside of 0 to 1 it has no gradient"),
            (flat.tanh(), "tanh in place of the sigmoid"),
            (flat.exp(), "exp in place of the sigmoid"),
        ]
        why = "".join(
            f" That is {said}." for row, said in rows if torch.allclose(values, row.expand_as(values))
        )
        if isinstance(other, torch.Tensor) and other.shape == G.shape and not torch.allclose(other, G):
            why = " With other features it is another one; it must depend on theta alone."
        first = [round(value, 3) for value in values[0].tolist()]
        raise Wrong(f"{about}, G is {first}; expected {[round(v, 3) for v in expected.tolist()]}.{why}")
    x = _maps(n, k, 4, 6, seed=16)
    with sheltered():
        weights = torch.linspace(-1, 1.5, x.numel()).view_as(x)
        [wanted] = torch.autograd.grad(
            (suppress_plain(x, torch.sigmoid(flat.requires_grad_())) * weights).sum(), flat
        )
        result = (suppress_plain(x, module(x.relu())) * weights).sum()
        gradient = torch.autograd.grad(result, theta, allow_unused=True)[0] if result.requires_grad else None
    if gradient is None:
        raise Wrong(
            f"{about}, G is right, but theta receives no gradient through a DRS module: it can't be trained. "
            "Leave "
            "out detach(), .data and no_grad()"
        )
    if not torch.allclose(gradient.flatten(), wanted, rtol=1e-3, atol=1e-4):
        raise Wrong(f"{about}, G is right, but the gradient that theta receives is not that of the sigmoid")


@check("03", "5", "a function f(values) of control values (images, K): an nn.Module")
def fixed_controller(answer):
    """A controller that answers every image with its channels' mean control values (03, exercise 5).

    The answer is a function (or class) of the control values of a trained controller, a tensor (images, K);
    called, it gives an nn.Module without trainable numbers, whose forward(features), features (N, K, H, W),
    returns the mean over the images as (K,), (N, K) or (N, K, 1, 1).
    """
    if not callable(answer):
        raise Wrong(f"the answer is {found(answer)}; hand in the function or the class, not called")
    for images, k, n in ((6, 4, 3), (3, 3, 2)):
        values = torch.sigmoid(randn(images, k, seed=17))
        about = f"with values of shape {(images, k)}"
        try:
            module = call(answer, values.clone())
            if not isinstance(module, nn.Module):
                raise Wrong(f"what was made is {found(module)}; expected an nn.Module")
            G = call(module, randn(n, k, 4, 6, seed=18).relu())
        except Wrong as wrong:
            raise Wrong(f"{about}, {wrong}") from None
        if any(parameter.requires_grad for parameter in module.parameters()):
            raise Wrong(f"{about}, the module has trainable numbers; the means are to stay what they are")
        rows = [
            (values.mean(1), "the mean over the channels: one number for each image, not for each channel"),
            (values.mean(), "one mean for all channels"),
            (values.median(0).values, "the median, not the mean"),
            (values[0], "the values of the first image"),
            (
                torch.sigmoid(values.mean(0)),
                "passed through a sigmoid once more; the values are control values already",
            ),
        ]
        shapes = ((k,), (n, k), (n, k, 1, 1))
        mean = values.mean(0)
        if isinstance(G, torch.Tensor) and tuple(G.shape) in shapes:
            flat = G.detach().reshape(-1, k)
            if torch.allclose(flat, mean.expand_as(flat), atol=1e-5):
                continue
        else:
            flat = G.detach() if isinstance(G, torch.Tensor) else torch.tensor(float("nan"))
        why = ""
        for row, said in rows:
            fits = flat.numel() % row.numel() == 0 and flat.ndim <= 2
            if fits and torch.allclose(
                flat.reshape(-1, row.numel()),
                row.expand(flat.numel() // row.numel(), -1) if row.ndim else row.expand(flat.numel(), 1),
            ):
                why = f". That is {said}"
                break
        if not isinstance(G, torch.Tensor) or tuple(G.shape) not in shapes:
            raise Wrong(f"{about} and {n} images, forward returned {found(G)}; expected shape {(k,)}{why}")
        first = [round(value, 3) for value in flat[0].tolist()]
        raise Wrong(
            f"{about}, forward returned {first}; expected {[round(v, 3) for v in mean.tolist()]}{why}"
        )
