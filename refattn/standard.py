"""Standard attention and its gradients, with the matrices S and P written out.

This is the text that FlashAttention compares itself with: it has no scale, no mask and no
dropout. `refattn.attention` states attention in full.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.checks import check_floats, check_shapes
from refattn.flash_backward import FlashGradients
from refattn.options import check_matrices
from refattn.tiles import check_lead, check_operands


class StandardResult(NamedTuple):
    """The two matrices that standard attention writes to the slow memory, and its output."""

    scores: Array
    weights: Array
    output: Array


@np.errstate(all="ignore")
def standard_attention(
    query: Array, key: Array, value: Array, *, scale: float = 1.0
) -> StandardResult:
    """Attend with the matrices of scores and of weights materialised.

    Spec: FA1-S22, FA1-ALG0 lines 1-4, FA1-S31, OWN-ROUND1, OWN-MEMORY1.

        S = τ Q Kᵀ,  P = softmax(S) by rows,  O = P V

    Args:
        query: Q, (..., n_q, d_k), any float dtype.
        key: K, (..., n_k, d_k), the same dtype, n_k ≥ 1.
        value: V, (..., n_k, d_v), the same dtype.
        scale: τ; 1, the default, is the listing as printed.

    Returns:
        scores: S, (..., n_q, n_k), logits, computing dtype.
        weights: P, (..., n_q, n_k), computing dtype.
        output: O, (..., n_q, d_v), dtype of the query.

    Raises:
        ShapeError: shapes do not fit.
        DtypeError: dtypes are not floating or differ.
        OptionError: the scale is not finite.
        MemoryLimitError: the (n_q, n_k) matrices do not fit into the free memory.
    """
    sizes = check_operands("standard_attention", query, key, value, scale=scale)
    check_matrices("standard_attention", query, sizes)
    scale = float(scale)
    xp = array_namespace(query)
    Q, K, V = widen(query), widen(key), widen(value)
    S = scale * (Q @ xp.matrix_transpose(K))  # line 1
    f = xp.exp(S - xp.max(S, axis=-1, keepdims=True))  # line 2: softmax as FA1-S31 computes it
    P = f / xp.sum(f, axis=-1, keepdims=True)
    O = P @ V  # line 3
    return StandardResult(S, P, narrow(O, query))  # line 4


@np.errstate(all="ignore")
def standard_attention_backward(
    d_output: Array,
    query: Array,
    key: Array,
    value: Array,
    weights: Array,
    *,
    scale: float = 1.0,
) -> FlashGradients:
    """Return the gradients of `standard_attention` from its materialised weights.

    Spec: FA1-ALG3 lines 1-6, OWN-ROUND1, OWN-MEMORY1.

        dV = Pᵀ dO,  dP = dO Vᵀ,  dS_ij = P_ij (dP_ij - Σ_l P_il dP_il),  dQ = τ dS K,  dK = τ dSᵀ Q

    Args:
        d_output: dO, (..., n_q, d_v), dtype of the query.
        query: Q, (..., n_q, d_k), any float dtype.
        key: K, (..., n_k, d_k), the same dtype.
        value: V, (..., n_k, d_v), the same dtype.
        weights: P, (..., n_q, n_k), of the forward pass, computing dtype.
        scale: τ; 1, the default, is the listing as printed.

    Returns:
        d_query: dQ, (..., n_q, d_k), dtype of the query.
        d_key: dK, (..., n_k, d_k), the same dtype.
        d_value: dV, (..., n_k, d_v), the same dtype.

    Raises:
        ShapeError: shapes do not fit.
        DtypeError: dtypes are not what the forward pass takes and returns.
        OptionError: the scale is not finite.
        MemoryLimitError: the (n_q, n_k) matrices do not fit into the free memory.
    """
    function = "standard_attention_backward"
    check_matrices(function, query, check_operands(function, query, key, value, scale=scale))
    scale = float(scale)
    arrays = {"query": query, "d_output": d_output, "weights": weights}
    check_shapes(
        function,
        query=(query, "... n_q d_k"),
        value=(value, "... n_k d_v"),
        d_output=(d_output, "... n_q d_v"),
        weights=(weights, "... n_q n_k"),
    )
    for name in ("d_output", "weights"):
        check_lead(function, arrays, name, "query")
    check_floats(function, query=query, d_output=d_output)
    check_floats(function, widened_query=widen(query), weights=weights)
    xp = array_namespace(query)
    Q, K, V, dO, P = widen(query), widen(key), widen(value), widen(d_output), weights
    dV = xp.matrix_transpose(P) @ dO  # line 1
    dP = dO @ xp.matrix_transpose(V)  # line 2
    dS = P * (dP - xp.sum(P * dP, axis=-1, keepdims=True))  # line 3
    dQ = scale * (dS @ K)  # line 4
    dK = scale * (xp.matrix_transpose(dS) @ Q)  # line 5
    return FlashGradients(narrow(dQ, query), narrow(dK, key), narrow(dV, value))  # line 6
