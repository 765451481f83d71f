"""Gradients of attention under any combination of options, every stage read back in turn."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, Unpack

import numpy as np

from refattn.arrays import Array, narrow, widen
from refattn.attention import (
    linear_bias,
    multiply_readable,
    pair_distances,
    scaled_logits,
    select_readable,
    weigh,
)
from refattn.checks import check_floats, check_shapes
from refattn.dropout import drop_weights
from refattn.grouped import sum_heads
from refattn.options import AttentionOptions, Problem, resolve


class AttentionGradients(NamedTuple):
    """Gradients of a scalar loss in the order of the inputs; None where an input was absent."""

    d_query: Array
    d_key: Array
    d_value: Array
    d_bias: Array | None
    d_slopes: Array | None
    d_sinks: Array | None


@np.errstate(all="ignore")
def attention_backward(
    d_output: Array,
    query: Array,
    key: Array,
    value: Array,
    *,
    d_logsumexp: Array | None = None,
    **options: Unpack[AttentionOptions],
) -> AttentionGradients:
    """Return the gradients of a loss that reads the output and the logsumexp.

    Spec: OWN-BACKWARD1, FA1-ALG3, OWN-GQA1, OWN-SINK1, OWN-EMPTY1, OWN-DROPOUT1, OWN-POISON1.

        dV = P_droppedᵀ dO,  dP = (dO Vᵀ) ∘ keep / keep_probability
        D_i = Σ_j P_ij dP_ij,  dS = P ∘ (dP - D + dL),  d_sink = Σ_i P_sink (dL - D)_i
        dQ = scale · dS_raw K,  dK = scale · dS_rawᵀ Q,  dS_raw = dS ∘ softcap′

    Args:
        d_output: dO, (..., h, n_q, d_v).
        query: Q, (..., h, n_q, d_k).
        key: K, (..., h_k, n_k, d_k).
        value: V, (..., h_k, n_k, d_v).
        d_logsumexp: dL, (..., h, n_q), query's dtype or its computing dtype; None = the loss does
            not read the logsumexp.
        **options: as in the forward call.

    Returns:
        d_query, d_key, d_value: shapes and dtypes of query, key and value.
        d_bias: shape of bias, summed over its broadcast axes.
        d_slopes, d_sinks: (h,).

    Raises:
        ShapeError, DtypeError, OptionError, MemoryLimitError: as `attention`.
    """
    problem = resolve("attention_backward", query, key, value, options)
    check_cotangents(d_output, query, value, d_logsumexp)
    xp, head_map = problem.xp, problem.options["head_map"]
    dO = widen(d_output)
    P, L = weigh(problem)
    dropped = drop_weights(P, problem.options.get("keep"), problem.options["keep_probability"])
    dV = multiply_readable(problem, dropped, dO, over="query")
    dS, D_minus_dL = _softmax_backward(problem, P, dO, d_logsumexp)
    dX, d_added = _logits_backward(problem, dS)
    through = problem
    if problem.options["empty_row"] == "uniform":  # by policy: its logits were not looked at
        through = replace(problem, readable=problem.allowed)
    dQ = multiply_readable(through, dX, problem.K) * problem.scale
    dK = multiply_readable(through, dX, problem.Q, over="query") * problem.scale
    d_slopes = d_sinks = d_bias = None
    if problem.bias is not None:
        d_bias = narrow(sum_to(d_added, problem.bias.shape, xp), query)
    if problem.slopes is not None:
        d_slopes = narrow(_sum_to_heads(d_added * pair_distances(problem), 2, xp), query)
    if problem.sinks is not None:
        P_sink = xp.exp(problem.sinks[:, None] - L)
        d_sinks = narrow(_sum_to_heads(-P_sink * D_minus_dL, 1, xp), query)
    return AttentionGradients(
        narrow(dQ, query),
        narrow(sum_heads(dK, problem.group, head_map=head_map), key),
        narrow(sum_heads(dV, problem.group, head_map=head_map), value),
        d_bias,
        d_slopes,
        d_sinks,
    )


def check_cotangents(
    d_output: Array, query: Array, value: Array, d_logsumexp: Array | None
) -> None:
    """Check that the cotangents have the shapes and the dtype of what they belong to.

    Raises:
        ShapeError, DtypeError: they do not.
    """
    lead = " ".join(str(n) for n in query.shape[:-1])
    check_shapes(
        "attention_backward",
        d_output=(d_output, f"{lead} {value.shape[-1]}"),
        d_logsumexp=(d_logsumexp, f"{lead} or None"),
        query=(query, "... d_k"),
    )
    check_floats("attention_backward", query=query, d_output=d_output)
    if d_logsumexp is not None:
        check_floats(
            "attention_backward", widened_query=widen(query), d_logsumexp=widen(d_logsumexp)
        )


def _softmax_backward(
    problem: Problem, P: Array, dO: Array, d_logsumexp: Array | None
) -> tuple[Array, Array]:
    """Return dS and D - dL."""
    xp, options = problem.xp, problem.options
    dP = xp.matmul(dO, xp.matrix_transpose(problem.V))
    dP = select_readable(problem, dP)
    dP = drop_weights(dP, options.get("keep"), options["keep_probability"])
    D = xp.sum(P * dP, axis=-1)
    if d_logsumexp is not None:
        D = D - widen(d_logsumexp)
    dS = select_readable(problem, P * (dP - D[..., None]))
    return _stop_at_constants(problem, dS), D


def _stop_at_constants(problem: Problem, cells: Array) -> Array:
    """Return gradients of logits with 0 where P was a constant, in empty rows.

    Spec: OWN-EMPTY1, OWN-POISON1.
    """
    xp = problem.xp
    if problem.options["empty_row"] == "nan" or problem.sinks is not None:
        return cells
    empty = ~xp.any(problem.allowed, axis=-1, keepdims=True)
    return xp.where(empty, xp.zeros_like(cells), cells)


def _logits_backward(problem: Problem, dS: Array) -> tuple[Array, Array]:
    """Return the gradients with respect to scale · Q Kᵀ and to what is added to it."""
    xp, c = problem.xp, problem.options.get("softcap")
    if c is None:
        return dS, dS
    X = scaled_logits(problem)
    after = problem.options["softcap_order"] == "after_bias"
    added = linear_bias(problem)
    if after and added is not None:
        X = X + added
    # forward was S = c·tanh(X/c), so now dX = dS (1 - tanh²(X/c))
    slope = 1.0 - xp.tanh(X / c) ** 2
    dX = _stop_at_constants(problem, select_readable(problem, dS * slope))
    return dX, (dX if after else dS)


def sum_to(array: Array, shape: tuple[int, ...], xp: object) -> Array:
    """Sum over the axes along which an array of that shape was broadcast."""
    extra = array.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(
        extra + a for a, n in enumerate(shape) if n == 1 and array.shape[extra + a] != 1
    )
    summed = xp.sum(array, axis=axes, keepdims=True) if axes else array  # type: ignore[attr-defined]
    return xp.reshape(summed, shape)  # type: ignore[attr-defined]


def _sum_to_heads(array: Array, trailing: int, xp: object) -> Array:
    """Sum over all axes but the head axis, which stands `trailing` axes before the end."""
    head = array.ndim - trailing - 1
    axes = tuple(a for a in range(array.ndim) if a != head)
    return xp.sum(array, axis=axes)  # type: ignore[attr-defined]
