"""Attention in the second engine, element by element.

O_i = Σ_j P_ij V_j with P_ij = e^{S_ij}/(Σ_k e^{S_ik} + e^{sink}), D_i = Σ_c dO_ic O_ic, and
dS_ij = P_ij (dP_ij - D_i + dL_i). NaN takes its course through the arithmetic of mpmath.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from mpmath import mp, mpf

from refattn.certify.mpmath_engine.numbers import Array, Matrix, load, matmul, number, real, total


class Options(NamedTuple):
    """The problem in the words of this engine."""

    t: Mapping[str, Array]
    p: Mapping[str, Any]
    c: Mapping[str, Any]
    b: int
    h: int
    h_k: int
    n_q: int
    n_k: int


class Scores(NamedTuple):
    """One head: cells read, weights (after dropout in `kept`), outputs, and what they need."""

    read: list[list[int]]
    state: list[str]
    P: list[dict[int, Any]]
    kept: list[dict[int, Any]]
    sink: list[Any]
    O: list[list[Any]]
    L: list[Any]
    slope: list[dict[int, Any]]


def options(t: Mapping[str, Array], p: Mapping[str, Any], c: Mapping[str, Any]) -> Options:
    """Read the sizes."""
    b, h, n_q, _ = t["query"].shape
    return Options(t, p, c, b, h, t["key"].shape[1], n_q, t["key"].shape[2])


def kv(o: Options, h: int) -> int:
    """Return the key/value head of a query head."""
    if o.c.get("head_map", "interleave") == "tile":
        return h % o.h_k
    return h * o.h_k // o.h


def shift(o: Options, b: int) -> int:
    """Return the position of the first query."""
    alignment = o.c.get("alignment", "top_left")
    if alignment == "top_left":
        return 0
    if alignment == "bottom_right":
        return length(o, "key_lengths", b, o.n_k) - length(o, "query_lengths", b, o.n_q)
    return int(alignment[b]) if isinstance(alignment, list | tuple) else int(alignment)


def length(o: Options, name: str, b: int, full: int) -> int:
    """Return the length of an item."""
    return int(o.t[name][b]) if name in o.t else full


def at(x: Array, b: int, h: int, i: int, j: int) -> Any:
    """Read an array that broadcasts to (b, h, n_q, n_k)."""
    index = (b, h, i, j)[4 - x.ndim :]
    return x[tuple(k if size > 1 else 0 for k, size in zip(index, x.shape, strict=True))]


def visible(o: Options, b: int, h: int, i: int, j: int) -> bool:
    """Tell whether query i may attend to key j."""
    if i >= length(o, "query_lengths", b, o.n_q) or j >= length(o, "key_lengths", b, o.n_k):
        return False
    reach = j - (i + shift(o, b))
    left, right = o.p.get("window") or (None, None)
    if o.p.get("causal") and reach > 0:
        return False
    if (left is not None and -reach > left) or (right is not None and reach > right):
        return False
    if "mask" in o.t and not at(o.t["mask"], b, h, i, j):
        return False
    return not ("bias" in o.t and at(o.t["bias"], b, h, i, j) == -np.inf)


def gap(o: Options, b: int, i: int, j: int) -> int:
    """Return the factor of the slope."""
    kind = o.c.get("distance", "absolute")
    p_i = i + shift(o, b)
    return {"absolute": -abs(j - p_i), "signed": j - p_i, "column": j}[kind]


def scale(o: Options) -> Any:
    """Return the scale as a real number."""
    if o.p.get("scale") is not None:
        return number(o.p["scale"])
    return 1 / mp.sqrt(o.t["query"].shape[-1])


def score(o: Options, raw: Any, b: int, h: int, i: int, j: int) -> tuple[Any, Any]:
    """Return a logit and the derivative of its cap."""
    x, added = raw, mpf(0)
    if "slopes" in o.t:
        added += number(o.t["slopes"][h]) * gap(o, b, i, j)
    if "bias" in o.t:
        bias = number(at(o.t["bias"], b, h, i, j))
        added += mpf(0) if mp.isinf(bias) else bias
    if o.p.get("softcap") is None:
        return x + added, mpf(1)
    cap = number(o.p["softcap"])
    if o.c.get("softcap_order", "before_bias") == "after_bias":
        t = mp.tanh((x + added) / cap)
        return cap * t, 1 - t * t
    t = mp.tanh(x / cap)
    return cap * t + added, 1 - t * t


def keep(o: Options, b: int, h: int, i: int, j: int) -> Any:
    """Return the factor of dropout."""
    if "keep" not in o.t:
        return mpf(1)
    kept = 1 if at(o.t["keep"], b, h, i, j) else 0
    return kept / number(o.p.get("keep_probability") or 1.0)


def head(o: Options, b: int, h: int) -> Scores:
    """Compute the weights and outputs of one head."""
    Q, K = load(o.t["query"][b, h]), load(o.t["key"][b, kv(o, h)])
    V = load(o.t["value"][b, kv(o, h)])
    return solve_head(o, b, h, matmul(Q, Matrix(K.n.T, K.e)), V)


def solve_head(o: Options, b: int, h: int, raw: Matrix, V: Matrix) -> Scores:
    """Compute the weights and outputs of one head from its raw scores and values."""
    s, policy = scale(o), o.c.get("empty_row", "zero")
    add = o.c.get("masked", "select") == "add"
    out = Scores([], [], [], [], [], [], [], [])
    for i in range(o.n_q):
        seen = [j for j in range(o.n_k) if visible(o, b, h, i, j)]
        live = bool(seen) or "sinks" in o.t
        read = list(range(o.n_k)) if add or (not live and policy != "zero") else seen
        weights: dict[int, Any] = {}
        slopes: dict[int, Any] = {}
        sink = mpf(0)
        if live:
            for j in read:
                S, slopes[j] = score(o, s * real(raw.n[i, j], raw.e), b, h, i, j)
                weights[j] = mp.exp(S if j in seen else S + mpf("-inf"))
            sink = mp.exp(number(o.t["sinks"][h])) if "sinks" in o.t else mpf(0)
        Z = total(weights.values()) + sink
        if not live:
            flat = {"zero": mpf(0), "nan": mp.nan, "uniform": mpf(1) / o.n_k}[policy]
            weights, Z = dict.fromkeys(read, flat), mpf(1)
        P = {j: w / Z for j, w in weights.items()}
        kept = {j: w * keep(o, b, h, i, j) for j, w in P.items()}
        row = [
            total([w * V.n[j, c] for j, w in kept.items()]) * mp.ldexp(1, V.e)
            for c in range(V.n.shape[1])
        ]
        out.read.append(read)
        out.state.append("live" if live else policy)
        out.P.append(P)
        out.kept.append(kept)
        out.sink.append(sink / Z)
        out.O.append(row)
        out.L.append(mp.log(Z) if live else mpf("-inf"))
        out.slope.append(slopes)
    return out


class Gradients(NamedTuple):
    """One head: dS and dX by row and key, and the gradient of the sink by row."""

    d_logits: list[dict[int, Any]]
    d_scores: list[dict[int, Any]]
    sink: list[Any]


def gradients(o: Options, f: Scores, dO: Matrix, V: Matrix, dL: Any, b: int, h: int) -> Gradients:
    """Compute the gradients of the logits of one head."""
    g = Gradients([], [], [])
    dP = matmul(dO, Matrix(V.n.T, V.e))
    adds = o.c.get("masked", "select") == "add"
    for i in range(o.n_q):
        if f.state[i] != "live":
            zero = mp.nan if f.state[i] == "nan" else mpf(0)
            read = f.read[i] if adds or f.state[i] == "nan" else []
            g.d_logits.append(dict.fromkeys(read, zero))
            g.d_scores.append(dict.fromkeys(read, zero))
            g.sink.append(zero)
            continue
        D = total([real(x, dO.e) * y for x, y in zip(dO.n[i], f.O[i], strict=True)])
        rest = (number(dL[i]) if dL is not None else mpf(0)) - D
        dS = {
            j: f.P[i][j] * (real(dP.n[i, j], dP.e) * keep(o, b, h, i, j) + rest) for j in f.read[i]
        }
        g.d_logits.append(dS)
        g.d_scores.append({j: x * f.slope[i][j] for j, x in dS.items()})
        g.sink.append(f.sink[i] * rest)
    return g


def column(rows: list[dict[int, Any]], j: int, x: Matrix, c: int) -> Any:
    """Return Σ_i rows_ij x_ic over the rows that read key j."""
    return total([row[j] * x.n[i, c] for i, row in enumerate(rows) if j in row]) * mp.ldexp(1, x.e)


class Views(NamedTuple):
    """The problem and its parts, each computed when first asked for."""

    o: Options
    forward: Callable[[int, int], Scores]
    back: Callable[[int, int], Gradients]
    matrix: Callable[[str, int, int], Matrix]


def views(o: Options) -> Views:
    """Prepare the parts of a problem at the present precision."""
    shape = (o.b, o.h, o.n_q, o.t["value"].shape[3])
    tensors = {"d_output": np.zeros(shape), **o.t}
    matrix = cache(lambda name, b, h: load(tensors[name][b, h]))
    forward = cache(lambda b, h: head(o, b, h))

    @cache
    def back(b: int, h: int) -> Gradients:
        dL = o.t["d_logsumexp"][b, h] if "d_logsumexp" in o.t else None
        V = matrix("value", b, kv(o, h))
        return gradients(o, forward(b, h), matrix("d_output", b, h), V, dL, b, h)

    return Views(o, forward, back, matrix)


def biased(v: Views, b: int, h: int) -> list[dict[int, Any]]:
    """Return the gradient of the sum to which bias and slopes belong."""
    after = v.o.p.get("softcap") is not None and v.o.c.get("softcap_order") == "after_bias"
    return v.back(b, h).d_scores if after else v.back(b, h).d_logits


def d_bias(v: Views, index: tuple[int, ...]) -> Any:
    """Add the gradients of all logits that share an element of the bias."""
    o, size = v.o, v.o.t["bias"].shape
    wide, place = (1,) * (4 - len(size)) + size, (0,) * (4 - len(index)) + index
    bs, hs, rows, keys = (
        [k] if n > 1 else range(full)
        for k, n, full in zip(place, wide, (o.b, o.h, o.n_q, o.n_k), strict=True)
    )
    parts = [biased(v, b, h)[i] for b in bs for h in hs for i in rows]
    return total([row.get(j, mpf(0)) for row in parts for j in keys])


def d_slope(v: Views, h: int) -> Any:
    """Add gradient times distance over all items, rows and keys of a head."""
    return total(
        [
            x * gap(v.o, b, i, j)
            for b in range(v.o.b)
            for i, row in enumerate(biased(v, b, h))
            for j, x in row.items()
        ]
    )


def d_query(v: Views, b: int, h: int, i: int, c: int) -> Any:
    """dq_i = scale Σ_j dX_ij k_j."""
    K = v.matrix("key", b, kv(v.o, h))
    terms = [x * K.n[j, c] for j, x in v.back(b, h).d_scores[i].items()]
    return scale(v.o) * total(terms) * mp.ldexp(1, K.e)


def shared(v: Views, name: str, b: int, group: int, j: int, c: int) -> Any:
    """Add what all query heads of a group give to a key or a value."""
    heads = [h for h in range(v.o.h) if kv(v.o, h) == group]
    if name == "d_value":
        parts = [column(v.forward(b, h).kept, j, v.matrix("d_output", b, h), c) for h in heads]
        return total(parts)
    parts = [column(v.back(b, h).d_scores, j, v.matrix("query", b, h), c) for h in heads]
    return scale(v.o) * total(parts)


def evaluator(t: Mapping[str, Array], p: Mapping[str, Any], c: Mapping[str, Any]) -> Any:
    """Return a function from output name and index to its value at the present precision."""
    v = views(options(t, p, c))

    def value(name: str, index: tuple[int, ...]) -> Any:
        if name == "output":
            return v.forward(*index[:2]).O[index[2]][index[3]]
        if name == "logsumexp":
            return v.forward(*index[:2]).L[index[2]]
        if name == "d_query":
            return d_query(v, *index)
        if name in ("d_key", "d_value"):
            return shared(v, name, *index)
        if name == "d_bias":
            return d_bias(v, index)
        if name == "d_slopes":
            return d_slope(v, *index)
        return total([x for b in range(v.o.b) for x in v.back(b, *index).sink])

    return value
