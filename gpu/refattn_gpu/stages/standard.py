"""Standard attention, materialised: what tiles are measured against."""

from __future__ import annotations

from typing import Any

from refattn.arrays import Array


def standard_attention(
    xp: Any, query: Array, key: Array, value: Array, causal: bool = False
) -> Array:
    """Return attention by whole matrices in the memory of the device.

    Spec: FA1-ALG0.

        S = Q Kᵀ / √d;  P = softmax(S);  O = P V

    Args:
        xp: CuPy, or NumPy.
        query: Q, (b, h, n, d).
        key: K, likewise.
        value: V, likewise.
        causal: whether a query sees the keys up to its own position only.

    Returns:
        output: O, (b, h, n, d).
    """
    S = xp.matmul(query, key.swapaxes(-1, -2))
    S *= S.dtype.type(query.shape[-1] ** -0.5)
    if causal:
        n_q, n_k = S.shape[-2:]
        S[..., xp.arange(n_k)[None, :] > xp.arange(n_q)[:, None]] = -xp.inf
    S -= S.max(axis=-1, keepdims=True)
    P = xp.exp(S, out=S)
    P /= P.sum(axis=-1, keepdims=True)
    return xp.matmul(P, value)
