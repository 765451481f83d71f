"""Majorants of layer normalisation, of an activation and of a gate, with their gradients.

Where a function is curved, its slope is taken at the worst end of the interval in which the
computed argument lies in any profile, so that nothing of higher order is left out.
"""

from typing import NamedTuple

import numpy as np
from scipy import special

from refattn.certify.majorant import (
    EXTRA,
    FUNCTION,
    REACH_ACCUMULATED,
    SECOND_OPERAND,
    Array,
    Known,
    larger,
    plus,
    scaled,
    times,
    total,
)

STEEPEST_GELU = 1.13
"""Above the largest slope of GELU."""

CURVED_GELU = 0.8
"""Above the largest second derivative of GELU, 2/√(2π)."""


class Normal(NamedTuple):
    """Layer normalisation with what its backward pass reads again."""

    rows: Known
    x_hat: Known
    inverse: Known
    """1/√(var + ε), by row."""
    relative: tuple[float, float]
    """The largest relative majorants of var + ε: `refattn.bounds` refuses where they reach 1/2."""


def reach(x: Known) -> Array:
    """Return how far the computed x may be off in any profile."""
    return np.asarray(REACH_ACCUMULATED * x.accumulated + SECOND_OPERAND * x.operand)


def norm_units(x: Known, weight: Known, bias: Known, epsilon: float) -> Normal:
    """Return LN(x), computed as the clause writes it or with one-pass sums and x/σ - μ/σ."""
    e = x.value.shape[-1]
    mean = scaled(total(x, (-1,), e, keepdims=True), 1.0 / e)
    centred = plus(x, scaled(mean, -1.0))
    two = scaled(total(times(centred, centred), (-1,), e, keepdims=True), 1.0 / e)
    square = scaled(total(times(x, x), (-1,), e, keepdims=True), 1.0 / e)
    one = plus(square, scaled(times(mean, mean), -1.0))
    variance = larger(two, one)
    v = variance.value + epsilon
    relative = (variance.accumulated / v + 2.0, variance.operand / v)
    # (1 + δ)^(-1/2) is off by δ/2 times at most e^(3δ) for δ ≤ 1/2, and κ covers that power
    value = v**-0.5
    inverse = Known(value, (0.5 * relative[0] + EXTRA) * value, 0.5 * relative[1] * value)
    x_hat = times(centred, inverse, 2.0)
    apart = 4.0 * inverse.value * (np.abs(x.value) + np.abs(mean.value))
    x_hat = x_hat._replace(accumulated=x_hat.accumulated + apart)
    largest = (float(np.max(relative[0])), float(np.max(relative[1])))
    return Normal(plus(times(x_hat, weight), bias), x_hat, inverse, largest)


def norm_backward_units(n: Normal, weight: Known, dy: Known) -> tuple[Known, Known, Known]:
    """Return dx, and dγ and dβ summed over all rows."""
    e = weight.value.shape[0]
    g = times(dy, weight)
    mean_g = scaled(total(g, (-1,), e, keepdims=True), -1.0 / e)
    mean_gx = scaled(total(times(g, n.x_hat), (-1,), e, keepdims=True), -1.0 / e)
    dx = times(plus(g, mean_g, times(n.x_hat, mean_gx)), n.inverse, 2.0)
    axes = tuple(range(dy.value.ndim - 1))
    rows = float(np.prod(dy.value.shape[:-1]))
    return dx, total(times(dy, n.x_hat), axes, rows), total(dy, axes, rows)


def gate_units(alpha: Known) -> tuple[Known, Known]:
    """Return tanh α, relatively accurate, and 1 - tanh²α."""
    T = np.tanh(alpha.value)
    gate = Known(T, FUNCTION * np.abs(T), np.abs(T))
    square = 2.0 * np.abs(T) * gate.accumulated + T * T + np.asarray(T != 0.0)
    return gate, Known(np.cosh(alpha.value) ** -2, square, 2.0 * np.abs(T) * gate.operand)


def activation_units(x: Known, kind: str) -> tuple[Known, Known]:
    """Return act(x) and act'(x)."""
    moved = reach(x)
    if kind == "gelu":
        return _gelu_units(x, moved)
    r = np.maximum(x.value, 0.0)
    open_ = x.value > -moved
    steep = np.where(open_, 2.0 * (r + moved), 0.0)
    slope = np.where(open_, 2.0, 0.0)
    return (
        Known(r * r, steep * x.accumulated + r * r, steep * x.operand),
        Known(2.0 * r, slope * x.accumulated + 2.0 * r, slope * x.operand),
    )


def _gelu_units(x: Known, moved: Array) -> tuple[Known, Known]:
    """Return GELU and its slope; Φ may be off by FUNCTION·u, absolutely, as 1 + erf is."""
    v = x.value
    distribution = 0.5 * special.erfc(-v / np.sqrt(2.0))
    density = np.exp(-0.5 * v * v) / np.sqrt(2.0 * np.pi)
    slope = distribution + v * density
    steep = np.minimum(np.abs(slope) + CURVED_GELU * moved, STEEPEST_GELU)
    value = v * distribution
    # e^(-v²/2) is off by FUNCTION and three roundings of its argument: |v φ| (8 + 3 v²/2) < 4
    own = FUNCTION * 1.0 + 4.0 + 4.0
    return (
        Known(
            value, steep * x.accumulated + FUNCTION * np.abs(v) + np.abs(value), steep * x.operand
        ),
        Known(slope, CURVED_GELU * x.accumulated + own, CURVED_GELU * x.operand),
    )
