"""Multi-head attention in the second engine: concatenated heads, projected once.

Y = Σ_h g_h O_h W_h, each head with its projections; gradients by the product rule.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from mpmath import mp, mpf

from refattn.certify.mpmath_engine.attention import (
    Gradients,
    Options,
    Scores,
    gradients,
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


def evaluator(t: Mapping[str, Array], p: Mapping[str, Any], c: Mapping[str, Any]) -> Any:
    """Return a function from output name and index to its value at the present precision."""
    b_, n_q, _ = t["query_input"].shape
    h_, d_k, n_k = t["w_query"].shape[0], t["w_query"].shape[2], t["source_input"].shape[1]
    stand_in = {"query": np.zeros((b_, h_, n_q, d_k)), "key": np.zeros((b_, h_, n_k, d_k))}
    o = Options(stand_in, p, c, b_, h_, h_, n_q, n_k)
    s = number(p["scale"]) if p.get("scale") is not None else 1 / mp.sqrt(d_k)
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
    def d_head(b: int, h: int) -> Matrix:
        dO = matmul(load(t["d_output"][b]), flip(load(t["w_output"][h])))
        return Matrix(dO.n * gates[h], dO.e)

    @cache
    def d_parts(b: int, h: int) -> tuple[Array, Array, Array]:
        x = part(b, h)
        g: Gradients = gradients(o, x.f, d_head(b, h), x.V, None, b, h)
        dX, kept = dense(g.d_scores, n_k), dense(x.f.kept, n_k)
        dQ = np.dot(dX, x.K.n) * (s * mp.ldexp(1, x.K.e))
        dK = np.dot(dX.T, x.Q.n) * (s * mp.ldexp(1, x.Q.e))
        dO = d_head(b, h)
        return dQ, dK, np.dot(kept.T, dO.n) * mp.ldexp(1, dO.e)

    def weight(name: str, h: int, row: int, column: int) -> Any:
        k = ("d_w_query", "d_w_key", "d_w_value").index(name)
        terms = []
        for b in range(b_):
            source = part(b, h).X if k == 0 else part(b, h).Y
            inner = np.dot(source.n[:, row], d_parts(b, h)[k][:, column])
            terms.append(inner * mp.ldexp(1, source.e))
        return total(terms)

    def back_through(name: str, h: int, d: Array, row: int, column: int) -> Any:
        W = load(t[name][h])
        return np.dot(d[row], W.n[column]) * mp.ldexp(1, W.e)

    def value(name: str, index: tuple[int, ...]) -> Any:
        if name == "output":
            b, i, e = index
            return total([gates[h] * projected(b, h)[i, e] for h in range(h_)])
        if name == "d_query_input":
            b, i, e = index
            dQ = [d_parts(b, h)[0] for h in range(h_)]
            return total([back_through("w_query", h, dQ[h], i, e) for h in range(h_)])
        if name == "d_source_input":
            b, j, e = index
            terms = []
            for h in range(h_):
                _, dK, dV = d_parts(b, h)
                terms.append(back_through("w_key", h, dK, j, e))
                terms.append(back_through("w_value", h, dV, j, e))
            return total(terms)
        if name == "d_w_output":
            h, v, e = index
            terms = []
            for b in range(b_):
                dY = load(t["d_output"][b])
                inner = total([part(b, h).f.O[i][v] * dY.n[i, e] for i in range(n_q)])
                terms.append(inner * mp.ldexp(1, dY.e))
            return gates[h] * total(terms)
        if name == "d_head_gates":
            (h,) = index
            terms = []
            for b in range(b_):
                dY = load(t["d_output"][b])
                terms.append(total((projected(b, h) * dY.n).reshape(-1)) * mp.ldexp(1, dY.e))
            return total(terms)
        return weight(name, *index)

    return value
