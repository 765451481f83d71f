"""The family of attention scores: additive, dot, general, scaled dot, cosine, location.

Each is a function of a query and a key to one logit; a softmax over the keys and a weighted mean
of the values follow all of them alike.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.checks import (
    OptionError,
    ShapeError,
    check_floats,
    check_option,
    check_shapes,
    describe,
)

CONTRACTS: dict[str, dict[str, str]] = {
    "additive": {"w_query": "d_q d_a", "w_key": "d_k d_a", "v": "d_a"},
    "dot": {},
    "general": {"weight": "d_q d_k"},
    "scaled_dot": {},
    "cosine": {"strength": ""},
    "location": {"weight": "d_q n_k"},
}
"""The weights that each kind of score takes, with their shapes."""

SAME_WIDTH = ("dot", "scaled_dot", "cosine")
"""Kinds that need queries and keys of the same number of features."""


class ScoreGradients(NamedTuple):
    """Gradients of a score; None for a weight that its kind does not take."""

    d_query: Array
    d_key: Array
    d_w_query: Array | None = None
    d_w_key: Array | None = None
    d_v: Array | None = None
    d_weight: Array | None = None
    d_strength: Array | None = None


class UnitRows(NamedTuple):
    """Rows divided by their lengths; a zero row stays zero."""

    unit: Array
    norm: Array


def _contract(
    function: str,
    kind: str,
    query: Array,
    key: Array,
    weights: dict[str, Array | None],
    d_scores: Array | None = None,
) -> None:
    """Check the kind, its weights, and every shape and dtype."""
    check_option(function, "kind", kind, CONTRACTS)
    arrays = {"d_scores": d_scores, "query": query, "key": key, **weights}
    for name, weight in weights.items():
        needed = name in CONTRACTS[kind]
        if needed != (weight is not None):
            state, rule = ("absent", "needs it") if needed else ("given", "takes none")
            raise OptionError(
                f"{name} is {state}, but kind {kind!r} {rule} {describe(function, arrays)}"
            )
    shapes = {name: (weights[name], shape) for name, shape in CONTRACTS[kind].items()}
    width = "d_q" if kind in SAME_WIDTH else "d_k"
    sizes = check_shapes(
        function,
        query=(query, "n_q d_q"),
        key=(key, f"n_k {width}"),
        d_scores=(d_scores, "n_q n_k"),
        **shapes,
    )
    for letter, size in sizes.items():
        if size == 0:
            raise ShapeError(
                f"{letter} is 0, but every size must be at least 1 {describe(function, arrays)}"
            )
    check_floats(function, **{name: a for name, a in arrays.items() if a is not None})


def unit_rows(x: Array) -> UnitRows:
    """Return every row divided by its Euclidean length, and the lengths.

    Spec: SCORES-COSINE1.

        û = u / ‖u‖,  0 / 0 = 0

    The row is divided by its largest magnitude first, so that no square leaves the range.

    Args:
        x: u (..., n, d).

    Returns:
        unit (..., n, d) and norm (..., n, 1).
    """
    xp = array_namespace(x)
    peak = xp.max(xp.abs(x), axis=-1, keepdims=True)
    peak = xp.where(peak == 0, xp.ones_like(peak), peak)
    scaled = x / peak
    length = xp.sqrt(xp.sum(scaled * scaled, axis=-1, keepdims=True))
    return UnitRows(scaled / xp.where(length == 0, xp.ones_like(length), length), peak * length)


@np.errstate(all="ignore")  # IEEE values travel silently, whatever the array library
def score(
    query: Array,
    key: Array,
    *,
    kind: str,
    w_query: Array | None = None,
    w_key: Array | None = None,
    v: Array | None = None,
    weight: Array | None = None,
    strength: Array | None = None,
) -> Array:
    """Return the score of every query for every key.

    Spec: SCORES-ADDITIVE1, SCORES-DOT1, SCORES-GENERAL1, SCORES-SCALED1, SCORES-COSINE1,
    SCORES-LOCATION1, OWN-ROUND1.

        additive:    e_ij = vᵀ tanh(W_q q_i + W_k k_j)      dot:         e_ij = q_i · k_j
        general:     e_ij = q_iᵀ W k_j                      scaled_dot:  e_ij = q_i · k_j / √d
        cosine:      e_ij = β q_i · k_j / (‖q_i‖ ‖k_j‖)     location:    e_ij = (W q_i)_j

    Args:
        query: q (n_q, d_q).
        key: k (n_k, d_k); for `location` only its number of rows counts.
        kind: one of `CONTRACTS`.
        w_query: W_qᵀ (d_q, d_a), for `additive`.
        w_key: W_kᵀ (d_k, d_a), for `additive`.
        v: v (d_a,), for `additive`.
        weight: W (d_q, d_k) for `general`, Wᵀ (d_q, n_k) for `location`.
        strength: β (), for `cosine`.

    Returns:
        scores: e (n_q, n_k), logits, dtype of query.

    Raises:
        ShapeError: two shapes do not fit.
        DtypeError: a dtype is not floating, or two differ.
        OptionError: no such kind, a weight is missing, or is given to a kind that takes none.
    """
    weights = {"w_query": w_query, "w_key": w_key, "v": v, "weight": weight, "strength": strength}
    _contract("score", kind, query, key, weights)
    xp = array_namespace(query)
    q, k = widen(query), widen(key)
    W = {name: widen(w) for name, w in weights.items() if w is not None}
    if kind == "additive":
        e = xp.tanh((q @ W["w_query"])[:, None, :] + (k @ W["w_key"])[None, :, :]) @ W["v"]
    elif kind == "general":
        e = q @ W["weight"] @ k.T
    elif kind == "cosine":
        e = W["strength"] * (unit_rows(q).unit @ unit_rows(k).unit.T)
    elif kind == "location":
        e = q @ W["weight"]
    else:
        e = (q @ k.T) / (math.sqrt(query.shape[-1]) if kind == "scaled_dot" else 1.0)
    return narrow(e, query)


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
    _contract("score_backward", kind, query, key, weights, d_scores)
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
