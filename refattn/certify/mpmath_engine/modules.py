"""The modules in the second engine: their forward texts on a tape, which yields the gradients."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from mpmath import mp, mpf

from refattn.certify.mpmath_engine.numbers import number
from refattn.certify.mpmath_engine.tape import (
    Array,
    Tape,
    apply,
    inner,
    leaves,
    put,
    quotient,
    slopes,
    times,
    total,
    weighted,
)

Text = Callable[[Tape, dict[str, Array], Mapping[str, Any]], Array]
"""A module's forward text: indices of the output from those of the inputs."""

FLAGS = ("keep", "output_keep", "media_locations")
"""Inputs that are no numbers."""


def attend(t: Tape, query: Array, key: Array, value: Array, scale: Any, keep: Any = None) -> Array:
    """Return one row of attention over the keys that it sees; `keep` weighs them after softmax."""
    logits = [weighted(t, inner(t, query, k), scale) for k in key]
    powers = [apply(t, s, mp.exp(t.values[s]), mp.exp(t.values[s])) for s in logits]
    below = total(t, powers)
    weights = [quotient(t, power, below) for power in powers]
    if keep is not None:
        weights = [weighted(t, w, k) for w, k in zip(weights, keep, strict=True)]
    columns = range(value.shape[1])
    return np.array([inner(t, weights, value[:, c]) for c in columns], dtype=object)


def product(t: Tape, a: Array, b: Array) -> Array:
    """Return a matrix product."""
    rows = [[inner(t, row, b[:, c]) for c in range(b.shape[1])] for row in a]
    return np.array(rows, dtype=object)


def rooted(d: int) -> Any:
    """Return the default scale of d features."""
    return 1 / mp.sqrt(mpf(d))


def causal(t: Tape, x: dict[str, Array], p: Mapping[str, Any]) -> Array:
    """Return the output of GPT's module, one token after the other."""
    b, n, e = x["x"].shape
    h, d = p["heads"], e // p["heads"]
    chance = [1 / number(p.get(f"{k}_probability", 1.0)) for k in ("keep", "output_keep")]
    output = np.empty((b, n, e), dtype=object)
    for item in range(b):
        qkv = product(t, x["x"][item], x["w_qkv"])
        if "b_qkv" in x:
            for i, c in np.ndindex(n, 3 * e):
                qkv[i, c] = total(t, [qkv[i, c], x["b_qkv"][c]])
        merged = np.empty((n, e), dtype=object)
        for i, head in np.ndindex(n, h):
            own = slice(head * d, (head + 1) * d)
            parts = qkv[: i + 1].reshape(i + 1, 3, e)[:, :, own]
            keep = None
            if "keep" in p:
                keep = [chance[0] * int(k) for k in p["keep"][item, head, i, : i + 1]]
            row = attend(t, parts[i, 0], parts[:, 1], parts[:, 2], rooted(d), keep)
            merged[i, own] = row
        if "w_output" in x:
            merged = product(t, merged, x["w_output"])
        for i, c in np.ndindex(n, e):
            y = [merged[i, c]] + ([x["b_output"][c]] if "b_output" in x else [])
            kept = chance[1] * int(p["output_keep"][item, i, c]) if "output_keep" in p else 1
            output[item, i, c] = weighted(t, total(t, y), mpf(kept))
    return output


def normal(t: Tape, row: Array, weight: Array, bias: Array, epsilon: Any) -> Array:
    """Return layer normalisation of one row, its variance as the mean square less the mean's."""
    share = mpf(1) / len(row)
    mean = weighted(t, total(t, row), share)
    square = weighted(t, inner(t, row, row), share)
    variance = total(t, [square, weighted(t, times(t, mean, mean), -1), put(t, epsilon)])
    root = mp.sqrt(t.values[variance])
    deviation = apply(t, variance, root, 1 / (2 * root))
    negative = weighted(t, mean, -1)
    found = [
        total(t, [times(t, g, quotient(t, total(t, [y, negative]), deviation)), c])
        for y, g, c in zip(row, weight, bias, strict=True)
    ]
    return np.array(found, dtype=object)


def activation(t: Tape, x: int, kind: str) -> int:
    """Return the activation of a number; GELU by the error function."""
    v = t.values[x]
    if kind == "gelu":
        half = (1 + mp.erf(v / mp.sqrt(2))) / 2
        return apply(t, x, v * half, half + v * mp.npdf(v))
    v = max(v, mpf(0))
    return apply(t, x, v * v, 2 * v)


def gate(t: Tape, x: Array, feature: int) -> int:
    """Return tanh of the gate of a feature."""
    alpha = x[feature if len(x) > 1 else 0]
    slope = 1 / mp.cosh(t.values[alpha]) ** 2
    return apply(t, alpha, mp.tanh(t.values[alpha]), slope)


def passed(marks: Any, row: int, p: Mapping[str, Any]) -> int:
    """Return how many media stand before a row of the text, or in its marker's place."""
    return int(np.count_nonzero(marks if p.get("cached_media") else marks[: row + 1]))


def gated(t: Tape, x: dict[str, Array], p: Mapping[str, Any]) -> Array:
    """Return the output of gated cross-attention, one token after the other."""
    output = np.empty(x["query_input"].shape, dtype=object)
    for item in range(len(output)):
        media, epsilon = x["media"][item], number(p.get("norm_epsilon", 1e-5))
        rows = media.reshape(-1, media.shape[-1])
        if "media_norm_weight" in x:
            weight, bias = x["media_norm_weight"], x["media_norm_bias"]
            rows = np.stack([normal(t, row, weight, bias, epsilon) for row in rows])
        heads = [
            (product(t, rows, k), product(t, rows, v))
            for k, v in zip(x["w_key"], x["w_value"], strict=True)
        ]
        for i, row in enumerate(x["query_input"][item]):
            output[item, i] = gated_row(t, x, p, row, heads, (item, i, len(media)), epsilon)
    return output


def gated_row(
    t: Tape,
    x: dict[str, Array],
    p: Mapping[str, Any],
    row: Array,
    heads: list[tuple[Array, Array]],
    at: tuple[int, int, int],
    epsilon: Any,
) -> Array:
    """Return one row of the text after the block."""
    item, i, m = at
    leak = p.get("before_media", "zero")
    phi = passed(p["media_locations"][item], i, p) if "media_locations" in p else None
    n_m = len(heads[0][0]) // m
    if phi is None or (phi == 0 and leak != "zero"):
        seen = slice(None)
    else:
        first = max(phi - 1, 0) if p.get("attend", "immediate") == "immediate" else 0
        seen = slice(first * n_m, phi * n_m)
    text = normal(t, row, x["norm_weight"], x["norm_bias"], epsilon)
    branch: list[list[int]] = [[] for _ in row]
    for h, (key, value) in enumerate(heads):
        if not len(key[seen]):
            continue
        query = product(t, text[None, :], x["w_query"][h])[0]
        scale = rooted(len(query)) if p.get("scale") is None else number(p["scale"])
        even = phi == 0 and leak == "uniform"
        mixed = attend(t, query, key[seen], value[seen], mpf(0) if even else scale)
        for c, y in enumerate(product(t, mixed[None, :], x["w_output"][h])[0]):
            branch[c].append(y)
    row = np.array(
        [_gated(t, y, x["attention_gate"], c, total(t, branch[c])) for c, y in enumerate(row)],
        dtype=object,
    )
    weight, bias = x["feed_forward_norm_weight"], x["feed_forward_norm_bias"]
    hidden = product(t, normal(t, row, weight, bias, epsilon)[None, :], x["w_up"])
    kind = p.get("activation", "squared_relu")
    acted = np.array([[activation(t, y, kind) for y in hidden[0]]], dtype=object)
    if phi == 0 and leak == "everything":
        return row
    fed = product(t, acted, x["w_down"])[0]
    return np.array(
        [_gated(t, y, x["feed_forward_gate"], c, fed[c]) for c, y in enumerate(row)], dtype=object
    )


def _gated(t: Tape, row: int, alpha: Array, feature: int, branch: int) -> int:
    return total(t, [row, times(t, gate(t, alpha, feature), branch)])


def evaluator_of(text: Text) -> Callable[..., Any]:
    """Return what builds the evaluation of a module: outputs and, by the tape, gradients."""

    def evaluator(inputs: Mapping[str, Any], p: Mapping[str, Any], c: Mapping[str, Any]) -> Any:
        t = Tape([], [])
        flags = {n: inputs[n] for n in FLAGS if n in inputs}
        numbers = {n: v for n, v in inputs.items() if n not in flags and n != "d_output"}
        x = {name: leaves(t, v) for name, v in numbers.items()}
        output = text(t, x, {**p, **c, **flags})
        seeds = [] if "d_output" not in inputs else inputs["d_output"].reshape(-1).tolist()
        pairs = zip(output.reshape(-1), seeds, strict=False)
        found = slopes(t, [(y, mpf(float(seed))) for y, seed in pairs])

        def value(name: str, index: tuple[int, ...]) -> Any:
            if name == "output":
                return t.values[output[index]]
            return found[x[name.removeprefix("d_")][index]]

        return value

    return evaluator
