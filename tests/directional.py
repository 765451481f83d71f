"""Gradients against central differences of the forward function, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def check_gradients(
    loss: Callable[[dict[str, Any]], float],
    arrays: Mapping[str, Any],
    gradients: Mapping[str, Any],
    *,
    seed: int = 0,
    step: float = 1e-5,
    rel_tol: float = 1e-6,
) -> None:
    """Compare each gradient with the loss's slope along one random direction.

    A direction along which the gradient is all but zero proves nothing and fails.
    """
    rng = np.random.default_rng(seed)
    for name, array in arrays.items():
        direction = rng.normal(size=array.shape)
        ahead = loss({**arrays, name: array + step * direction})
        behind = loss({**arrays, name: array - step * direction})
        numeric = (ahead - behind) / (2 * step)
        assert gradients[name].shape == array.shape, name
        analytic = float((gradients[name] * direction).sum())
        assert abs(analytic) > 1e-3, f"{name}: the gradient along this direction is all but zero"
        assert math.isclose(analytic, numeric, rel_tol=rel_tol, abs_tol=1e-8), name
