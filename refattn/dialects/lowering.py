"""Calls that broadcast, share heads and name a mask or a bias by its dtype, in our own terms.

Frameworks take more shapes than the reference does: this file turns a call of theirs into one
attention of ours, and the gradients back into the shapes that came.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refattn.arrays import Array, dtype_name, narrow, widen
from refattn.attention import attention
from refattn.attention_backward import attention_backward, sum_to
from refattn.checks import (
    DtypeError,
    OptionError,
    ShapeError,
    check_arrays,
    check_finite,
    check_flag,
    check_floats,
    check_shapes,
    describe,
    given,
    shown,
)
from refattn.grouped import expand_heads, group_size, sum_heads
from refattn.options import AttentionOptions

FUNCTION = "scaled_dot_product_attention"
"""The name in error sentences."""


class Lowered(NamedTuple):
    """A call in the reference's terms: operands broadcast, heads repeated, dtypes widened."""

    Q: Array
    K: Array
    V: Array
    options: AttentionOptions
    given: tuple[Array, Array, Array]
    """query, key and value as they came."""
    groups: tuple[int, int]
    """How many query heads share a head of key, and of value."""
    mask_like: Array | None
    """The float mask as it came."""


class LoweredGradients(NamedTuple):
    """Gradients in the order of the inputs; d_attn_mask is None where no float mask was given."""

    d_query: Array
    d_key: Array
    d_value: Array
    d_attn_mask: Array | None


def lower(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    keep: Array | None = None,
    *,
    empty_row: str = "zero",
) -> Lowered:
    """Return a call as operands and options of the reference's attention.

    Spec: OWN-BATCH1, OWN-GQA1, OWN-MASK1, OWN-BIAS1, OWN-DROPOUT1.

    Args:
        query: (..., n_q, d_k); leading axes broadcast, and d_k may be 0.
        key: (..., n_k, d_k); n_k may be 0.
        value: (..., n_k, d_v).
        attn_mask: bool, True = attend, or float, added to the logits; (..., n_q, n_k).
        dropout_p: chance that a weight is dropped; one that is negative drops nothing.
        is_causal: whether a query sees keys up to its own row only.
        scale: factor of the logits; 1/√d_k if None.
        enable_gqa: whether heads of key, and of value, are shared by groups of query heads.
        keep: bool, (..., n_q, n_k), the weights that dropout keeps.
        empty_row: `zero`, `nan` or `uniform`.

    Raises:
        ShapeError, DtypeError, OptionError: an argument is refused.
    """
    arrays = {"query": query, "key": key, "value": value}
    sizes = check_shapes(
        FUNCTION,
        query=(query, "... n_q d_k"),
        key=(key, "... n_k d_k"),
        value=(value, "... n_k d_v"),
    )
    check_floats(FUNCTION, **arrays)
    check_flag(FUNCTION, is_causal=is_causal, enable_gqa=enable_gqa)
    groups = _groups(query, key, value) if enable_gqa else (1, 1)
    Q, K, V = (
        expand_heads(widen(array), group, head_map="interleave")
        for array, group in zip((query, key, value), (1, *groups), strict=True)
    )
    logits = (*_broadcast("key", Q, K), sizes["n_q"], sizes["n_k"])
    options: AttentionOptions = {
        "scale": scale, "causal": is_causal, "empty_row": empty_row, "masked": "add"
    }  # fmt: skip
    options |= _mask_options(query, Q, attn_mask, logits)
    options |= _dropout_options(dropout_p, keep, logits)
    if empty_row == "nan" and "keep" in options and "bias" in options:
        # dropping is multiplying by 0, and a weight that is NaN stays NaN
        empty = np.all(options["bias"] == -np.inf, axis=-1, keepdims=True)
        options["keep"] = options["keep"] | empty
    if sizes["d_k"] == 0:  # an empty sum is 0, as is the product of one feature that is 0
        check_finite(FUNCTION, **given(scale=scale))
        Q, K = (np.zeros((*a.shape[:-1], 1), dtype=a.dtype) for a in (Q, K))
    batch = _broadcast("value", Q, K, V)
    Q, K, V = (np.broadcast_to(a, (*batch, *a.shape[-2:])) for a in (Q, K, V))
    mask_like = attn_mask if "bias" in options else None
    return Lowered(Q, K, V, options, (query, key, value), groups, mask_like)


def attend(problem: Lowered) -> Array:
    """Return the output of a lowered call, in query's dtype."""
    Q, K, V, query = problem.Q, problem.K, problem.V, problem.given[0]
    if K.shape[-2] == 0:
        return np.zeros((*Q.shape[:-1], V.shape[-1]), dtype=query.dtype)
    return narrow(attention(Q, K, V, **problem.options).output, query)


def attend_backward(problem: Lowered, d_output: Array) -> LoweredGradients:
    """Return the gradients of a lowered call, summed over what was broadcast or shared.

    Raises:
        ShapeError, DtypeError: d_output has not the shape and dtype of the output.
    """
    query = problem.given[0]
    operands = (problem.Q, problem.K, problem.V)
    check_arrays(FUNCTION, d_output=d_output)
    expected = (*problem.Q.shape[:-1], problem.V.shape[-1])
    if tuple(d_output.shape) != expected:
        raise ShapeError(
            f"d_output has shape {tuple(d_output.shape)}, but the output has {expected}; they must "
            f"be equal [{FUNCTION}]"
        )
    check_floats(FUNCTION, query=query, d_output=d_output)
    mask_like = problem.mask_like
    if problem.K.shape[-2] == 0:
        dQ, dK, dV = (np.zeros_like(array) for array in problem.given)
        return LoweredGradients(dQ, dK, dV, None if mask_like is None else np.zeros_like(mask_like))
    *found, d_bias, _, _ = attention_backward(widen(d_output), *operands, **problem.options)
    by_operand = []
    for gradient, array, group in zip(found, problem.given, (1, *problem.groups), strict=True):
        *lead, n, d = array.shape
        shared = (*lead[:-1], lead[-1] * group, n, d) if lead else (n, d)
        gradient = sum_to(gradient[..., :d], shared, np)
        by_operand.append(narrow(sum_heads(gradient, group, head_map="interleave"), array))
    if d_bias is not None and mask_like is not None:
        d_bias = narrow(d_bias, mask_like)
    dQ, dK, dV = by_operand
    return LoweredGradients(dQ, dK, dV, d_bias)


def _groups(query: Array, key: Array, value: Array) -> tuple[int, int]:
    """Return how many query heads share a head of key, and of value; the two may differ."""
    if min(query.ndim, key.ndim, value.ndim) < 3:
        raise ShapeError(
            f"query has {query.ndim} axes, but enable_gqa needs the 3 of (h, n, d) in all operands "
            f"{describe(FUNCTION, {'query': query, 'key': key, 'value': value})}"
        )
    return group_size(FUNCTION, query, key), group_size(FUNCTION, query, value)


def _broadcast(name: str, *arrays: Array) -> tuple[int, ...]:
    """Return the leading axes that arrays broadcast to; `name` is the last of them."""
    leads = [tuple(array.shape[:-2]) for array in arrays]
    try:
        return np.broadcast_shapes(*leads)
    except ValueError:
        raise ShapeError(
            f"{name} has leading axes {leads[-1]}, but those before have {leads[:-1]}; they must "
            f"broadcast [{FUNCTION}]"
        ) from None


def _mask_options(
    query: Array, Q: Array, mask: Array | None, logits: tuple[int, ...]
) -> AttentionOptions:
    if mask is None:
        return {}
    check_mask_dtype(query, mask)
    _check_fits("attn_mask", mask, logits)
    return {"mask": mask} if mask.dtype == bool else {"bias": mask.astype(Q.dtype)}


def check_mask_dtype(query: Array, mask: Array | None) -> None:
    """Check that a mask is bool, float32, or of query's dtype.

    Raises:
        DtypeError: it is not.
    """
    if mask is None:
        return
    check_arrays(FUNCTION, query=query, attn_mask=mask)
    name = dtype_name(mask)
    if name not in ("bool", "bool_", "float32", dtype_name(query)):
        raise DtypeError(
            f"attn_mask has dtype {name}, but it must be bool, float32 or that of query, "
            f"{dtype_name(query)} [{FUNCTION}]"
        )


def _dropout_options(
    dropout_p: float, keep: Array | None, logits: tuple[int, ...]
) -> AttentionOptions:
    if dropout_p > 1:
        raise OptionError(
            f"dropout_p is {shown(dropout_p)}, but it must be from 0 to 1 [{FUNCTION}]"
        )
    if dropout_p == 1:
        return {"keep": np.zeros(logits, dtype=bool)}
    if (keep is not None) != (dropout_p > 0):
        raise OptionError(
            f"dropout_p is {shown(dropout_p)}, but keep is "
            f"{'absent' if keep is None else 'given'}; dropout needs its keep mask, and a keep "
            f"mask its dropout [{FUNCTION}]"
        )
    if keep is None:
        return {}
    check_arrays(FUNCTION, keep=keep)
    _check_fits("keep", keep, logits)
    return {"keep": keep, "keep_probability": 1 - dropout_p}


def _check_fits(name: str, array: Any, logits: tuple[int, ...]) -> None:
    shape = tuple(array.shape)
    pairs = zip(reversed(shape), reversed(logits), strict=False)
    if len(shape) > len(logits) or any(a not in (1, b) for a, b in pairs):
        raise ShapeError(
            f"{name} has shape {shape}, but the logits have {logits}; the first must broadcast to "
            f"the second [{FUNCTION}]"
        )
