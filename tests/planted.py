"""Attention by NumPy, once right and in the ways in which it is often wrong.

Subjects of the audit's tests: `planted:correct` is judged right, every other one is found out.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

EVERYTHING = {
    "features": ["causal", "scale", "grouped_heads", "cross_lengths", "logsumexp", "backward"],
    "conventions": {"masked": "add"},  # 0 · NaN is NaN
}
"""What `correct` and its faulty kin declare."""


def _attend(
    query: Any,
    key: Any,
    value: Any,
    *,
    scale: float | None = None,
    causal: bool = False,
    d_output: Any = None,
    offset: int = 0,
    tile: bool = False,
    exp: Any = np.exp,
) -> dict[str, Any]:
    group = query.shape[1] // key.shape[1]
    spread = (lambda a: np.tile(a, (1, group, 1, 1))) if tile else (lambda a: a.repeat(group, 1))
    K, V = spread(key), spread(value)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    S = (query @ K.swapaxes(-1, -2)) * query.dtype.type(factor)
    if causal:
        allowed = np.tri(S.shape[-2], S.shape[-1], offset, dtype=bool)
        S = np.where(allowed, S, -np.inf).astype(S.dtype)
    m = S.max(axis=-1, keepdims=True)
    E = exp(S - m).astype(S.dtype)
    total = E.sum(axis=-1, keepdims=True)
    P = E / total
    found = {"output": P @ V, "logsumexp": (m + np.log(total))[..., 0]}
    if d_output is not None:
        dP = d_output @ V.swapaxes(-1, -2)
        dS = P * (dP - (P * dP).sum(axis=-1, keepdims=True)) * query.dtype.type(factor)
        folded = (query.shape[0], key.shape[1], group, *key.shape[2:])
        found["d_query"] = dS @ K
        found["d_key"] = (dS.swapaxes(-1, -2) @ query).reshape(folded).sum(axis=2)
        found["d_value"] = (P.swapaxes(-1, -2) @ d_output).reshape(folded).sum(axis=2)
    return found


def correct(query, key, value, **options):
    return _attend(query, key, value, **options)


def missing_scale(query, key, value, **options):
    return _attend(query, key, value, **{"scale": 1.0, **options})


def bottom_right(query, key, value, **options):
    return _attend(query, key, value, offset=key.shape[2] - query.shape[2], **options)


def head_tile(query, key, value, **options):
    return _attend(query, key, value, tile=True, **options)


def exp_in_float16(query, key, value, **options):
    return _attend(query, key, value, exp=lambda x: np.exp(x.astype(np.float16)), **options)


def gradient_without_row_sum(query, key, value, **options):
    found = _attend(query, key, value, **options)
    if "d_query" in found:
        found["d_query"] = found["d_query"] + 1
    return found


for _function in (correct, missing_scale, bottom_right, head_tile, exp_in_float16):
    _function.refattn_capabilities = EVERYTHING
gradient_without_row_sum.refattn_capabilities = EVERYTHING


def bare(query, key, value, scale=None):
    return _attend(query, key, value, scale=scale)["output"]


def forward_only(query, key, value, *, scale=None, causal=False):
    return _attend(query, key, value, scale=scale, causal=causal)["output"]


def in_float32(query, key, value, *, scale=None, causal=False):
    q, k, v = (a.astype(np.float32) for a in (query, key, value))
    return _attend(q, k, v, scale=scale, causal=causal)["output"].astype(query.dtype)


def by_length_first(query, key, value):
    q, k, v = (a.swapaxes(1, 2) for a in (query, key, value))
    return _attend(q, k, v)["output"].swapaxes(1, 2)


def shifts_causally(query, key, value, *, causal=False, alignment="top_left"):
    offset = {"top_left": 0, "bottom_right": key.shape[2] - query.shape[2]}[alignment]
    return _attend(query, key, value, causal=causal, offset=offset)["output"]


def raises(query, key, value):
    raise RuntimeError("the kernel\nrefused")


def leaves(query, key, value):
    print("farewell")
    raise SystemExit(0)


def wrong_shape(query, key, value):
    return _attend(query, key, value)["output"][:, :, :-1]


def not_a_number(query, key, value):
    return np.full(query.shape, np.nan, query.dtype)


def integers(query, key, value):
    return np.zeros(query.shape, np.int64)


def nothing(query, key, value):
    return None


def overwrites(query, key, value):
    found = _attend(query, key, value)
    query[...] = 0
    return found["output"]


number = 3


def positional_only(query, key, value, /):
    return _attend(query, key, value)


def one_more(query, key, value, temperature):
    return _attend(query / temperature, key, value)


class Attention:
    def __init__(self, query, key, value):
        self.output = _attend(query, key, value)["output"]
