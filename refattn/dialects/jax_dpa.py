"""JAX's dot_product_attention (implementation xla), stated over the reference's attention.

JAX puts one large finite number in the place of every logit that a rule forbids, so that a row
without any logit left attends to the forbidden keys, all alike (`jax_dpa_call.fall_back`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refattn.arrays import Array, narrow, widen
from refattn.attention import attention
from refattn.attention_backward import attention_backward, sum_to
from refattn.checks import ShapeError, check_floats, check_option
from refattn.dialects.conventions import Dialect
from refattn.dialects.jax_dpa_call import FUNCTION, four, lower, spilled

IMPLEMENTATIONS = ("xla",)
"""Implementations that are stated here; None names the first."""

LARGE_NEGATIVE = float(np.float32(-0.7 * float(np.finfo(np.float32).max)))
"""The logit of a forbidden cell: the logsumexp of a row that has no other."""

DIALECT = Dialect(
    name="jax_dpa_0_10",
    alias="jax_dpa",
    system="JAX",
    version="0.10 (xla, CPU)",
    sentence="jax.nn.dot_product_attention.",
    functions=(
        "refattn.dialects.jax_dpa.dot_product_attention",
        "refattn.dialects.jax_dpa.dot_product_attention_backward",
    ),
    conventions={
        "argument_order": "query key value",
        "layout": "length heads features",
        "batch_axes": "equal",
        "projections": "none",
        "default_scale": "1/sqrt(d_k)",
        "causal_alignment": "top_left",
        "mask_polarity": "True attends",
        "float_mask": {"mask": "refused", "bias": "added"},
        "integer_mask": {"mask": "refused", "bias": "added"},
        "mask_with_causal": "and",
        "masked_cell": {"key": "select", "value": "add"},
        "empty_row": {"mask": "uniform", "bias of -∞": "nan", "query_seq_lengths": "zero"},
        "no_keys": "zero",
        "head_map": "interleave",
        "window": "inclusive",
        "softcap": "none",
        "sinks": "none",
        "dropout": "none",
        "returned_weights": "none",
        "weights_over_heads": "none",
        "softmax_dtype": "float32",
    },
    exceptions=(
        "float64: JAX takes the softmax in float32 whatever the inputs are; here it is in their "
        "own computing dtype, so that the two differ by what float32 rounds off.",
        "scale not finite, or an array: JAX computes with it; refused here.",
        "one key beside a mask or bias of more keys: JAX repeats the key; refused here.",
        "gradients where an operand is not finite: JAX multiplies forbidden cells by 0, which "
        "gives NaN; here they are not read.",
        "implementation cudnn: it needs a device; refused here.",
    ),
)
"""What jax 0.10 does on a CPU."""


class JaxGradients(NamedTuple):
    """Gradients in the order of the inputs; d_bias is None where no bias was given."""

    d_query: Array
    d_key: Array
    d_value: Array
    d_bias: Array | None


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    """Return what JAX's function of this name returns.

    Spec: VAS-EQ1, OWN-SCALE1, OWN-MASK1, OWN-BIAS1, OWN-CAUSAL1, OWN-WINDOW1, OWN-LENGTH1,
        OWN-GQA1, OWN-EMPTY1, OWN-POISON1, OWN-LSE1, OWN-ROUND2.

        O = attention(Q, K, V; mask and bias, causal from the top left, empty rows fall back)

    Args:
        query: (b, n_q, h, d); axes that lead may be left out.
        key: (b, n_k, h_k, d).
        value: (b, n_k, h_k, d).
        bias: numbers of any dtype, added to the logits; broadcastable to (b, h, n_q, n_k).
        mask: bool, True = attend; likewise.
        scale: factor of the logits; 1/√d if None.
        is_causal: whether a query sees keys up to its own row only.
        query_seq_lengths: (b,), int32: rows of query beyond are zero.
        key_value_seq_lengths: (b,), int32: rows of key and value beyond are forbidden.
        local_window_size: tokens (left, right), or one number for both, both ends inclusive.
        implementation: `xla` or None.
        return_residual: whether the logsumexp is returned, too.

    Returns:
        output: shape and dtype of query.
        residual: with `return_residual` only: the logsumexp, (b, n_q, h), in the same dtype.

    Raises:
        ShapeError, DtypeError, OptionError: where JAX errs, and for the named exceptions.
    """
    check_option(FUNCTION, "implementation", implementation or "xla", IMPLEMENTATIONS)
    lengths = (query_seq_lengths, key_value_seq_lengths)
    call = lower(query, key, value, bias, mask, scale, is_causal, lengths, local_window_size)
    if call is None:
        output = np.zeros_like(query)
        return (output, np.full_like(query[..., 0], -np.inf)) if return_residual else output
    result = attention(call.Q, call.K, call.V, **call.options)
    output = np.where(spilled(call), np.nan, result.output) * call.answered
    output = narrow(output.swapaxes(1, 2).reshape(query.shape), query)
    if not return_residual:
        return output
    logsumexp = np.where(call.fallen[..., 0], LARGE_NEGATIVE, result.logsumexp)
    with np.errstate(over="ignore"):
        residual = narrow(logsumexp.swapaxes(1, 2).reshape(query.shape[:-1]), query)
    return output, residual


def dot_product_attention_backward(
    d_output: Array,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
) -> JaxGradients:
    """Return the gradients that jax.grad gives for `dot_product_attention`.

    Spec: OWN-BACKWARD1, OWN-GQA1, OWN-EMPTY1, OWN-LENGTH1.

    Args:
        d_output: dO, shape and dtype of the output.
        query: as in the forward call, and so on; no gradient passes through the residual.
        key: as in the forward call.
        value: as in the forward call.
        bias: as in the forward call.
        mask: as in the forward call.
        scale: as in the forward call.
        is_causal: as in the forward call.
        query_seq_lengths: as in the forward call.
        key_value_seq_lengths: as in the forward call.
        local_window_size: as in the forward call.
        implementation: as in the forward call.

    Returns:
        The gradients, each with the shape and dtype of what it belongs to.

    Raises:
        ShapeError, DtypeError, OptionError: as the forward call, or d_output does not fit.
    """
    check_option(FUNCTION, "implementation", implementation or "xla", IMPLEMENTATIONS)
    lengths = (query_seq_lengths, key_value_seq_lengths)
    call = lower(query, key, value, bias, mask, scale, is_causal, lengths, local_window_size)
    check_floats(FUNCTION, query=query, d_output=d_output)
    if d_output.shape != query.shape:
        raise ShapeError(
            f"d_output has shape {d_output.shape}, but the output has {query.shape}; they must be "
            f"equal [{FUNCTION}]"
        )
    if call is None:
        dQ, dK, dV = (np.zeros_like(array) for array in (query, key, value))
        return JaxGradients(dQ, dK, dV, None if bias is None else np.zeros_like(bias))
    dO = np.where(call.answered, widen(four(d_output)).swapaxes(1, 2), 0)
    found = attention_backward(dO, call.Q, call.K, call.V, **call.options)
    dQ = np.where(call.fallen, 0, found.d_query)
    dQ, dK, dV = (
        narrow(gradient.swapaxes(1, 2).reshape(array.shape), array)
        for gradient, array in ((dQ, query), (found.d_key, key), (found.d_value, value))
    )
    if bias is None or found.d_bias is None:
        return JaxGradients(dQ, dK, dV, None)
    d_bias = sum_to(np.where(call.fallen, 0, found.d_bias), bias.shape, np)
    return JaxGradients(dQ, dK, dV, d_bias.astype(bias.dtype))
