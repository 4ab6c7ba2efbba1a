"""What a check answers, and the checks' common parts that need no tensors: numbers, words, pairs."""

import contextlib
import functools
import inspect
import math
import numbers
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

CORRECT = "correct"


class Verdict(str):
    """ "correct" or "Not yet: ...": a string, shown without quotes and wrapped to a notebook's width."""

    @property
    def ok(self):
        """Whether the answer was right."""
        return self == CORRECT

    def __repr__(self):
        return "\n".join(textwrap.fill(line, 100, subsequent_indent="  ") for line in self.splitlines())


class Wrong(Exception):
    """Raised inside a check; its message becomes the verdict."""


@dataclass(frozen=True)
class Exercise:
    """Where a check belongs: a notebook ("02") and its exercise ("3", or "B" in the text); the answer."""

    name: str
    notebook: str
    number: str
    answer: str


def check(notebook, number, answer):
    """Makes a check of a function that raises `Wrong` for a wrong answer and returns for a right one.

    answer: what the answer must look like, in a few words; it joins the docstring and the list of checks.
    """

    def decorate(function):
        @functools.wraps(function)
        def checked(*given):
            try:
                if len(given) != 1:
                    raise Wrong(f"this check takes one answer, {answer}; {len(given)} were given")
                function(*given)
            except Wrong as wrong:
                reason = str(wrong)
            except Exception as error:  # an answer whose own methods fail, say its __array__ or __len__
                cause = f"{type(error).__name__}: {error}"
                reason = f"the answer can't be read ({cause}). The answer is to be {answer}"
            else:
                return Verdict(CORRECT)
            return Verdict(f"Not yet: {reason}" + ("" if reason.endswith((".", "?", ")")) else "."))

        question, _, more = inspect.cleandoc(function.__doc__ or "").partition("\n\n")
        checked.__doc__ = f"{question}\n\nThe answer is {answer}.\n{more}".rstrip()
        checked.exercise = Exercise(function.__name__, notebook, number, answer)
        return checked

    return decorate


def found(value):
    """A value in a message: its type, and itself if that is short."""
    if value is None:
        return "None"
    shape = getattr(value, "shape", None)
    kind = type(value).__name__
    try:
        text = repr(value)
    except Exception:
        text = "..."
    if isinstance(shape, tuple) and shape:
        return f"a {kind} of shape {tuple(shape)}"
    return f"{text} ({kind})" if len(text) <= 60 and "\n" not in text else f"a {kind}"


def as_number(value, what="the answer"):
    """A real number from an int, a float, or a tensor or array of one element."""
    if hasattr(value, "item"):
        with contextlib.suppress(RuntimeError, ValueError, TypeError):
            value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise Wrong(f"{what} is {found(value)}; it must be one number")
    if math.isnan(value):
        raise Wrong(f"{what} is nan. Somewhere 0 was divided by 0, or a nan was taken along")
    return float(value)


def as_list(value, names, what="the answer"):
    """A sequence, array, tensor or mapping as a list in the order of `names`."""
    if isinstance(value, Mapping):
        if len(value) != len(names) or any(name not in value for name in names):
            raise Wrong(f"{what} has the keys {list(value)}; expected {list(names)}")
        return [value[name] for name in names]
    expected = f"{', '.join(map(str, names))}"
    if isinstance(value, (str, bytes, set, frozenset)) or not isinstance(value, Iterable):
        raise Wrong(f"{what} is {found(value)}; expected {len(names)} things: {expected}")
    values = list(value)
    if len(values) != len(names):
        entries = f"{len(values)} {'entry' if len(values) == 1 else 'entries'}"
        raise Wrong(f"{what} has {entries}; expected {len(names)}: {expected}")
    return values


def as_numbers(value, names, what="the answer"):
    """A number for each of `names`, a list."""
    return [as_number(*pair) for pair in zip(as_list(value, names, what), names, strict=True)]


def as_pairs(answer, what):
    """A set of pairs of whole numbers from a sequence, set or array of pairs."""
    if isinstance(answer, (str, bytes, Mapping)) or not isinstance(answer, Iterable):
        raise Wrong(f"{what} are {found(answer)}; expected pairs of whole numbers such as [(1, 2), (3, 0)]")
    pairs = set()
    for pair in answer:
        if isinstance(pair, (str, bytes)) or not isinstance(pair, Iterable) or len(pair := list(pair)) != 2:
            raise Wrong(f"{what} hold {found(pair)}; expected pairs of whole numbers such as (1, 2)")
        pair = tuple(as_number(value, f"a number in {what}") for value in pair)
        if not all(value.is_integer() for value in pair):
            raise Wrong(f"{what} hold {pair}; expected whole numbers")
        pairs.add(tuple(map(int, pair)))
    return pairs


def alike(given, wanted, tolerance=0.01):
    """Whether a number, or each of several, is within `tolerance` of the wanted one."""
    given, wanted = (one if isinstance(one, (tuple, list)) else [one] for one in (given, wanted))
    pairs = zip(given, wanted, strict=True)
    return all(math.isclose(*pair, rel_tol=tolerance, abs_tol=1e-9) for pair in pairs)


def cause(given, causes, otherwise=""):
    """ ". " and how one gets what was given. causes: from wrong numbers (one, or a tuple) to the sentence."""
    why = next((why for wrong, why in causes.items() if alike(given, wrong)), otherwise)
    return f". {why}" if why else ""


def same_numbers(answer, right, causes, tolerance=0.01):
    """Compares numbers worked out by hand, within `tolerance` of the right ones.

    right: a dictionary from names to numbers. causes: see `cause`, in the same order. The message names the
    numbers that are wrong, not the right ones.
    """
    given = as_numbers(answer, right) if len(right) > 1 else [as_number(answer, *right)]
    wrong = [
        f"{name} is not {value:g}"
        for (name, wanted), value in zip(right.items(), given, strict=True)
        if not alike(value, wanted, tolerance)
    ]
    if not wrong:
        return
    rest = ""
    if alike(given, [100 * value for value in right.values()], tolerance):
        rest = "Those would be percent; give shares between 0 and 1"
    elif len(wrong) < len(right):
        rest = f"The other {'is' if len(right) - len(wrong) == 1 else 'ones are'} right"
    raise Wrong(", ".join(wrong) + cause(given, causes, rest))


def choose(answer, right, why):
    """Raises `Wrong` unless the answer is the word `right`. why: from each wrong word to what helps."""
    options = list(why) if right in why else [right, *why]
    choices = ", ".join(map(repr, options[:-1])) + f" and {options[-1]!r}"
    if not isinstance(answer, str):
        raise Wrong(f"the answer is {found(answer)}; choose one of the words {choices}")
    given = {option.lower(): option for option in options}.get(" ".join(answer.lower().split()))
    if given is None:
        raise Wrong(f"{answer!r} is none of the choices {choices}")
    if given != right:
        raise Wrong(f"{given!r} is not it. {why[given]}")


def choose_each(answer, options, questions):
    """`choose` for several questions: from each to its right word and what helps with it."""
    for question, given in zip(questions, as_list(answer, questions), strict=True):
        right, why = questions[question]
        try:
            choose(given, right, dict.fromkeys(options, why))
        except Wrong as wrong:
            raise Wrong(f"{question}: {wrong}") from None
