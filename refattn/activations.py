"""Activations of a feed-forward layer, and their slopes."""

from __future__ import annotations

import importlib
import math

import numpy as np
from array_api_compat import is_cupy_namespace, is_numpy_namespace, is_torch_namespace

from refattn.arrays import Array, array_namespace

ACTIVATIONS = ("squared_relu", "gelu")
"""Named activations; the first is the default."""


def activate(x: Array, activation: str) -> Array:
    """Return the activation of every element.

    Spec: OWN-ACTIVATION1.

        squared_relu: max(x, 0)²    gelu: x Φ(x),  Φ(x) = erfc(-x/√2) / 2

    Args:
        x: any shape, in the computing dtype.
        activation: one of `ACTIVATIONS`.

    Returns:
        Same shape and dtype.
    """
    if activation == "gelu":
        return x * _normal_distribution(x)
    positive = _positive(x)
    return positive * positive


def activation_slope(x: Array, activation: str) -> Array:
    """Return the derivative of the activation at every element.

    Spec: OWN-ACTIVATION1, OWN-BACKWARD1.

        squared_relu: 2 max(x, 0)    gelu: Φ(x) + x e^(-x²/2) / √(2π)

    Args:
        x: any shape, in the computing dtype.
        activation: one of `ACTIVATIONS`.

    Returns:
        Same shape and dtype.
    """
    if activation == "gelu":
        density = array_namespace(x).exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))
        return _normal_distribution(x) + x * density
    return 2.0 * _positive(x)


def _positive(x: Array) -> Array:
    """Return max(x, 0); a NaN travels."""
    xp = array_namespace(x)
    return xp.where(x < 0, xp.zeros_like(x), x)


def _normal_distribution(x: Array) -> Array:
    """Return Φ(x), accurate relatively far to the left too, where 1 + erf cancels."""
    return 0.5 * _erfc(x * (-1.0 / math.sqrt(2.0)))


def _erfc(x: Array) -> Array:
    """Return erfc(x), of which the array API knows nothing: the library's own, or SciPy's."""
    xp = array_namespace(x)
    if is_torch_namespace(xp):
        return xp.erfc(x)
    if is_cupy_namespace(xp):
        return importlib.import_module("cupyx.scipy.special").erfc(x)
    erfc = importlib.import_module("scipy.special").erfc  # loaded by those who need it
    return erfc(x) if is_numpy_namespace(xp) else xp.asarray(erfc(np.asarray(x)))
