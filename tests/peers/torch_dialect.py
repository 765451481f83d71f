"""A dialect and torch on the same call: results, gradients, errors, and how far apart they may be.

How far: the derived bounds of the tests beside this file are of attention alone. A dialect adds
projections, so that a difference is measured here against the largest magnitude of its array: a
wrong rule is off by far more than `TOLERANCE`, and rounding in float64 by far less.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from optional import require
from refattn.errors import RefattnError

torch = require("torch")

TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""By dtype, of the largest magnitude, at least 1."""

Results = dict[str, np.ndarray | None]


def assert_same(ours: Results, theirs: Results) -> None:
    """Assert names, dtypes, shapes, NaN places, and values."""
    assert set(ours) == set(theirs)
    for name, actual in ours.items():
        expected = theirs[name]
        assert (actual is None) == (expected is None), name
        if actual is None or expected is None:
            continue
        assert actual.dtype == expected.dtype, (name, actual.dtype, expected.dtype)
        assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
        assert np.array_equal(np.isnan(actual), np.isnan(expected)), (name, actual, expected)
        scale = max(1.0, np.max(np.abs(np.nan_to_num(expected)), initial=0.0))
        difference = np.max(np.abs(np.nan_to_num(actual - expected)), initial=0.0)
        assert difference <= TOLERANCE[actual.dtype.name] * scale, (name, difference)


def attempt(run: Callable[[], Any], errors: tuple[type[Exception], ...]) -> Any:
    """Return what a call returns, or the error that it raises, warnings aside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return run()
        except errors as error:
            return error


def theirs_or_error(run: Callable[[], Any]) -> Any:
    """Return torch's result or its error."""
    errors = (RuntimeError, AssertionError, ValueError, IndexError, TypeError, NotImplementedError)
    return attempt(run, errors)


def ours_or_error(run: Callable[[], Any]) -> Any:
    """Return our result or our error, which is always one of refattn's own."""
    return attempt(run, (RefattnError,))


def tensor(value: Any, gradient: bool = True) -> Any:
    """Return a leaf of torch for an array; anything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    leaf = torch.from_numpy(value.copy())
    return leaf.requires_grad_(gradient and leaf.is_floating_point())


def array(value: Any) -> Any:
    """Return a NumPy array for a tensor; anything else as it is."""
    return value.detach().numpy().copy() if isinstance(value, torch.Tensor) else value


def gradients(
    results: tuple[Any, ...], cotangents: tuple[Any, ...], leaves: Mapping[str, Any]
) -> Results:
    """Return torch's gradients by name; zeros where the results do not depend on a leaf."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    pairs = [(r, c) for r, c in zip(results, cotangents, strict=True) if r is not None]
    found = torch.autograd.grad(
        [r for r, _ in pairs],
        list(wanted.values()),
        [torch.from_numpy(c) for _, c in pairs],
        materialize_grads=True,
    )
    return {name: gradient.numpy() for name, gradient in zip(wanted, found, strict=True)}
