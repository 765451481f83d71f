"""Matrices of values, exact or balls, for what is no longer a product of exact inputs.

Sums and products keep an exact zero exact, so that what structure makes zero stays zero.
"""

from collections.abc import Iterable
from typing import Any

from flint import arb, fmpq

from refattn.certify.errors import Undecided
from refattn.certify.exact import ZERO, Array, Value, add, enclosed, multiply, rational, total_of

Rows = list[list[Value]]
"""A matrix of values."""


def loaded(x: Array) -> Any:
    """Return an array of finite floats as nested lists of rational numbers."""
    if x.ndim == 0:
        return rational(float(x))
    return [loaded(part) for part in x]


def flat(nested: Any) -> list[Value]:
    """List the values of nested lists in C order."""
    if isinstance(nested, list):
        return [v for part in nested for v in flat(part)]
    return [nested]


def dot(a: Iterable[Value], b: Iterable[Value]) -> Value:
    """Return Σ a_i b_i."""
    return total_of(multiply(x, y) for x, y in zip(a, b, strict=True))


def matmul(a: Rows, b: Rows) -> Rows:
    """Multiply two matrices."""
    columns = turned(b)
    return [[dot(row, column) for column in columns] for row in a]


def turned(a: Rows) -> Rows:
    """Transpose a matrix."""
    return [list(column) for column in zip(*a, strict=True)]


def plus(a: Rows, b: Rows) -> Rows:
    """Add two matrices."""
    return [[add(x, y) for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)]


def scaled(a: Iterable[Value], factor: Value) -> list[Value]:
    """Multiply a row by a number."""
    return [multiply(x, factor) for x in a]


def by_column(a: Rows, factors: list[Value]) -> Rows:
    """Multiply the columns of a matrix by one factor each."""
    return [[multiply(x, f) for x, f in zip(row, factors, strict=True)] for row in a]


def minus(x: Value) -> Value:
    """Return -x."""
    return multiply(x, fmpq(-1))


def column_sums(a: Rows) -> list[Value]:
    """Add the rows of a matrix."""
    return [total_of(column) for column in zip(*a, strict=True)]


def sign(x: Value) -> int:
    """Return the sign of a value.

    Raises:
        Undecided: the ball holds numbers of both signs.
    """
    if isinstance(x, fmpq):
        return int(x > 0) - int(x < 0)
    if x > 0:
        return 1
    if x < 0:
        return -1
    raise Undecided


def softmax(logits: list[Value]) -> list[Value]:
    """Return the weights of a row; exact where it has one key."""
    if len(logits) == 1:
        return [fmpq(1)]
    balls = [enclosed(x) for x in logits]
    top = max(balls, key=lambda x: float(x.mid()))
    powers = [(x - top).exp() for x in balls]
    inverse = 1 / sum(powers, arb(0))
    return [p * inverse for p in powers]


def softmax_backward(weights: list[Value], d_weights: list[Value]) -> list[Value]:
    """Return P_j (dP_j - Σ_k P_k dP_k): zero for one key, or where all dP_j are one number."""
    first = d_weights[0]
    if len(weights) == 1 or (
        isinstance(first, fmpq) and all(isinstance(x, fmpq) and x == first for x in d_weights)
    ):
        return [ZERO] * len(weights)
    mean = minus(dot(weights, d_weights))
    return [multiply(p, add(x, mean)) for p, x in zip(weights, d_weights, strict=True)]
