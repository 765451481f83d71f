"""Our own implementations by name: loaded when asked for, and able to say why they are absent.

A backend runs an operation on named arrays, so that vectors can be put to it without knowing
how its functions are called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from refattn.arrays import FLOATS, numpy_dtype
from refattn.errors import RefattnError

Arrays: TypeAlias = dict[str, np.ndarray[Any, Any]]
"""Tensors by the names of the operation's table."""

Options: TypeAlias = Mapping[str, Any]
"""Parameters or conventions of a case."""

BACKENDS = ("numpy", "numba", "numba-cuda", "cupy")
"""Every backend, whether it loads here or not."""

ABSENT = {
    "numba": "not part of this release",
    "numba-cuda": "not part of this release",
    "cupy": "not part of this release",
}
"""Why a backend cannot be loaded anywhere."""

OPS = (
    "attention",
    "multihead",
    "head_importance",
    "rope",
    "alibi",
    "tiles",
    "merge",
    "score",
    "rope_decay",
    "traffic",
    "keep_mask",
)
"""Every operation that a case can ask for."""

CLAIMS: dict[str, tuple[str, ...]] = {"numpy": OPS}
"""Operations that each backend of this release claims."""


class BackendAbsent(RefattnError):  # noqa: N818 - a state of this machine
    """A backend that cannot be loaded here; the sentence says why."""


class Unsupported(RefattnError):  # noqa: N818 - a state of the backend
    """An operation or a dtype that a backend does not claim."""


class Backend(NamedTuple):
    """One implementation: its name, its dtypes and how to run an operation."""

    name: str
    dtypes: tuple[str, ...]
    run: Callable[[str, Mapping[str, Any], Options, Options, str], Arrays]


def load(name: str) -> Backend:
    """Return a backend.

    Raises:
        BackendAbsent: it is unknown, or cannot be loaded here.
    """
    if name not in BACKENDS:
        raise BackendAbsent(f"there is no backend {name}; there are {', '.join(BACKENDS)}")
    if name in ABSENT:
        raise BackendAbsent(f"backend {name} is absent: {ABSENT[name]}")
    return Backend("numpy", FLOATS, run_numpy)


def claiming(ops: set[str]) -> tuple[str, ...]:
    """Return the backends that claim every one of the given operations; none for none."""
    return tuple(name for name in BACKENDS if ops and ops <= set(CLAIMS.get(name, ())))


def run_numpy(
    op: str, inputs: Mapping[str, Any], parameters: Options, conventions: Options, dtype: str
) -> Arrays:
    """Run an operation by the reference functions on NumPy arrays.

    Args:
        op: one of `OPS`.
        inputs: tensors by name; floating ones are cast to dtype.
        parameters: numbers of the case.
        conventions: choices of the case.
        dtype: one of `refattn.arrays.FLOATS`.

    Returns:
        outputs: tensors by name.

    Raises:
        Unsupported: the operation or the dtype is not claimed.
    """
    if op not in _NUMPY:
        raise Unsupported(f"op is {op}, but backend numpy claims {', '.join(_NUMPY)}")
    if dtype not in FLOATS:
        raise Unsupported(f"dtype is {dtype}, but backend numpy claims {', '.join(FLOATS)}")
    cast = {name: cast_floats(np.asarray(array), dtype) for name, array in inputs.items()}
    with np.errstate(all="ignore"):
        outputs = _NUMPY[op](cast, {**parameters, **conventions}, dtype)
    return {name: np.asarray(array) for name, array in outputs.items() if array is not None}


def cast_floats(array: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """Return a floating array in the named dtype, and any other as it is."""
    return array.astype(numpy_dtype(dtype)) if array.dtype.kind == "f" else array


def _call(dotted: str, *args: Any, **options: Any) -> Any:
    """Call a reference function, imported on first use."""
    module, name = dotted.rsplit(".", 1)
    return getattr(importlib.import_module(f"refattn.{module}"), name)(*args, **options)


def _split(inputs: Arrays, *names: str) -> tuple[Arrays, Arrays]:
    """Return the named inputs that are there, and the rest."""
    taken = {name: inputs[name] for name in names if name in inputs}
    return taken, {name: array for name, array in inputs.items() if name not in taken}


def _attention(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    cotangents, forward = _split(inputs, "d_output", "d_logsumexp")
    outputs = _call("attention.attention", **forward, **options)._asdict()
    if "d_output" in cotangents:
        gradients = _call(
            "attention_backward.attention_backward", **cotangents, **forward, **options
        )
        outputs |= gradients._asdict()
    return dict(outputs)


_NUMPY: dict[str, Callable[[Arrays, dict[str, Any], str], dict[str, Any]]] = {
    "attention": _attention,
}
"""How the reference functions are called for each operation."""
