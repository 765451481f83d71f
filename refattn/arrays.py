"""The array library of an argument, and the rounding model that every function follows."""

from __future__ import annotations

from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from array_api_compat import array_namespace as _array_namespace

Array: TypeAlias = Any
"""An array of any library that follows the array API standard (NumPy, CuPy, torch, strict)."""

NARROW = ("float16", "bfloat16")
"""Names of the dtypes that are widened to float32 before computing."""

FLOATS = ("float64", "float32", *NARROW)
"""Names of the dtypes that attention is defined on."""


def array_namespace(*arrays: Array | None) -> Any:
    """Return the module whose functions act on the given arrays; None entries are ignored."""
    return _array_namespace(*(a for a in arrays if a is not None))


def dtype_name(array: Array) -> str:
    """Return an array's dtype by its bare name: `float32` for NumPy's, torch's and CuPy's."""
    return str(getattr(array.dtype, "name", array.dtype)).rsplit(".", 1)[-1].strip("'>")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return NumPy's dtype for one of `FLOATS` (bfloat16 is ml_dtypes')."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def widen(array: Array) -> Array:
    """Return the array in its computing dtype.

    Spec: OWN-ROUND1.

        float16, bfloat16 → float32;  float32, float64 stay
    """
    if dtype_name(array) not in NARROW:
        return array
    xp = array_namespace(array)
    return xp.astype(array, xp.float32)


def narrow(array: Array, like: Array) -> Array:
    """Round an array once to the dtype of `like`.

    Spec: OWN-ROUND1.
    """
    if array.dtype == like.dtype:
        return array
    return array_namespace(array).astype(array, like.dtype)
