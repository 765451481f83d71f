"""Multi-head attention: projections to heads, attention in each, concatenation, one projection.

Queries come from one sequence and keys and values from another, or from the same one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.attention import attention
from refattn.attention_backward import attention_backward
from refattn.checks import check_floats, check_shapes
from refattn.options import AttentionOptions
from refattn.projections import merge_heads, pack_output, split_heads


class MultiheadGradients(NamedTuple):
    """Gradients in the order of the inputs; d_head_gates is None where no gates were given."""

    d_query_input: Array
    d_source_input: Array
    d_w_query: Array
    d_w_key: Array
    d_w_value: Array
    d_w_output: Array
    d_head_gates: Array | None


class Projected(NamedTuple):
    """Queries, keys and values of every head."""

    Q: Array
    K: Array
    V: Array


@np.errstate(all="ignore")  # IEEE values travel silently, whatever the array library
def multihead_attention(
    query_input: Array,
    source_input: Array,
    w_query: Array,
    w_key: Array,
    w_value: Array,
    w_output: Array,
    *,
    head_gates: Array | None = None,
    scale: float | None = None,
    causal: bool = False,
    alignment: str | int = "top_left",
    empty_row: str = "zero",
) -> Array:
    """Return multi-head attention of the query sequence over the source sequence.

    Spec: VAS-S322a, VAS-S323a, VAS-S323b, HEADS-S23, OWN-SCALE1, OWN-ROUND1.

        head_h = Attention(X W^Q_h, Y W^K_h, Y W^V_h)
        MultiHead = Concat(ξ_1 head_1, ..., ξ_h head_h) W^O

    Self-attention: pass one sequence twice. The decoder's self-attention: also causal=True.

    Args:
        query_input: X (b, n_q, e_q).
        source_input: Y (b, n_k, e_s), where keys and values come from.
        w_query: W^Q (h, e_q, d_k).
        w_key: W^K (h, e_s, d_k).
        w_value: W^V (h, e_s, d_v).
        w_output: W^O by heads (h, d_v, e_o); see `unpack_output`.
        head_gates: ξ (h,), 1 keeps a head, 0 masks it; all 1 if None.
        scale: factor of the logits; None is 1/√d_k.
        causal: whether a query sees keys up to its own position only.
        alignment: `top_left`, `bottom_right` or the offset of the queries.
        empty_row: `zero`, `nan` or `uniform`: what a row without an allowed key returns.

    Returns:
        (b, n_q, e_o), dtype of query_input.

    Raises:
        ShapeError: two shapes do not fit.
        DtypeError: a dtype is not floating, or two differ.
        OptionError: an option is refused.
    """
    weights = {"w_query": w_query, "w_key": w_key, "w_value": w_value, "w_output": w_output}
    _contract("multihead_attention", query_input, source_input, weights, head_gates)
    heads = project(query_input, source_input, w_query, w_key, w_value)
    options: AttentionOptions = {
        "scale": scale, "causal": causal, "alignment": alignment, "empty_row": empty_row
    }  # fmt: skip
    output = attention(*heads, **options).output
    gated = output if head_gates is None else _gate(head_gates) * output
    return narrow(merge_heads(gated) @ pack_output(widen(w_output)), query_input)


@np.errstate(all="ignore")
def multihead_attention_backward(
    d_output: Array,
    query_input: Array,
    source_input: Array,
    w_query: Array,
    w_key: Array,
    w_value: Array,
    w_output: Array,
    *,
    head_gates: Array | None = None,
    scale: float | None = None,
    causal: bool = False,
    alignment: str | int = "top_left",
    empty_row: str = "zero",
) -> MultiheadGradients:
    """Return the gradients of multi-head attention.

    Spec: VAS-S322a, VAS-S323a, VAS-S323b, HEADS-S23, OWN-BACKWARD1, OWN-ROUND1.

        dC = split(dO W^Oᵀ),   dW^O_h = Σ_b (ξ_h head_h)ᵀ dO,   dξ_h = Σ_bik dC ∘ head_h
        dQ, dK, dV of attention at d_head_h = ξ_h dC_h
        dX = Σ_h dQ_h W^Q_hᵀ,  dY = Σ_h dK_h W^K_hᵀ + dV_h W^V_hᵀ,  dW^Q_h = Σ_b Xᵀ dQ_h, ...

    Args:
        d_output: dO (b, n_q, e_o).
        query_input: as for `multihead_attention`, and so on.
        source_input: as for `multihead_attention`.
        w_query: as for `multihead_attention`.
        w_key: as for `multihead_attention`.
        w_value: as for `multihead_attention`.
        w_output: as for `multihead_attention`.
        head_gates: as for `multihead_attention`.
        scale: as for `multihead_attention`.
        causal: as for `multihead_attention`.
        alignment: as for `multihead_attention`.
        empty_row: as for `multihead_attention`.

    Returns:
        The gradients, each with the shape and dtype of what it belongs to.

    Raises:
        ShapeError: two shapes do not fit.
        DtypeError: a dtype is not floating, or two differ.
        OptionError: an option is refused.
    """
    function = "multihead_attention_backward"
    weights = {"w_query": w_query, "w_key": w_key, "w_value": w_value, "w_output": w_output}
    _contract(function, query_input, source_input, weights, head_gates, d_output)
    xp = array_namespace(query_input)
    X, Y, dO = widen(query_input), widen(source_input), widen(d_output)
    W_Q, W_K, W_V, W_O = (widen(w) for w in weights.values())
    heads = project(X, Y, W_Q, W_K, W_V)
    options: AttentionOptions = {
        "scale": scale, "causal": causal, "alignment": alignment, "empty_row": empty_row
    }  # fmt: skip
    head = attention(*heads, **options).output
    xi = _gate(xp.ones(w_query.shape[0], dtype=X.dtype) if head_gates is None else head_gates)
    dC = split_heads(dO @ pack_output(W_O).T, w_query.shape[0])
    dQ, dK, dV, *_ = attention_backward(xi * dC, *heads, **options)
    gradients = MultiheadGradients(
        d_query_input=_from_heads(dQ, W_Q),
        d_source_input=_from_heads(dK, W_K) + _from_heads(dV, W_V),
        d_w_query=_to_weight(X, dQ),
        d_w_key=_to_weight(Y, dK),
        d_w_value=_to_weight(Y, dV),
        d_w_output=_to_output_weight(xi * head, dO),
        d_head_gates=None if head_gates is None else xp.sum(dC * head, axis=(0, 2, 3)),
    )
    return MultiheadGradients(*(None if g is None else narrow(g, query_input) for g in gradients))


def project(
    query_input: Array, source_input: Array, w_query: Array, w_key: Array, w_value: Array
) -> Projected:
    """Return the queries, keys and values of every head, in the computing dtype.

    Spec: VAS-S322a, VAS-S323a.

        Q_h = X W^Q_h,  K_h = Y W^K_h,  V_h = Y W^V_h

    Args:
        query_input: X (b, n_q, e_q).
        source_input: Y (b, n_k, e_s).
        w_query: W^Q (h, e_q, d_k).
        w_key: W^K (h, e_s, d_k).
        w_value: W^V (h, e_s, d_v).

    Returns:
        Q (b, h, n_q, d_k), K (b, h, n_k, d_k), V (b, h, n_k, d_v).
    """
    X, Y = widen(query_input)[:, None, :, :], widen(source_input)[:, None, :, :]
    return Projected(X @ widen(w_query), Y @ widen(w_key), Y @ widen(w_value))


def _contract(
    function: str,
    query_input: Array,
    source_input: Array,
    weights: dict[str, Array],
    head_gates: Array | None,
    d_output: Array | None = None,
) -> None:
    """Check every shape and dtype."""
    shapes = {
        "w_query": "h e_q d_k", "w_key": "h e_s d_k", "w_value": "h e_s d_v",
        "w_output": "h d_v e_o",
    }  # fmt: skip
    check_shapes(
        function,
        query_input=(query_input, "b n_q e_q"),
        source_input=(source_input, "b n_k e_s"),
        **{name: (weights[name], shape) for name, shape in shapes.items()},
        head_gates=(head_gates, "h"),
        d_output=(d_output, "b n_q e_o"),
    )
    arrays = {"query_input": query_input, "source_input": source_input, **weights}
    check_floats(function, **arrays, head_gates=head_gates, d_output=d_output)


def _gate(head_gates: Array) -> Array:
    """Return the gates as a factor of (b, h, n, d), in the computing dtype."""
    return widen(head_gates)[None, :, None, None]


def _from_heads(d_projected: Array, weight: Array) -> Array:
    """Return Σ_h dZ_h W_hᵀ (b, n, e) from dZ (b, h, n, d) and W (h, e, d)."""
    xp = array_namespace(d_projected)
    return xp.sum(d_projected @ xp.matrix_transpose(weight), axis=1)


def _to_weight(x: Array, d_projected: Array) -> Array:
    """Return Σ_b Xᵀ dZ_h (h, e, d) from X (b, n, e) and dZ (b, h, n, d)."""
    xp = array_namespace(x)
    return xp.sum(xp.matrix_transpose(x)[:, None, :, :] @ d_projected, axis=0)


def _to_output_weight(head: Array, d_output: Array) -> Array:
    """Return Σ_b head_hᵀ dO (h, d_v, e) from head (b, h, n, d_v) and dO (b, n, e)."""
    xp = array_namespace(head)
    return xp.sum(xp.matrix_transpose(head) @ d_output[:, None, :, :], axis=0)
