"""Grouped heads: which key-value head a query head reads."""

from __future__ import annotations

from refattn.arrays import Array, array_namespace
from refattn.checks import ShapeError, describe

HEAD_MAPS = ("interleave", "tile")
"""Query head h reads key-value head h // g (interleave) or h mod h_k (tile) (OWN-GQA1)."""


def group_size(function: str, query: Array, key: Array) -> int:
    """Return how many query heads share one key-value head.

    Spec: OWN-GQA1.

    Raises:
        ShapeError: the number of query heads is no multiple of the key's.
    """
    if query.ndim < 3:
        return 1
    heads, key_heads = query.shape[-3], key.shape[-3]
    if key_heads == 0 or heads % key_heads:
        raise ShapeError(
            f"query has {heads} heads, but key has {key_heads}; the first must be a multiple of "
            f"the second {describe(function, {'query': query, 'key': key})}"
        )
    return int(heads // key_heads)


def expand_heads(array: Array, group: int, *, head_map: str) -> Array:
    """Repeat key-value heads so that every query head has its own.

    Spec: OWN-GQA1.

    Args:
        array: (..., h_k, n, d).
        group: g, query heads a key-value head.
        head_map: "interleave" or "tile".

    Returns:
        expanded: (..., h_k * g, n, d).
    """
    if group == 1:
        return array
    xp = array_namespace(array)
    if head_map == "interleave":
        return xp.repeat(array, group, axis=-3)
    return xp.concat([array] * group, axis=-3)


def sum_heads(array: Array, group: int, *, head_map: str) -> Array:
    """Sum the gradients of the query heads that share a key-value head.

    Spec: OWN-GQA1, OWN-BACKWARD1.

    Args:
        array: (..., h_k * g, n, d).
        group: g, query heads a key-value head.
        head_map: "interleave" or "tile".

    Returns:
        summed: (..., h_k, n, d).
    """
    if group == 1:
        return array
    xp = array_namespace(array)
    *lead, heads, n, d = array.shape
    if head_map == "interleave":
        return xp.sum(xp.reshape(array, (*lead, heads // group, group, n, d)), axis=-3)
    return xp.sum(xp.reshape(array, (*lead, group, heads // group, n, d)), axis=-4)
