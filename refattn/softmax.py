"""The row-wise softmax over allowed keys, with sinks, empty rows and the logsumexp."""

from __future__ import annotations

from typing import NamedTuple

from refattn.arrays import Array, array_namespace

EMPTY_ROWS = ("zero", "nan", "uniform")
"""What a row without an allowed key returns (OWN-EMPTY1)."""


class SoftmaxRows(NamedTuple):
    """Weights of every row and the logarithm of its denominator."""

    weights: Array
    logsumexp: Array


def softmax_rows(
    logits: Array,
    allowed: Array,
    *,
    sinks: Array | None = None,
    empty_row: str = "zero",
) -> SoftmaxRows:
    """Return the softmax over the allowed keys of each row.

    Spec: FA1-S22, OWN-EMPTY1, OWN-LSE1, OWN-SINK1.

        m_i = max_j S_ij,  P_ij = exp(S_ij - m_i) / ℓ_i
        ℓ_i = Σ_j exp(S_ij - m_i) + exp(sink_h - m_i),  L_i = m_i + ln ℓ_i

    Args:
        logits: S, (..., n_q, n_k), logits; -∞ in the cells that may not be attended.
        allowed: bool, the same shape: a row without a True is empty unless it has a sink.
        sinks: (h,), logits, one a head (axis -3), in the denominator only.
        empty_row: "zero", "nan" or "uniform": weights of an empty row.

    Returns:
        weights: P, (..., n_q, n_k).
        logsumexp: L, (..., n_q), nats; -∞ for an empty row.
    """
    xp = array_namespace(logits)
    S = logits
    m = xp.max(S, axis=-1, keepdims=True)
    empty = ~xp.any(allowed, axis=-1, keepdims=True)
    if sinks is not None:
        sink = xp.broadcast_to(xp.reshape(sinks, (-1, 1, 1)), m.shape)
        m = xp.maximum(m, sink)
        empty = xp.zeros_like(empty)
    # the maximum of an empty row is -∞, and -∞ - (-∞) is no number: shift such a row by nothing
    shift = xp.where(empty, xp.zeros_like(m), m)
    P_tilde = xp.exp(S - shift)
    row_sum = xp.sum(P_tilde, axis=-1, keepdims=True)
    if sinks is not None:
        row_sum = row_sum + xp.exp(sink - shift)
    L = xp.where(empty, xp.full_like(m, -float("inf")), shift + xp.log(row_sum))
    P = P_tilde / xp.where(empty, xp.ones_like(row_sum), row_sum)
    fill = {"zero": 0.0, "nan": float("nan"), "uniform": 1.0 / S.shape[-1]}[empty_row]
    P = xp.where(empty, xp.full_like(P, fill), P)
    return SoftmaxRows(P, xp.squeeze(L, axis=-1))
