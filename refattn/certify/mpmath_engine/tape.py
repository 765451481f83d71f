"""Numbers on a tape: the second engine differentiates whole modules by reverse accumulation.

Every number is an index into the tape, which remembers its value and what it was made from. No
formula of a gradient is written down, so that none can be wrong in both engines.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from mpmath import mp, mpf

Link = tuple[int, Any]
"""A number that another was made from, and the derivative by it."""

Array = Any
"""A NumPy array of indices."""


class Tape(NamedTuple):
    """Values in the order in which they were made, and the links of each."""

    values: list[Any]
    links: list[tuple[Link, ...]]


def put(t: Tape, value: Any, *links: Link) -> int:
    """Write a number and return its index."""
    t.values.append(value)
    t.links.append(links)
    return len(t.values) - 1


def leaves(t: Tape, x: Any) -> Array:
    """Write an array of floats, exactly; return the array of indices."""
    x = np.asarray(x)
    found = np.empty(x.shape, dtype=object)
    for at in np.ndindex(*x.shape):
        found[at] = put(t, mpf(float(x[at])))
    return found


def total(t: Tape, xs: Iterable[int]) -> int:
    """Return Σ x."""
    xs = list(xs)
    return put(t, mp.fsum(t.values[x] for x in xs), *((x, mpf(1)) for x in xs))


def times(t: Tape, x: int, y: int) -> int:
    """Return x y."""
    return put(t, t.values[x] * t.values[y], (x, t.values[y]), (y, t.values[x]))


def weighted(t: Tape, x: int, factor: Any) -> int:
    """Return x times a number that is no variable."""
    return put(t, t.values[x] * factor, (x, factor))


def inner(t: Tape, xs: Iterable[int], ys: Iterable[int]) -> int:
    """Return Σ x y."""
    return total(t, [times(t, x, y) for x, y in zip(xs, ys, strict=True)])


def quotient(t: Tape, x: int, y: int) -> int:
    """Return x / y."""
    a, b = t.values[x], t.values[y]
    return put(t, a / b, (x, 1 / b), (y, -a / b**2))


def apply(t: Tape, x: int, value: Any, slope: Any) -> int:
    """Return f(x) from its value and its derivative at x."""
    return put(t, value, (x, slope))


def slopes(t: Tape, seeds: Iterable[Link]) -> list[Any]:
    """Return the derivative of Σ seed · number by every number of the tape."""
    found = [mpf(0)] * len(t.values)
    for x, seed in seeds:
        found[x] += seed
    for x in reversed(range(len(found))):
        if found[x]:
            for source, slope in t.links[x]:
                found[source] += found[x] * slope
    return found
