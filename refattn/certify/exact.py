"""Exact matrices, and matrices of which some elements are known exactly and others as balls.

Every input float is a dyadic rational, so sums and products of inputs are exact integers times a
power of two. An element that is rational by structure is carried as a rational number beside the
ball of the whole; see OWN-EXACT1.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from flint import arb, arb_mat, fmpq, fmpz_mat

from refattn.certify.errors import CertifyError

Value: TypeAlias = Any
"""An arb (a ball), an fmpq (an exact number) or a float (NaN, ∞ or -∞: a special value)."""

Array: TypeAlias = npt.NDArray[Any]

ZERO = fmpq(0)
"""The exact number zero."""


class Cells(NamedTuple):
    """One output: its shape and its values in C order."""

    shape: tuple[int, ...]
    values: list[Value]


class Grid(NamedTuple):
    """An exact matrix: element (i, j) is n[i, j]·2^e."""

    n: fmpz_mat
    e: int

    def rows(self) -> list[list[Any]]:
        """Return the integers n as lists."""
        rows: list[list[Any]] = self.n.tolist()
        return rows


class Mixed(NamedTuple):
    """A matrix that encloses exact values.

    `open[i]` lists the columns of row i that are known as balls only; `exact` holds the exact
    non-zero elements of the rest; all others are exactly zero. `total[i]` is the exact sum of
    row i where an identity gives it.
    """

    ball: arb_mat
    open: list[list[int]]
    exact: dict[tuple[int, int], fmpq]
    total: list[fmpq | None]


def widened(x: Array) -> Array:
    """Widen floats of any format to float64, exactly; leave integers and bools."""
    x = np.asarray(x)
    return x if x.dtype.kind in "biu" else x.astype(np.float64)


def rational(x: float) -> fmpq:
    """Convert a finite float to the rational number that it is."""
    return fmpq(*float(x).as_integer_ratio())


def power(e: int) -> fmpq:
    """Return 2^e."""
    return fmpq(1 << e) if e >= 0 else fmpq(1, 1 << -e)


def integers(values: Iterable[float]) -> tuple[list[int], int]:
    """Write finite floats as integers times one common power of two: (n, e)."""
    ratios = [float(x).as_integer_ratio() for x in values]
    bits = max((q.bit_length() - 1 for _, q in ratios), default=0)
    return [p << (bits - q.bit_length() + 1) for p, q in ratios], -bits


def grid(matrix: Array) -> Grid:
    """Convert a matrix of finite floats, exactly."""
    matrix = np.asarray(matrix)
    if matrix.ndim != 2:
        raise CertifyError(f"a matrix has two axes, but this array has shape {matrix.shape}")
    n, e = integers(matrix.reshape(-1).tolist())
    return Grid(fmpz_mat(matrix.shape[0], matrix.shape[1], n), e)


def product(a: Grid, b: Grid) -> Grid:
    """Multiply two exact matrices."""
    return Grid(a.n * b.n, a.e + b.e)


def transposed(a: Grid) -> Grid:
    """Transpose an exact matrix."""
    return Grid(a.n.transpose(), a.e)


def with_zero_row(a: Grid) -> Grid:
    """Append a row of zeros: the key and the value of a sink."""
    rows = a.rows()
    return Grid(fmpz_mat([*rows, [0] * a.n.ncols()]), a.e)


def scaled_by(a: Grid, factor: float) -> Grid:
    """Multiply an exact matrix by a finite float."""
    p, q = float(factor).as_integer_ratio()
    return Grid(a.n * p, a.e - (q.bit_length() - 1))


def balls(a: Grid) -> arb_mat:
    """Enclose an exact matrix at the present precision."""
    return arb_mat(a.n) * arb((1, a.e))


def exact_values(a: Grid) -> list[fmpq]:
    """List the elements of an exact matrix in C order."""
    unit = power(a.e)
    return [fmpq(x) * unit for row in a.rows() for x in row]


def add(a: Value, b: Value) -> Value:
    """Add two values; the sum of exact values is exact."""
    if isinstance(a, fmpq) and isinstance(b, fmpq):
        return a + b
    if isinstance(a, fmpq):
        return b if a == 0 else b + arb(a)
    if isinstance(b, fmpq):
        return a if b == 0 else a + arb(b)
    return a + b


def multiply(a: Value, b: Value) -> Value:
    """Multiply two values; the product of exact values, or with an exact zero, is exact."""
    if isinstance(a, fmpq):
        if isinstance(b, fmpq):
            return a * b
        return ZERO if a == 0 else b * arb(a)
    if isinstance(b, fmpq):
        return ZERO if b == 0 else a * arb(b)
    return a * b


def total_of(values: Iterable[Value]) -> Value:
    """Add values, exactly where all are exact."""
    result: Value = ZERO
    for value in values:
        result = add(result, value)
    return result


def enclosed(value: Value) -> arb:
    """Return the ball of a value."""
    return arb(value) if isinstance(value, fmpq) else value


def mixed(rows: Sequence[Sequence[Value]], total: list[fmpq | None] | None = None) -> Mixed:
    """Build a Mixed matrix from rows of values."""
    exact = {
        (i, j): x
        for i, row in enumerate(rows)
        for j, x in enumerate(row)
        if isinstance(x, fmpq) and x != 0
    }
    open_ = [[j for j, x in enumerate(row) if not isinstance(x, fmpq)] for row in rows]
    ball = arb_mat([[enclosed(x) for x in row] for row in rows])
    return Mixed(ball, open_, exact, total or [None] * len(rows))


def transposed_mixed(a: Mixed) -> Mixed:
    """Transpose a Mixed matrix; the totals of its rows are dropped."""
    columns: list[list[int]] = [[] for _ in range(a.ball.ncols())]
    for i, open_row in enumerate(a.open):
        for j in open_row:
            columns[j].append(i)
    exact = {(j, i): x for (i, j), x in a.exact.items()}
    return Mixed(a.ball.transpose(), columns, exact, [None] * len(columns))


def times(a: Mixed, b: Grid) -> list[list[Value]]:
    """Multiply a Mixed matrix by an exact one; each element exact where structure says so.

    Element (i, c) is exact when every open a_ij meets the same b_jc = g, and g = 0 or the total
    of row i is known: then  Σ_j a_ij b_jc = Σ_exact a_ij (b_jc - g) + g·total_i.
    """
    product_balls = (a.ball * arb_mat(b.n) * arb((1, b.e))).tolist()
    rows, unit = b.rows(), power(b.e)
    known: list[list[int]] = [[] for _ in a.open]
    for i, j in a.exact:
        known[i].append(j)
    result: list[list[Value]] = product_balls
    for i, open_row in enumerate(a.open):
        for c in range(b.n.ncols()):
            g = rows[open_row[0]][c] if open_row else 0
            if g != 0 and a.total[i] is None:
                continue
            if any(rows[j][c] != g for j in open_row):
                continue
            known_sum = sum((a.exact[i, j] * (rows[j][c] - g) for j in known[i]), ZERO)
            result[i][c] = (known_sum + g * (a.total[i] or ZERO)) * unit
    return result
