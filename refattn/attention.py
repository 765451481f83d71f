"""Scaled dot-product attention, and attention under every option that the papers leave open."""

from __future__ import annotations

from typing import NamedTuple, Unpack

import numpy as np

from refattn.alibi import distances
from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.checks import given
from refattn.dropout import drop_weights
from refattn.options import AttentionOptions, Problem, check_matrices, resolve
from refattn.softmax import SoftmaxRows, softmax_rows
from refattn.tiles import check_operands, default_scale, product_over_allowed


class AttentionResult(NamedTuple):
    """The output of attention and the logarithm of each row's denominator."""

    output: Array
    logsumexp: Array


@np.errstate(all="ignore")  # IEEE values travel silently, whatever the array library
def scaled_dot_product_attention(
    query: Array, key: Array, value: Array, *, scale: float | None = None
) -> Array:
    """Return the weighted sum of the values, the equation alone.

    Spec: VAS-EQ1, OWN-SCALE1, OWN-ROUND1, OWN-MEMORY1.

        Attention(Q, K, V) = softmax(Q Kᵀ / √d_k) V

    Args:
        query: Q, (..., n_q, d_k).
        key: K, (..., n_k, d_k).
        value: V, (..., n_k, d_v).
        scale: factor on Q Kᵀ; 1/√d_k if None.

    Returns:
        output: (..., n_q, d_v), in query's dtype.

    Raises:
        ShapeError: the feature sizes of query and key, the lengths of key and value, or leading
            axes differ, or there is no key or no feature.
        DtypeError: an argument is no array, a dtype is not floating, or two differ.
        OptionError: scale is not finite, or overflows in the computing dtype.
        MemoryLimitError: the n_q x n_k matrices do not fit into the free memory.
    """
    name = "scaled_dot_product_attention"
    sizes = check_operands(name, query, key, value, **given(scale=scale))
    check_matrices(name, query, sizes)
    xp = array_namespace(query)
    Q, K, V = widen(query), widen(key), widen(value)
    logits = xp.matmul(Q, xp.matrix_transpose(K)) * default_scale(scale, sizes["d_k"])
    exponentials = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    softmax = exponentials / xp.sum(exponentials, axis=-1, keepdims=True)
    return narrow(xp.matmul(softmax, V), query)


@np.errstate(all="ignore")
def attention(
    query: Array, key: Array, value: Array, **options: Unpack[AttentionOptions]
) -> AttentionResult:
    """Return attention under any combination of options.

    Spec: VAS-EQ1, VAS-S323b, ALIBI-S3a, ALIBI-FN10, OWN-SOFTCAP1, OWN-SINK1, OWN-EMPTY1,
        OWN-LSE1, OWN-DROPOUT1, OWN-ROUND1, OWN-ROUND2, OWN-POISON1, OWN-MEMORY1.

        S = softcap(scale · Q Kᵀ) + alibi + bias;  P = softmax over allowed keys
        O = (P ∘ keep / keep_probability) V

    Args:
        query: Q, (..., h, n_q, d_k).
        key: K, (..., h_k, n_k, d_k); h is a multiple of h_k.
        value: V, (..., h_k, n_k, d_v).
        **options: see `refattn.options.AttentionOptions`.

    Returns:
        output: O, (..., h, n_q, d_v), in query's dtype.
        logsumexp: (..., h, n_q), nats, in the computing dtype; -∞ for an empty row.

    Raises:
        ShapeError: two shapes do not fit together.
        DtypeError: an argument is no array, a dtype is not floating, or two differ, or a mask is
            not bool.
        OptionError: an option's value, or its company, is refused.
        MemoryLimitError: the n_q x n_k matrices do not fit into the free memory.
    """
    problem = resolve("attention", query, key, value, options)
    P, L = weigh(problem)
    P = drop_weights(P, problem.options.get("keep"), problem.options["keep_probability"])
    if problem.options["round_weights"]:
        P = widen(narrow(P, query))
    return AttentionResult(narrow(multiply_readable(problem, P, problem.V), query), L)


@np.errstate(all="ignore")
def attention_weights(
    query: Array, key: Array, value: Array, **options: Unpack[AttentionOptions]
) -> Array:
    """Return the weights P before dropout.

    Spec: FA1-S22, OWN-EMPTY1, OWN-SINK1.

        P_ij = exp(S_ij - L_i) for an allowed key, else 0

    Args:
        query: Q, (..., h, n_q, d_k).
        key: K, (..., h_k, n_k, d_k).
        value: V, (..., h_k, n_k, d_v); only its shape is read.
        **options: see `refattn.options.AttentionOptions`.

    Returns:
        weights: P, (..., h, n_q, n_k), in query's dtype.

    Raises:
        ShapeError, DtypeError, OptionError, MemoryLimitError: as `attention`.
    """
    problem = resolve("attention_weights", query, key, value, options)
    return narrow(weigh(problem).weights, query)


def scaled_logits(problem: Problem) -> Array:
    """Return scale · Q Kᵀ in every cell, allowed or not.

    Spec: VAS-EQ1.
    """
    xp = problem.xp
    return xp.matmul(problem.Q, xp.matrix_transpose(problem.K)) * problem.scale


def soften(problem: Problem, logits: Array) -> Array:
    """Return c·tanh(S/c), or S where there is no softcap.

    Spec: OWN-SOFTCAP1.
    """
    c = problem.options.get("softcap")
    return logits if c is None else c * problem.xp.tanh(logits / c)


def linear_bias(problem: Problem) -> Array | None:
    """Return what is added to the logits: ALiBi and the given bias, neither scaled.

    Spec: ALIBI-S3a, ALIBI-FN10, OWN-BIAS1.
    """
    total = problem.bias
    if problem.slopes is not None:
        alibi = problem.slopes[:, None, None] * pair_distances(problem)
        total = alibi if total is None else total + alibi
    return total


def pair_distances(problem: Problem) -> Array:
    """Return the distance of every pair in the form that was asked for.

    Spec: OWN-ALIBI1.
    """
    xp, n_q, n_k = problem.xp, problem.Q.shape[-2], problem.K.shape[-2]
    steps = distances(n_q, n_k, offset=problem.offset, distance=problem.options["distance"], xp=xp)
    return xp.astype(steps, problem.Q.dtype)


def weigh(problem: Problem) -> SoftmaxRows:
    """Return P and the logsumexp: the stages of the logits, the masks, the softmax.

    Spec: OWN-SOFTCAP1, OWN-MASK1, OWN-POISON1.
    """
    xp, options = problem.xp, problem.options
    added = linear_bias(problem)
    S = scaled_logits(problem)
    if options["softcap_order"] == "before_bias":
        S = soften(problem, S)
    S = S if added is None else S + added
    if options["softcap_order"] == "after_bias":
        S = soften(problem, S)
    sunk = xp.full_like(S, -float("inf"))
    if options["masked"] == "add":
        sunk = S + sunk
    S = xp.where(problem.allowed, S, sunk)
    P, L = softmax_rows(S, problem.allowed, sinks=problem.sinks, empty_row=options["empty_row"])
    return SoftmaxRows(select_readable(problem, P), L)


def select_readable(problem: Problem, cells: Array) -> Array:
    """Return cells with 0 where nothing may be read, though the row of the cell be NaN.

    Spec: OWN-POISON1.
    """
    if problem.options["masked"] == "add":
        return cells
    return problem.xp.where(problem.readable, cells, problem.xp.zeros_like(cells))


def multiply_readable(problem: Problem, cells: Array, rows: Array, *, over: str = "key") -> Array:
    """Return cells · rows, where a cell that is not readable reads nothing of its row.

    Spec: OWN-POISON1.

        out_i = Σ_j readable_ij · cells_ij rows_j   (over="key")
        out_j = Σ_i readable_ij · cells_ij rows_i   (over="query")

    Under "add" every cell is readable.
    """
    xp, readable = problem.xp, problem.readable
    if over == "query":
        cells, readable = xp.matrix_transpose(cells), xp.matrix_transpose(readable)
    if problem.options["masked"] == "add":
        return xp.matmul(cells, rows)
    return product_over_allowed(cells, rows, readable)
