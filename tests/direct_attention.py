"""Attention by its definition, row by row in extended precision, and what rounding may do to it.

Written from the formula, without tiles: it reads the allowed keys of a row and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


class Direct(NamedTuple):
    output: Floats
    row_max: Floats
    row_sum: Floats
    logsumexp: Floats
    bound: Floats  # of the output of any order of summation in float64
    relative: Floats  # error of a row's sums, relative to their sum of magnitudes


class DirectGradients(NamedTuple):
    d_query: Floats
    d_key: Floats
    d_value: Floats
    bound_query: Floats
    bound_key: Floats
    bound_value: Floats


def direct(query, key, value, *, scale=1.0, allowed=None, keep=None, kept=1.0, tiles=1) -> Direct:
    """Return attention of (n_q, d), (n_k, d), (n_k, d_v); an empty row is 0."""
    n_q, n_k, d_v = len(query), len(key), value.shape[1]
    rows = np.ones((n_q, n_k), bool) if allowed is None else np.broadcast_to(allowed, (n_q, n_k))
    O, bound = np.zeros((n_q, d_v), np.longdouble), np.zeros((n_q, d_v), np.longdouble)
    m, l = np.full(n_q, -np.inf, np.longdouble), np.zeros(n_q, np.longdouble)
    relative = np.zeros(n_q, np.longdouble)
    for i in range(n_q):
        seen = np.flatnonzero(rows[i])
        if len(seen) == 0:
            continue
        K, V = key[seen].astype(np.longdouble), value[seen].astype(np.longdouble)
        s = np.longdouble(scale) * (K @ query[i].astype(np.longdouble))
        m[i] = s.max()
        e = np.exp(s - m[i])
        l[i] = e.sum()
        p = e / l[i] * (1 if keep is None else keep[i, seen] / np.longdouble(kept))
        O[i] = p @ V
        relative[i] = _relative(query[i], K, scale, n_k, tiles)
        bound[i] = relative[i] * (p @ np.abs(V)) + 1e-300
    with np.errstate(divide="ignore"):
        return Direct(O, m, l, m + np.log(l), bound, relative)


def assert_output(output: Floats, expected: Direct) -> None:
    """Check an output against the definition, within what rounding may do."""
    error = np.abs(output - expected.output)
    worst = np.unravel_index(np.argmax(error - expected.bound), error.shape)
    assert (error <= expected.bound).all(), (worst, error[worst], expected.bound[worst])


def assert_statistics(row_max: Floats, row_sum: Floats, expected: Direct) -> None:
    """Check m and l: a logit is off by less than `relative`, a sum by that share of itself."""
    empty = np.isneginf(expected.row_max)
    np.testing.assert_array_equal(np.isneginf(row_max), empty)
    error = np.abs(row_max[~empty] - expected.row_max[~empty])
    assert (error <= expected.relative[~empty]).all()
    assert (np.abs(row_sum - expected.row_sum) <= expected.relative * expected.row_sum).all()


def assert_logsumexp(logsumexp: Floats, expected: Direct) -> None:
    """Check L = m + ln l, itself rounded."""
    empty = np.isneginf(expected.logsumexp)
    np.testing.assert_array_equal(np.isneginf(logsumexp), empty)
    exact = expected.logsumexp[~empty]
    bound = 2 * expected.relative[~empty] + np.finfo(np.float64).eps * np.abs(exact)
    assert (np.abs(logsumexp[~empty] - exact) <= bound).all()


def direct_gradients(
    d_output, query, key, value, *, scale=1.0, allowed=None, keep=None, kept=1.0, tiles=1
) -> DirectGradients:
    """Return the gradients of `direct` by the Jacobian diag(p) - p pᵀ of each row."""
    n_q, n_k = len(query), len(key)
    rows = np.ones((n_q, n_k), bool) if allowed is None else np.broadcast_to(allowed, (n_q, n_k))
    shapes = (query.shape, key.shape, value.shape)
    dQ, dK, dV = (np.zeros(s, np.longdouble) for s in shapes)
    bQ, bK, bV = (np.full(s, 1e-300, np.longdouble) for s in shapes)
    for i in range(n_q):
        seen = np.flatnonzero(rows[i])
        if len(seen) == 0:
            continue
        K, V = key[seen].astype(np.longdouble), value[seen].astype(np.longdouble)
        q, g = query[i].astype(np.longdouble), d_output[i].astype(np.longdouble)
        tau = np.longdouble(scale)
        s = tau * (K @ q)
        e = np.exp(s - s.max())
        p = e / e.sum()
        z = np.ones(len(seen)) if keep is None else keep[i, seen] / np.longdouble(kept)
        dp = z * (V @ g)
        jacobian = np.diag(p) - np.outer(p, p)
        ds = jacobian @ dp
        size = p * (z * (np.abs(V) @ np.abs(g)) + p @ (z * (np.abs(V) @ np.abs(g))))
        factor = 4 * _relative(query[i], K, scale, n_k + n_q + value.shape[1], tiles)
        dQ[i] = tau * (ds @ K)
        dK[seen] += tau * np.outer(ds, q)
        dV[seen] += np.outer(p * z, g)
        bQ[i] += factor * np.abs(tau) * (size @ np.abs(K))
        bK[seen] += factor * np.abs(tau) * np.outer(size, np.abs(q))
        bV[seen] += factor * np.outer(p * z, np.abs(g))
    return DirectGradients(dQ, dK, dV, bQ, bK, bV)


def _relative(q: Floats, K: Floats, scale: float, n: int, tiles: int) -> np.longdouble:
    """Return the relative error of a weighted sum of one row, to first order in the unit roundoff.

    A logit is off by (d + 2) u Σ|q k|, its difference to the maximum by twice that and one more
    rounding of it; the sums over n keys and the rescaling at each tile add the rest.
    """
    u = np.finfo(np.float64).eps / 2
    largest = (abs(scale) * (np.abs(K) @ np.abs(q.astype(np.longdouble)))).max()
    return np.longdouble(2 * u * ((2 * len(q) + 6) * largest + n + 10 * tiles + 20))


def tiles_of(n: int, size: int) -> int:
    return -(-n // size)
