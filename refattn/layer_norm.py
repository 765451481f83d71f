"""Layer normalisation of the features of a row, and its gradients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.checks import (
    check_arrays,
    check_computable,
    check_floats,
    check_positive,
    check_shapes,
)

EPSILON = 1e-5
"""Default of ε, what most libraries add to the variance."""


class LayerNormGradients(NamedTuple):
    """Gradients in the order of the inputs."""

    d_x: Array
    d_weight: Array
    d_bias: Array


@np.errstate(all="ignore")  # IEEE values travel silently, whatever the array library
def layer_norm(x: Array, weight: Array, bias: Array, *, epsilon: float = EPSILON) -> Array:
    """Return rows of mean 0 and variance 1, scaled and shifted feature by feature.

    Spec: OWN-NORM1, OWN-ROUND1.

        x̂ = (x - mean(x)) / √(var(x) + ε),  var(x) = mean((x - mean(x))²),  y = γ ∘ x̂ + β

    Args:
        x: (..., e).
        weight: γ (e,).
        bias: β (e,).
        epsilon: ε, in units of x².

    Returns:
        y: (..., e), dtype of x.

    Raises:
        ShapeError: two shapes do not fit.
        DtypeError: a dtype is not floating, or two differ.
        OptionError: epsilon is not above zero, or vanishes in the computing dtype.
    """
    _check("layer_norm", x, weight, bias, epsilon)
    x_hat, _ = _normalized(widen(x), float(epsilon))
    return narrow(widen(weight) * x_hat + widen(bias), x)


@np.errstate(all="ignore")
def layer_norm_backward(
    d_output: Array, x: Array, weight: Array, bias: Array, *, epsilon: float = EPSILON
) -> LayerNormGradients:
    """Return the gradients of layer normalisation.

    Spec: OWN-NORM1, OWN-BACKWARD1, OWN-ROUND1.

        g = γ ∘ dy,  dx = (g - mean(g) - x̂ mean(g ∘ x̂)) / √(var(x) + ε)
        dγ = Σ dy ∘ x̂,  dβ = Σ dy, over all rows

    Args:
        d_output: dy (..., e).
        x: as for `layer_norm`, and so on.
        weight: as for `layer_norm`.
        bias: as for `layer_norm`.
        epsilon: as for `layer_norm`.

    Returns:
        The gradients, each with the shape and dtype of what it belongs to.

    Raises:
        ShapeError, DtypeError, OptionError: as `layer_norm`.
    """
    check_arrays("layer_norm_backward", d_output=d_output)
    _check("layer_norm_backward", x, weight, bias, epsilon, d_output)
    xp = array_namespace(x)
    dy = widen(d_output)
    x_hat, deviation = _normalized(widen(x), float(epsilon))
    g = widen(weight) * dy
    mean_g = xp.mean(g, axis=-1, keepdims=True)
    mean_gx = xp.mean(g * x_hat, axis=-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    return LayerNormGradients(
        d_x=narrow((g - mean_g - x_hat * mean_gx) / deviation, x),
        d_weight=narrow(xp.sum(dy * x_hat, axis=rows), x),
        d_bias=narrow(xp.sum(dy, axis=rows), x),
    )


def _normalized(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Return x̂ and √(var(x) + ε)."""
    xp = array_namespace(x)
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    deviation = xp.sqrt(xp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
    return centred / deviation, deviation


def _check(
    function: str,
    x: Array,
    weight: Array,
    bias: Array,
    epsilon: float,
    d_output: Array | None = None,
) -> None:
    cotangent = {} if d_output is None else {"d_output": (d_output, " ".join(map(str, x.shape)))}
    check_shapes(function, x=(x, "... e"), weight=(weight, "e"), bias=(bias, "e"), **cotangent)
    floats = {} if d_output is None else {"d_output": d_output}
    check_floats(function, x=x, weight=weight, bias=bias, **floats)
    check_positive(function, epsilon=epsilon)
    check_computable(function, x, epsilon=epsilon)
