"""Which query may attend which key: causal alignment, windows, lengths, given masks.

A query row i stands at position p_i = i + offset, a key row j at position j; every rule of this
file is a comparison of these two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refattn.arrays import Array
from refattn.checks import (
    OptionError,
    ShapeError,
    check_arrays,
    check_counts,
    check_memory,
    is_array,
    is_integer,
    shown,
)

ALIGNMENTS = ("top_left", "bottom_right")
"""Named alignments; an integer offset, or one a batch item, is the general form."""

FARTHEST = 2**62
"""Tokens: no offset and no window reaches farther, so that no sum of two leaves int64."""


def position_offset(
    function: str,
    n_q: int,
    n_k: int,
    *,
    alignment: Any = "top_left",
    query_lengths: Array | None = None,
    key_lengths: Array | None = None,
    xp: Any = np,
) -> Any:
    """Return the offset of the query positions, an integer or one a batch item.

    Spec: OWN-CAUSAL1, OWN-CACHE1, OWN-LENGTH1.

        p_i = i + offset;  top_left: 0;  bottom_right: n_k - n_q

    Args:
        function: name of the caller, for the error sentence.
        n_q: number of query rows.
        n_k: number of key rows.
        alignment: "top_left", "bottom_right", an offset in tokens, or (b,) offsets.
        query_lengths: (b,), valid query rows of each item; bottom_right then uses them.
        key_lengths: (b,), valid key rows of each item; likewise.
        xp: array library of the result.

    Returns:
        offset: an int, or (b, 1, 1, 1) int64, tokens.

    Raises:
        OptionError: alignment is neither a name nor integers, or an offset is beyond `FARTHEST`.
    """
    if isinstance(alignment, str):
        if alignment == "top_left":
            return 0
        if alignment == "bottom_right":
            # lengths may be unsigned, and their difference negative
            keys, queries = (
                n if lengths is None else xp.astype(lengths, xp.int64)
                for n, lengths in ((n_k, key_lengths), (n_q, query_lengths))
            )
            offset = keys - queries
            return offset if isinstance(offset, int) else xp.reshape(offset, (-1, 1, 1, 1))
    elif is_integer(alignment):
        _check_near(function, alignment, [alignment])
        return int(alignment)
    elif is_array(alignment):
        if alignment.ndim == 1 and xp.isdtype(alignment.dtype, "integral"):
            ends = [xp.min(alignment), xp.max(alignment)] if alignment.shape[0] else []
            _check_near(function, alignment, ends)
            return xp.reshape(xp.astype(alignment, xp.int64), (-1, 1, 1, 1))
    elif isinstance(alignment, Sequence) and all(map(is_integer, alignment)):
        _check_near(function, alignment, alignment)
        return xp.reshape(xp.asarray(list(alignment), dtype=xp.int64), (-1, 1, 1, 1))
    raise OptionError(
        f"alignment is {shown(alignment)}, but it must be {', '.join(ALIGNMENTS)}, an integer "
        f"offset or a list of integer offsets [{function}]"
    )


def _check_near(function: str, alignment: Any, offsets: Sequence[Any]) -> None:
    if any(abs(int(offset)) > FARTHEST for offset in offsets):
        raise OptionError(
            f"alignment is {shown(alignment)}, but no offset may be beyond 2^62 tokens [{function}]"
        )


def relative_positions(n_q: int, n_k: int, *, offset: Any = 0, xp: Any = np) -> Array:
    """Return how far each key stands ahead of each query.

    Spec: OWN-CAUSAL1.

        r_ij = j - p_i = j - (i + offset)

    Args:
        n_q: number of query rows.
        n_k: number of key rows.
        offset: an int, or (b, 1, 1, 1) integers, tokens.
        xp: array library of the result.

    Returns:
        relative: r, (n_q, n_k) or (b, 1, n_q, n_k), int64, tokens; negative is the past.
    """
    i = xp.arange(n_q, dtype=xp.int64)[:, None]
    j = xp.arange(n_k, dtype=xp.int64)[None, :]
    return j - (i + offset)


def causal_mask(
    n_q: int, n_k: int, *, alignment: str | int | Sequence[int] = "top_left", xp: Any = np
) -> Array:
    """Return the decoder's mask: a query sees the keys up to its own position.

    Spec: VAS-S323b, OWN-CAUSAL1, OWN-MEMORY1.

        allowed_ij = j ≤ p_i

    Args:
        n_q: number of query rows.
        n_k: number of key rows.
        alignment: where the diagonal starts; see `position_offset`.
        xp: array library of the result.

    Returns:
        allowed: (n_q, n_k) or (b, 1, n_q, n_k), bool, True = attend.

    Raises:
        OptionError: a number of rows is no integer of at least 0, or alignment is neither a name
            nor integers.
        MemoryLimitError: the positions of the pairs do not fit into the free memory.
    """
    n_q, n_k = check_counts("causal_mask", least=0, n_q=n_q, n_k=n_k)
    offset = position_offset("causal_mask", n_q, n_k, alignment=alignment, xp=xp)
    items = [] if isinstance(offset, int) else offset.shape[:1]
    check_memory("causal_mask", (*items, n_q, n_k), itemsize=8, arrays=2)
    return relative_positions(n_q, n_k, offset=offset, xp=xp) <= 0


def window_mask(
    relative: Array, window: tuple[int | None, int | None] | Sequence[int | None], *, xp: Any = np
) -> Array:
    """Return the band of keys around each query; both ends are inclusive.

    Spec: OWN-WINDOW1.

        allowed_ij = p_i - left ≤ j ≤ p_i + right

    Args:
        relative: r, (..., n_q, n_k), of `relative_positions`.
        window: (left, right), tokens, None = unbounded on that side.
        xp: array library of the arrays.

    Returns:
        allowed: (..., n_q, n_k), bool.
    """
    left, right = window
    allowed = xp.ones(relative.shape, dtype=xp.bool)
    if left is not None:
        allowed = allowed & (relative >= -left)
    if right is not None:
        allowed = allowed & (relative <= right)
    return allowed


def length_mask(n: int, lengths: Array, *, xp: Any = np) -> Array:
    """Return which of n rows are valid in each batch item.

    Spec: OWN-LENGTH1.

    Args:
        n: number of rows.
        lengths: (b,), integers.
        xp: array library of the arrays.

    Returns:
        valid: (b, n), bool.
    """
    return xp.arange(n, dtype=xp.int64)[None, :] < xp.astype(lengths, xp.int64)[:, None]


def allowed_pairs(
    n_q: int,
    n_k: int,
    *,
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    query_lengths: Array | None = None,
    key_lengths: Array | None = None,
    offset: Any = 0,
    xp: Any = np,
) -> Array:
    """Return the conjunction of every rule that forbids a pair.

    Spec: OWN-MASK1, OWN-BIAS1, OWN-LENGTH1, OWN-WINDOW1, VAS-S323b.

        allowed = mask ∧ (bias ≠ -∞) ∧ causal ∧ window ∧ (j < key length) ∧ (i < query length)

    Args:
        n_q: number of query rows.
        n_k: number of key rows.
        causal: whether the future is forbidden.
        window: (left, right), tokens, None = unbounded.
        mask: bool, broadcastable to (b, h, n_q, n_k), True = attend.
        bias: float, likewise; a cell that holds -∞ is forbidden.
        query_lengths: (b,), valid query rows.
        key_lengths: (b,), valid key rows.
        offset: of the query positions; see `position_offset`.
        xp: array library of the result.

    Returns:
        allowed: bool, broadcastable to (b, h, n_q, n_k), True = attend.
    """
    relative = relative_positions(n_q, n_k, offset=offset, xp=xp)
    allowed = xp.ones((n_q, n_k), dtype=xp.bool)
    if causal:
        allowed = allowed & (relative <= 0)
    if window is not None:
        allowed = allowed & window_mask(relative, window, xp=xp)
    if mask is not None:
        allowed = allowed & mask
    if bias is not None:
        allowed = allowed & (bias != -float("inf"))
    if key_lengths is not None:
        allowed = allowed & length_mask(n_k, key_lengths, xp=xp)[:, None, None, :]
    if query_lengths is not None:
        allowed = allowed & length_mask(n_q, query_lengths, xp=xp)[:, None, :, None]
    return allowed


def check_window(
    function: str, window: Sequence[int | None] | None
) -> tuple[int | None, ...] | None:
    """Return a window as two counts of tokens in Python's integers, or None where there is none.

    Raises:
        OptionError: it is not two counts, or one is negative or beyond `FARTHEST`.
    """
    if window is None:
        return None
    ends = tuple(window) if isinstance(window, Sequence) else ()
    if len(ends) != 2 or not all(
        end is None or (is_integer(end) and 0 <= end <= FARTHEST) for end in ends
    ):
        raise OptionError(
            f"window is {shown(window)}, but it must be (left, right), each None or a count of "
            f"tokens from 0 to 2^62 [{function}]"
        )
    return tuple(None if end is None else int(end) for end in ends)


def check_lengths(
    function: str, name: str, lengths: Array | None, batch: int, n: int, xp: Any
) -> None:
    """Check that lengths are integers from 0 to n, one a batch item.

    Raises:
        ShapeError: their number is not the batch's.
        DtypeError: lengths is no array.
        OptionError: a length is outside 0..n, or not an integer.
    """
    if lengths is None:
        return
    check_arrays(function, **{name: lengths})
    if tuple(lengths.shape) != (batch,):
        raise ShapeError(
            f"{name} has shape {tuple(lengths.shape)}, but the batch has {batch} items; "
            f"they must be equal [{function}]"
        )
    if not xp.isdtype(lengths.dtype, "integral"):
        raise OptionError(f"{name} has dtype {lengths.dtype}, but it must be integral [{function}]")
    low, high = (int(xp.min(lengths)), int(xp.max(lengths))) if batch else (0, 0)
    if low < 0 or high > n:
        raise OptionError(
            f"{name} reaches from {low} to {high}, but it must stay within 0 and {n} [{function}]"
        )
