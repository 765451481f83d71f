"""The remaining operations in the second engine."""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from mpmath import mp, mpf

from refattn.certify.mpmath_engine.numbers import Array, load, number, real, total

Tensors = Mapping[str, Array]
"""Input arrays by name."""

Options = Mapping[str, Any]
"""Parameters or conventions by name."""


def alibi_evaluator(t: Tensors, p: Options, c: Options) -> Any:
    """Slopes by repeated square roots of powers of two; bias by distance."""
    heads = int(p["heads"])
    whole = 1
    while 2 * whole <= heads:
        whole *= 2
    alignment = c.get("alignment", "top_left")
    named = {"top_left": 0, "bottom_right": int(p["n_k"]) - int(p["n_q"])}
    offset = named[alignment] if isinstance(alignment, str) else int(alignment)

    def slope(h: int) -> Any:
        if c.get("slope_rule", "authors") == "geometric":
            return mp.root(mpf(2) ** (-8 * (h + 1)), heads)
        if h < whole:
            return mp.root(mpf(2) ** (-8 * (h + 1)), whole)
        return mp.root(mpf(2) ** (-8 * (2 * (h - whole) + 1)), 2 * whole)

    def value(name: str, index: tuple[int, ...]) -> Any:
        if name == "slopes":
            return slope(index[0])
        h, i, j = index
        steps = {"absolute": -abs(i + offset - j), "signed": j - i - offset, "column": j}
        return slope(h) * steps[c.get("distance", "absolute")]

    return value


def tiles_evaluator(t: Tensors, p: Options, c: Options) -> Any:
    """Run the recurrence of Algorithm 1, lines 9 to 13, tile by tile."""
    Q, K, V = load(t["query"]), load(t["key"]), load(t["value"])
    s, width, n_k = number(p.get("scale", 1.0)), int(p["block_cols"]), len(K.n)
    states: dict[tuple[int, int], tuple[Any, Any, list[Any]]] = {}
    for i in range(len(Q.n)):
        m, l, O = mpf("-inf"), mpf(0), [mpf(0)] * V.n.shape[1]
        for step, start in enumerate(range(0, n_k, width)):
            tile = range(start, min(start + width, n_k))
            S = {j: s * real(np.dot(Q.n[i], K.n[j]), Q.e + K.e) for j in tile}
            m_tilde = max(S.values())
            P_tilde = {j: mp.exp(x - m_tilde) for j, x in S.items()}
            l_tilde = total(P_tilde.values())
            m_new = max(m, m_tilde)
            l_new = mp.exp(m - m_new) * l + mp.exp(m_tilde - m_new) * l_tilde
            old, new = l * mp.exp(m - m_new) / l_new, mp.exp(m_tilde - m_new) / l_new
            O = [
                old * x
                + new * total([P * V.n[j, k] for j, P in P_tilde.items()]) * mp.ldexp(1, V.e)
                for k, x in enumerate(O)
            ]
            m, l = m_new, l_new
            states[step, i] = (m, l, O)

    def value(name: str, index: tuple[int, ...]) -> Any:
        m, l, O = states[index[0], index[1]]
        if name == "row_max":
            return m
        return l if name == "row_sum" else O[index[2]]

    return value


def merge_evaluator(t: Tensors, p: Options, c: Options) -> Any:
    """Weigh each part by e^{L_p - L}, L = log Σ e^{L_p}."""

    def value(name: str, index: tuple[int, ...]) -> Any:
        i = index[0]
        L = {k: number(x) for k, x in enumerate(t["logsumexps"][:, i]) if x != -np.inf}
        if not L:
            return mpf("-inf") if name == "logsumexp" else mpf(0)
        whole = mp.log(total([mp.exp(x) for x in L.values()]))
        if name == "logsumexp":
            return whole
        column = t["outputs"][:, i, index[1]]
        return total([mp.exp(x - whole) * number(column[k]) for k, x in L.items()])

    return value


def score_evaluator(t: Tensors, p: Options, c: Options) -> Any:
    """Score one pair, sum by sum."""
    kind = p["kind"]

    def dot(a: Any, b: Any) -> Any:
        return total([number(x) * number(y) for x, y in zip(a, b, strict=True)])

    def value(name: str, index: tuple[int, ...]) -> Any:
        i, j = index
        q = t["query"][i]
        if kind == "location":
            return dot(q, t["weight"][:, j])
        k = t["key"][j]
        if kind == "additive":
            hidden = [
                mp.tanh(dot(q, t["w_query"][:, a]) + dot(k, t["w_key"][:, a])) * number(v)
                for a, v in enumerate(t["v"])
            ]
            return total(hidden)
        if kind == "general":
            return total([number(q[a]) * dot(t["weight"][a], k) for a in range(len(q))])
        if kind == "cosine":
            cosine = dot(q, k) / mp.sqrt(dot(q, q)) / mp.sqrt(dot(k, k))
            return number(t.get("strength", np.float64(1.0))) * cosine
        return dot(q, k) / (mp.sqrt(len(q)) if kind == "scaled_dot" else 1)

    return value


def _sum(terms: Iterable[Fraction]) -> Fraction:
    result = Fraction(0)
    for term in terms:
        result += term
    return result


def _inner(a: Array, b: Array) -> Fraction:
    return _sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True))


def importance_evaluator(t: Tensors, p: Options, c: Options) -> Any:
    """Compute importance in fractions; compare heads by squared normalised importance."""
    A, B = t["head_outputs"], t["d_head_outputs"]
    layers, x, h, n = (int(size) for size in A.shape[:4])
    granularity = c.get("granularity", "example")

    def importance(layer: int, head: int) -> Fraction:
        products = [
            [_inner(A[layer, s, head, i], B[layer, s, head, i]) for i in range(n)] for s in range(x)
        ]
        if granularity == "token":
            return _sum(abs(v) for row in products for v in row) / (x * n)
        if granularity == "example":
            return _sum(abs(_sum(row)) for row in products) / x
        return abs(_sum(v for row in products for v in row)) / x

    table = [[importance(layer, head) for head in range(h)] for layer in range(layers)]
    lengths = [_sum(v * v for v in row) for row in table]
    ranks = [
        v * v / lengths[k] if lengths[k] else Fraction(0) for k in range(layers) for v in table[k]
    ]

    def value(name: str, index: tuple[int, ...]) -> Any:
        if name == "order":
            return sorted(range(len(ranks)), key=lambda k: (ranks[k], k))[index[0]]
        v = table[index[0]][index[1]]
        exact = mpf(v.numerator) / v.denominator
        if name == "importance" or not lengths[index[0]]:
            return exact
        whole = lengths[index[0]]
        return exact / mp.sqrt(mpf(whole.numerator) / whole.denominator)

    return value


def keep_evaluator(t: Tensors, p: Options, c: Options) -> Any:
    """Draw each word of Philox4x32-10 from its own block, on an array of four words."""
    seed, first, shape = int(p["seed"]), int(p.get("offset", 0)), tuple(p["shape"])
    limit = Fraction(p["keep_probability"]) * 2**32 // 1

    def value(name: str, index: tuple[int, ...]) -> Any:
        e = int(np.ravel_multi_index(index, shape)) if shape else 0
        block = (first + e // 4) % 2**128
        x = [(block // 2 ** (32 * k)) % 2**32 for k in range(4)]
        for r in range(10):
            low = (seed + r * 0x9E3779B9) % 2**32
            high = (seed // 2**32 + r * 0xBB67AE85) % 2**32
            a, b = divmod(x[0] * 0xD2511F53, 2**32), divmod(x[2] * 0xCD9E8D57, 2**32)
            x = [b[0] ^ x[1] ^ low, b[1], a[0] ^ x[3] ^ high, a[1]]
        return int(x[e % 4] < limit)

    return value


def traffic_evaluator(t: Tensors, p: Options, c: Options) -> Any:
    """Count by closed forms: how often each matrix is passed over, times its size."""
    n_q, n_k, d = int(p["n_q"]), int(p["n_k"]), int(p["d"])
    q, k, s = n_q * d, n_k * d, n_q * n_k
    passes = -(-n_k // max(1, -(-int(p.get("sram", 1)) // (4 * d))))
    counts = {
        "standard": (q + 2 * k + 2 * s, q + 2 * s),
        "standard_backward": (3 * q + 2 * k + 5 * s, q + 2 * k + 2 * s),
        "tiled": (2 * k + passes * (2 * q + 2 * n_q), (1 + passes) * (q + 2 * n_q)),
        "tiled_backward": (2 * k + passes * (4 * q + 2 * n_q), q + 4 * k + passes * q),
    }

    def value(name: str, index: tuple[int, ...]) -> Any:
        return counts[p["algorithm"]][0 if name == "reads" else 1]

    return value
