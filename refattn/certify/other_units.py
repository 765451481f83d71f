"""Error units of importance, tile states, merging and scores (NUM-OTHER1)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from refattn.certify.attention_units import exact_finite
from refattn.certify.cells import Tensors
from refattn.certify.floor_units import SMALL
from refattn.certify.majorant import (
    EXTRA,
    FUNCTION,
    Array,
    Known,
    contract,
    exact,
    plus,
    rounded,
    scaled,
    stored,
    tanh,
    times,
    total,
)
from refattn.certify.softmax_units import mean, softmax

STEP = 5.0
"""Rounding units of one update of a state: two products, a sum, a division, a product; and of
the exponential of a maximum that rises by rounding alone, which tiles of a few keys allow."""

ILL = 2.0**30
"""Unit of a normalised importance whose layer's length is zero by cancellation: no claim."""

Sizes = dict[str, float]
Result = tuple[dict[str, Known], Sizes]


def _floors(names: Mapping[str, float]) -> Sizes:
    """Return floors of `size` underflows of the arithmetic and one of the operand format."""
    sizes: Sizes = {}
    for name, size in names.items():
        sizes[f"{name}.floor"], sizes[f"{name}.floor_operand"] = size, 1.0
    return sizes


def _peak(*tensors: Known) -> float:
    return max(1.0, *(float(np.max(np.abs(x.value), initial=0.0)) for x in tensors))


def head_importance_units(
    inputs: Tensors, parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> Result:
    """Return the majorants of importance and of its l2-normalised form."""
    A, dA = exact_finite(inputs["head_outputs"]), exact_finite(inputs["d_head_outputs"])
    _, x, h, n, d = A.value.shape
    spec, axes, inner, outer = {
        "token": ("lxhnd,lxhnd->lxhn", (1, 3), d, x * n),
        "example": ("lxhnd,lxhnd->lxh", (1,), n * d, x),
        "batch": ("lxhnd,lxhnd->lh", (), x * n * d, x),
    }[conventions.get("granularity", "example")]
    sums = contract(spec, A, dA, inner)
    sums = sums._replace(value=np.abs(sums.value))
    importance = stored(scaled(total(sums, axes, outer) if axes else sums, 1.0 / outer))
    length = np.sqrt(np.sum(importance.value**2, axis=1, keepdims=True))
    size = 4.0 * x * n * d * _peak(A, dA)
    sizes = _floors({"importance": size, "normalized": 4.0 * h})
    shortest = float(np.min(length, initial=1.0, where=length > 0))
    for kind, one in (("floor", size), ("floor_operand", 1.0)):  # an underflow before dividing
        sizes[f"normalized.{kind}"] += one * (1 + np.sqrt(h)) / shortest
    sizes["longest"] = float(max(inner, outer, h))
    normalized, sizes["exponent"] = _normalized(importance, length)
    return {"importance": importance, "normalized": normalized}, sizes


def _normalized(x: Known, length: Array) -> tuple[Known, float]:
    """Return x / ‖x‖ by rows, and the largest relative error of a length."""
    safe = np.where(length > 0, length, 1.0)
    unit = x.value / safe
    parts = []
    for error in (x.accumulated, x.operand):
        relative = np.sum(unit * error, axis=1, keepdims=True) / safe
        parts.append(np.where(length > 0, error / safe + unit * relative, ILL * (error > 0)))
    moved = float(np.max(parts[0], initial=0.0, where=length > 0))
    accumulated = parts[0] + (x.value.shape[1] + EXTRA) * unit
    return Known(unit, accumulated, parts[1] + unit), moved


def tiles_units(
    inputs: Tensors, parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> Result:
    """Return the majorants of m, l and O after every outer step of Algorithm 1."""
    Q, K, V = (exact_finite(inputs[name]) for name in ("query", "key", "value"))
    n_k, d = K.value.shape
    scale = float(parameters.get("scale", 1.0))
    S = scaled(contract("ic,jc->ij", Q, K, d), scale)
    width = int(parameters["block_cols"])
    steps: dict[str, list[Known]] = {"row_max": [], "row_sum": [], "states": []}
    exponent = 0.0
    for j, end in enumerate(range(width, n_k + width, width), start=1):
        seen = np.broadcast_to(np.arange(n_k) < end, S.value.shape)
        rows = softmax(S, seen)
        e = rows.exponent._replace(accumulated=rows.exponent.accumulated + STEP * j)
        once = np.zeros_like(rows.division)  # the listing merges nothing
        rows = rows._replace(exponent=e, terms=rows.terms + STEP * j, division=once)
        moved = np.max(np.where(seen, S.accumulated, 0.0), axis=1)
        m_i = np.max(np.where(seen, S.value, -np.inf), axis=1)
        l_i = np.exp(rows.logsumexp.value - m_i)
        zero = np.zeros_like(m_i)
        by_cell = rows.exponent.accumulated + rows.terms
        slack = np.sum(rows.weights * by_cell, axis=1) + moved
        steps["row_max"].append(Known(m_i, moved, zero))
        steps["row_sum"].append(Known(l_i, l_i * slack, zero))
        steps["states"].append(mean(rows, np.ones_like(S.value), V))
        exponent = max(exponent, float(np.max(by_cell[:, :-1][seen]) + np.max(moved)))
    found = {n: Known(*(np.stack(p) for p in zip(*x, strict=True))) for n, x in steps.items()}
    size = 4.0 * (n_k + EXTRA)
    sizes = _floors({"row_max": size * _peak(Q, K), "row_sum": size, "states": size * _peak(V)})
    sizes["states.floor_operand"] += n_k * _peak(V)
    raw = np.max(np.abs(Q.value) @ np.abs(K.value).T) * max(1.0, abs(scale))
    sizes["peak"] = float(max(raw, np.max(np.abs(V.value).sum(axis=0))))
    sizes |= {"exponent": exponent, "terms": n_k + STEP * n_k}
    return found, {**sizes, "shortest": float(d), "longest": float(d)}


def merge_units(
    inputs: Tensors, parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> Result:
    """Return the majorants of a merged output and logsumexp: a softmax over the parts."""
    parts = exact_finite(inputs["outputs"]).value.transpose(1, 0, 2)
    L = np.asarray(inputs["logsumexps"], np.float64).T
    rows = softmax(exact_finite(L), ~np.isneginf(L), parts=max(1, L.shape[1]))
    output = mean(rows, np.ones(L.shape), exact(parts))
    p = L.shape[1]
    size = 4.0 * (p + EXTRA)
    sizes = _floors({"output": size * _peak(exact(parts)), "logsumexp": size})
    small = float(np.max((rows.weights[:, :-1] < SMALL).sum(axis=1), initial=0.0))
    sizes["output.floor_operand"] += small * _peak(exact(parts))
    moved = rows.exponent.accumulated + rows.division[:, None]
    sizes["exponent"] = float(np.max(moved, initial=0.0))
    lse = rows.logsumexp
    return {"output": output, "logsumexp": lse}, {**sizes, "terms": p + EXTRA}


def score_units(
    inputs: Tensors, parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> Result:
    """Return the majorant of the scores of every kind."""
    x = {name: exact_finite(t) for name, t in inputs.items()}
    q, k = x["query"], x["key"]
    kind, d = parameters["kind"], float(q.value.shape[1])
    if kind == "additive":
        z_q = contract("ic,ca->ia", q, x["w_query"], d)
        z_k = contract("jc,ca->ja", k, x["w_key"], float(k.value.shape[1]))
        z = plus(Known(*(t[:, None] for t in z_q)), Known(*(t[None] for t in z_k)))
        scores = contract("ija,a->ij", tanh(z), x["v"], float(z.value.shape[2]))
    elif kind == "general":
        projected = contract("ic,ce->ie", q, x["weight"], d)
        scores = contract("ie,je->ij", projected, k, float(k.value.shape[1]))
    elif kind == "location":
        scores = contract("ic,cj->ij", q, x["weight"], d)
    elif kind == "cosine":
        scores = _cosine(q, k, float(x["strength"].value))
    else:
        scores = contract("ic,jc->ij", q, k, d)
        scores = scaled(scores, 1.0 / np.sqrt(d) if kind == "scaled_dot" else 1.0)
    widths = (*q.value.shape[1:], *k.value.shape[1:], *(w.value.size for w in (x.get("v"),) if w))
    sizes = _floors({"scores": 4.0 * (max(widths) + FUNCTION) ** 2 * _peak(*x.values()) ** 3})
    sizes |= {"shortest": float(min(widths)), "longest": float(max(widths))}
    return {"scores": stored(scores)}, sizes


def _cosine(q: Known, k: Known, strength: float) -> Known:
    """Return β q·k / (‖q‖ ‖k‖): each length errs by d/2 + 4 units, relatively."""
    unit = []
    for x in (q, k):
        length = np.sqrt(np.sum(x.value**2, axis=1, keepdims=True))
        hat = exact(x.value / np.where(length > 0, length, 1.0))
        unit.append(rounded(hat, x.value.shape[1] / 2 + EXTRA))
    scores = contract("ic,jc->ij", unit[0], unit[1], float(q.value.shape[1]))
    return times(exact(np.asarray(strength)), scores, 2.0)
