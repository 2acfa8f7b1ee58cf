"""Check settings. The error for a value that is not allowed is one line: the setting, its value, what is allowed and, for a word, the nearest allowed one."""

from __future__ import annotations

import difflib
from numbers import Real


def did_you_mean(word: object, allowed) -> str:
    """`"; did you mean 'x'?"` with the word of `allowed` that is nearest to `word`, or an empty text if none is near."""
    near = difflib.get_close_matches(str(word), [str(a) for a in allowed], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def one_line(error: object) -> str:
    """The message of an exception, on one line."""
    return " ".join(str(error).split())


def one_of(name: str, value, allowed):
    """`value`, or `ValueError` with one line that names the setting, what is allowed and the nearest allowed value."""
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is none of {', '.join(allowed)}" + did_you_mean(value, allowed))
    return value


def whole_number(name: str, value, low: int = 1) -> int:
    """`value`, or `ValueError` with one line unless it is an `int` of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}: {value!r} must be a whole number of at least {low}")
    return value


def fraction(name: str, value: float, *, below: bool = True) -> float:
    """`value`, or `ValueError` with one line unless it is a real number of at least 0 and below 1 (with `below=False`, at most 1)."""
    if isinstance(value, bool) or not isinstance(value, Real) or not (0 <= value < 1 or (value == 1 and not below)):
        raise ValueError(f"{name}: {value!r} must be a number of at least 0 and {'below' if below else 'at most'} 1")
    return value
