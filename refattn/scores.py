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
    check_arrays,
    check_floats,
    check_option,
    check_shapes,
    describe,
    given,
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


class UnitRows(NamedTuple):
    """Rows divided by their lengths; a zero row stays zero."""

    unit: Array
    norm: Array


def check_score(
    function: str,
    kind: str,
    query: Array,
    key: Array,
    weights: dict[str, Array | None],
    d_scores: Array | None = None,
) -> None:
    """Check the kind, its weights, and every shape and dtype.

    Raises:
        ShapeError, DtypeError, OptionError: an argument is refused.
    """
    check_option(function, "kind", kind, CONTRACTS)
    arrays = {"query": query, "key": key} | given(d_scores=d_scores, **weights)
    check_arrays(function, **arrays)
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
        d_scores=(d_scores, "n_q n_k or None"),
        **shapes,
    )
    for letter, size in sizes.items():
        if size == 0:
            raise ShapeError(
                f"{letter} is 0, but every size must be at least 1 {describe(function, arrays)}"
            )
    check_floats(function, **arrays)


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
    check_score("score", kind, query, key, weights)
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
