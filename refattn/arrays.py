"""The array library of an argument, and the rounding model that every function follows."""

from __future__ import annotations

from functools import lru_cache
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

_NUMPY = _array_namespace(np.empty(0))


def array_namespace(*arrays: Array | None) -> Any:
    """Return the module whose functions act on the given arrays; None entries are ignored."""
    given = [a for a in arrays if a is not None]
    return _NUMPY if given and all(map(is_plain, given)) else _array_namespace(*given)


def is_plain(value: Any) -> bool:
    """Tell, without asking any library, that a value is an array of NumPy; false is no answer.

    A gradient of JAX that is zero by its type is an ndarray too: its dtype is of kind V.
    """
    return type(value) is np.ndarray and value.dtype.kind != "V"


def dtype_name(array: Array) -> str:
    """Return an array's dtype by its bare name: `float32` for NumPy's, torch's and CuPy's."""
    dtype = array.dtype
    return _bare_name(dtype) if isinstance(dtype, np.dtype) else _bare_name.__wrapped__(dtype)


@lru_cache(maxsize=64)  # NumPy makes the name anew whenever it is asked
def _bare_name(dtype: Any) -> str:
    return str(getattr(dtype, "name", dtype)).rsplit(".", 1)[-1].strip("'>")


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
