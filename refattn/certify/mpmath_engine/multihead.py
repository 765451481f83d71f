"""Multi-head attention in the second engine: concatenated heads, projected once.

Y = Σ_h g_h O_h W_h, each head with its projections; gradients by the product rule.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from mpmath import mp, mpf

from refattn.certify.mpmath_engine.attention import (
    Gradients,
    Options,
    Scores,
    gradients,
    scale,
    solve_head,
)
from refattn.certify.mpmath_engine.numbers import Array, Matrix, load, matmul, number, total


class Part(NamedTuple):
    """One head of one item."""

    X: Matrix
    Y: Matrix
    Q: Matrix
    K: Matrix
    V: Matrix
    f: Scores


def flip(a: Matrix) -> Matrix:
    """Transpose."""
    return Matrix(a.n.T, a.e)


def dense(rows: list[dict[int, Any]], n: int) -> Array:
    """Write rows by key as a full matrix."""
    full = np.empty((len(rows), n), dtype=object)
    for i, row in enumerate(rows):
        for j in range(n):
            full[i, j] = row.get(j, mpf(0))
    return full


class Views(NamedTuple):
    """The problem and its parts, each computed when first asked for."""

    t: Mapping[str, Array]
    gates: list[Any]
    part: Callable[[int, int], Part]
    projected: Callable[[int, int], Array]
    d_parts: Callable[[int, int], tuple[Array, Array, Array]]


def views(t: Mapping[str, Array], p: Mapping[str, Any], c: Mapping[str, Any]) -> Views:
    """Prepare the parts of a problem at the present precision."""
    b_, n_q, _ = t["query_input"].shape
    h_, d_k, n_k = t["w_query"].shape[0], t["w_query"].shape[2], t["source_input"].shape[1]
    stand_in = {"query": np.zeros((b_, h_, n_q, d_k)), "key": np.zeros((b_, h_, n_k, d_k))}
    o = Options(stand_in, p, c, b_, h_, h_, n_q, n_k)
    gates = [number(g) for g in t["head_gates"]] if "head_gates" in t else [mpf(1)] * h_

    @cache
    def part(b: int, h: int) -> Part:
        X, Y = load(t["query_input"][b]), load(t["source_input"][b])
        Q, K = matmul(X, load(t["w_query"][h])), matmul(Y, load(t["w_key"][h]))
        V = matmul(Y, load(t["w_value"][h]))
        return Part(X, Y, Q, K, V, solve_head(o, b, h, matmul(Q, flip(K)), V))

    @cache
    def projected(b: int, h: int) -> Array:
        W = load(t["w_output"][h])
        return np.dot(np.array(part(b, h).f.O, dtype=object), W.n) * mp.ldexp(1, W.e)

    @cache
    def d_parts(b: int, h: int) -> tuple[Array, Array, Array]:
        x, s = part(b, h), scale(o)
        d = matmul(load(t["d_output"][b]), flip(load(t["w_output"][h])))
        dO = Matrix(d.n * gates[h], d.e)
        g: Gradients = gradients(o, x.f, dO, x.V, None, b, h)
        dX, kept = dense(g.d_scores, n_k), dense(x.f.kept, n_k)
        dQ = np.dot(dX, x.K.n) * (s * mp.ldexp(1, x.K.e))
        dK = np.dot(dX.T, x.Q.n) * (s * mp.ldexp(1, x.Q.e))
        return dQ, dK, np.dot(kept.T, dO.n) * mp.ldexp(1, dO.e)

    return Views(t, gates, part, projected, d_parts)


def d_weight(v: Views, k: int, h: int, row: int, column: int) -> Any:
    """Return an element of Xᵀ dQ, Yᵀ dK or Yᵀ dV, added over items."""
    terms = []
    for b in range(len(v.t["query_input"])):
        source = v.part(b, h).X if k == 0 else v.part(b, h).Y
        terms.append(np.dot(source.n[:, row], v.d_parts(b, h)[k][:, column]))
        terms[-1] *= mp.ldexp(1, source.e)
    return total(terms)


def d_input(v: Views, names: dict[str, int], b: int, row: int, column: int) -> Any:
    """Return an element of Σ_h dQ W_qᵀ, or of Σ_h (dK W_kᵀ + dV W_vᵀ)."""
    terms = []
    for h in range(len(v.gates)):
        for name, k in names.items():
            W = load(v.t[name][h])
            terms.append(np.dot(v.d_parts(b, h)[k][row], W.n[column]) * mp.ldexp(1, W.e))
    return total(terms)


def d_projection(v: Views, h: int, feature: int, column: int) -> Any:
    """Return an element of g_h O_hᵀ dY, added over items."""
    terms = []
    for b, dY in enumerate(v.t["d_output"]):
        O = v.part(b, h).f.O
        terms += [O[i][feature] * number(dY[i, column]) for i in range(len(O))]
    return v.gates[h] * total(terms)


def d_gate(v: Views, h: int) -> Any:
    """Return Σ dY·(O_h W_h)."""
    terms = []
    for b, dY in enumerate(v.t["d_output"]):
        flat = zip(v.projected(b, h).reshape(-1), dY.reshape(-1), strict=True)
        terms += [x * number(y) for x, y in flat]
    return total(terms)


def evaluator(t: Mapping[str, Array], p: Mapping[str, Any], c: Mapping[str, Any]) -> Any:
    """Return a function from output name and index to its value at the present precision."""
    v = views(t, p, c)

    def value(name: str, index: tuple[int, ...]) -> Any:
        if name == "output":
            b, i, e = index
            return total([g * v.projected(b, h)[i, e] for h, g in enumerate(v.gates)])
        if name == "d_query_input":
            return d_input(v, {"w_query": 0}, *index)
        if name == "d_source_input":
            return d_input(v, {"w_key": 1, "w_value": 2}, *index)
        if name == "d_w_output":
            return d_projection(v, *index)
        if name == "d_head_gates":
            return d_gate(v, *index)
        return d_weight(v, ("d_w_query", "d_w_key", "d_w_value").index(name), *index)

    return value
