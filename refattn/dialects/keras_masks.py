"""Keras's masks: those of query, value and key, causal ones and windows, merged by NumPy's rules.

Keras broadcasts while it merges, and brings the result to the scores' axes afterwards; both steps
are stated as they are, for they decide which masks fit.
"""

from __future__ import annotations

import math

import numpy as np

from refattn.arrays import Array
from refattn.checks import ShapeError, check_arrays, given


def merged(
    function: str,
    query: Array,
    value: Array,
    masks: dict[str, Array | None],
    *,
    causal: bool,
    window: int | None = None,
) -> Array | None:
    """Return the masks of query, value and key, causal and window, as one; None if there is none.

    Spec: OWN-MASK1, OWN-CAUSAL1, OWN-WINDOW1.

        mask_ij = query_mask_i ∧ value_mask_j ∧ key_mask_j ∧ (j ≤ i) ∧ (|i - j| < window)

    Args:
        function: the name in error sentences.
        query: (b, n_q, ...); only its shape is read.
        value: (b, n_k, ...), likewise.
        masks: `query_mask`, (b, n_q), `value_mask` and `key_mask`, (b, n_k); what is not 0 attends.
        causal: whether query i sees keys up to i only.
        window: how far a key must be away to be forbidden, tokens; None = no window.

    Raises:
        ShapeError, DtypeError: a mask is no array, or two do not broadcast.
    """
    present = given(**masks)
    if present:
        check_arrays(function, **present)
    i, j = np.arange(query.shape[1])[:, None], np.arange(value.shape[1])
    found = None
    for name, mask in present.items():
        if mask.ndim == 0:
            raise ShapeError(f"{name} has 0 axes, but it must have 2, (b, n) [{function}]")
        rows = np.expand_dims(mask != 0, -1 if name == "query_mask" else -2)
        found = both(function, name, found, rows)
    if causal:
        found = both(function, "use_causal_mask", found, (j <= i)[None])
    if window is not None:
        found = both(function, "sliding_window", found, (np.abs(i - j) < window)[None])
    return found


def both(function: str, name: str, one: Array | None, other: Array) -> Array:
    """Return the conjunction of two masks, broadcast.

    Spec: OWN-MASK1.

    Raises:
        ShapeError: they do not broadcast.
    """
    if one is None:
        return other
    try:
        return one & other
    except ValueError:
        raise ShapeError(
            f"{name} makes a mask of shape {other.shape}, but the other masks make one of "
            f"{one.shape}; they must broadcast [{function}]"
        ) from None


def spread(
    function: str,
    name: str,
    mask: Array | None,
    lead: tuple[int, ...],
    queries: tuple[int, ...],
    keys: tuple[int, ...],
) -> Array | None:
    """Return a mask over the scores, its missing axes in place, attended axes as one of each.

    Spec: OWN-MASK1, OWN-AXES1.

    Args:
        function: the name in error sentences.
        name: the mask's.
        mask: axes of the scores from the right; missing ones stand before those of the queries.
        lead: the scores' axes of batch and heads.
        queries: the scores' axes of queries.
        keys: the scores' axes of keys.

    Returns:
        mask: (..., n_q, n_k), or None where there is none.

    Raises:
        ShapeError: it does not fit.
    """
    if mask is None:
        return None
    check_arrays(function, **{name: mask})
    k, scores = 2 * len(queries), (*lead, *queries, *keys)
    shape = tuple(mask.shape)
    missing = len(scores) - len(shape)
    # missing axes go where Keras puts them: one by one before the axes of queries and keys
    full = (*shape[: max(len(shape) - k, 0)], *(1,) * missing, *shape[max(len(shape) - k, 0) :])
    fits = all(a in (1, b) for a, b in zip(full, scores, strict=False))
    if missing < 0 or (missing and len(shape) < k) or not fits:
        raise ShapeError(
            f"{name} has shape {shape}, but the scores have {scores}; the first must broadcast to "
            f"the second, with all axes of queries and keys [{function}]"
        )
    mask = np.broadcast_to(np.reshape(mask, full), (*full[:-k], *queries, *keys))
    return np.reshape(mask, (*full[:-k], math.prod(queries), math.prod(keys)))
