"""How far underflow can move a result, and the sizes that the coefficients of a bound need."""

import numpy as np

from refattn.certify.head_units import Forward, Head
from refattn.certify.majorant import Array, Known

SMALL = 2.0**-14
"""Below it a weight is subnormal in float16, the narrowest of the operand formats."""

EVENTS = 4.0
"""Underflows granted a term: of its weight, its product, its sum and its rescaling."""


def new_track() -> dict[str, float]:
    """Return the sizes that `observe` fills, all zero; `shortest` is the shortest contraction."""
    names = "exponent exponent_operand terms rows small small_key heads factor scale features"
    names += " longest group division peak"
    peaks = "query key value d_output d_logsumexp distance"
    return dict.fromkeys([*names.split(), "bias_terms", *(f"{p}_max" for p in peaks.split())], 0.0)


def observe(track: dict[str, float], f: Forward, head: Head, dO: Known, d_lse: Array) -> None:
    """Note the sizes of one head; of keys and queries, only those in an allowed cell."""
    P, e = f.rows.weights, f.rows.exponent
    lse = f.rows.logsumexp
    small = (P[:, :-1] < SMALL) & head.allowed
    read, asked = head.allowed.any(axis=0) | (head.fill & f.empty.any()), head.allowed.any(axis=1)
    backward = bool(np.any(dO.value))
    d_k, d_v = head.Q.value.shape[1], head.V.value.shape[1]
    common = f.rows.division + backward * lse.accumulated
    sizes: dict[str, Array | float] = {
        "exponent": np.where(P > 0, e.accumulated + common[:, None], 0.0),
        "exponent_operand": np.where(P > 0, e.operand + backward * lse.operand[:, None], 0.0),
        "terms": f.rows.terms,
        "rows": head.group * head.allowed.sum(axis=0),
        "small": small.sum(axis=1),
        "small_key": head.group * small.sum(axis=0),
        "factor": head.factor,
        "scale": abs(head.scale),
        "features": d_v,
        "longest": max(d_k, d_v),
        "group": head.group,
        "division": f.rows.division,
        "peak": peak(f, head, dO, d_lse),
        "query_max": np.abs(head.Q.value[asked]),
        "key_max": np.abs(head.K.value[read]),
        "value_max": np.abs(head.V.value[read]),
        "d_output_max": np.abs(dO.value),
        "d_logsumexp_max": np.abs(d_lse),
    }
    for name, value in sizes.items():
        track[name] = max(track[name], float(np.max(value, initial=0.0)))
    shortest = float(min(d_k, d_v) if backward else d_k)
    track["shortest"] = min(track.get("shortest", shortest), shortest)
    track["heads"] += 1


def peak(f: Forward, head: Head, dO: Known, d_lse: Array) -> float:
    """Return the largest sum of magnitudes that one head meets before its results.

    Products of queries and keys before and after the scale, logits, outputs before the
    division, and in the backward pass dP, its difference from its mean, and the sums of dQ, dK.
    """
    Q, K, V, dO_abs = (np.abs(x.value) for x in (head.Q, head.K, head.V, dO))
    A, w = head.allowed, head.allowed * head.factor
    s = abs(head.scale)
    X = Q @ K.T * max(1.0, s, s / (head.softcap or np.inf))
    added = 0.0 if head.added is None else np.abs(head.added.value)
    P, dP = f.rows.weights[:, :-1], head.factor * (dO_abs @ V.T)
    T = dP + np.sum(P * dP, axis=1, keepdims=True) + np.abs(d_lse)[:, None]
    dS = P * T * max(1.0, s)
    sums = (np.where(A, X + added, 0.0), w @ V, np.where(A, T, 0.0), dS @ K, head.group * dS.T @ Q)
    return max(float(np.max(x, initial=0.0)) for x in sums)


def floors(track: dict[str, float], names: list[str]) -> dict[str, float]:
    """Return `<name>.floor` and `<name>.floor_operand`: what one unit of underflow does to it.

    The first is in units of the smallest number of the arithmetic, the second of half the
    spacing of the subnormal numbers of the operand format.
    """
    t = track
    n, m = EVENTS * t["terms"], EVENTS * (t["rows"] + 1)
    shares = t["group"] if t["group"] > 1 else 0.0  # each head's gradient may be stored
    s, K, Q, dO = t["scale"], t["key_max"], t["query_max"], t["d_output_max"]
    V = t["value_max"] * t["factor"]
    T = 2 * t["features"] * dO * V + t["d_logsumexp_max"] + 1
    T_lost = T + 2 * t["features"]
    O_lost = t["small"] * V + 1
    D_lost = t["features"] * dO * O_lost
    every, summed = t["heads"] * t["terms"] * (t["rows"] + 1), t["bias_terms"]
    cell = T * min(t["small"], 1.0) + D_lost + 1
    steps = t["distance_max"]
    dK_lost = s * Q * (t["rows"] + t["small_key"] * T + t["rows"] * D_lost)
    dV_lost = t["small_key"] * dO * t["factor"]
    table = {
        "output": (n * (V + 1), O_lost),
        "logsumexp": (n, 0.0),
        "d_query": (n * (s * (K * T_lost + 1) + 1), s * K * (t["terms"] + t["small"] * T + D_lost)),
        "d_key": (m * (s * (Q * T_lost + 1) + 1) + shares, dK_lost + shares),
        "d_value": (m * (dO * t["factor"] + 1) + shares, dV_lost + shares),
        "d_bias": (EVENTS * summed * T_lost, summed * cell),
        "d_slopes": (EVENTS * every * steps * T_lost, every * steps * cell),
        "d_sinks": (EVENTS * every * T_lost, every * cell),
    }
    found = {"output.trivial": 2 * V}
    found |= {f"{n}.terms": every for n in ("d_slopes", "d_sinks") if n in names}
    found |= {"d_bias.terms": summed} if "d_bias" in names else {}
    for name in names:
        found[f"{name}.floor"], found[f"{name}.floor_operand"] = table[name][0] + 1, table[name][1]
        if name != "logsumexp":
            found[f"{name}.floor_operand"] += 1
    return found
