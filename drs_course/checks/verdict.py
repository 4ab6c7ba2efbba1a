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
        if len(value) != len(names) or any(name not in value for name in names):
            raise Wrong(f"{what} has the keys {list(value)}; expected {list(names)}")
        return [value[name] for name in names]
    if isinstance(value, (str, bytes, set, frozenset)) or not isinstance(value, Iterable):
        raise Wrong(f"{what} is {found(value)}; expected {len(names)} things: {', '.join(map(str, names))}")
    values = list(value)
    if len(values) != len(names):
        entries = f"{len(values)} {'entry' if len(values) == 1 else 'entries'}"
        raise Wrong(f"{what} has {entries}; expected {len(names)}: {', '.join(map(str, names))}")
    return values


def as_numbers(value, names, what="the answer"):
    """A number for each of `names`, a list."""
    return [as_number(*pair) for pair in zip(as_list(value, names, what), names, strict=True)]


def close(one, other, tolerance):
    return math.isclose(one, other, rel_tol=tolerance, abs_tol=1e-9)


def alike(given, wanted, tolerance=0.01):
    """Whether a number, or each of several, is within `tolerance` of the wanted one."""
    given, wanted = (one if isinstance(one, (tuple, list)) else [one] for one in (given, wanted))
    return all(close(*pair, tolerance) for pair in zip(given, wanted, strict=True))


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
        if not close(value, wanted, tolerance)
    ]
    if not wrong:
        return
    rest = ""
    if alike(given, [100 * value for value in right.values()], tolerance):
        rest = "Those would be percent; give shares between 0 and 1"
    elif len(wrong) < len(right):
        rest = f"The other {'is' if len(right) - len(wrong) == 1 else 'ones are'} right"
    raise Wrong(", ".join(wrong) + cause(given, causes, rest))


def word(notebook, number, right):
    """Makes a check of one word from a function that returns, for each wrong one, a sentence that helps."""

    def decorate(function):
        why = function()
        options = (right, *why)
        compare = functools.partial(_chosen, options=options, right=right, why=why)
        return _of_words(notebook, number, function, options, compare)

    return decorate


def words(notebook, number, options, right):
    """Makes a check of a word for each of several questions; the function returns what helps with each."""
    asked = ", ".join(f'"{question}": ...' for question in right)

    def decorate(function):
        why = function()

        def compare(answer):
            for question, one in zip(right, as_list(answer, right), strict=True):
                try:
                    _chosen(one, options, right[question], dict.fromkeys(options, why[question]))
                except Wrong as wrong:
                    raise Wrong(f"{question}: {wrong}") from None

        return _of_words(notebook, number, function, options, compare, f"{{{asked}}}, each ")

    return decorate


def _of_words(notebook, number, function, options, compare, asked=""):
    quoted = [f'"{option}"' for option in options]
    made = check(notebook, number, f"{asked}{', '.join(quoted[:-1])} or {quoted[-1]}")
    return made(functools.wraps(function)(compare))


def _chosen(answer, options, right, why):
    choices = ", ".join(map(repr, options[:-1])) + f" and {options[-1]!r}"
    if not isinstance(answer, str):
        raise Wrong(f"the answer is {found(answer)}; choose one of the words {choices}")
    by_name = {option.lower(): option for option in options}
    given = by_name.get(" ".join(answer.lower().split()))
    if given is None:
        raise Wrong(f"{answer!r} is none of the choices {choices}")
    if given != right:
        raise Wrong(f"{given!r} is not it. {why[given]}")


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
