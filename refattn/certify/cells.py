"""Cells of the attention matrix in float64: positions, distances, and which cells are allowed.

The direct formulas of the conventions, for the error units only; certified values do not use them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = Mapping[str, NDArray[Any]]


def finite(x: NDArray[Any] | None) -> NDArray[np.float64] | None:
    """Return x in float64 with 0 for NaN and infinities: a unit is finite whatever is poisoned."""
    if x is None:
        return None
    wide = np.asarray(x, np.float64)
    return np.where(np.isfinite(wide), wide, 0.0)


def key_head(h: int, heads: int, key_heads: int, conventions: Mapping[str, Any]) -> int:
    """Return the key-value head that query head h reads."""
    if conventions.get("head_map", "interleave") == "tile":
        return h % key_heads
    return h // (heads // key_heads)


def offset_of(b: int, n_q: int, n_k: int, inputs: Tensors, conventions: Mapping[str, Any]) -> int:
    """Return the position of query 0 of batch item b."""
    alignment = conventions.get("alignment", "top_left")
    if alignment == "top_left":
        return 0
    if alignment == "bottom_right":
        keys = int(inputs["key_lengths"][b]) if "key_lengths" in inputs else n_k
        queries = int(inputs["query_lengths"][b]) if "query_lengths" in inputs else n_q
        return keys - queries
    return int(alignment[b]) if isinstance(alignment, list | tuple) else int(alignment)


def distance_of(offset: int, n_q: int, n_k: int, form: str) -> NDArray[np.float64]:
    """Return what a slope multiplies, with its sign: -|p_i - j|, j - p_i, or j."""
    p_i = np.arange(n_q, dtype=np.float64)[:, None] + offset
    j = np.arange(n_k, dtype=np.float64)[None, :]
    if form == "column":
        return np.broadcast_to(j, (n_q, n_k))
    return j - p_i if form == "signed" else -np.abs(p_i - j)


def cell_of(x: NDArray[Any] | None, b: int, h: int, n_q: int, n_k: int) -> NDArray[Any] | None:
    """Return the (n_q, n_k) matrix of a mask or bias that broadcasts to (b, h, n_q, n_k)."""
    if x is None:
        return None
    shape = (1,) * (4 - x.ndim) + x.shape
    x = x.reshape(shape)
    matrix = x[b if shape[0] > 1 else 0, h if shape[1] > 1 else 0]
    return np.broadcast_to(matrix, (n_q, n_k))


def allowed_cells(
    b: int,
    h: int,
    n_q: int,
    n_k: int,
    inputs: Tensors,
    parameters: Mapping[str, Any],
    conventions: Mapping[str, Any],
) -> NDArray[np.bool_]:
    """Return which cells of one head are allowed."""
    p_i = np.arange(n_q)[:, None] + offset_of(b, n_q, n_k, inputs, conventions)
    j = np.arange(n_k)[None, :]
    A = np.ones((n_q, n_k), bool)
    if parameters.get("causal", False):
        A &= j <= p_i
    left, right = parameters.get("window") or (None, None)
    if left is not None:
        A &= j >= p_i - left
    if right is not None:
        A &= j <= p_i + right
    mask, bias = (cell_of(inputs.get(name), b, h, n_q, n_k) for name in ("mask", "bias"))
    if mask is not None:
        A &= mask
    if bias is not None:
        A &= ~np.isneginf(bias)
    if "key_lengths" in inputs:
        A &= j < int(inputs["key_lengths"][b])
    if "query_lengths" in inputs:
        A &= np.arange(n_q)[:, None] < int(inputs["query_lengths"][b])
    return A
