"""Gradients of multi-head attention: through the projections, the heads and their gates."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.attention import attention
from refattn.attention_backward import attention_backward
from refattn.checks import check_arrays
from refattn.multihead import check_multihead, gate_factor, project
from refattn.options import AttentionOptions
from refattn.projections import pack_output, split_heads


class MultiheadGradients(NamedTuple):
    """Gradients in the order of the inputs; d_head_gates is None where no gates were given."""

    d_query_input: Array
    d_source_input: Array
    d_w_query: Array
    d_w_key: Array
    d_w_value: Array
    d_w_output: Array
    d_head_gates: Array | None


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
        MemoryLimitError: the n_q x n_k matrices do not fit into the free memory.
    """
    function = "multihead_attention_backward"
    weights = {"w_query": w_query, "w_key": w_key, "w_value": w_value, "w_output": w_output}
    check_arrays(function, d_output=d_output)
    check_multihead(function, query_input, source_input, weights, head_gates, d_output)
    xp = array_namespace(query_input)
    X, Y, dO = widen(query_input), widen(source_input), widen(d_output)
    W_Q, W_K, W_V, W_O = (widen(w) for w in weights.values())
    heads = project(X, Y, W_Q, W_K, W_V)
    options: AttentionOptions = {
        "scale": scale, "causal": causal, "alignment": alignment, "empty_row": empty_row
    }  # fmt: skip
    head = attention(*heads, **options).output
    xi = gate_factor(xp.ones(w_query.shape[0], dtype=X.dtype) if head_gates is None else head_gates)
    dC = split_heads(dO @ pack_output(W_O).T, w_query.shape[0])
    dQ, dK, dV, *_ = attention_backward(xi * dC, *heads, **options)
    gradients = MultiheadGradients(
        d_query_input=from_heads(dQ, W_Q),
        d_source_input=from_heads(dK, W_K) + from_heads(dV, W_V),
        d_w_query=to_weight(X, dQ),
        d_w_key=to_weight(Y, dK),
        d_w_value=to_weight(Y, dV),
        d_w_output=to_output_weight(xi * head, dO),
        d_head_gates=None if head_gates is None else xp.sum(dC * head, axis=(0, 2, 3)),
    )
    return MultiheadGradients(*(None if g is None else narrow(g, query_input) for g in gradients))


def from_heads(d_projected: Array, weight: Array) -> Array:
    """Return Σ_h dZ_h W_hᵀ (b, n, e) from dZ (b, h, n, d) and W (h, e, d)."""
    xp = array_namespace(d_projected)
    return xp.sum(d_projected @ xp.matrix_transpose(weight), axis=1)


def to_weight(x: Array, d_projected: Array) -> Array:
    """Return Σ_b Xᵀ dZ_h (h, e, d) from X (b, n, e) and dZ (b, h, n, d)."""
    xp = array_namespace(x)
    return xp.sum(xp.matrix_transpose(x)[:, None, :, :] @ d_projected, axis=0)


def to_output_weight(head: Array, d_output: Array) -> Array:
    """Return Σ_b head_hᵀ dO (h, d_v, e) from head (b, h, n, d_v) and dO (b, n, e)."""
    xp = array_namespace(head)
    return xp.sum(xp.matrix_transpose(head) @ d_output[:, None, :, :], axis=0)
