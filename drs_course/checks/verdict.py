"""What a check answers, and the checks' common parts that need no tensors: numbers, words, pairs."""

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
    """Where a check belongs: a notebook ("02"), the number of the exercise, and the answer it expects.

    ``number`` is a letter for an exercise that stands in the notebook's text, and "" where no exercise asks.
    """

    name: str
    notebook: str
    number: str
    answer: str

    @property
    def place(self):
        return self.notebook, self.number or "9", self.name


def check(notebook, number, answer):
    """Makes a check of a function that raises `Wrong` for a wrong answer and returns for a right one.

    answer: what the answer must look like, in a few words, for the list of the checks.
    """

    def decorate(function):
        @functools.wraps(function)
        def checked(*given):
            if len(given) != 1:
                return _not_yet(f"this check takes one answer, {answer}; {len(given)} were given")
            try:
                function(*given)
            except Wrong as wrong:
                return _not_yet(str(wrong))
            except Exception as error:  # an answer whose own methods fail, say its __array__ or __len__
                return _not_yet(
                    f"the answer can't be read ({type(error).__name__}: {error}). {expects(answer)}"
                )
            return Verdict(CORRECT)

        checked.__signature__ = inspect.Signature(
            [inspect.Parameter("answer", inspect.Parameter.POSITIONAL_ONLY)], return_annotation=Verdict
        )
        checked.exercise = Exercise(function.__name__, notebook, number, answer)
        return checked

    return decorate


def _not_yet(reason):
    return Verdict(f"Not yet: {reason}" + ("" if reason.endswith((".", "?", ")")) else "."))


def expects(what):
    return f"The answer is to be {what}"


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
    if hasattr(value, "item") and getattr(value, "size", None) is not None:
        try:
            value = value.item()
        except (RuntimeError, ValueError, TypeError):
            raise Wrong(f"{what} is {found(value)}; it must be one number") from None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise Wrong(f"{what} is {found(value)}; it must be one number")
    if math.isnan(value):
        raise Wrong(f"{what} is nan. Somewhere 0 was divided by 0, or a nan was taken along")
    return float(value)


def as_list(value, names, what="the answer"):
    """A sequence, array, tensor or mapping as a list in the order of `names`."""
    if isinstance(value, Mapping):
        missing = [name for name in names if name not in value]
        if missing or len(value) != len(names):
            raise Wrong(f"{what} has the keys {list(value)}; expected {list(names)}")
        return [value[name] for name in names]
    if (
        isinstance(value, (str, bytes))
        or not isinstance(value, Iterable)
        or isinstance(value, (set, frozenset))
    ):
        raise Wrong(f"{what} is {found(value)}; expected {len(names)} things: {', '.join(map(str, names))}")
    values = list(value)
    if len(values) != len(names):
        raise Wrong(f"{what} has {_entries(values)}; expected {len(names)}: {', '.join(map(str, names))}")
    return values


def _entries(values):
    return f"{len(values)} {'entry' if len(values) == 1 else 'entries'}"


def close(one, other, tolerance):
    return math.isclose(one, other, rel_tol=tolerance, abs_tol=1e-9)


def same_numbers(answer, right, causes=(), tolerance=0.01):
    """Compares numbers worked out by hand, within `tolerance` of the right ones.

    right: a dictionary from names to numbers. causes: pairs of wrong numbers, in the same order, and the
    sentence that tells how one gets them. The message names the numbers that are wrong, not the right ones.
    """
    if len(right) == 1:
        [name] = right
        given = [as_number(answer, name)]
    else:
        given = [as_number(*pair) for pair in zip(as_list(answer, right), right, strict=True)]
    expected = list(right.values())
    wrong = [
        f"{name} is not {value:g}"
        for name, value, wanted in zip(right, given, expected, strict=True)
        if not close(value, wanted, tolerance)
    ]
    if not wrong:
        return
    for values, sentence in causes:
        if all(close(a, b, tolerance) for a, b in zip(given, values, strict=True)):
            raise Wrong(f"{', '.join(wrong)}. {sentence}")
    hundredfold = [100 * value for value in expected]
    if all(close(a, b, tolerance) for a, b in zip(given, hundredfold, strict=True)):
        raise Wrong(f"{', '.join(wrong)}. Those would be percent; give shares between 0 and 1")
    rest = (
        ""
        if len(wrong) == len(right)
        else f". The other {'is' if len(right) - len(wrong) == 1 else 'ones are'} right"
    )
    raise Wrong(", ".join(wrong) + rest)


def chosen(answer, options, right, why):
    """Compares one word with the right one. why: for each wrong option a sentence that helps."""
    if not isinstance(answer, str):
        raise Wrong(f"the answer is {found(answer)}; choose one of the words {_or(options)}")
    word = " ".join(answer.lower().split())
    by_name = {option.lower(): option for option in options}
    if word not in by_name:
        raise Wrong(f"{answer!r} is none of the choices {_or(options)}")
    if by_name[word] != right:
        raise Wrong(f"{by_name[word]!r} is not it. {why[by_name[word]]}")


def chosen_each(answer, options, right, why):
    """`chosen` for several questions: right and why are dictionaries by question; so may the answer be."""
    for question, word in zip(right, as_list(answer, right), strict=True):
        hints = dict.fromkeys(options, why[question])
        try:
            chosen(word, options, right[question], hints)
        except Wrong as wrong:
            raise Wrong(f"{question}: {wrong}") from None


def _or(options):
    return ", ".join(map(repr, options[:-1])) + f" and {options[-1]!r}"


def as_pairs(answer, what):
    """A set of pairs of whole numbers from a sequence, set or array of pairs."""
    if isinstance(answer, (str, bytes, Mapping)) or not isinstance(answer, Iterable):
        raise Wrong(f"{what} are {found(answer)}; expected pairs of whole numbers such as [(1, 2), (3, 0)]")
    pairs = []
    for pair in answer:
        if isinstance(pair, (str, bytes)) or not isinstance(pair, Iterable) or len(pair := list(pair)) != 2:
            raise Wrong(f"{what} hold {found(pair)}; expected pairs of whole numbers such as (1, 2)")
        pair = [as_number(value, f"a number in {what}") for value in pair]
        if not all(value.is_integer() for value in pair):
            raise Wrong(f"{what} hold {tuple(pair)}; expected whole numbers")
        pairs.append(tuple(int(value) for value in pair))
    return set(pairs)
