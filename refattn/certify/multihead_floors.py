"""How far underflow can move the results of multi-head attention (NUM-OTHER1)."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from refattn.certify.floor_units import EVENTS


class Sizes(NamedTuple):
    """Lengths of the contractions, and the largest numbers that enter them."""

    e_q: int
    e_s: int
    e_o: int
    heads: int
    d_k: int
    d_v: int
    queries: int
    """Rows of all batch items."""
    keys: int
    x: float
    """Largest input."""
    w: float
    """Largest weight of a projection."""
    gate: float


class Lost(NamedTuple):
    """Underflows of one kind: what one sum loses, and the weights of a row and of a key."""

    one: Callable[[float], float]
    """Underflows of one stored sum of n terms."""
    cells: float
    cells_key: float
    weights: float
    weights_key: float


def multihead_floors(
    sizes: Sizes, track: Mapping[str, float], names: list[str]
) -> dict[str, float]:
    """Return `<name>.floor` and `<name>.floor_operand` of every output, as `floors` does."""
    t = track
    n, m = t["terms"], t["rows"]
    computing = Lost(
        lambda terms: EVENTS * (terms + 1), EVENTS * n, EVENTS * m, EVENTS * n, EVENTS * m
    )
    operand = Lost(lambda terms: 1.0, n, m, t["small"], t["small_key"])
    found: dict[str, float] = {}
    for suffix, lost in (("floor", computing), ("floor_operand", operand)):
        table = _moved(sizes, track, lost)
        found |= {f"{name}.{suffix}": table[name] for name in names}
    return found


def _moved(z: Sizes, t: Mapping[str, float], lost: Lost) -> dict[str, float]:
    """Return what one unit of underflow moves, from the projections in to every result."""
    Q, K, V, dO = (t[f"{name}_max"] for name in ("query", "key", "value", "d_output"))
    s = t["scale"]
    one, n, m = lost.one, t["terms"], t["rows"]
    S = s * z.d_k * (Q * one(z.e_s) + K * one(z.e_q))
    O = one(z.e_s) + 2 * V * S + lost.weights * V + one(n)
    gated = z.gate * O + one(0)
    dO_raw = one(z.e_o)
    cotangent = z.gate * dO_raw + one(0)
    T = 2 * z.d_v * dO * V + 1
    D = z.d_v * (dO * (one(z.e_s) + O) + 2 * V * cotangent) + 2 * one(z.d_v) + 2 * S * T
    dQ = s * (K * (lost.cells + lost.weights * T + D) + T * one(z.e_s)) + (1 + s) * one(n)
    dK = s * (Q * (lost.cells_key + lost.weights_key * T + m * D) + m * T * one(z.e_q))
    dK += (1 + s) * one(m)
    dV = m * (2 * S * dO + cotangent) + lost.weights_key * dO + one(m)
    raw = z.e_o * z.w * t["cotangent_max"]
    return {
        "output": z.heads * z.d_v * z.w * gated + one(z.heads * z.d_v),
        "d_query_input": z.heads * z.d_k * z.w * dQ + one(z.heads * z.d_k),
        "d_source_input": z.heads * z.w * (z.d_k * dK + z.d_v * dV)
        + 2 * one(z.heads * (z.d_k + z.d_v)),
        "d_w_query": z.queries * z.x * dQ + one(z.queries),
        "d_w_key": z.keys * z.x * dK + one(z.keys),
        "d_w_value": z.keys * z.x * dV + one(z.keys),
        "d_w_output": z.queries * t["cotangent_max"] * gated + one(z.queries),
        "d_head_gates": z.queries * z.d_v * (raw * O + V * dO_raw) + one(z.queries * z.d_v),
    }
