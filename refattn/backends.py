"""Our own implementations by name: loaded when asked for, and able to say why they are absent.

A backend runs an operation on named arrays, so that vectors can be put to it without knowing
how its functions are called.
"""

from __future__ import annotations

import importlib
import importlib.util
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

CLAIMS: dict[str, tuple[str, ...]] = {"numpy": OPS, "numba": ("attention",)}
"""Operations that each backend of this release claims, some of them not under every option."""


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
    if name == "numba":
        if importlib.util.find_spec("numba") is None:
            remedy = 'numba is not installed: pip install "refattn[cpu]"'
            raise BackendAbsent(f"backend {name} is absent: {remedy}")
        return Backend("numba", FLOATS, run_numba)
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


def run_numba(
    op: str, inputs: Mapping[str, Any], parameters: Options, conventions: Options, dtype: str
) -> Arrays:
    """Run an operation by the CPU kernels; arguments and outputs as `run_numpy`.

    Raises:
        Unsupported: the operation, the dtype or an option is not claimed.
    """
    if op not in CLAIMS["numba"]:
        raise Unsupported(f"op is {op}, but backend numba claims {', '.join(CLAIMS['numba'])}")
    if dtype not in FLOATS:
        raise Unsupported(f"dtype is {dtype}, but backend numba claims {', '.join(FLOATS)}")
    cast = {name: cast_floats(np.asarray(array), dtype) for name, array in inputs.items()}
    cotangents, forward = _split(cast, "d_output", "d_logsumexp")
    options = {**parameters, **conventions}
    outputs = _call("cpu.attention", **forward, **options)
    if cotangents:
        outputs |= _call("cpu.attention_backward", **cotangents, **forward, **options)
    return {name: np.asarray(array) for name, array in outputs.items() if array is not None}


def cast_floats(array: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """Return a floating array in the named dtype, and any other as it is."""
    return array.astype(numpy_dtype(dtype)) if array.dtype.kind == "f" else array


def _call(dotted: str, *args: Any, **options: Any) -> dict[str, Any]:
    """Call a reference function, imported on first use, and return its results by name."""
    module, name = dotted.rsplit(".", 1)
    result = getattr(importlib.import_module(f"refattn.{module}"), name)(*args, **options)
    return dict(result._asdict()) if hasattr(result, "_asdict") else {"": result}


def _split(inputs: Arrays, *names: str) -> tuple[Arrays, Arrays]:
    """Return the named inputs that are there, and the rest."""
    taken = {name: inputs[name] for name in names if name in inputs}
    return taken, {name: array for name, array in inputs.items() if name not in taken}


def _attention(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    cotangents, forward = _split(inputs, "d_output", "d_logsumexp")
    outputs = _call("attention.attention", **forward, **options)
    if cotangents:
        backward = "attention_backward.attention_backward"
        outputs |= _call(backward, **cotangents, **forward, **options)
    return outputs


def _multihead(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    cotangent, forward = _split(inputs, "d_output")
    outputs = {"output": _call("multihead.multihead_attention", **forward, **options)[""]}
    if cotangent:
        backward = "multihead_backward.multihead_attention_backward"
        outputs |= _call(backward, **cotangent, **forward, **options)
    return outputs


def _head_importance(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    return _call("heads.head_importance", **inputs, **options)


def _rope(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    outputs = _call("rope.rope", inputs["x"], inputs["positions"], **options)
    if "d_output" in inputs:
        backward = _call("rope.rope_backward", inputs["d_output"], inputs["positions"], **options)
        outputs["d_x"] = backward[""]
    return outputs


def _alibi(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    heads, rule = options.pop("heads"), options.pop("slope_rule", "authors")
    computing = "float64" if dtype == "float64" else "float32"
    slopes = _call("alibi.alibi_slopes", heads, slope_rule=rule)[""].astype(computing)
    bias = _call("alibi.alibi_bias", slopes, **options)[""]
    return {"slopes": cast_floats(slopes, dtype), "bias": cast_floats(bias, dtype)}


def _tiles(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    return _call("flash.tile_states", **inputs, **options)


def _merge(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    return _call("merge.merge", **inputs, **options)


def _score(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {"scores": _call("scores.score", **inputs, **options)[""]}


def _rope_decay(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    computing = "float64" if dtype == "float64" else "float32"
    decay = _call("rope_decay.rope_decay", inputs["distances"], dtype=computing, **options)[""]
    return {"decay": cast_floats(decay, dtype)}


def _traffic(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    return _call("traffic.hbm_traffic", **options)


def _keep_mask(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {"keep": _call("dropout.keep_mask", options.pop("shape"), **options)[""]}


_NUMPY: dict[str, Callable[[Arrays, dict[str, Any], str], dict[str, Any]]] = {
    "attention": _attention,
    "multihead": _multihead,
    "head_importance": _head_importance,
    "rope": _rope,
    "alibi": _alibi,
    "tiles": _tiles,
    "merge": _merge,
    "score": _score,
    "rope_decay": _rope_decay,
    "traffic": _traffic,
    "keep_mask": _keep_mask,
}
"""How the reference functions are called for each operation."""
