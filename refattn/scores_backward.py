"""Gradients of the attention scores, a kind at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.checks import check_arrays
from refattn.scores import UnitRows, check_score, unit_rows


class ScoreGradients(NamedTuple):
    """Gradients of a score; None for a weight that its kind does not take."""

    d_query: Array
    d_key: Array
    d_w_query: Array | None = None
    d_w_key: Array | None = None
    d_v: Array | None = None
    d_weight: Array | None = None
    d_strength: Array | None = None


@np.errstate(all="ignore")
def score_backward(
    d_scores: Array,
    query: Array,
    key: Array,
    *,
    kind: str,
    w_query: Array | None = None,
    w_key: Array | None = None,
    v: Array | None = None,
    weight: Array | None = None,
    strength: Array | None = None,
) -> ScoreGradients:
    """Return the gradients of a score.

    Spec: SCORES-ADDITIVE1, SCORES-DOT1, SCORES-GENERAL1, SCORES-SCALED1, SCORES-COSINE1,
    SCORES-LOCATION1, OWN-ROUND1.

        additive:   t_ij = tanh(·),  g_ij = de_ij v ∘ (1 - t_ij²),  dq_i = W_qᵀ Σ_j g_ij
        dot:        dq = de k,  dk = deᵀ q     (scaled_dot: both / √d;  general: through W)
        cosine:     dû = β de k̂,  dq_i = (dû_i - (dû_i · û_i) û_i) / ‖q_i‖,  0 where q_i = 0
        location:   dq = de W,  dk = 0

    Args:
        d_scores: de (n_q, n_k).
        query: as for `score`, and so on.
        key: as for `score`.
        kind: as for `score`.
        w_query: as for `score`.
        w_key: as for `score`.
        v: as for `score`.
        weight: as for `score`.
        strength: as for `score`.

    Returns:
        The gradients, each with the shape and dtype of what it belongs to.

    Raises:
        ShapeError: two shapes do not fit.
        DtypeError: a dtype is not floating, or two differ.
        OptionError: no such kind, a weight is missing, or is given to a kind that takes none.
    """
    weights = {"w_query": w_query, "w_key": w_key, "v": v, "weight": weight, "strength": strength}
    check_arrays("score_backward", d_scores=d_scores)
    check_score("score_backward", kind, query, key, weights, d_scores)
    xp = array_namespace(query)
    de, q, k = widen(d_scores), widen(query), widen(key)
    W = {name: widen(w) for name, w in weights.items() if w is not None}
    if kind == "additive":
        gradients = _additive_backward(de, q, k, W["w_query"], W["w_key"], W["v"])
    elif kind == "general":
        gradients = ScoreGradients(
            de @ (k @ W["weight"].T), de.T @ (q @ W["weight"]), d_weight=q.T @ de @ k
        )
    elif kind == "cosine":
        gradients = _cosine_backward(de, q, k, W["strength"])
    elif kind == "location":
        gradients = ScoreGradients(de @ W["weight"].T, xp.zeros_like(k), d_weight=q.T @ de)
    else:
        root = math.sqrt(query.shape[-1]) if kind == "scaled_dot" else 1.0
        gradients = ScoreGradients((de @ k) / root, (de.T @ q) / root)
    return ScoreGradients(*(None if g is None else narrow(g, query) for g in gradients))


def _additive_backward(
    de: Array, q: Array, k: Array, W_q: Array, W_k: Array, v: Array
) -> ScoreGradients:
    """Return the gradients of the additive score."""
    xp = array_namespace(q)
    t = xp.tanh((q @ W_q)[:, None, :] + (k @ W_k)[None, :, :])
    g = de[:, :, None] * v * (1 - t * t)
    g_q, g_k = xp.sum(g, axis=1), xp.sum(g, axis=0)
    return ScoreGradients(
        d_query=g_q @ W_q.T,
        d_key=g_k @ W_k.T,
        d_w_query=q.T @ g_q,
        d_w_key=k.T @ g_k,
        d_v=xp.sum(de[:, :, None] * t, axis=(0, 1)),
    )


def _cosine_backward(de: Array, q: Array, k: Array, beta: Array) -> ScoreGradients:
    """Return the gradients of the cosine score; a zero row gets none."""
    xp = array_namespace(q)
    rows_q, rows_k = unit_rows(q), unit_rows(k)
    d_unit_q = beta * (de @ rows_k.unit)
    d_unit_k = beta * (de.T @ rows_q.unit)
    return ScoreGradients(
        d_query=_unit_rows_backward(d_unit_q, rows_q),
        d_key=_unit_rows_backward(d_unit_k, rows_k),
        d_strength=xp.sum(de * (rows_q.unit @ rows_k.unit.T)),
    )


def _unit_rows_backward(d_unit: Array, rows: UnitRows) -> Array:
    """Return the gradient of rows from that of their unit rows, zero for a zero row."""
    xp = array_namespace(d_unit)
    along = xp.sum(d_unit * rows.unit, axis=-1, keepdims=True)
    zero = rows.norm == 0
    norm = xp.where(zero, xp.ones_like(rows.norm), rows.norm)
    return xp.where(zero, xp.zeros_like(d_unit), (d_unit - along * rows.unit) / norm)
