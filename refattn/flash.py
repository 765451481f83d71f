"""Attention by tiles, which carries two numbers a row instead of an (n_q, n_k) matrix.

FlashAttention walks over blocks of keys and keeps, for each query row, the maximum m, the sum l
of shifted exponentials and the output O of the keys seen so far. Its backward pass stands in
`refattn.flash_backward`, its traffic with the slow memory in `refattn.traffic`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.checks import check_counts, given
from refattn.dropout import drop_weights
from refattn.tiles import (
    allowed_cells,
    check_operands,
    default_scale,
    divide,
    divisor,
    join,
    kept_cells,
    masking,
    product_over_allowed,
    shift,
    spans,
)


class BlockSizes(NamedTuple):
    """Rows of a tile of queries (B_r) and of a tile of keys (B_c)."""

    block_rows: int
    block_cols: int


class FlashResult(NamedTuple):
    """Output of a forward pass by tiles, and the statistics its backward pass reads."""

    output: Array
    row_max: Array
    row_sum: Array
    logsumexp: Array


class TileStates(NamedTuple):
    """Statistics m, l and output O after each outer step, stacked along a new first axis."""

    row_max: Array
    row_sum: Array
    states: Array


class _State(NamedTuple):
    """What an outer step leaves in HBM: m, l as (..., n_q, 1) and O as (..., n_q, d_v)."""

    m: Array
    l: Array
    O: Array


def block_sizes(*, sram: int, d: int) -> BlockSizes:
    """Return the tile sizes that the paper sets for a size of on-chip memory.

    Spec: FA1-ALG1 line 1.

        B_c = ⌈M / 4d⌉,  B_r = min(⌈M / 4d⌉, d)

    Args:
        sram: M, elements that the on-chip memory holds.
        d: d, features of a head.

    Returns:
        block_rows, block_cols: B_r and B_c.

    Raises:
        OptionError: a number is not an integer of at least 1.
    """
    sram, d = check_counts("block_sizes", sram=sram, d=d)
    B_c = -(-sram // (4 * d))
    return BlockSizes(block_rows=min(B_c, d), block_cols=B_c)


@np.errstate(all="ignore")
def flash_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    block_rows: int,
    block_cols: int,
    scale: float = 1.0,
) -> FlashResult:
    """Attend by tiles, as the paper's first listing does, which has neither scale nor mask.

    Spec: FA1-ALG1 lines 1-16, FA1-S31, FA1-THM1, OWN-LSE1, OWN-ROUND1.

        O = softmax(τ Q Kᵀ) V

    Args:
        query: Q, (..., n_q, d_k), any float dtype.
        key: K, (..., n_k, d_k), n_k ≥ 1, the same dtype.
        value: V, (..., n_k, d_v), the same dtype.
        block_rows: B_r, query rows of a tile; need not divide n_q.
        block_cols: B_c, key rows of a tile; need not divide n_k.
        scale: τ; 1, the default, is the listing as printed.

    Returns:
        output: O, (..., n_q, d_v), dtype of the query.
        row_max: m, (..., n_q), logits, computing dtype.
        row_sum: l, (..., n_q), computing dtype.
        logsumexp: m + ln l, (..., n_q), nats, computing dtype.

    Raises:
        ShapeError: shapes do not fit.
        DtypeError: dtypes are not floating or differ.
        OptionError: a tile size is not an integer of at least 1, or the scale is not finite.
    """
    check_operands("flash_attention", query, key, value, scale=scale)
    B_r, B_c = check_counts("flash_attention", block_rows=block_rows, block_cols=block_cols)
    steps = _outer_steps(widen(query), widen(key), widen(value), B_r, B_c, float(scale))
    *_, last = steps
    return _result(last, query)  # line 16


@np.errstate(all="ignore")
def tile_states(
    query: Array,
    key: Array,
    value: Array,
    *,
    block_rows: int,
    block_cols: int,
    scale: float = 1.0,
) -> TileStates:
    """Return what the listing holds after each of its outer steps.

    Spec: FA1-ALG1 lines 2-15, FA1-THM1, OWN-ROUND1.

        m⁽ʲ⁾ = rowmax(S_:j),  l⁽ʲ⁾ = rowsum(exp(S_:j - m⁽ʲ⁾)),  O⁽ʲ⁾ = softmax(S_:j) V_:j

    Args:
        query: Q, (..., n_q, d_k), any float dtype.
        key: K, (..., n_k, d_k), n_k ≥ 1, the same dtype.
        value: V, (..., n_k, d_v), the same dtype.
        block_rows: B_r, query rows of a tile.
        block_cols: B_c, key rows of a tile; T_c = ⌈n_k / B_c⌉.
        scale: τ; 1, the default, is the listing as printed.

    Returns:
        row_max: m, (T_c, ..., n_q), logits, computing dtype.
        row_sum: l, (T_c, ..., n_q), computing dtype.
        states: O, (T_c, ..., n_q, d_v), dtype of the query.

    Raises:
        ShapeError: shapes do not fit.
        DtypeError: dtypes are not floating or differ.
        OptionError: a tile size is not an integer of at least 1, or the scale is not finite.
    """
    check_operands("tile_states", query, key, value, scale=scale)
    B_r, B_c = check_counts("tile_states", block_rows=block_rows, block_cols=block_cols)
    xp = array_namespace(query)
    steps = _outer_steps(widen(query), widen(key), widen(value), B_r, B_c, float(scale))
    m, l, O = (xp.stack(kept)[1:, ...] for kept in zip(*steps, strict=True))
    return TileStates(m[..., 0], l[..., 0], narrow(O, query))


def _outer_steps(
    query: Array, key: Array, value: Array, block_rows: int, block_cols: int, scale: float
) -> Iterator[_State]:
    """Yield the state after line 2 and after each outer step.

    Spec: FA1-ALG1 lines 2-15.
    """
    xp = array_namespace(query)
    state = _zero_state(query, value)  # line 2
    rows, cols = spans(query.shape[-2], block_rows), spans(key.shape[-2], block_cols)
    Q, K, V = divide(query, rows), divide(key, cols), divide(value, cols)  # line 3
    m, l, O = (divide(x, rows) for x in state)  # line 4
    yield state
    for j in range(len(cols)):  # line 5
        K_j, V_j = K[j], V[j]  # line 6
        for i in range(len(rows)):  # line 7
            Q_i, O_i, l_i, m_i = Q[i], O[i], l[i], m[i]  # line 8
            S_ij = scale * (Q_i @ xp.matrix_transpose(K_j))  # line 9
            m_tilde_ij = xp.max(S_ij, axis=-1, keepdims=True)  # line 10
            P_tilde_ij = xp.exp(S_ij - m_tilde_ij)
            l_tilde_ij = xp.sum(P_tilde_ij, axis=-1, keepdims=True)
            m_new = xp.maximum(m_i, m_tilde_ij)  # line 11
            old, new = xp.exp(m_i - m_new), xp.exp(m_tilde_ij - m_new)
            l_new = old * l_i + new * l_tilde_ij
            O[i] = (l_i * old * O_i + new * (P_tilde_ij @ V_j)) / l_new  # line 12
            l[i], m[i] = l_new, m_new  # line 13
        yield _State(join(m, state.m), join(l, state.l), join(O, state.O))


@np.errstate(all="ignore")
def flash_attention_forward(
    query: Array,
    key: Array,
    value: Array,
    *,
    block_rows: int,
    block_cols: int,
    scale: float | None = None,
    mask: Array | None = None,
    causal: bool = False,
    alignment: str | int = "top_left",
    keep: Array | None = None,
    keep_probability: float | None = None,
) -> FlashResult:
    """Attend by tiles with scale, mask and dropout, as the paper's full listing does.

    Spec: FA1-ALG2 lines 1-19, OWN-SCALE1, OWN-MASK1, OWN-CAUSAL1, OWN-DROPOUT1, OWN-LSE1,
    OWN-POISON1, OWN-ROUND1. Differs: OWN-EMPTY1.

        O = dropout(softmax(MASK(τ Q Kᵀ))) V

    Args:
        query: Q, (..., n_q, d_k), any float dtype.
        key: K, (..., n_k, d_k), n_k ≥ 1, the same dtype.
        value: V, (..., n_k, d_v), the same dtype.
        block_rows: B_r, query rows of a tile.
        block_cols: B_c, key rows of a tile.
        scale: τ; None is 1/√d_k.
        mask: bool, broadcastable to (..., n_q, n_k), True = attend.
        causal: whether query i sees only the keys j ≤ i + offset.
        alignment: "top_left" (offset 0), "bottom_right" (n_k - n_q) or the offset in tokens.
        keep: bool, broadcastable to (..., n_q, n_k), True = the weight is kept.
        keep_probability: 1 - p_drop; given with keep.

    Returns:
        output: O, (..., n_q, d_v), dtype of the query; 0 in an empty row.
        row_max: m, (..., n_q), logits, computing dtype; -∞ in an empty row.
        row_sum: l, (..., n_q), before dropout, computing dtype; 0 in an empty row.
        logsumexp: m + ln l, (..., n_q), nats, computing dtype; -∞ in an empty row.

    Raises:
        ShapeError: shapes do not fit.
        DtypeError: an argument is no array, operands are not of one floating dtype, or mask or keep
            is not bool.
        OptionError: a tile size, the scale, causal, the alignment or the dropout is refused.
    """
    function = "flash_attention_forward"
    sizes = check_operands(function, query, key, value, **given(scale=scale))
    B_r, B_c = check_counts(function, block_rows=block_rows, block_cols=block_cols)
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
    state = _zero_state(widen(query), widen(value))  # line 3
    rows, cols = spans(sizes["n_q"], B_r), spans(sizes["n_k"], B_c)
    Q = divide(widen(query), rows)  # line 4
    K, V = divide(widen(key), cols), divide(widen(value), cols)
    m, l, O = (divide(x, rows) for x in state)  # line 5
    for j in range(len(cols)):  # line 6
        K_j, V_j = K[j], V[j]  # line 7
        for i in range(len(rows)):  # line 8
            Q_i, O_i, l_i, m_i = Q[i], O[i], l[i], m[i]  # line 9
            allowed = allowed_cells(rules, rows[i], cols[j], xp)
            S_ij = masked_scores(Q_i, K_j, allowed, tau)  # lines 10, 11
            m_tilde_ij = xp.max(S_ij, axis=-1, keepdims=True)  # line 12
            P_tilde_ij = xp.exp(S_ij - shift(m_tilde_ij))
            l_tilde_ij = xp.sum(P_tilde_ij, axis=-1, keepdims=True)
            m_new = xp.maximum(m_i, m_tilde_ij)  # line 13
            old, new = xp.exp(m_i - shift(m_new)), xp.exp(m_tilde_ij - shift(m_new))
            l_new = old * l_i + new * l_tilde_ij
            keep_ij = kept_cells(rules, rows[i], cols[j])
            P_dropped = drop_weights(P_tilde_ij, keep_ij, kept)  # line 14
            PV_ij = product_over_allowed(P_dropped, V_j, allowed)
            O[i] = (l_i * old * O_i + new * PV_ij) / divisor(l_new)  # line 15
            l[i], m[i] = l_new, m_new  # line 16
    return _result(_State(join(m, state.m), join(l, state.l), join(O, state.O)), query)  # line 19


def masked_scores(Q_i: Array, K_j: Array, allowed: Array, tau: float) -> Array:
    """Return the scores of a tile, -∞ in the cells that are not allowed.

    Spec: FA1-ALG2 lines 10-11, FA1-ALG4 lines 11-12, OWN-POISON1.

        S_ij = MASK(τ Q_i K_jᵀ)
    """
    xp = array_namespace(Q_i)
    S_ij = tau * (Q_i @ xp.matrix_transpose(K_j))
    return xp.where(allowed, S_ij, xp.full_like(S_ij, -float("inf")))


def _zero_state(query: Array, value: Array) -> _State:
    """Return O = 0, l = 0 and m = -∞ in the computing dtype.

    Spec: FA1-ALG1 line 2, FA1-ALG2 line 3.
    """
    xp = array_namespace(query)
    shape, dtype = tuple(query.shape[:-1]), query.dtype
    return _State(
        m=xp.full((*shape, 1), -float("inf"), dtype=dtype),
        l=xp.zeros((*shape, 1), dtype=dtype),
        O=xp.zeros((*shape, value.shape[-1]), dtype=dtype),
    )


def _result(state: _State, query: Array) -> FlashResult:
    """Return the last state with its logsumexp, the output in the dtype of the query."""
    xp = array_namespace(query)
    m, l = state.m[..., 0], state.l[..., 0]
    return FlashResult(narrow(state.O, query), m, l, m + xp.log(divisor(l)))
