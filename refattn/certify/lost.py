"""How far underflow can move a number: largest magnitudes and losses, carried stage by stage.

Two kinds are carried apart: underflows of the arithmetic, each of one smallest normal number, and
numbers stored in the operand format below its normal range, each off by half its spacing there.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from refattn.certify.floor_units import EVENTS
from refattn.certify.majorant import Array

SECOND = 2.0**-24
"""The largest smallest number of any profile: a loss times a loss is at most this of one."""


class Kind(NamedTuple):
    """What one sum of n terms loses, and what storing its result loses."""

    suffix: str
    event: float
    store: float


KINDS = (Kind("floor", EVENTS, 0.0), Kind("floor_operand", 0.0, 1.0))
"""Underflows of the arithmetic, and of the operand format."""


class Loss(NamedTuple):
    """The largest magnitude of a tensor, and the most that one element can lose."""

    peak: float
    lost: float


def given(x: Array) -> Loss:
    """Return an input, which loses nothing."""
    return Loss(float(np.max(np.abs(x), initial=0.0)), 0.0)


def crossed(x: Loss, y: Loss) -> float:
    """Return what one product loses by the losses of its factors."""
    return (x.peak + SECOND * x.lost) * y.lost + x.lost * y.peak


def summed(kind: Kind, value: Array, terms: float, *pairs: tuple[Loss, Loss]) -> Loss:
    """Return a stored sum of products: `terms` of each pair of factors."""
    lost = sum(terms * crossed(x, y) for x, y in pairs)
    return Loss(given(value).peak, lost + kind.event * (terms * len(pairs) + 1) + kind.store)


def joined(kind: Kind, value: Array, *parts: Loss) -> Loss:
    """Return a stored sum of numbers."""
    return Loss(given(value).peak, sum(p.lost for p in parts) + kind.event + kind.store)


class Core(NamedTuple):
    """What attention between the projections loses."""

    output: Loss
    d_query: Loss
    d_key: Loss
    d_value: Loss


def core(
    kind: Kind,
    track: Mapping[str, float],
    operands: tuple[Loss, Loss, Loss, Loss],
    values: tuple[Array, ...],
    d: tuple[int, int],
) -> Core:
    """Return the losses of the output and the gradients from those of Q, K, V and dO.

    `values` are the output and its three gradients, `d` the features of a key and of a value.
    """
    Q, K, V, dO = operands
    t, (d_k, d_v) = track, d
    n, m, s, f = t["terms"], t["rows"], t["scale"], max(t["factor"], 1.0)
    small, small_key = (
        (kind.event * n, kind.event * m) if kind.event else (t["small"], t["small_key"])
    )
    cells, cells_key = (kind.event * n, kind.event * m) if kind.event else (n, m)

    def end(terms: float) -> float:
        return kind.event * (terms + 1) + kind.store

    S = s * d_k * (crossed(Q, K) + kind.event)
    O = f * (V.lost + 2 * V.peak * S + small * V.peak) + end(n)
    T = 2 * d_v * f * dO.peak * V.peak + 1
    A = d_v * f * (crossed(dO, V) + 2 * V.peak * dO.lost)
    D = A + d_v * dO.peak * O + 2 * end(d_v) + 2 * S * T
    dQ = s * (K.peak * (cells + small * T + D) + T * K.lost) + (1 + s) * end(n)
    dK = s * (Q.peak * (cells_key + small_key * T + m * D) + m * T * Q.lost) + (1 + s) * end(m)
    dV = f * (m * (2 * S * dO.peak + dO.lost) + small_key * dO.peak) + end(m)
    losses = zip(values, (O, dQ, dK, dV), strict=True)
    return Core(*(Loss(given(x).peak, lost) for x, lost in losses))
