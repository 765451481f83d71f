"""One problem for every subject: its tensors, and how far a result is from float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.bench.shapes import Shape
from refattn.checks import check_memory

Array = NDArray[Any]
"""A tensor of (b, h, n, d)."""

Call = Callable[[], Any]
"""One timed call; its result becomes an array by `Subject.array`."""

SAMPLED_ROWS = 16
"""Query rows a head whose error is measured against float64."""

MATRIX_LIMIT = 2 * 2**30
"""Bytes that a subject's matrices of n_q times n_k may take: its like at 16384 tokens does not."""


class Unable(ValueError):  # noqa: N818 - a state of the subject
    """A problem that a subject does not take."""


class Problem(NamedTuple):
    """What is to be computed, on given arrays."""

    query: Array
    key: Array
    value: Array
    d_output: Array | None
    """None = the forward pass alone; else the result is the queries' gradient."""
    causal: bool
    """The last query sees the last key."""
    threads: int


def draw(shape: Shape, dtype: str, causal: bool, backward: bool, threads: int) -> Problem:
    """Return a problem of standard normal numbers.

    Raises:
        MemoryLimitError: its tensors do not fit.
    """
    b, h, n_q, n_k, d = shape
    check_memory("bench", (b, h, max(n_q, n_k), d), itemsize=np.dtype(dtype).itemsize, arrays=8)
    drawn = np.random.default_rng(0)
    query, key, value, d_output = (
        drawn.standard_normal((b, h, n, d), np.float32).astype(dtype, copy=False)
        for n in (n_q, n_k, n_k, n_q)
    )
    return Problem(query, key, value, d_output if backward else None, causal, threads)


def check_matrices(p: Problem, copies: int, itemsize: int = 0) -> None:
    """Refuse, for a subject that forms the weights of all pairs, what is too large for that.

    Raises:
        Unable: they take more than the limit, or than is free.
    """
    import psutil

    b, h, n_q, _ = p.query.shape
    size = copies * b * h * n_q * p.key.shape[-2] * (itemsize or p.query.itemsize)
    limit = min(MATRIX_LIMIT, psutil.virtual_memory().available // 2)
    if size > limit:
        raise Unable(
            f"it forms matrices of {n_q} by {p.key.shape[-2]}, {size / 2**30:.1f} GiB, "
            f"but the limit is {limit / 2**30:.1f} GiB"
        )


def mask_matrix(p: Problem) -> Array | None:
    """Return which query sees which key, where a causal mask from the top left is another one.

    Raises:
        Unable: the matrix is too large.
    """
    n_q, n_k = p.query.shape[-2], p.key.shape[-2]
    if not p.causal or n_q in (1, n_k):
        return None
    check_matrices(p._replace(query=p.query[:1, :1]), 1, itemsize=1)
    from refattn.masks import causal_mask

    return np.asarray(causal_mask(n_q, n_k, alignment="bottom_right"))


def errors(problem: Problem, result: Array) -> tuple[float, float]:
    """Return the root mean square and the largest error on sampled rows, against float64."""
    n_q = problem.query.shape[-2]
    rows = np.unique(np.linspace(0, n_q - 1, min(n_q, SAMPLED_ROWS)).astype(int))
    off = np.stack(
        [
            np.abs(result[b, h, rows].astype(np.float64) - exact_rows(problem, b, h, rows))
            for b, h in np.ndindex(problem.query.shape[:2])
        ]
    )
    return float(np.sqrt((off**2).mean())), float(off.max())


def exact_rows(problem: Problem, b: int, h: int, rows: Array) -> Array:
    """Return rows of the output, or of the queries' gradient, of one head in float64."""
    Q, K, V = (x[b, h].astype(np.float64) for x in (problem.query, problem.key, problem.value))
    n_q, n_k = len(Q), len(K)
    scale = 1 / math.sqrt(Q.shape[-1])
    S = scale * (Q[rows] @ K.T)
    if problem.causal:
        S[np.arange(n_k)[None, :] > rows[:, None] + n_k - n_q] = -np.inf
    P = np.exp(S - S.max(-1, keepdims=True))
    P /= P.sum(-1, keepdims=True)
    if problem.d_output is None:
        return np.asarray(P @ V)
    dP = problem.d_output[b, h, rows].astype(np.float64) @ V.T
    dS = P * (dP - (P * dP).sum(-1, keepdims=True))
    return np.asarray(scale * (dS @ K))
