"""Linear bias, alignment scores and head importance, in ball arithmetic or exactly."""

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

import numpy as np
from flint import arb, fmpq

from refattn.certify.errors import CertifyError
from refattn.certify.exact import (
    ZERO,
    Array,
    Cells,
    Grid,
    Value,
    add,
    exact_values,
    grid,
    integers,
    multiply,
    power,
    product,
    transposed,
)
from refattn.certify.setting import choose, distance, expect, offsets_of


def two_to(exponent: fmpq) -> Value:
    """Return 2^exponent, exact for an integer exponent."""
    if exponent.q == 1:
        return power(int(exponent.p))
    return (arb(2).log() * exponent).exp()


def geometric_slopes(heads: int) -> list[Value]:
    """m_h = 2^(-8(h+1)/H)."""
    return [two_to(fmpq(-8 * (h + 1), heads)) for h in range(heads)]


def authors_slopes(heads: int) -> list[Value]:
    """Return the geometric slopes of a power of two; else interleave those of the next power."""
    nearest = 1 << (heads.bit_length() - 1)
    if nearest == heads:
        return geometric_slopes(heads)
    return geometric_slopes(nearest) + geometric_slopes(2 * nearest)[::2][: heads - nearest]


def prepare_alibi(
    inputs: Mapping[str, Array], parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> Callable[[], dict[str, Cells]]:
    """Write the slopes and the bias of every head."""
    expect(inputs, frozenset(), "input")
    expect(parameters, frozenset({"heads", "n_q", "n_k"}), "parameter")
    expect(conventions, frozenset({"alignment", "distance", "slope_rule"}), "convention")
    heads, n_q, n_k = (int(parameters[name]) for name in ("heads", "n_q", "n_k"))
    choice = choose(
        conventions,
        {
            "distance": ("absolute", "signed", "column"),
            "slope_rule": ("authors", "geometric"),
        },
    )
    (offset,) = offsets_of(conventions.get("alignment", "top_left"), n_q, n_k, [n_q], [n_k])
    rule = authors_slopes if choice["slope_rule"] == "authors" else geometric_slopes

    def evaluate() -> dict[str, Cells]:
        slopes = rule(heads)
        bias = [
            multiply(m, fmpq(distance(choice["distance"], i + offset, j)))
            for m in slopes
            for i in range(n_q)
            for j in range(n_k)
        ]
        return {"slopes": Cells((heads,), slopes), "bias": Cells((heads, n_q, n_k), bias)}

    return evaluate


def square_root(x: fmpq) -> Value:
    """Return √x for x ≥ 0, exact for the square of a rational number."""
    p, q = int(x.p), int(x.q)
    root = fmpq(isqrt(p), isqrt(q))
    return root if root * root == x else arb(x).sqrt()


def divide(a: fmpq, b: Value) -> Value:
    """Return a/b, exact for an exact b or a zero a."""
    if a == 0:
        return ZERO
    return a / b if isinstance(b, fmpq) else arb(a) / b


def _additive(inputs: Mapping[str, Array]) -> list[Value]:
    """s_ij = vᵀ tanh(W_qᵀ q_i + W_kᵀ k_j)."""
    d_a = inputs["v"].shape[0]
    from_query = exact_values(product(grid(inputs["query"]), grid(inputs["w_query"])))
    from_key = exact_values(product(grid(inputs["key"]), grid(inputs["w_key"])))
    v = exact_values(grid(inputs["v"].reshape(1, -1)))
    scores = []
    for i in range(inputs["query"].shape[0]):
        for j in range(inputs["key"].shape[0]):
            score: Value = ZERO
            for a in range(d_a):
                inner = from_query[i * d_a + a] + from_key[j * d_a + a]
                if inner != 0:
                    score = add(score, multiply(arb(inner).tanh(), v[a]))
            scores.append(score)
    return scores


def _norms(x: Grid) -> list[fmpq]:
    """Return the squared length of every row."""
    unit = power(2 * x.e)
    return [sum((t * t for t in row), 0) * unit for row in x.rows()]


def _cosine(inputs: Mapping[str, Array]) -> list[Value]:
    """s_ij = β q_i·k_j / (|q_i| |k_j|)."""
    Q, K = grid(inputs["query"]), grid(inputs["key"])
    (beta,) = exact_values(grid(np.asarray(inputs.get("strength", 1.0)).reshape(1, 1)))
    dots = exact_values(product(Q, transposed(K)))
    lengths = [(a * b) for a in _norms(Q) for b in _norms(K)]
    if any(x == 0 for x in lengths):
        raise CertifyError("a cosine score of a zero vector is undefined")
    return [divide(beta * x, square_root(y)) for x, y in zip(dots, lengths, strict=True)]


def prepare_score(
    inputs: Mapping[str, Array], parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> Callable[[], dict[str, Cells]]:
    """Write the scores of one kind."""
    known = frozenset({"query", "key", "w_query", "w_key", "v", "weight", "strength"})
    expect(inputs, known, "input")
    expect(parameters, frozenset({"kind"}), "parameter")
    expect(conventions, frozenset(), "convention")
    kind, Q = parameters["kind"], grid(inputs["query"])
    columns = inputs["weight"].shape[1] if kind == "location" else inputs["key"].shape[0]

    def scores() -> list[Value]:
        if kind == "additive":
            return _additive(inputs)
        if kind == "cosine":
            return _cosine(inputs)
        if kind == "location":
            return list(exact_values(product(Q, grid(inputs["weight"]))))
        if kind == "general":
            Q_W = product(Q, grid(inputs["weight"]))
            return list(exact_values(product(Q_W, transposed(grid(inputs["key"])))))
        if kind not in ("dot", "scaled_dot"):
            raise CertifyError(f"score kind is {kind!r}, which certification does not define")
        dots = exact_values(product(Q, transposed(grid(inputs["key"]))))
        if kind == "dot":
            return list(dots)
        root = square_root(fmpq(inputs["query"].shape[-1]))
        return [divide(x, root) for x in dots]

    shape = (inputs["query"].shape[0], columns)
    return lambda: {"scores": Cells(shape, scores())}


def exact_importance(inputs: Mapping[str, Array], granularity: str) -> list[list[fmpq]]:
    """Return the importance of every head of every layer, which is rational."""
    a, b = inputs["head_outputs"], inputs["d_head_outputs"]
    layers, x, h, n, d = a.shape
    numbers_a, e_a = integers(a.reshape(-1).tolist())
    numbers_b, e_b = integers(b.reshape(-1).tolist())
    unit = power(e_a + e_b)

    def token(at: tuple[int, int, int, int]) -> int:
        start = int(np.ravel_multi_index((*at, 0), a.shape))
        return sum(numbers_a[k] * numbers_b[k] for k in range(start, start + d))

    result = []
    for layer in range(layers):
        line = []
        for head in range(h):
            sums = [[token((layer, s, head, t)) for t in range(n)] for s in range(x)]
            if granularity == "token":
                mean = fmpq(sum(abs(t) for row in sums for t in row), x * n)
            elif granularity == "example":
                mean = fmpq(sum(abs(sum(row)) for row in sums), x)
            else:
                mean = fmpq(abs(sum(t for row in sums for t in row)), x)
            line.append(mean * unit)
        result.append(line)
    return result


def prepare_importance(
    inputs: Mapping[str, Array], parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> Callable[[], dict[str, Any]]:
    """Write importance, its l2 normalisation by layer, and the order of pruning."""
    expect(inputs, frozenset({"head_outputs", "d_head_outputs"}), "input")
    expect(parameters, frozenset(), "parameter")
    expect(conventions, frozenset({"granularity"}), "convention")
    granularity = choose(conventions, {"granularity": ("example", "token", "batch")})
    importance = exact_importance(inputs, granularity["granularity"])
    shape = (len(importance), len(importance[0]))
    squares = [sum((x * x for x in line), ZERO) for line in importance]
    ranks = [
        x * x / total if total else ZERO
        for line, total in zip(importance, squares, strict=True)
        for x in line
    ]
    order = sorted(range(len(ranks)), key=lambda k: (ranks[k], k))

    def evaluate() -> dict[str, Any]:
        normalized = [
            divide(x, square_root(total)) if total else ZERO
            for line, total in zip(importance, squares, strict=True)
            for x in line
        ]
        return {
            "importance": Cells(shape, [x for line in importance for x in line]),
            "normalized": Cells(shape, normalized),
            "order": np.array(order, dtype=np.int64),
        }

    return evaluate
