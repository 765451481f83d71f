"""A dialect beside the system it speaks of: results, errors, and how far apart they may be.

How far: the derived bounds of the tests beside this file are of attention alone. A dialect adds
projections, so that a difference is measured here against the largest magnitude of its array: a
wrong rule is off by far more than `TOLERANCE`, and rounding in float64 by far less.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from refattn.errors import RefattnError

TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""By dtype, of the largest magnitude, at least 1."""

Results = dict[str, np.ndarray | None]


def assert_same(ours: Results, theirs: Results, tolerance: Mapping[str, float] = TOLERANCE) -> None:
    """Assert names, dtypes, shapes, NaN places, and values; infinities are equal or a fault."""
    assert set(ours) == set(theirs)
    for name, actual in ours.items():
        expected = theirs[name]
        assert (actual is None) == (expected is None), name
        if actual is None or expected is None:
            continue
        assert actual.dtype == expected.dtype, (name, actual.dtype, expected.dtype)
        assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
        assert np.array_equal(np.isnan(actual), np.isnan(expected)), (name, actual, expected)
        scale = max(1.0, np.max(np.abs(expected[np.isfinite(expected)]), initial=0.0))
        with np.errstate(invalid="ignore"):  # equal infinities have no difference
            difference = np.max(np.abs(np.nan_to_num(actual - expected)), initial=0.0)
        assert difference <= tolerance[actual.dtype.name] * scale, (name, difference)


def attempt(run: Callable[[], Any], errors: tuple[type[Exception], ...]) -> Any:
    """Return what a call returns, or the error that it raises, warnings aside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return run()
        except errors as error:
            return error


def ours_or_error(run: Callable[[], Any]) -> Any:
    """Return our result or our error, which is always one of refattn's own."""
    return attempt(run, (RefattnError,))
