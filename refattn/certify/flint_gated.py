"""Gated cross-attention in ball arithmetic, by the direct formulas.

Layer normalisation makes the queries irrational, so this operation is computed in values of which
only those that structure makes exact (closed gates, rows without media, one key) are exact.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flint import arb, fmpq

from refattn.certify.errors import CertifyError
from refattn.certify.exact import ZERO, Array, Cells, Value, add, enclosed, multiply, rational
from refattn.certify.logits import scale_of
from refattn.certify.setting import choose, expect
from refattn.certify.values import (
    Rows,
    by_column,
    column_sums,
    dot,
    flat,
    loaded,
    matmul,
    minus,
    plus,
    scaled,
    sign,
    softmax,
    softmax_backward,
    turned,
)

PARAMETER_INPUTS = (
    *("norm_weight", "norm_bias", "w_query", "w_key", "w_value", "w_output", "attention_gate"),
    *("feed_forward_norm_weight", "feed_forward_norm_bias", "w_up", "w_down"),
    *("feed_forward_gate", "media_norm_weight", "media_norm_bias"),
)
"""Names of the block's parameters, the last two of which may be absent."""

INPUTS = frozenset((*PARAMETER_INPUTS, "query_input", "media", "media_locations", "d_output"))
"""Names of the input tensors."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "attend": ("immediate", "preceding"),
    "before_media": ("zero", "uniform", "everything"),
    "cached_media": (False, True),
    "activation": ("squared_relu", "gelu"),
}
"""Conventions and their values; the first of each is the default."""


class Seen(NamedTuple):
    """What each token of one item may attend to."""

    keys: list[list[int]]
    before: list[bool]
    """No medium stands before the token."""


class Normal(NamedTuple):
    """Normalised rows: γ x̂ + β, x̂, and 1/√(var + ε) by row."""

    rows: Rows
    x_hat: Rows
    inverse: list[Value]


class State(NamedTuple):
    """One item at the present precision."""

    text: Normal
    media: Normal | None
    tokens: Rows
    heads: list[tuple[Rows, Rows, Rows]]
    weights: list[list[list[Value]]]
    """By head and row, over the keys that the row sees."""
    mixed: list[Rows]
    attended: Rows
    second: Normal
    hidden: Rows
    fed: Rows
    output: Rows


class Problem(NamedTuple):
    """The inputs as rational numbers, and the options."""

    t: dict[str, Any]
    seen: list[Seen]
    choice: dict[str, Any]
    epsilon: fmpq
    parameters: Mapping[str, Any]


def seen_of(
    marks: Array | None, rows: int, shape: tuple[int, int], choice: Mapping[str, Any]
) -> Seen:
    """Return the keys of every token of one item: media are counted from 1."""
    m, n_m = shape
    every = list(range(m * n_m))
    if marks is None:
        return Seen([every] * rows, [False] * rows)
    keys, before = [], []
    for i in range(rows):
        phi = int(marks.sum() if choice["cached_media"] else marks[: i + 1].sum())
        if phi > m:
            raise CertifyError(f"an item marks {phi} media, but it has {m}")
        first = phi - 1 if choice["attend"] == "immediate" else 0
        own = list(range(max(first, 0) * n_m, phi * n_m))
        everything = phi == 0 and choice["before_media"] != "zero"
        keys.append(every if everything else own)
        before.append(phi == 0)
    return Seen(keys, before)


def normalise(rows: Rows, weight: list[Value], bias: list[Value], epsilon: fmpq) -> Normal:
    """Return layer normalisation of rows."""
    found, hats, inverses = [], [], []
    for row in rows:
        share = fmpq(1, len(row))
        mean = minus(multiply(dot(row, [fmpq(1)] * len(row)), share))
        centred = [add(x, mean) for x in row]
        variance = multiply(dot(centred, centred), share)
        inverse = enclosed(add(variance, epsilon)).rsqrt()
        x_hat = scaled(centred, inverse)
        terms = zip(weight, x_hat, bias, strict=True)
        found.append([add(multiply(g, x), b) for g, x, b in terms])
        hats.append(x_hat)
        inverses.append(inverse)
    return Normal(found, hats, inverses)


def normalise_backward(state: Normal, weight: list[Value], d_rows: Rows) -> tuple[Rows, Rows]:
    """Return the gradient of the rows, and those of weight and bias as two rows."""
    d_x: Rows = []
    for dy, x_hat, inverse in zip(d_rows, state.x_hat, state.inverse, strict=True):
        g = [multiply(a, b) for a, b in zip(dy, weight, strict=True)]
        share = fmpq(-1, len(g))
        mean_g = multiply(dot(g, [fmpq(1)] * len(g)), share)
        mean_gx = multiply(dot(g, x_hat), share)
        terms = zip(g, x_hat, strict=True)
        d_x.append([multiply(inverse, add(add(a, mean_g), multiply(x, mean_gx))) for a, x in terms])
    products = [
        [multiply(a, b) for a, b in zip(dy, x_hat, strict=True)]
        for dy, x_hat in zip(d_rows, state.x_hat, strict=True)
    ]
    return d_x, [column_sums(products), column_sums(d_rows)]


def activated(x: Value, kind: str) -> Value:
    """Return the activation of a value."""
    if kind == "gelu":
        return multiply(x, _distribution(x))
    return multiply(x, x) if sign(x) > 0 else ZERO


def slope(x: Value, kind: str) -> Value:
    """Return the derivative of the activation."""
    if kind == "gelu":
        ball = enclosed(x)
        density = (-ball * ball / 2).exp() / (2 * arb.pi()).sqrt()
        return add(_distribution(x), multiply(x, density))
    return multiply(x, fmpq(2)) if sign(x) > 0 else ZERO


def _distribution(x: Value) -> Value:
    return (-enclosed(x) / arb(2).sqrt()).erfc() / 2


def _gate(values: list[fmpq], features: int) -> list[Value]:
    """Return tanh of a gate for every feature; that of 0 is exact."""
    found = [ZERO if a == 0 else arb(a).tanh() for a in values]
    return found * features if len(found) == 1 else found


def _gate_slope(values: list[fmpq]) -> list[Value]:
    return [fmpq(1) if a == 0 else arb(a).cosh() ** -2 for a in values]


def _attend(p: Problem, item: int, parts: tuple[Rows, Rows, Rows]) -> tuple[list[Any], Rows]:
    """Return the weights of one head by row, over the keys seen, and its output."""
    Q, K, V = parts
    exact = scale_of(dict(p.parameters), len(Q[0]))
    scale = exact.exact if exact.exact is not None else exact.ball()
    weights: list[Any] = []
    mixed: Rows = []
    columns = turned(V)
    for q, keys, before in zip(Q, p.seen[item].keys, p.seen[item].before, strict=True):
        if before and p.choice["before_media"] == "uniform":
            P: list[Value] = [fmpq(1, len(keys))] * len(keys)
        else:
            P = softmax([multiply(dot(q, K[j]), scale) for j in keys]) if keys else []
        weights.append(P)
        mixed.append([dot(P, [column[j] for j in keys]) for column in columns])
    return weights, mixed


def _attend_backward(
    p: Problem, item: int, state: State, h: int, dO: Rows
) -> tuple[Rows, Rows, Rows]:
    """Return the gradients of queries, keys and values of one head."""
    Q, K, V = state.heads[h]
    exact = scale_of(dict(p.parameters), len(Q[0]))
    scale = exact.exact if exact.exact is not None else exact.ball()
    seen = p.seen[item]
    dS, full = [[ZERO] * len(K) for _ in Q], [[ZERO] * len(K) for _ in Q]
    for i, keys in enumerate(seen.keys):
        if not keys:
            continue
        P = state.weights[h][i]
        frozen = seen.before[i] and p.choice["before_media"] == "uniform"
        back = softmax_backward(P, [dot(dO[i], V[j]) for j in keys])
        for j, weight, d in zip(keys, P, back, strict=True):
            full[i][j] = weight
            dS[i][j] = ZERO if frozen else multiply(d, scale)
    return matmul(dS, K), matmul(turned(dS), Q), matmul(turned(full), dO)


def _forward(p: Problem, item: int) -> State:
    t, kind = p.t, p.choice["activation"]
    Y, features = t["query_input"][item], len(t["norm_weight"])
    tokens: Rows = [row for medium in t["media"][item] for row in medium]
    media = None
    if "media_norm_weight" in t:
        media = normalise(tokens, t["media_norm_weight"], t["media_norm_bias"], p.epsilon)
        tokens = media.rows
    text = normalise(Y, t["norm_weight"], t["norm_bias"], p.epsilon)
    heads, weights, mixed = [], [], []
    A: Rows = [[ZERO] * features for _ in Y]
    for h, w_output in enumerate(t["w_output"]):
        parts = (
            matmul(text.rows, t["w_query"][h]),
            matmul(tokens, t["w_key"][h]),
            matmul(tokens, t["w_value"][h]),
        )
        P, O = _attend(p, item, parts)
        heads.append(parts)
        weights.append(P)
        mixed.append(O)
        A = plus(A, matmul(O, w_output))
    middle = plus(Y, by_column(A, _gate(t["attention_gate"], features)))
    second = normalise(
        middle, t["feed_forward_norm_weight"], t["feed_forward_norm_bias"], p.epsilon
    )
    hidden = matmul(second.rows, t["w_up"])
    fed = matmul([[activated(x, kind) for x in row] for row in hidden], t["w_down"])
    fed = _closed(p, item, fed)
    output = plus(middle, by_column(fed, _gate(t["feed_forward_gate"], features)))
    return State(text, media, tokens, heads, weights, mixed, A, second, hidden, fed, output)


def _closed(p: Problem, item: int, rows: Rows) -> Rows:
    """Return rows of the feed-forward, zero where `everything` closes it."""
    if p.choice["before_media"] != "everything":
        return rows
    pairs = zip(rows, p.seen[item].before, strict=True)
    return [[ZERO] * len(row) if before else row for row, before in pairs]


def _d_gate(values: list[fmpq], d_rows: Rows, rows: Rows) -> list[Value]:
    products = [
        [multiply(a, b) for a, b in zip(p, q, strict=True)]
        for p, q in zip(d_rows, rows, strict=True)
    ]
    sums = column_sums(products)
    if len(values) == 1:
        sums = [dot(sums, [fmpq(1)] * len(sums))]
    return [multiply(a, b) for a, b in zip(_gate_slope(values), sums, strict=True)]


def _backward(p: Problem, item: int, s: State) -> dict[str, Any]:
    """Return the gradients of one item, those of parameters to be added over the items."""
    t, kind, dO = p.t, p.choice["activation"], p.t["d_output"][item]
    features = len(t["norm_weight"])
    dF = _closed(p, item, by_column(dO, _gate(t["feed_forward_gate"], features)))
    acts = [[activated(x, kind) for x in row] for row in s.hidden]
    slopes = [[slope(x, kind) for x in row] for row in s.hidden]
    d_hidden = [
        [multiply(a, b) for a, b in zip(q, r, strict=True)]
        for q, r in zip(matmul(dF, turned(t["w_down"])), slopes, strict=True)
    ]
    d_rows = matmul(d_hidden, turned(t["w_up"]))
    d_middle, d_second = normalise_backward(s.second, t["feed_forward_norm_weight"], d_rows)
    dY = plus(dO, d_middle)
    dA = by_column(dY, _gate(t["attention_gate"], features))
    found = _attention_gradients(p, item, s, dA)
    d_text, d_norm = normalise_backward(s.text, t["norm_weight"], found.pop("text"))
    d_tokens = found.pop("tokens")
    if s.media is not None:
        d_tokens, d_media_norm = normalise_backward(s.media, t["media_norm_weight"], d_tokens)
        found |= {"media_norm_weight": d_media_norm[0], "media_norm_bias": d_media_norm[1]}
    return found | {
        "query_input": plus(dY, d_text),
        "media": d_tokens,
        "norm_weight": d_norm[0],
        "norm_bias": d_norm[1],
        "attention_gate": _d_gate(t["attention_gate"], dY, s.attended),
        "feed_forward_norm_weight": d_second[0],
        "feed_forward_norm_bias": d_second[1],
        "w_up": matmul(turned(s.second.rows), d_hidden),
        "w_down": matmul(turned(acts), dF),
        "feed_forward_gate": _d_gate(t["feed_forward_gate"], dO, s.fed),
    }


def _attention_gradients(p: Problem, item: int, s: State, dA: Rows) -> dict[str, Any]:
    """Return the gradients of the projections, and of the rows that they are given."""
    t = p.t
    d_text: Rows = [[ZERO] * len(t["norm_weight"]) for _ in s.text.rows]
    d_tokens: Rows = [[ZERO] * len(row) for row in s.tokens]
    found: dict[str, Any] = {f"w_{n}": [] for n in ("query", "key", "value", "output")}
    for h, w_output in enumerate(t["w_output"]):
        dQ, dK, dV = _attend_backward(p, item, s, h, matmul(dA, turned(w_output)))
        d_text = plus(d_text, matmul(dQ, turned(t["w_query"][h])))
        d_tokens = plus(d_tokens, matmul(dK, turned(t["w_key"][h])))
        d_tokens = plus(d_tokens, matmul(dV, turned(t["w_value"][h])))
        found["w_query"].append(matmul(turned(s.text.rows), dQ))
        found["w_key"].append(matmul(turned(s.tokens), dK))
        found["w_value"].append(matmul(turned(s.tokens), dV))
        found["w_output"].append(matmul(turned(s.mixed[h]), dA))
    return {**found, "text": d_text, "tokens": d_tokens}


def _evaluate(p: Problem, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Cells]:
    states = [_forward(p, item) for item in range(len(p.seen))]
    cells = {"output": Cells(shapes["query_input"], flat([s.output for s in states]))}
    if "d_output" not in p.t:
        return cells
    parts = [_backward(p, item, s) for item, s in enumerate(states)]
    for name in ("query_input", "media", *PARAMETER_INPUTS):
        if name not in p.t:
            continue
        items = [flat(part[name]) for part in parts]
        values = flat(items)
        if name in PARAMETER_INPUTS:
            values = [dot(column, [fmpq(1)] * len(items)) for column in zip(*items, strict=True)]
        cells[f"d_{name}"] = Cells(shapes[name], values)
    return cells


def prepare(
    inputs: Mapping[str, Array], parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> Callable[[], dict[str, Cells]]:
    """Write the block exactly; return what evaluates it at the present precision."""
    expect(inputs, INPUTS, "input")
    expect(parameters, frozenset({"scale", "norm_epsilon"}), "parameter")
    expect(conventions, frozenset(CHOICES), "convention")
    choice = choose(conventions, CHOICES)
    if not all(np.isfinite(x).all() for x in inputs.values()):
        raise CertifyError("gated_cross_attention has a non-finite input; certification has none")
    shapes = {name: x.shape for name, x in inputs.items()}
    b, n, _ = shapes["query_input"]
    marks = inputs.get("media_locations")
    seen = [
        seen_of(None if marks is None else marks[item], n, shapes["media"][1:3], choice)
        for item in range(b)
    ]
    t = {name: loaded(x) for name, x in inputs.items() if name != "media_locations"}
    epsilon = rational(parameters.get("norm_epsilon", 1e-5))
    problem = Problem(t, seen, choice, epsilon, parameters)
    return lambda: _evaluate(problem, shapes)
