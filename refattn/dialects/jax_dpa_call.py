"""A call of JAX's dot_product_attention, checked and turned into one attention of ours."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refattn.arrays import Array, widen
from refattn.attention import attention
from refattn.checks import (
    DtypeError,
    OptionError,
    ShapeError,
    check_arrays,
    check_floats,
    check_shapes,
    given,
    is_integer,
    shown,
)
from refattn.grouped import group_size
from refattn.masks import allowed_pairs, length_mask
from refattn.options import AttentionOptions

FUNCTION = "dot_product_attention"
"""The name in error sentences."""


class Call(NamedTuple):
    """A call in the reference's terms, (b, h, n, d), and what JAX changes on either side of it."""

    Q: Array
    K: Array
    V: Array
    options: AttentionOptions
    fallen: Array
    """(b, h, n_q, 1): rows whose logits are all forbidden, and so are constants."""
    answered: Array
    """(b, 1, n_q, 1): rows within the query lengths; any other is multiplied by 0."""


def lower(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    scale: float | None,
    is_causal: bool,
    lengths: tuple[Array | None, Array | None],
    local_window_size: Any,
) -> Call | None:
    """Return a call in the reference's terms; None where there is nothing to attend to.

    Raises:
        ShapeError, DtypeError, OptionError: an argument is refused.
    """
    arrays = {"query": query, "key": key, "value": value}
    check_arrays(FUNCTION, **arrays, **given(bias=bias, mask=mask))
    query, key, value = (four(array) for array in arrays.values())
    sizes = check_shapes(
        FUNCTION,
        query=(query, "b n_q h d"),
        key=(key, "b n_k h_k d"),
        value=(value, "b n_k h_k d"),
        query_seq_lengths=(lengths[0], "b or None"),
        key_value_seq_lengths=(lengths[1], "b or None"),
    )
    check_floats(FUNCTION, query=query, key=key, value=value)
    Q, K, V = (widen(array).swapaxes(1, 2) for array in (query, key, value))
    group_size(FUNCTION, Q, K)
    logits = (*Q.shape[:-1], sizes["n_k"])
    for name, array in given(mask=mask, bias=bias).items():
        _check_fits(name, array, logits)
    queries, keys = (_clipped(n, a) for n, a in zip(logits[2:], lengths, strict=True))
    allowed = allowed_pairs(
        *logits[2:],
        causal=bool(is_causal),
        window=_window(local_window_size),
        mask=mask,
        query_lengths=queries,
        key_lengths=keys,
    )
    if query.size == 0 or key.size == 0:
        return None
    options: AttentionOptions = {"scale": scale, "empty_row": "nan", "round_weights": True}
    Q, found, fallen = fall_back(Q, np.broadcast_to(allowed, logits), bias)
    rows = np.ones((1, logits[2]), bool) if queries is None else length_mask(logits[2], queries)
    return Call(Q, K, V, options | found, fallen, rows[:, None, :, None])


def fall_back(Q: Array, allowed: Array, bias: Array | None) -> tuple[Array, Any, Array]:
    """Return Q, mask and bias that give JAX's weights, and the rows that fall back.

    A row without a logit left, masked or -∞, attends to its forbidden keys, all alike: a query of
    0 does so under the mask turned round. Where no key is forbidden, a bias of -∞ gives NaN.
    """
    if bias is None:
        fallen = ~allowed.any(axis=-1, keepdims=True)
        return np.where(fallen, 0, Q), {"mask": allowed | fallen}, fallen
    B = np.broadcast_to(bias.astype(Q.dtype), allowed.shape)
    left = (allowed & (B != -np.inf)).any(axis=-1, keepdims=True)
    fallen = ~left & ~allowed.all(axis=-1, keepdims=True)
    mask, B = np.where(fallen, ~allowed, allowed), np.where(fallen, 0, B)
    return np.where(fallen, 0, Q), {"mask": mask, "bias": B}, fallen


def spilled(call: Call) -> Array:
    """Return which features of which rows are NaN by a forbidden value: 0·∞ is NaN."""
    if np.isfinite(call.V).all():
        return np.zeros((1, 1, 1, 1), bool)
    Q, K = np.zeros_like(call.Q), np.zeros_like(call.K)
    return np.isnan(attention(Q, K, call.V, mask=call.options["mask"], masked="add").output)


def four(array: Array) -> Array:
    """Return an array with leading axes of one, up to four."""
    return array[(None,) * (4 - array.ndim)]


def _check_fits(name: str, array: Array, logits: tuple[int, ...]) -> None:
    """Check a mask or a bias against the logits.

    Raises:
        DtypeError: a mask is not bool.
        ShapeError: it does not broadcast to the logits.
    """
    if name == "mask" and array.dtype != bool:
        raise DtypeError(f"mask has dtype {array.dtype}, but it must be bool [{FUNCTION}]")
    pairs = zip(reversed(array.shape), reversed(logits), strict=False)
    if array.ndim > 4 or any(a not in (1, b) for a, b in pairs):
        raise ShapeError(
            f"{name} has shape {array.shape}, but the logits have {logits}; the first must "
            f"broadcast to the second [{FUNCTION}]"
        )


def _clipped(n: int, lengths: Array | None) -> Array | None:
    """Return lengths within 0 and n: JAX only compares positions with them.

    Raises:
        DtypeError: they are not int32.
    """
    if lengths is None:
        return None
    if lengths.dtype != np.int32:
        raise DtypeError(f"lengths have dtype {lengths.dtype}, but it must be int32 [{FUNCTION}]")
    return np.clip(lengths, 0, n)


def _window(size: Any) -> tuple[int, int] | None:
    """Return both ends of a window.

    Raises:
        OptionError: it is neither one integer nor two.
    """
    if size is None:
        return None
    ends = (int(size), int(size)) if isinstance(size, int) else size
    if not isinstance(ends, (tuple, list)) or len(ends) != 2 or not all(map(is_integer, ends)):
        raise OptionError(
            f"local_window_size is {shown(size)}, but it must be one integer or two [{FUNCTION}]"
        )
    return ends[0], ends[1]
