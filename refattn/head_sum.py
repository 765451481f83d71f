"""Multi-head attention as a sum of independent heads, each multiplied by a mask variable."""

from __future__ import annotations

import math

import numpy as np

from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.attention import scaled_dot_product_attention
from refattn.checks import check_floats, check_shapes, given
from refattn.multihead import project


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
        OptionError: scale is not finite, or overflows in the computing dtype.
        MemoryLimitError: the n_q x n_k matrices do not fit into the free memory.
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
    check_shapes(
        "sum_of_heads", outputs=(outputs, "... h n e"), head_gates=(head_gates, "h or None")
    )
    check_floats("sum_of_heads", outputs=outputs, **given(head_gates=head_gates))
    xp = array_namespace(outputs)
    Att = widen(outputs)
    gated = Att if head_gates is None else widen(head_gates)[:, None, None] * Att
    return narrow(xp.sum(gated, axis=-3), outputs)
