"""How a check tries a function that a student wrote: on inputs of its own, against a reference.

All cases are tried before anything is said. If every result (and gradient) equals what a known slip gives,
the message names the slip.
"""

import contextlib
import copy
import functools
import inspect
import random
import re
from dataclasses import dataclass

import numpy as np
import torch

from drs_course.checks.verdict import Wrong, as_number, as_numbers, found
from drs_lib.runtime import threads

RTOL, ATOL = 1e-3, 1e-5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    """Normal random numbers, the same on every call."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Case:
    """What a function is tried on; ``about`` describes it where values and shapes say too little."""

    args: tuple
    about: str = ""
    gradients: bool = True


@dataclass(frozen=True)
class Task:
    """What a function must do: see `compare`."""

    names: tuple
    right: object
    cases: list
    slips: dict
    wrt: tuple
    read: object
    result: str


@contextlib.contextmanager
def sheltered():
    """Gradients on, random numbers that start alike, and the random states as they were afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.default_generator.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def like_expected(result, wanted):
    """Reads a floating-point tensor of the shape and type of the expected one."""
    if not isinstance(result, torch.Tensor):
        raise Wrong(f"the result is {found(result)}; expected a tensor")
    if not result.is_floating_point():
        raise Wrong(f"the result is {_kind(result)}; expected floating point")
    if wanted is not None and result.shape != wanted.shape:
        raise Wrong(f"the result has shape {tuple(result.shape)}; expected {tuple(wanted.shape)}")
    if wanted is not None and result.dtype != wanted.dtype:
        raise Wrong(
            f"the result is {_kind(result)}; expected {_kind(wanted)}, the type of "
            "the input. A new tensor takes it with dtype=x.dtype, or use torch.zeros_like and the like"
        )
    return result.detach()


def one_number(result, wanted):
    """Reads a number."""
    return torch.tensor(as_number(result, "the result"), dtype=torch.float64)


def some_numbers(*names):
    """Reads a number for each of the names."""
    return lambda result, wanted: torch.tensor(as_numbers(result, names, "the result"), dtype=torch.float64)


def label_map(result, wanted):
    """Reads integers of the expected shape: a tensor or an array."""
    if isinstance(result, np.ndarray) and result.dtype != np.uint16:
        result = torch.from_numpy(result.copy())
    if not isinstance(result, torch.Tensor):
        raise Wrong(f"the result is {found(result)}; expected a tensor of labels")
    if result.is_floating_point() or result.dtype == torch.bool:
        raise Wrong(f"the result is {_kind(result)}; labels are whole numbers, say uint8")
    if wanted is not None and result.shape != wanted.shape:
        raise Wrong(f"the result has shape {tuple(result.shape)}; expected {tuple(wanted.shape)}")
    return result.detach().double()


def compare(answer, right, cases, slips, names=(), *, wrt=(), read=like_expected, result="the result"):
    """Raises `Wrong` unless the function `answer` does on every case what the function `right` does.

    cases: tuples of arguments, or `Case`. slips: a dictionary from a sentence, which continues "Your result
    equals what comes out if", to a wrong function that many write, to the parts in which such a one differs
    from `right`, a dictionary of keyword arguments, or to a tuple of these. names: of the arguments; none:
    those of `right` without a default. wrt: names of the arguments whose gradient is compared. read: makes
    of a result, given the expected one, a tensor, or raises `Wrong`. result: what a message calls it.
    """
    parameters = inspect.signature(right).parameters.values()
    names = names or tuple(one.name for one in parameters if one.default is one.empty)
    cases = [case if isinstance(case, Case) else Case(case) for case in cases]
    task = Task(names, right, cases, slips, wrt, read, result)
    called(answer, f"the function itself, f({', '.join(names)}), not called")
    # The inputs are small: more threads would only wait for each other.
    with threads(1), sheltered():
        expected = [_run(right, task, case) for case in cases]
        given = [_attempt(answer, task, *pair) for pair in zip(cases, expected, strict=True)]
        for case, outcome, wanted in zip(cases, given, expected, strict=True):
            if isinstance(outcome, Wrong):
                raise Wrong(f"{_tried(task, case)}, {outcome}")
            if not _equal(outcome, wanted):
                raise Wrong(f"{_tried(task, case)}, {_difference(outcome, wanted)}.{_slip(given, task)}")


def called(answer, what):
    """Raises `Wrong` unless the answer can be called. what: to hand in."""
    if not callable(answer):
        raise Wrong(f"the answer is {found(answer)}; hand in {what}")


def call(function, *args):
    """The function's result; an exception becomes a `Wrong`."""
    with sheltered():
        try:
            result = function(*args)
        except NotImplementedError as error:
            text = f"nothing was computed: the function is still to be written. {error}"
            raise Wrong(text.rstrip()) from None
        except Wrong:
            raise
        except (Exception, SystemExit) as error:
            raise Wrong(f"the function raised {type(error).__name__}: {_short(error)}") from None
    if result is None:
        raise Wrong("the function returned nothing (None). Does it end with return?")
    return result


def _short(error):
    text = " ".join(str(error).split()) or "(no message)"
    return text if len(text) <= 200 else text[:200] + " ..."


def _tried(task, case):
    said = [f"{name} {_described(value)}" for name, value in zip(task.names, case.args, strict=True)]
    return f"with {case.about or ', '.join(said)}"


def _described(value):
    if isinstance(value, (np.ndarray, torch.Tensor)):
        value = torch.as_tensor(value)
        if 0 < value.numel() <= 24:
            return f"= {_listed(value.tolist())}"
        return f"of shape {tuple(value.shape)}, {_kind(value)}"
    return f"= {value:g}" if isinstance(value, float) else f"= {value!r}"


def _listed(value):
    if isinstance(value, list):
        return f"[{', '.join(map(_listed, value))}]"
    if isinstance(value, bool):
        return str(int(value))
    return f"{value + 0.0:.4g}" if isinstance(value, float) else str(value)  # + 0.0: no -0


def _unchanged(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_unchanged(one[key], other[key]) for key in one)
    if isinstance(one, (np.ndarray, torch.Tensor)):
        return torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    return one == other


def _attempt(function, task, case, wanted=None):
    try:
        return _run(function, task, case, wanted)
    except Wrong as wrong:
        return wrong


def _run(function, task, case, wanted=None):
    """The result and the gradients of a function, by what they are."""
    args = copy.deepcopy(case.args)
    result = call(function, *args)
    for name, before, after in zip(task.names, case.args, args, strict=True):
        if not _unchanged(before, after):
            raise Wrong(
                f"{name} is another one after the call: the function writes into it. Make a new one; names "
                "that end with _ (relu_, clamp_) and assignments to slices write into the old one"
            )
    outcome = {task.result: task.read(result, wanted and wanted[task.result])}
    return outcome | (_gradients(function, task, case) if task.wrt and case.gradients else {})


def _gradients(function, task, case):
    args = dict(zip(task.names, copy.deepcopy(case.args), strict=True))
    leaves = [args[name].requires_grad_() for name in task.wrt]
    result = call(function, *args.values())
    if not isinstance(result, torch.Tensor) or not result.requires_grad:
        raise Wrong(
            "the values may be right, but no gradient can flow back through the result. Leave out detach(), "
            "item(), numpy() and no_grad(), and make no new tensor of numbers"
        )
    weights = torch.linspace(-1, 1.5, result.numel(), dtype=result.dtype).view_as(result)
    with sheltered():
        try:
            loss = (result * weights).sum()
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        except RuntimeError as error:
            raise Wrong(f"backpropagation through the result failed: {_short(error)}") from None
    verbs = ["receive" if name.endswith("s") else "receives" for name in task.wrt]
    return {
        f"the gradient that {name} {verb}": gradient
        for name, verb, gradient in zip(task.wrt, verbs, gradients, strict=True)
    }


def _kind(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def _same(one, other):
    # An atol relative to the largest value, so that inputs of any scale are compared alike.
    scale = other[torch.isfinite(other)].abs().max().item() if torch.isfinite(other).any() else 1.0
    atol = ATOL * max(scale, 1e-30)
    return torch.isclose(one.double(), other.double(), rtol=RTOL, atol=atol, equal_nan=True)


def _equal(outcome, wanted):
    return all(bool(_same(outcome[what], wanted[what]).all()) for what in wanted)


def _difference(outcome, wanted):
    number, what, differs = next(
        (number, what, differs)
        for number, what in enumerate(wanted)
        if (differs := ~_same(outcome[what], wanted[what])).any()
    )
    one, other = outcome[what], wanted[what]
    right = next(iter(wanted))
    before = f"{right} is right, but for a loss that weighs it from -1 to 1.5, " if number else ""
    one_of_it, verb = ("the label", "are") if what == "the labels" else (what, "is")
    if one.numel() == 1:
        return f"{before}{one_of_it} is {one.item():.4g}; expected {other.item():.4g}"
    if one.numel() <= 12:
        return f"{before}{what} {verb} {_listed(one.tolist())}; expected {_listed(other.tolist())}"
    place = tuple(differs.nonzero()[0].tolist())
    return (
        f"{before}{one_of_it} at {list(place)} is {one[place].item():.4g}; "
        f"expected {other[place].item():.4g} ({int(differs.sum())} of {differs.numel()} values differ)"
    )


def _slip(given, task):
    """What the known slip is called whose outcome is the given one in every case, or nothing."""
    for sentence, functions in task.slips.items():
        for function in functions if isinstance(functions, tuple) else (functions,):
            if isinstance(function, dict):
                function = functools.partial(task.right, **function)
            outcomes = (_attempt(function, task, case) for case in task.cases)
            if all(_alike(*pair) for pair in zip(outcomes, given, strict=True)):
                return f" Your result equals what comes out if {sentence}."
    return ""


def _alike(slipped, outcome):
    if isinstance(slipped, Wrong) or isinstance(outcome, Wrong):
        # The sentences of two exceptions may name different places.
        return type(slipped) is type(outcome) and _gist(slipped) == _gist(outcome)
    return all(slipped[what].shape == outcome[what].shape for what in outcome) and _equal(outcome, slipped)


def _gist(wrong):
    return re.split(r"[:;,]", str(wrong))[0]
