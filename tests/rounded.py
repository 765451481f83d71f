"""Correct attentions in many precisions and orders, and attentions with one precision fault.

They are what the bounds are tried on: plain formulas, every rounding of a profile in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
Rounding = Callable[[Array], Array]


def same(x: Array) -> Array:
    return x


def to_half(x: Array) -> Array:
    return x.astype(np.float16).astype(x.dtype)


def to_bfloat16(x: Array) -> Array:
    return x.astype(ml_dtypes.bfloat16).astype(x.dtype)


def to_tf32(x: Array) -> Array:
    """Truncate float32 to 11 significant bits, as hardware that reads the upper bits does."""
    return (np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


class Arithmetic(NamedTuple):
    """Where a simulated implementation rounds, and how."""

    dtype: type = np.float32
    operand: Rounding = same
    result: Rounding = same
    product: Rounding = same
    exp: Callable[[Array], Array] = np.exp
    one_by_one: bool = False
    """Sum products one after another in dtype; else as NumPy's matmul does."""


ARITHMETICS = {
    "fp64": Arithmetic(np.float64),
    "fp32": Arithmetic(),
    "tf32": Arithmetic(product=to_tf32),
    "bf16": Arithmetic(operand=to_bfloat16, result=to_bfloat16),
    "fp16": Arithmetic(operand=to_half, result=to_half),
    "fp16_accumulate": Arithmetic(np.float16, one_by_one=True),
}
"""A correct arithmetic for every profile."""

FAULTS = {
    "weights in 11 bits": Arithmetic(operand=to_half),
    "weights in 8 bits": Arithmetic(operand=to_bfloat16),
    "exponential in 11 bits": Arithmetic(exp=lambda x: to_half(np.exp(to_half(x)))),
    "products in tf32": Arithmetic(product=to_tf32),
}
"""Arithmetics that a float32 implementation must not have."""


def multiply(x: Array, y: Array, a: Arithmetic) -> Array:
    x, y = a.product(x), a.product(y)
    if not a.one_by_one:
        return x @ y
    total = np.zeros((x.shape[0], y.shape[1]), a.dtype)
    for c in range(x.shape[1]):
        total = total + x[:, c : c + 1] * y[c : c + 1]
    return total


def rows_sum(x: Array, a: Arithmetic) -> Array:
    if not a.one_by_one:
        return x.sum(axis=1, keepdims=True)
    return multiply(x, np.ones((x.shape[1], 1), a.dtype), a._replace(product=same))


def attend(
    query: Array, key: Array, value: Array, a: Arithmetic, block: int = 0, reverse: bool = False
) -> tuple[Array, Array]:
    """Return output and logsumexp; block 0 is the whole row, else a running maximum by blocks."""
    Q, K, V = (x.astype(a.dtype) for x in (query, key, value))
    scale = a.dtype(1 / np.sqrt(Q.shape[1]))
    n_k = len(K)
    block = block or n_k
    m_i = np.full((len(Q), 1), -np.inf, a.dtype)
    l_i = np.zeros((len(Q), 1), a.dtype)
    O_i = np.zeros((len(Q), V.shape[1]), a.dtype)
    starts = range(0, n_k, block)
    for start in reversed(starts) if reverse else starts:
        part = slice(start, start + block)
        S_ij = multiply(Q, K[part].T, a) * scale
        m_new = np.maximum(m_i, S_ij.max(axis=1, keepdims=True))
        decay, P_ij = a.exp(m_i - m_new), a.exp(S_ij - m_new)
        l_i = l_i * decay + rows_sum(P_ij, a)
        O_i = O_i * decay + multiply(a.operand(P_ij), V[part], a)
        m_i = m_new
    return a.result(O_i / l_i), (m_i + np.log(l_i))[:, 0]


def gradients(
    d_output: Array, query: Array, key: Array, value: Array, a: Arithmetic, from_lse: bool
) -> tuple[Array, Array, Array]:
    """Return dQ, dK, dV: P from the logsumexp and D from O, or P anew and D from P ∘ dP."""
    dO, Q, K, V = (x.astype(a.dtype) for x in (d_output, query, key, value))
    scale = a.dtype(1 / np.sqrt(Q.shape[1]))
    O_i, L_i = attend(Q, K, V, a)
    S_ij = multiply(Q, K.T, a) * scale
    dP_ij = multiply(dO, V.T, a)
    if from_lse:
        P_ij = a.exp(S_ij - L_i[:, None])
        D_i = rows_sum(dO * O_i, a)
    else:
        P_tilde = a.exp(S_ij - S_ij.max(axis=1, keepdims=True))
        P_ij = P_tilde / rows_sum(P_tilde, a)
        D_i = rows_sum(P_ij * dP_ij, a)
    dS_ij = a.operand(P_ij * (dP_ij - D_i))
    dV = multiply(a.operand(P_ij).T, dO, a)
    dQ, dK = multiply(dS_ij, K, a) * scale, multiply(dS_ij.T, Q, a) * scale
    return a.result(dQ), a.result(dK), a.result(dV)


FAMILIES = (
    "unit",
    "normal",
    "spread",
    "rising",
    "falling",
    "negative",
    "outliers",
    "ties",
    "cancel",
)
"""Kinds of inputs."""


def draw(family: str, n_q: int, n_k: int, d_k: int, d_v: int, seed: int) -> tuple[Array, ...]:
    """Return query, key, value and d_output, each exact in every format (8 significant bits)."""
    r = np.random.default_rng(seed)
    Q, K, V, dO = (r.standard_normal(s) for s in ((n_q, d_k), (n_k, d_k), (n_k, d_v), (n_q, d_v)))
    if family == "unit":
        Q, K, V = (r.random(x.shape) for x in (Q, K, V))
    if family == "spread":
        Q, K = 4 * Q, 4 * K
    if family in ("rising", "falling"):
        Q, K = Q / 8, K / 8
        Q[:, 0], K[:, 0] = 2, np.linspace(0, 24, n_k)[:: 1 if family == "rising" else -1]
    if family == "negative":
        Q, K = 3 + r.random(Q.shape), -3 - r.random(K.shape)
    if family == "outliers":
        Q, K = Q * (1 + 29 * (r.random(d_k) < 0.1)), K + 8 * (r.random(K.shape) < 0.02)
    if family == "ties":
        K, V = np.repeat(K[:1], n_k, axis=0), V[np.arange(n_k) % 3]
    if family == "cancel":
        K[1::2], V[1::2] = K[: n_k // 2 * 2 : 2], -V[: n_k // 2 * 2 : 2]
    return tuple(to_bfloat16(np.asarray(x, np.float32)) for x in (Q, K, V, dO))
