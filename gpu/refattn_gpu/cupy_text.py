"""The reference text on CuPy's arrays: the same functions, at work in device memory.

A backend is handed NumPy arrays and returns NumPy arrays; between the two stands a library of the
array API. Only `cupy_library` speaks of CuPy, so the whole path runs, and is proven, with another
library where there is no device.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from refattn.alibi import alibi_bias, alibi_slopes
from refattn.arrays import FLOATS, NARROW, Array
from refattn.backends import CLAIMS, Arrays, Options, Unsupported, cast_floats, reference_op
from refattn.judge import STATISTICS
from refattn.rope_decay import rope_decay

REMEDY = 'cupy is not installed: pip install "refattn[cuda13]", or [cuda12] for a driver of CUDA 12'
"""What to do where the package is missing."""


Call: TypeAlias = "Callable[[Library, str, dict[str, Array], dict[str, Any], str], dict[str, Any]]"
"""How an operation is called on a library: arrays, options, the computing dtype."""


class Library(NamedTuple):
    """An array library of the array API standard, and the way to it and back."""

    name: str
    put: Callable[[np.ndarray[Any, Any]], Array]
    """From NumPy's memory to the library's."""
    get: Callable[[Array], np.ndarray[Any, Any]]
    """And back."""


def absent() -> str:
    """Return why CuPy cannot compute here, in one sentence; an empty string if it can."""
    if importlib.util.find_spec("cupy") is None:
        return REMEDY
    try:
        devices = _cupy().cuda.runtime.getDeviceCount()
    except Exception as error:  # its own classes stand in a module that may not load
        words = " ".join(str(error).split())[:200] or type(error).__name__
        return f"cupy is installed, but finds no CUDA device: {words}"
    return "" if devices else "cupy is installed, but the driver shows no CUDA device"


def _cupy() -> Any:
    return importlib.import_module("cupy")


def cupy_library() -> Library:
    """Return CuPy; call it only where `absent` finds nothing."""
    cupy = _cupy()
    return Library("cupy", cupy.asarray, cupy.asnumpy)


def run(
    op: str, inputs: Mapping[str, Any], parameters: Options, conventions: Options, dtype: str
) -> Arrays:
    """Run an operation of the reference on CuPy's arrays.

    Spec: OWN-ROUND1.

    Args:
        op: one of `refattn.backends.CLAIMS["cupy"]`.
        inputs: NumPy arrays by name.
        parameters: of the case.
        conventions: of the case.
        dtype: one of `refattn.arrays.FLOATS`.

    Returns:
        NumPy arrays by name.

    Raises:
        Unsupported: the operation or the dtype is none of these, or the case needs a rounding
            between two stages that is not made here.
    """
    return run_on(cupy_library(), op, inputs, {**parameters, **conventions}, dtype)


def run_on(
    library: Library, op: str, inputs: Mapping[str, Any], options: Options, dtype: str
) -> Arrays:
    """Run an operation of the reference on the arrays of a library.

    Spec: OWN-ROUND1.

    Not every library has 16-bit arrays, so none is asked for them: inputs are rounded to the dtype,
    widened and put; results are rounded once to it when they are back.

    Raises:
        Unsupported: as `run`.
    """
    _check(op, options, dtype)
    computing = "float32" if dtype in NARROW else dtype
    put = {n: library.put(_rounded(np.asarray(x), dtype, computing)) for n, x in inputs.items()}
    with np.errstate(all="ignore"):
        results = _CALLS.get(op, _reference)(library, op, put, dict(options), computing)
    back = {name: np.asarray(library.get(x)) for name, x in results.items() if x is not None}
    return {name: x if name in STATISTICS else cast_floats(x, dtype) for name, x in back.items()}


def _rounded(array: np.ndarray[Any, Any], dtype: str, computing: str) -> np.ndarray[Any, Any]:
    """Return a floating array rounded to a dtype, in its computing dtype; any other as it is."""
    return cast_floats(array, dtype).astype(computing) if array.dtype.kind == "f" else array


def _check(op: str, options: Options, dtype: str) -> None:
    if op not in CLAIMS["cupy"]:
        raise Unsupported(f"op is {op}, but backend cupy claims {', '.join(CLAIMS['cupy'])}")
    if dtype not in FLOATS:
        raise Unsupported(f"dtype is {dtype}, but backend cupy claims {', '.join(FLOATS)}")
    if dtype in NARROW and options.get("round_weights"):
        raise Unsupported(
            f"the case rounds the weights to {dtype}, but this backend keeps 16-bit numbers in "
            f"float32 from first to last"
        )


def _reference(
    library: Library, op: str, put: dict[str, Array], options: dict[str, Any], dtype: str
) -> dict[str, Any]:
    return reference_op(op)(put, options, dtype)


def _alibi(
    library: Library, op: str, put: dict[str, Array], options: dict[str, Any], dtype: str
) -> dict[str, Any]:
    rule = options.pop("slope_rule", "authors")
    slopes = library.put(alibi_slopes(options.pop("heads"), slope_rule=rule).astype(dtype))
    return {"slopes": slopes, "bias": alibi_bias(slopes, **options)}


def _rope_decay(
    library: Library, op: str, put: dict[str, Array], options: dict[str, Any], dtype: str
) -> dict[str, Any]:
    return {"decay": rope_decay(put["distances"], dtype=dtype, **options)}


_CALLS: dict[str, Call] = {"alibi": _alibi, "rope_decay": _rope_decay}
"""Operations whose call in `refattn.backends` names NumPy."""
