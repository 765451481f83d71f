"""The causal self-attention module of GPT, line by line: one fused projection, a buffer, heads.

It is multi-head attention under the decoder's mask, written as the modules of GPT write it, so that
a reader can hold the two side by side: every line says what it does to the shape.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from refattn.arrays import Array, array_namespace, dtype_name, narrow, widen
from refattn.checks import (
    DtypeError,
    OptionError,
    ShapeError,
    check_arrays,
    check_computable,
    check_counts,
    check_floats,
    check_memory,
    check_positive,
    check_shapes,
    describe,
    given,
)
from refattn.dropout import drop_weights
from refattn.options import check_matrices
from refattn.projections import merge_heads, split_heads
from refattn.softmax import softmax_rows
from refattn.tiles import product_over_allowed


class FusedHeads(NamedTuple):
    """Queries, keys and values of every head, cut out of one fused projection."""

    q: Array
    k: Array
    v: Array


@np.errstate(all="ignore")  # IEEE values travel silently, whatever the array library
def causal_self_attention(
    x: Array,
    w_qkv: Array,
    b_qkv: Array | None = None,
    w_output: Array | None = None,
    b_output: Array | None = None,
    *,
    heads: int,
    block_size: int,
    keep: Array | None = None,
    keep_probability: float = 1.0,
    output_keep: Array | None = None,
    output_keep_probability: float = 1.0,
) -> Array:
    """Return the output of a GPT's causal self-attention module.

    Spec: GPT-MODULE1, GPT-BUFFER1, GPT-DROPOUT1, OWN-POISON1, OWN-ROUND1, OWN-MEMORY1.

        [Q K V] = x W_qkv + b_qkv,  P_h = softmax(mask(Q_h K_hᵀ / √(C/h))),  Y_h = P_h V_h
        output = Concat(Y_1, ..., Y_h) W_o + b_o

    Args:
        x: (B, T, C), T tokens of C features.
        w_qkv: W_qkv (C, 3C): the columns of all queries, then of all keys, then of all values.
        b_qkv: (3C,); none if None.
        w_output: W_o (C, C); the merged heads are returned as they are if None.
        b_output: (C,); none if None.
        heads: h, a divisor of C.
        block_size: the longest sequence that the buffer serves, tokens.
        keep: bool (B, h, T, T), dropout of the weights, True = keep.
        keep_probability: the weights kept are divided by it.
        output_keep: bool (B, T, C), dropout of the output, True = keep.
        output_keep_probability: the features kept are divided by it.

    Returns:
        (B, T, C), dtype of x.

    Raises:
        ShapeError: two shapes do not fit, or the sequence is longer than block_size.
        DtypeError: a dtype is not floating, or two differ, or a keep mask is not bool.
        OptionError: a number is outside its range.
        MemoryLimitError: the T x T matrices or the buffer do not fit into the free memory.
    """
    weights = {"w_qkv": w_qkv, "b_qkv": b_qkv, "w_output": w_output, "b_output": b_output}
    chances = {"keep": keep_probability, "output_keep": output_keep_probability}
    masks = {"keep": keep, "output_keep": output_keep}
    check_module("causal_self_attention", x, weights, heads, block_size, masks, chances)
    xp = array_namespace(x)
    T, C = x.shape[-2:]
    bias = causal_buffer(block_size, like=x)  # (1, 1, block_size, block_size)
    q, k, v = fused_heads(x, w_qkv, b_qkv, heads)  # each (B, h, T, C/h)
    att = q @ xp.matrix_transpose(k)  # (B, h, T, C/h) @ (B, h, C/h, T) -> (B, h, T, T)
    att = att * (1.0 / math.sqrt(C // heads))
    allowed = bias[:, :, :T, :T] != 0  # (1, 1, T, T): the corner of the buffer that T tokens use
    att = xp.where(allowed, att, xp.full_like(att, -math.inf))  # masked fill
    allowed = xp.broadcast_to(allowed, att.shape)
    att = softmax_rows(att, allowed).weights  # (B, h, T, T), rows sum to 1
    att = drop_weights(att, keep, float(keep_probability))
    y = product_over_allowed(att, v, allowed)  # (B, h, T, T) @ (B, h, T, C/h) -> (B, h, T, C/h)
    y = merge_heads(y)  # transpose to (B, T, h, C/h), then one view to (B, T, C)
    if w_output is not None:
        y = add_bias(y @ widen(w_output), b_output)  # (B, T, C) @ (C, C) -> (B, T, C)
    y = drop_weights(y, output_keep, float(output_keep_probability))
    return narrow(y, x)


def causal_buffer(block_size: int, *, like: Array) -> Array:
    """Return the module's buffer: ones in the lower triangle, zeros above it.

    Spec: GPT-BUFFER1, OWN-MEMORY1.

        buffer[0, 0, i, j] = 1 for j ≤ i, else 0

    Args:
        block_size: the longest sequence, tokens.
        like: an array of the library and the computing dtype of the result.

    Returns:
        (1, 1, block_size, block_size).

    Raises:
        OptionError: block_size is no integer of at least 1.
        MemoryLimitError: the buffer does not fit into the free memory.
    """
    (block_size,) = check_counts("causal_buffer", block_size=block_size)
    check_memory("causal_buffer", (block_size, block_size), itemsize=8, arrays=2)
    xp = array_namespace(like)
    ones = xp.ones((block_size, block_size), dtype=widen(like).dtype)
    return xp.reshape(xp.tril(ones), (1, 1, block_size, block_size))


def fused_heads(x: Array, w_qkv: Array, b_qkv: Array | None, heads: int) -> FusedHeads:
    """Return queries, keys and values of every head from one product, in the computing dtype.

    Spec: GPT-MODULE1, VAS-S322b.

    Args:
        x: (B, T, C).
        w_qkv: W_qkv (C, 3C).
        b_qkv: (3C,) or None.
        heads: h.

    Returns:
        q, k, v, each (B, h, T, C/h).
    """
    C = x.shape[-1]
    qkv = add_bias(widen(x) @ widen(w_qkv), b_qkv)  # (B, T, C) @ (C, 3C) -> (B, T, 3C)
    parts = qkv[..., :C], qkv[..., C : 2 * C], qkv[..., 2 * C :]  # split: three times (B, T, C)
    # view each as (B, T, h, C/h), then transpose rows and heads to (B, h, T, C/h)
    return FusedHeads(*(split_heads(part, heads) for part in parts))


def add_bias(y: Array, bias: Array | None) -> Array:
    """Return y + bias, or y where there is no bias; the bias is widened to y's dtype."""
    return y if bias is None else y + widen(bias)


def check_module(
    function: str,
    x: Array,
    weights: dict[str, Array | None],
    heads: int,
    block_size: int,
    masks: dict[str, Array | None],
    chances: dict[str, float],
    d_output: Array | None = None,
) -> None:
    """Check every shape, dtype and number.

    Raises:
        ShapeError, DtypeError, OptionError, MemoryLimitError: an argument is refused.
    """
    sizes = check_shapes(
        function,
        x=(x, "B T C"),
        w_qkv=(weights["w_qkv"], "C columns"),
        b_qkv=(weights["b_qkv"], "columns or None"),
        w_output=(weights["w_output"], "C C or None"),
        b_output=(weights["b_output"], "C or None"),
        d_output=(d_output, "B T C or None"),
    )
    T, C = sizes["T"], sizes["C"]
    heads, block_size = check_counts(function, heads=heads, block_size=block_size)
    where = describe(function, {"x": x, "w_qkv": weights["w_qkv"]})
    if sizes["columns"] != 3 * C:
        raise ShapeError(
            f"w_qkv has {sizes['columns']} columns, but x has C={C}; the first must be three "
            f"times the second {where}"
        )
    if C % heads or C == 0:
        raise ShapeError(
            f"x has C={C} features, but heads is {heads}; the first must be a multiple of the "
            f"second, and not 0 {where}"
        )
    if not 1 <= T <= block_size:
        raise ShapeError(
            f"x has T={T} tokens, but block_size is {block_size}; the first must be at least 1 and "
            f"at most the second {where}"
        )
    if weights["w_output"] is None and weights["b_output"] is not None:
        raise OptionError(
            f"b_output is given, but w_output is None; a bias needs its projection {where}"
        )
    check_floats(function, x=x, **given(**weights, d_output=d_output))
    check_matrices(function, x, {"n_q": T * heads, "n_k": T})
    shapes = {"keep": (x.shape[0], heads, T, T), "output_keep": (x.shape[0], T, C)}
    for name, shape in shapes.items():
        _check_keep(function, x, name, masks[name], chances[name], shape)


def _check_keep(
    function: str, x: Array, name: str, keep: Array | None, chance: Any, shape: tuple[int, ...]
) -> None:
    """Check one keep mask and its probability."""
    check_positive(function, **{f"{name}_probability": chance})
    check_computable(function, x, **{f"{name}_probability": chance})
    if chance > 1 or (keep is None and chance != 1):
        raise OptionError(
            f"{name}_probability is {chance}, but it must be at most 1, and 1 without {name} "
            f"[{function}]"
        )
    if keep is None:
        return
    check_arrays(function, x=x, **{name: keep})
    if dtype_name(keep) not in ("bool", "bool_"):
        raise DtypeError(
            f"{name} has dtype {keep.dtype}, but it must be bool, True = keep [{function}]"
        )
    if tuple(keep.shape) != shape:
        raise ShapeError(
            f"{name} has shape {tuple(keep.shape)}, but it must have shape {shape} "
            f"{describe(function, {'x': x})}"
        )
