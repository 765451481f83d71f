"""Heads as a sum, gates on heads, and how much each head matters.

The paper writes multi-head attention as a sum of independent heads, multiplies each by a mask
variable, and takes the loss's sensitivity to that variable as the head's importance.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.attention import scaled_dot_product_attention
from refattn.checks import check_floats, check_option, check_shapes
from refattn.multihead import project

GRANULARITIES = ("token", "example", "batch")
"""Over what a head's sensitivity is summed before its absolute value is taken."""


class HeadImportance(NamedTuple):
    """Importance of every head, the same normalised by layer, and the heads from the least."""

    importance: Array
    normalized: Array
    order: Array


@np.errstate(all="ignore")  # IEEE values travel silently, whatever the array library
def single_head_attention(
    source_input: Array,
    query_input: Array,
    w_query: Array,
    w_key: Array,
    w_value: Array,
    w_output: Array,
) -> Array:
    """Return the attention of one query vector over a sequence, as the paper writes it.

    Spec: HEADS-S21, OWN-ROUND1.

        Att(x, q) = W_o Σ_i α_i W_v x_i,   α = softmax_i(qᵀ W_qᵀ W_k x_i / √d)

    Args:
        source_input: x (n, d).
        query_input: q (d,).
        w_query: W_q (d_h, d); the paper's single head has d_h = d.
        w_key: W_k (d_h, d).
        w_value: W_v (d_h, d).
        w_output: W_o (d, d_h).

    Returns:
        Att (d,), dtype of source_input.

    Raises:
        ShapeError: two shapes do not fit, or x is empty.
        DtypeError: a dtype is not floating, or two differ.
    """
    arrays = {"source_input": source_input, "query_input": query_input, "w_query": w_query}
    arrays |= {"w_key": w_key, "w_value": w_value, "w_output": w_output}
    shapes = ("n d", "d", "d_h d", "d_h d", "d_v d", "e d_v")
    contracts = dict(zip(arrays, zip(arrays.values(), shapes, strict=True), strict=True))
    check_shapes("single_head_attention", **contracts)
    check_floats("single_head_attention", **arrays)
    x, q, W_q, W_k, W_v, W_o = (widen(a) for a in arrays.values())
    scale = 1.0 / math.sqrt(x.shape[-1])
    mean = scaled_dot_product_attention((W_q @ q)[None, :], x @ W_k.T, x @ W_v.T, scale=scale)
    return narrow(W_o @ mean[0, :], source_input)


@np.errstate(all="ignore")
def head_outputs(
    query_input: Array,
    source_input: Array,
    w_query: Array,
    w_key: Array,
    w_value: Array,
    w_output: Array,
    *,
    scale: float | None = None,
) -> Array:
    """Return what every head adds to the result, its output projection included.

    Spec: HEADS-EQ1, OWN-SCALE1, OWN-ROUND1.

        Att_h(x, q) = Attention(q W^Q_h, x W^K_h, x W^V_h) W^h_o

    Args:
        query_input: q (b, n_q, e_q).
        source_input: x (b, n_k, e_s).
        w_query: W_qᵀ by heads (h, e_q, d_k).
        w_key: W_kᵀ by heads (h, e_s, d_k).
        w_value: W_vᵀ by heads (h, e_s, d_v).
        w_output: W_oᵀ by heads (h, d_v, e_o).
        scale: factor of the logits; None is 1/√d_k.

    Returns:
        Att (b, h, n_q, e_o), dtype of query_input.

    Raises:
        ShapeError: two shapes do not fit.
        DtypeError: a dtype is not floating, or two differ.
        OptionError: scale is not finite.
    """
    weights = {"w_query": w_query, "w_key": w_key, "w_value": w_value, "w_output": w_output}
    check_shapes(
        "head_outputs",
        query_input=(query_input, "b n_q e_q"),
        source_input=(source_input, "b n_k e_s"),
        w_query=(w_query, "h e_q d_k"),
        w_key=(w_key, "h e_s d_k"),
        w_value=(w_value, "h e_s d_v"),
        w_output=(w_output, "h d_v e_o"),
    )
    check_floats("head_outputs", query_input=query_input, source_input=source_input, **weights)
    heads = project(query_input, source_input, w_query, w_key, w_value)
    return narrow(scaled_dot_product_attention(*heads, scale=scale) @ widen(w_output), query_input)


@np.errstate(all="ignore")
def sum_of_heads(outputs: Array, *, head_gates: Array | None = None) -> Array:
    """Return multi-head attention as the gated sum over heads.

    Spec: HEADS-EQ1, HEADS-S23, OWN-ROUND1.

        MHAtt(x, q) = Σ_h ξ_h Att_h(x, q)

    Args:
        outputs: Att (..., h, n, e) of `head_outputs`.
        head_gates: ξ (h,), 1 keeps a head, 0 masks it; all 1 if None.

    Returns:
        (..., n, e), dtype of outputs.

    Raises:
        ShapeError: there is not one gate a head.
        DtypeError: a dtype is not floating, or two differ.
    """
    check_shapes("sum_of_heads", outputs=(outputs, "... h n e"), head_gates=(head_gates, "h"))
    check_floats("sum_of_heads", outputs=outputs, head_gates=head_gates)
    xp = array_namespace(outputs)
    Att = widen(outputs)
    gated = Att if head_gates is None else widen(head_gates)[:, None, None] * Att
    return narrow(xp.sum(gated, axis=-3), outputs)


@np.errstate(all="ignore")
def head_importance(
    head_outputs: Array, d_head_outputs: Array, *, granularity: str = "example"
) -> HeadImportance:
    """Return the importance of every head: the loss's expected sensitivity to its gate.

    Spec: HEADS-EQ2, HEADS-S4a, HEADS-S4b, OWN-IMPORTANCE1, OWN-ROUND1.

        I_h = E_x |∂L(x)/∂ξ_h| = E_x |Att_h(x)ᵀ ∂L(x)/∂Att_h(x)|
        token: mean over x and n of |Σ_d|   example: mean over x of |Σ_nd|   batch: |Σ_xnd| / x

    Args:
        head_outputs: Att (layers, x, h, n, d): layers, examples, heads, rows, features.
        d_head_outputs: ∂L/∂Att, the same shape.
        granularity: one of `GRANULARITIES`; the paper's is `example`.

    Returns:
        importance (layers, h), normalized (layers, h), both in the dtype of head_outputs, and
        order (layers·h,) int64: flat indices, the least important first.

    Raises:
        ShapeError: the two shapes differ, or there is no example or no row.
        DtypeError: a dtype is not floating, or the two differ.
        OptionError: granularity has no such name.
    """
    check_option("head_importance", "granularity", granularity, GRANULARITIES)
    shape = "layers x h n d"
    check_shapes(
        "head_importance",
        head_outputs=(head_outputs, shape),
        d_head_outputs=(d_head_outputs, shape),
    )
    check_floats("head_importance", head_outputs=head_outputs, d_head_outputs=d_head_outputs)
    xp = array_namespace(head_outputs)
    d_xi = xp.sum(widen(head_outputs) * widen(d_head_outputs), axis=-1)  # (layers, x, h, n)
    if granularity == "token":
        I_h = xp.mean(xp.abs(d_xi), axis=(1, 3))
    elif granularity == "example":
        I_h = xp.mean(xp.abs(xp.sum(d_xi, axis=3)), axis=1)
    else:
        I_h = xp.abs(xp.sum(d_xi, axis=(1, 3))) / d_xi.shape[1]
    normalized = normalize_by_layer(I_h)
    order = importance_order(normalized)
    return HeadImportance(narrow(I_h, head_outputs), narrow(normalized, head_outputs), order)


@np.errstate(all="ignore")
def gate_importance(d_head_gates: Array) -> Array:
    """Return the importance of every head from the gradients of its gate, one an example.

    Spec: HEADS-EQ2, OWN-ROUND1.

        I_h = E_x |∂L(x)/∂ξ_h|

    Args:
        d_head_gates: ∂L(x)/∂ξ (layers, x, h), a row of `multihead_attention_backward` an example.

    Returns:
        I (layers, h), dtype of d_head_gates.

    Raises:
        ShapeError: d_head_gates does not have three axes.
        DtypeError: d_head_gates is not floating.
    """
    check_shapes("gate_importance", d_head_gates=(d_head_gates, "layers x h"))
    check_floats("gate_importance", d_head_gates=d_head_gates)
    xp = array_namespace(d_head_gates)
    return narrow(xp.mean(xp.abs(widen(d_head_gates)), axis=1), d_head_gates)


@np.errstate(all="ignore")
def normalize_by_layer(importance: Array) -> Array:
    """Return importances divided by the Euclidean norm of their layer.

    Spec: HEADS-S4a, OWN-IMPORTANCE1.

        Î_lh = I_lh / √(Σ_h' I_lh'²),  a layer of zeros stays zero

    A layer is divided by its largest entry first, so that no square leaves the range.

    Args:
        importance: I (layers, h).

    Returns:
        Î (layers, h), dtype of importance.

    Raises:
        ShapeError: importance does not have two axes.
        DtypeError: importance is not floating.
    """
    check_shapes("normalize_by_layer", importance=(importance, "layers h"))
    check_floats("normalize_by_layer", importance=importance)
    xp = array_namespace(importance)
    I_h = widen(importance)
    peak = xp.max(xp.abs(I_h), axis=1, keepdims=True)
    scaled = I_h / xp.where(peak == 0, xp.ones_like(peak), peak)
    norm = xp.sqrt(xp.sum(scaled * scaled, axis=1, keepdims=True))
    return narrow(scaled / xp.where(norm == 0, xp.ones_like(norm), norm), importance)


def importance_order(normalized: Array) -> Array:
    """Return all heads of all layers, the least important first.

    Spec: HEADS-S4b, OWN-IMPORTANCE1.

        flat index = layer · h + head;  equal importances in the order of their indices

    Args:
        normalized: Î (layers, h).

    Returns:
        order (layers·h,), int64.

    Raises:
        ShapeError: normalized does not have two axes.
        DtypeError: normalized is not floating.
    """
    check_shapes("importance_order", normalized=(normalized, "layers h"))
    check_floats("importance_order", normalized=normalized)
    xp = array_namespace(normalized)
    flat = xp.reshape(widen(normalized), (-1,))
    return xp.astype(xp.argsort(flat, stable=True), xp.int64)
