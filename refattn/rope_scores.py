"""Attention with rotated queries and keys, and the relative form of their product.

The paper asks that the product of a query at m and a key at n depend on the position m - n alone;
rotation grants it, because the transpose of a rotation turns back.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import numpy as np

from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.attention import scaled_dot_product_attention
from refattn.attention_backward import attention_backward
from refattn.checks import check_floats, check_shapes
from refattn.rope import RopeOptions, rope, rope_backward, table_dtype
from refattn.rope_forms import rotation_matrix
from refattn.rope_tables import host_positions


class PositionAware(NamedTuple):
    """Queries and keys that know their positions, and values that do not."""

    query: Array
    key: Array
    value: Array


class PositionAwareGradients(NamedTuple):
    """Gradients of the inputs and weights of position-aware attention."""

    d_x: Array
    d_w_query: Array
    d_w_key: Array
    d_w_value: Array


@np.errstate(all="ignore")
def position_aware_projections(
    x: Array,
    positions: Array,
    *,
    w_query: Array,
    w_key: Array,
    w_value: Array,
    **options: Unpack[RopeOptions],
) -> PositionAware:
    """Return queries and keys projected and rotated, and values projected.

    Spec: ROPE-EQ1, ROPE-EQ14, OWN-ROUND1.

        q_m = f_q(x_m, m) = R_m W_q x_m;  k_n = f_k(x_n, n) = R_n W_k x_n;  v_n = f_v(x_n) = W_v x_n

    Args:
        x: word embeddings, (..., n, e).
        positions: (n,), integers, tokens.
        w_query: W_q transposed, (e, d), d even.
        w_key: W_k transposed, (e, d).
        w_value: W_v transposed, (e, d_v).
        **options: base, rotary_dim, variant, pairing; see `rope`.

    Returns:
        query, key: (..., n, d), in x's dtype.
        value: (..., n, d_v).

    Raises:
        RefattnError: two shapes do not fit, dtypes differ, or an option is refused.
    """
    _check_weights("position_aware_projections", x, w_query, w_key, w_value)
    xp = array_namespace(x)
    X = widen(x)
    q, k = (rope(xp.matmul(X, widen(w)), positions, **options).output for w in (w_query, w_key))
    v = xp.matmul(X, widen(w_value))
    return PositionAware(*(narrow(array, x) for array in (q, k, v)))


@np.errstate(all="ignore")
def position_aware_attention(
    x: Array,
    positions: Array,
    *,
    w_query: Array,
    w_key: Array,
    w_value: Array,
    **options: Unpack[RopeOptions],
) -> Array:
    """Return self-attention over position-aware queries and keys.

    Spec: ROPE-EQ1, ROPE-EQ2, OWN-ROUND1.

        a_mn = exp(q_mᵀ k_n/√d) / Σ_j exp(q_mᵀ k_j/√d);  o_m = Σ_n a_mn v_n

    Args:
        x: word embeddings, (..., n, e).
        positions: as in `position_aware_projections`, and so are all others.
        w_query: (e, d).
        w_key: (e, d).
        w_value: (e, d_v).
        **options: base, rotary_dim, variant, pairing; see `rope`.

    Returns:
        output: o, (..., n, d_v), in x's dtype.

    Raises:
        RefattnError: as `position_aware_projections`.
    """
    _check_weights("position_aware_attention", x, w_query, w_key, w_value)
    q, k, v = position_aware_projections(
        widen(x),
        positions,
        w_query=widen(w_query),
        w_key=widen(w_key),
        w_value=widen(w_value),
        **options,
    )
    return narrow(scaled_dot_product_attention(q, k, v), x)


@np.errstate(all="ignore")
def position_aware_attention_backward(
    d_output: Array,
    x: Array,
    positions: Array,
    *,
    w_query: Array,
    w_key: Array,
    w_value: Array,
    **options: Unpack[RopeOptions],
) -> PositionAwareGradients:
    """Return the gradients of position-aware attention.

    Spec: ROPE-EQ1, ROPE-EQ2, OWN-ROUND1.

        dW_q = Xᵀ R_{-m} dq,  dW_k = Xᵀ R_{-n} dk,  dW_v = Xᵀ dv,
        dX = (R_{-m} dq) W_qᵀ + (R_{-n} dk) W_kᵀ + dv W_vᵀ,  (dq, dk, dv) by attention's backward

    Args:
        d_output: do, (..., n, d_v).
        x: as in `position_aware_attention`, and so are all others.
        positions: (n,).
        w_query: (e, d).
        w_key: (e, d).
        w_value: (e, d_v).
        **options: base, rotary_dim, variant, pairing; see `rope`.

    Returns:
        d_x: like x.
        d_w_query, d_w_key, d_w_value: like the weights, summed over x's leading axes.

    Raises:
        RefattnError: as `position_aware_attention`.
    """
    name = "position_aware_attention_backward"
    _check_weights(name, x, w_query, w_key, w_value)
    check_shapes(
        name, d_output=(d_output, "... n d_v"), x=(x, "... n e"), w_value=(w_value, "e d_v")
    )
    check_floats(name, x=x, d_output=d_output)
    xp = array_namespace(x)
    X, W = widen(x), [widen(w) for w in (w_query, w_key, w_value)]
    q, k, v = position_aware_projections(
        X, positions, w_query=W[0], w_key=W[1], w_value=W[2], **options
    )
    heads = [array[..., None, :, :] for array in (widen(d_output), q, k, v)]
    dq, dk, dv = (g[..., 0, :, :] for g in attention_backward(*heads)[:3])
    d_projected = [*(rope_backward(g, positions, **options) for g in (dq, dk)), dv]
    d_x = sum(xp.matmul(g, xp.matrix_transpose(w)) for g, w in zip(d_projected, W, strict=True))
    rows = [xp.reshape(array, (-1, array.shape[-1])) for array in (X, *d_projected)]
    d_w = [xp.matmul(xp.matrix_transpose(rows[0]), g) for g in rows[1:]]
    return PositionAwareGradients(*(narrow(array, x) for array in (d_x, *d_w)))


@np.errstate(all="ignore")
def relative_scores(
    query: Array,
    key: Array,
    *,
    query_positions: Array,
    key_positions: Array,
    base: float = 10000.0,
) -> Array:
    """Return the products of rotated queries and keys from their distances alone.

    Spec: ROPE-EQ11, ROPE-EQ16, OWN-ROUND1.

        g(x_m, x_n, m - n) = q_mᵀ R_{n-m} k_n,  R_{n-m} = R_mᵀ R_n

    One d x d matrix stands for every pair of positions: a statement for small sizes.

    Args:
        query: W_q x_m, before any rotation, (..., n_q, d), d even.
        key: W_k x_n, likewise, (..., n_k, d).
        query_positions: m, (n_q,), integers, tokens.
        key_positions: n, (n_k,), integers, tokens.
        base: base of the frequencies.

    Returns:
        scores: (..., n_q, n_k), not scaled, in query's dtype.

    Raises:
        RefattnError: two shapes do not fit, dtypes differ, or an option is refused.
    """
    R = _relative_rotations("relative_scores", query, key, query_positions, key_positions, base)
    xp = array_namespace(query)
    turned = xp.matmul(R, widen(key)[..., None, :, :, None])[..., 0]  # R_{n-m} k_n
    return narrow(xp.matmul(turned, widen(query)[..., None])[..., 0], query)


@np.errstate(all="ignore")
def relative_scores_backward(
    d_scores: Array,
    query: Array,
    key: Array,
    *,
    query_positions: Array,
    key_positions: Array,
    base: float = 10000.0,
) -> tuple[Array, Array]:
    """Return the gradients of the relative form.

    Spec: ROPE-EQ16, OWN-ROUND1.

        dq_m = Σ_n dg_mn R_{n-m} k_n;  dk_n = Σ_m dg_mn R_{m-n} q_m

    Args:
        d_scores: dg, (..., n_q, n_k).
        query: as in `relative_scores`, and so are all others.
        key: (..., n_k, d).
        query_positions: (n_q,).
        key_positions: (n_k,).
        base: base of the frequencies.

    Returns:
        d_query, d_key: like query and key.

    Raises:
        RefattnError: as `relative_scores`.
    """
    name = "relative_scores_backward"
    check_shapes(
        name, d_scores=(d_scores, "... n_q n_k"), query=(query, "... n_q d"), key=(key, "... n_k d")
    )
    check_floats(name, query=query, d_scores=d_scores)
    R = _relative_rotations(name, query, key, query_positions, key_positions, base)
    xp = array_namespace(query)
    dg = widen(d_scores)[..., None]
    turned_key = xp.matmul(R, widen(key)[..., None, :, :, None])[..., 0]
    turned_query = xp.matmul(xp.matrix_transpose(R), widen(query)[..., :, None, :, None])[..., 0]
    d_query, d_key = xp.sum(dg * turned_key, axis=-2), xp.sum(dg * turned_query, axis=-3)
    return narrow(d_query, query), narrow(d_key, key)


def _relative_rotations(
    function: str, query: Array, key: Array, m: Array, n: Array, base: float
) -> Array:
    """Return R_{n-m} for every pair of positions, (n_q, n_k, d, d)."""
    sizes = check_shapes(
        function,
        query=(query, "... n_q d"),
        key=(key, "... n_k d"),
        query_positions=(m, "n_q"),
        key_positions=(n, "n_k"),
    )
    check_floats(function, query=query, key=key)
    # on the host as int64: positions may be unsigned, and their distances negative
    steps = host_positions(n)[None, :] - host_positions(m)[:, None]
    steps = array_namespace(query).asarray(steps, device=query.device)
    return rotation_matrix(steps, d=sizes["d"], base=base, dtype=table_dtype(query))


def _check_weights(function: str, x: Array, w_query: Array, w_key: Array, w_value: Array) -> None:
    """Check the shapes and dtypes of embeddings and weights."""
    check_shapes(
        function,
        x=(x, "... n e"),
        w_query=(w_query, "e d"),
        w_key=(w_key, "e d"),
        w_value=(w_value, "e d_v"),
    )
    check_floats(function, x=x, w_query=w_query, w_key=w_key, w_value=w_value)
