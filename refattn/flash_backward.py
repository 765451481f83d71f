"""Gradients of attention by tiles: the weights are computed again from the saved m and l.

FlashAttention's backward pass never holds P or dS: tile by tile it computes P_ij = exp(S_ij - m_i)
/ l_i once more, and it takes the row sum of P ∘ dP from O, as D_i = Σ_d dO_id O_id.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.checks import DtypeError, check_counts, check_floats, check_shapes, describe, given
from refattn.dropout import drop_weights
from refattn.flash import masked_scores
from refattn.tiles import (
    allowed_cells,
    check_lead,
    check_operands,
    default_scale,
    divide,
    join,
    kept_cells,
    masking,
    product_over_allowed,
    spans,
)


class FlashGradients(NamedTuple):
    """Gradients with respect to the three operands."""

    d_query: Array
    d_key: Array
    d_value: Array


@np.errstate(all="ignore")
def flash_attention_backward(
    d_output: Array,
    query: Array,
    key: Array,
    value: Array,
    output: Array,
    row_max: Array,
    row_sum: Array,
    *,
    block_rows: int,
    block_cols: int,
    scale: float | None = None,
    mask: Array | None = None,
    causal: bool = False,
    alignment: str | int = "top_left",
    keep: Array | None = None,
    keep_probability: float | None = None,
) -> FlashGradients:
    """Return the gradients of `flash_attention_forward` from its output and its statistics.

    Spec: FA1-ALG4 lines 1-26, OWN-SCALE1, OWN-MASK1, OWN-CAUSAL1, OWN-DROPOUT1, OWN-POISON1,
    OWN-ROUND1. Differs: OWN-EMPTY1.

        dV = P_droppedᵀ dO,  dP = (dO Vᵀ) ∘ Z,  dS = P ∘ (dP - D),  D_i = Σ_d dO_id O_id
        dQ = τ dS K,  dK = τ dSᵀ Q

    Args:
        d_output: dO, (..., n_q, d_v), dtype of the query.
        query: Q, (..., n_q, d_k), any float dtype.
        key: K, (..., n_k, d_k), the same dtype.
        value: V, (..., n_k, d_v), the same dtype.
        output: O, (..., n_q, d_v), of the forward pass.
        row_max: m, (..., n_q), logits, of the forward pass, computing dtype.
        row_sum: l, (..., n_q), of the forward pass, computing dtype.
        block_rows: B_r, query rows of a tile; need not be the forward pass's.
        block_cols: B_c, key rows of a tile; likewise.
        scale: τ; None is 1/√d_k.
        mask: bool, broadcastable to (..., n_q, n_k), True = attend.
        causal: whether query i sees only the keys j ≤ i + offset.
        alignment: "top_left" (offset 0), "bottom_right" (n_k - n_q) or the offset in tokens.
        keep: bool, broadcastable to (..., n_q, n_k), the forward pass's.
        keep_probability: 1 - p_drop; given with keep.

    Returns:
        d_query: dQ, (..., n_q, d_k), dtype of the query.
        d_key: dK, (..., n_k, d_k), the same dtype.
        d_value: dV, (..., n_k, d_v), the same dtype.

    Raises:
        ShapeError: shapes do not fit.
        DtypeError: dtypes are not what the forward pass takes and returns.
        OptionError: a tile size, the scale, causal, the alignment or the dropout is refused.
    """
    function = "flash_attention_backward"
    sizes = check_operands(function, query, key, value, **given(scale=scale))
    B_r, B_c = check_counts(function, block_rows=block_rows, block_cols=block_cols)
    _check_saved(function, d_output, query, value, output, row_max, row_sum)
    rules = masking(
        function,
        query,
        key,
        mask=mask,
        causal=causal,
        alignment=alignment,
        keep=keep,
        keep_probability=keep_probability,
    )
    xp = array_namespace(query)
    tau = default_scale(scale, sizes["d_k"])
    kept = 1.0 if keep_probability is None else float(keep_probability)
    rows, cols = spans(sizes["n_q"], B_r), spans(sizes["n_k"], B_c)
    Q = divide(widen(query), rows)  # line 3
    K, V = divide(widen(key), cols), divide(widen(value), cols)
    O, dO = divide(widen(output), rows), divide(widen(d_output), rows)  # line 4
    l, m = divide(row_sum[..., None], rows), divide(row_max[..., None], rows)
    dQ, dK, dV = ([xp.zeros_like(x) for x in blocks] for blocks in (Q, K, V))  # line 5
    for j in range(len(cols)):  # line 6
        K_j, V_j = K[j], V[j]  # line 7
        dK_j, dV_j = xp.zeros_like(K_j), xp.zeros_like(V_j)  # line 8
        for i in range(len(rows)):  # line 9
            Q_i, O_i, dO_i, l_i, m_i = Q[i], O[i], dO[i], l[i], m[i]  # line 10
            allowed = allowed_cells(rules, rows[i], cols[j], xp)
            keep_ij = kept_cells(rules, rows[i], cols[j])
            S_ij = masked_scores(Q_i, K_j, allowed, tau)  # lines 11, 12
            P_ij = xp.exp(S_ij - m_i) / l_i  # line 13
            P_ij = xp.where(allowed, P_ij, xp.zeros_like(P_ij))  # also where m_i is -∞ or NaN
            P_dropped = drop_weights(P_ij, keep_ij, kept)  # lines 14, 15
            allowed_T = xp.matrix_transpose(allowed)
            P_dropped_T = xp.matrix_transpose(P_dropped)
            dV_j = dV_j + product_over_allowed(P_dropped_T, dO_i, allowed_T)  # line 16
            dP_dropped = dO_i @ xp.matrix_transpose(V_j)  # line 17
            dP_ij = drop_weights(dP_dropped, keep_ij, kept)  # line 18
            D_i = xp.sum(dO_i * O_i, axis=-1, keepdims=True)  # line 19
            dS_ij = P_ij * (dP_ij - D_i)  # line 20
            dS_ij = xp.where(allowed, dS_ij, xp.zeros_like(dS_ij))  # also where D_i is NaN
            dQ[i] = dQ[i] + tau * product_over_allowed(dS_ij, K_j, allowed)  # line 21
            dS_T = xp.matrix_transpose(dS_ij)
            dK_j = dK_j + tau * product_over_allowed(dS_T, Q_i, allowed_T)  # line 22
        dK[j], dV[j] = dK_j, dV_j  # line 24
    return FlashGradients(  # line 26
        narrow(join(dQ, xp.zeros_like(widen(query))), query),
        narrow(join(dK, xp.zeros_like(widen(key))), key),
        narrow(join(dV, xp.zeros_like(widen(value))), value),
    )


def _check_saved(
    function: str,
    d_output: Array,
    query: Array,
    value: Array,
    output: Array,
    row_max: Array,
    row_sum: Array,
) -> None:
    """Check what the forward pass saved against its operands.

    Raises:
        ShapeError: a shape does not fit.
        DtypeError: a dtype is not what the forward pass returns.
    """
    arrays = {"query": query, "d_output": d_output, "output": output}
    check_shapes(
        function,
        query=(query, "... n_q d_k"),
        value=(value, "... n_k d_v"),
        d_output=(d_output, "... n_q d_v"),
        output=(output, "... n_q d_v"),
        row_max=(row_max, "... n_q"),
        row_sum=(row_sum, "... n_q"),
    )
    check_floats(function, **arrays)
    for name in ("d_output", "output"):
        check_lead(function, arrays, name, "query")
    for name, statistic in (("row_max", row_max), ("row_sum", row_sum)):
        check_lead(function, {"query": query, name: statistic}, name, "query", rank=1)
        if statistic.dtype != widen(query).dtype:
            raise DtypeError(
                f"{name} has dtype {statistic.dtype}, but the pass computes in "
                f"{widen(query).dtype}; they must be equal "
                f"{describe(function, {**arrays, name: statistic})}"
            )
