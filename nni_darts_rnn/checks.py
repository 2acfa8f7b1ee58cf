"""One line for a setting that is not allowed: its name, its value, what is allowed and, of words, the nearest."""

from __future__ import annotations

import difflib
from numbers import Real


def did_you_mean(word: object, allowed) -> str:
    """`"; did you mean 'x'?"` for the nearest of `allowed`, or nothing."""
    near = difflib.get_close_matches(str(word), [str(a) for a in allowed], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def one_line(error: object) -> str:
    """What an exception says, without its line breaks."""
    return " ".join(str(error).split())


def one_of(name: str, value, allowed):
    """`value`, or `ValueError` with one line that names the setting, what is allowed and the nearest of it."""
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is none of {', '.join(allowed)}" + did_you_mean(value, allowed))
    return value


def whole_number(name: str, value, low: int = 1) -> int:
    """`value`, an `int` of at least `low`, or `ValueError` with one line."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}: {value!r} must be a whole number of at least {low}")
    return value


def fraction(name: str, value: float, *, below: bool = True) -> float:
    """`value`, a real number of at least 0 and below 1 (not `below`: at most 1), or `ValueError` with one line."""
    if isinstance(value, bool) or not isinstance(value, Real) or not (0 <= value < 1 or (value == 1 and not below)):
        raise ValueError(f"{name}: {value!r} must be a number of at least 0 and {'below' if below else 'at most'} 1")
    return value
