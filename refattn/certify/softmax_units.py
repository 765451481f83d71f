"""Majorants of a softmax and of what it weighs, with rescaling as in the tiled algorithms."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.certify.majorant import (
    EXTRA,
    FUNCTION,
    SECOND_ACCUMULATED,
    Array,
    Known,
)

MERGES = 2.0
"""Exponentials granted a cell beside those of its own chain: its own, and one merge of parts."""

NARROWEST = 16
"""Keys to one more part, and to one more rise of a maximum made by rounding alone (NUM-MODEL1)."""

RISE = 4.0
"""Rounding units of the exponential of such a rise, whose argument is nearly 0."""

TIE = 2.0**-40
"""Logits nearer than this, times 1 + |S|, count as equal, on every machine alike."""

CHUNK = 1 << 21
"""Elements of the largest temporary, (rows, n_k, d_v)."""


Cells = NDArray[np.bool_]


class Rows(NamedTuple):
    """The softmax of the rows of one head; column n_k is the sink (weight 0 without one)."""

    weights: Array
    """P, (n_q, n_k + 1)."""
    exponent: Known
    """Error of the logarithm of exp(S - m), by cell, (n_q, n_k + 1); value unused."""
    terms: Array
    """How many roundings a cell's product meets in a sum over its row, (n_q, n_k + 1)."""
    logsumexp: Known
    """(n_q,); 0 for an empty row."""
    division: Array
    """Roundings common to a row that is merged by its logsumexp, not divided by a sum, (n_q,)."""


def chain(S: Array, allowed: Cells) -> Array:
    """Return how many times a running maximum can rise after cell j, in either direction.

    The hops from j to the next strictly greater logit, from there to the next, and so on.
    """
    S = np.where(allowed, S, -np.inf)
    return np.maximum(_hops(S), _hops(S[:, ::-1])[:, ::-1])


def _hops(S: Array) -> Array:
    n_q, n_k = S.shape
    hops = np.zeros((n_q, n_k))
    row = np.arange(n_q)
    for j in range(n_k - 2, -1, -1):
        here = S[:, j : j + 1]
        level = here + TIE * (1 + np.abs(np.where(np.isfinite(here), here, 0.0)))
        greater = S[:, j + 1 :] > level
        first = np.argmax(greater, axis=1)
        hops[:, j] = np.where(greater.any(axis=1), 1 + hops[row, j + 1 + first], 0.0)
    return hops


def softmax(S: Known, allowed: Cells, sink: float | None = None, parts: int | None = None) -> Rows:
    """Return the majorants of P = softmax over the allowed cells of S, and of its logsumexp.

    A computed exp(S_ij - m) is off by the factor e^ε with |ε| ≤ u·e_ij,
    e_ij = δS_ij + 8 (2 + r_ij) + 4 (p_i - 1) + 8 (ln n_i + 1) + 4 (|S_ij| + |m_i| + |L_i|),
    r_ij from `chain`; the row is cut into p_i parts at most, and the fourth term is 0 for one key.
    """
    n_q, n_k = S.value.shape
    column = np.full((n_q, 1), 0.0 if sink is None else sink)
    A = np.concatenate([allowed, np.full((n_q, 1), sink is not None)], axis=1)
    logits = np.where(A, np.concatenate([np.where(allowed, S.value, 0.0), column], axis=1), -np.inf)
    filled = A.any(axis=1)
    m_i = np.where(filled, logits.max(axis=1, initial=-np.inf), 0.0)
    exponentials = np.exp(logits - m_i[:, None])
    l_i = np.where(filled, exponentials.sum(axis=1), 1.0)
    L_i = np.where(filled, m_i + np.log(l_i), 0.0)
    r_ij = chain(logits, A)
    sizes = np.abs(np.where(A, logits, 0.0)) + (np.abs(m_i) + np.abs(L_i))[:, None]
    n_i = A.sum(axis=1, keepdims=True)
    p_i = np.clip(n_i, 1, 2 + n_k // NARROWEST if parts is None else parts)
    logarithm = np.where(n_i > 1, FUNCTION * (np.log(np.maximum(n_i, 1)) + 1.0), 0.0)
    functions = FUNCTION * (MERGES + r_ij) + RISE * (p_i - 1) + logarithm
    pad = ((0, 0), (0, 1))
    e_ij = np.where(A, np.pad(S.accumulated, pad) + functions + 4.0 * sizes, 0.0)
    o_ij = np.where(A, np.pad(S.operand, pad), 0.0)
    P = exponentials / l_i[:, None]
    n_ij = n_i + r_ij + (p_i - 1) + EXTRA
    lse = Known(
        L_i,
        np.sum(P * (e_ij + n_ij), axis=1)
        + np.where(filled, FUNCTION * (np.abs(L_i) + np.abs(m_i) + 1.0), 0.0),
        np.sum(P * o_ij, axis=1),
    )
    return Rows(P, Known(P, e_ij, o_ij), n_ij, lse, _division(L_i, p_i[:, 0]))


def _division(L_i: Array, p_i: Array) -> Array:
    """Return the roundings of e^(-L), by which OWN-MERGE1 divides p_i parts: 0 for one part.

    That of L; its ln; p_i exponentials in its sum and as many outside; their arguments.
    """
    functions = FUNCTION * (np.log(p_i) + 1.0) + 2 * FUNCTION + 6.0 * np.log(p_i)
    return np.where(p_i > 1, np.abs(L_i) + functions, 0.0)


def uniform(rows: Rows, empty: Cells) -> Rows:
    """Fill the empty rows with weights 1/n_k that depend on no logit."""
    n_k = rows.weights.shape[1] - 1
    P = rows.weights.copy()
    P[empty, :n_k] = 1.0 / n_k
    terms = np.where(empty[:, None], n_k + EXTRA, rows.terms)
    return rows._replace(weights=P, terms=terms)


def probability(rows: Rows) -> Known:
    """Return P itself (sink column included), from the softmax or as exp(S - logsumexp)."""
    P = rows.weights
    return Known(
        P,
        P * (rows.exponent.accumulated + rows.logsumexp.accumulated[:, None] + EXTRA),
        P * (rows.exponent.operand + rows.logsumexp.operand[:, None]),
    )


def mean(rows: Rows, factor: Array, values: Known) -> Known:
    """Return O = Σ_j P_ij f_ij V_j, P rounded to the operand format beforehand and O afterwards.

    values is (n_k, d_v), or (n_q, n_k, d_v) where each row has its own. An error common to
    numerator and denominator weighs |f V_j - O|; one of the sum alone |f V_j| or |O|.
    """
    n_q, n_k = factor.shape
    V = [np.broadcast_to(x, (n_q, n_k, x.shape[-1])) for x in values]
    parts = []
    step = max(1, CHUNK // max(1, n_k * V[0].shape[-1]))
    for start in range(0, n_q, step):
        part = slice(start, start + step)
        few = _part(rows, part)
        parts.append(_mean(few, factor[part], Known(*(x[part] for x in V))))
    return Known(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def _part(rows: Rows, part: slice) -> Rows:
    e, lse = (Known(*(x[part] for x in k)) for k in (rows.exponent, rows.logsumexp))
    return Rows(rows.weights[part], e, rows.terms[part], lse, rows.division[part])


def _mean(rows: Rows, f: Array, V: Known) -> Known:
    P, P_sink = rows.weights[:, :-1], rows.weights[:, -1:]
    e, o, n = (x[:, :-1] for x in (rows.exponent.accumulated, rows.exponent.operand, rows.terms))
    O_i = _weigh(P * f, V.value)
    W = f[:, :, None] * V.value
    spread = np.abs(W - O_i[:, None, :])
    P_f, O_abs, W_abs = P * f, np.abs(O_i), np.abs(V.value)
    sink = P_sink * (rows.exponent.accumulated[:, -1:] + rows.terms[:, -1:])
    accumulated = (
        _weigh(P * e, spread)
        + _weigh(P_f * n, W_abs)
        + (np.sum(P * n, axis=1, keepdims=True) + sink + rows.division[:, None]) * O_abs
        + _weigh(P_f * (1 + SECOND_ACCUMULATED * e), V.accumulated)
    )
    operand = (
        _weigh(P * o, spread)
        + _weigh(P_f, W_abs)
        + O_abs
        + _weigh(P_f * (1 + SECOND_ACCUMULATED * e), V.operand)
    )
    return Known(O_i, accumulated, operand)


def _weigh(weights: Array, values: Array) -> Array:
    return np.asarray(np.einsum("ij,ijc->ic", weights, values, optimize=True))
