"""Arguments as people pass them: NumPy's and torch's whole numbers are as good as Python's."""

import operator


def whole(name, value, least=1, most=None):
    """`value` as an int. Raises ValueError, with the argument's name, if it is no whole number from `least`
    to `most` (None: without end); True and False are none."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least or (most is not None and number > most):
        span = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} holds {value!r}: expected a whole number {span}")
    return number
