"""Our own implementations by name: loaded when asked for, and able to say why they are absent.

A backend runs an operation on named arrays, so that vectors can be put to it without knowing
how its functions are called.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from refattn.arrays import FLOATS, numpy_dtype
from refattn.errors import RefattnError

Arrays: TypeAlias = dict[str, np.ndarray[Any, Any]]
"""Tensors by the names of the operation's table."""

Options: TypeAlias = Mapping[str, Any]
"""Parameters or conventions of a case."""

Op: TypeAlias = Callable[[Arrays, dict[str, Any], str], dict[str, Any]]
"""How an operation is called: inputs in their dtype, options by name, the dtype's name."""

BACKENDS = ("numpy", "numpy-tiled", "numba", "numba-cuda", "cuda-cpp", "cupy")
"""Every backend, whether it loads here or not."""

GPU = {
    "numba-cuda": "refattn_gpu.numba_cuda.backend",
    "cuda-cpp": "refattn_gpu.cuda.backend",
    "cupy": "refattn_gpu.cupy_text",
}
"""Backends of the GPU package, by the module that has `absent()` and `run(...)`, and that has
`simulator()` if it may run without a device, and `DTYPES` if it claims some of them only."""

OPS = (
    "attention",
    "multihead",
    "causal_module",
    "gated_cross_attention",
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

CLAIMS: dict[str, tuple[str, ...]] = {
    "numpy": OPS,
    "numpy-tiled": ("attention",),
    "numba": ("attention", "rope", "alibi"),
    "numba-cuda": ("attention", "rope", "alibi", "merge"),
    "cuda-cpp": ("attention",),
    # what is counted or drawn on the host, as GELU's error function is, says nothing of a device
    "cupy": tuple(op for op in OPS if op not in ("traffic", "keep_mask", "gated_cross_attention")),
}
"""Operations that each backend of this release claims, some of them not under every option."""

TILED_TEXT = frozenset({"FA1-S31", "FA1-ALG1", "FA1-ALG2", "FA1-ALG4", "FA1-THM1"})
"""Clauses that say how attention goes tile by tile; a matrix text does not state them."""

MATRIX_TEXT = frozenset({"FA1-S22", "FA1-ALG0", "FA1-ALG3"})
"""Clauses that say how attention goes by whole matrices; a tiled text does not state them."""

TABLE_TEXT = frozenset({"OWN-ROPE4", "OWN-ROPE5"})
"""Clauses of the tables of a rotation; a kernel is given those of the reference."""

SLOPE_TEXT = frozenset({"ALIBI-S3b", "ALIBI-S3c"})
"""Clauses of the slopes of a linear bias; a kernel is given those of the reference."""

UNSTATED = {
    ("numpy", "attention"): TILED_TEXT,
    ("numpy-tiled", "attention"): MATRIX_TEXT,
    ("numba", "attention"): MATRIX_TEXT,
    ("numba", "rope"): TABLE_TEXT,
    ("numba", "alibi"): SLOPE_TEXT,
    ("numba-cuda", "attention"): MATRIX_TEXT,
    ("numba-cuda", "rope"): TABLE_TEXT,
    ("numba-cuda", "alibi"): SLOPE_TEXT,
    ("cuda-cpp", "attention"): MATRIX_TEXT,
    ("cupy", "attention"): TILED_TEXT,
    ("cupy", "rope"): TABLE_TEXT,
    ("cupy", "alibi"): SLOPE_TEXT,
}
"""Clauses whose vectors a backend may run, but of which its run proves nothing."""

TILE = {"block_rows": 13, "block_cols": 17}
"""Tile sizes of numpy-tiled: primes, so that tiles end off the edges of most lengths."""


class BackendAbsent(RefattnError):  # noqa: N818 - a state of this machine
    """A backend that cannot be loaded here; the sentence says why."""


class Unsupported(RefattnError):  # noqa: N818 - a state of the backend
    """An operation or a dtype that a backend does not claim."""


class Backend(NamedTuple):
    """One implementation: its name, its dtypes and how to run an operation."""

    name: str
    dtypes: tuple[str, ...]
    run: Callable[[str, Mapping[str, Any], Options, Options, str], Arrays]
    simulator: str = ""
    """What stands in for its device here; it takes minutes where a device takes seconds."""


def load(name: str) -> Backend:
    """Return a backend.

    Raises:
        BackendAbsent: it is unknown, or cannot be loaded here.
    """
    if name not in BACKENDS:
        raise BackendAbsent(f"there is no backend {name}; there are {', '.join(BACKENDS)}")
    if name == "numba" and importlib.util.find_spec("numba") is None:
        remedy = 'numba is not installed: pip install "refattn[cpu]"'
        raise BackendAbsent(f"backend {name} is absent: {remedy}")
    if name in GPU:
        return _load_gpu(name)
    ops = _OPS[name]

    def run(
        op: str, inputs: Mapping[str, Any], parameters: Options, conventions: Options, dtype: str
    ) -> Arrays:
        return run_one(name, ops, op, inputs, {**parameters, **conventions}, dtype)

    return Backend(name, FLOATS, run)


def _load_gpu(name: str) -> Backend:
    """Return a backend of the GPU package, which is imported here and by name only."""
    try:
        module = importlib.import_module(GPU[name])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "refattn_gpu":
            raise
        raise BackendAbsent(
            f"backend {name} is absent: refattn_gpu is not installed: pip install refattn"
        ) from None
    if why := module.absent():
        raise BackendAbsent(f"backend {name} is absent: {why}")
    simulator = getattr(module, "simulator", str)
    return Backend(name, getattr(module, "DTYPES", FLOATS), module.run, simulator())


def reference_op(name: str) -> Op:
    """Return how the reference is called for an operation, on arrays of any library."""
    return _OPS["numpy"][name]


def stated(name: str, op: str, clauses: Iterable[str]) -> tuple[str, ...]:
    """Return the clauses among those of a vector that a backend's run of it proves."""
    if op not in CLAIMS.get(name, ()):
        return ()
    return tuple(id_ for id_ in clauses if id_ not in UNSTATED.get((name, op), ()))


def claiming(clause: str, ops: Iterable[str]) -> tuple[str, ...]:
    """Return the backends whose run of one of these operations proves something of a clause."""
    wanted = tuple(ops)
    return tuple(name for name in BACKENDS if any(stated(name, op, (clause,)) for op in wanted))


def run_one(
    name: str,
    ops: Mapping[str, Op],
    op: str,
    inputs: Mapping[str, Any],
    options: dict[str, Any],
    dtype: str,
) -> Arrays:
    """Run an operation of a backend on NumPy arrays; floating inputs are cast.

    Raises:
        Unsupported: the operation or the dtype is not claimed.
    """
    if op not in ops:
        raise Unsupported(f"op is {op}, but backend {name} claims {', '.join(ops)}")
    if dtype not in FLOATS:
        raise Unsupported(f"dtype is {dtype}, but backend {name} claims {', '.join(FLOATS)}")
    cast = {key: cast_floats(np.asarray(array), dtype) for key, array in inputs.items()}
    with np.errstate(all="ignore"):
        outputs = ops[op](cast, options, dtype)
    return {key: np.asarray(array) for key, array in outputs.items() if array is not None}


def cast_floats(array: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """Return a floating array in the named dtype, and any other as it is."""
    return array.astype(numpy_dtype(dtype)) if array.dtype.kind == "f" else array


def _call(dotted: str, *args: Any, **options: Any) -> dict[str, Any]:
    """Call a function, imported on first use, and return its results by name."""
    module, name = dotted.rsplit(".", 1)
    package = "" if module.startswith("refattn_gpu") else "refattn."
    result = getattr(importlib.import_module(package + module), name)(*args, **options)
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


def _causal_module(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    cotangent, forward = _split(inputs, "d_output")
    outputs = {"output": _call("causal_module.causal_self_attention", **forward, **options)[""]}
    if cotangent:
        backward = "causal_module_backward.causal_self_attention_backward"
        outputs |= _call(backward, **cotangent, **forward, **options)
    return outputs


def _gated_cross_attention(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    from refattn.gated import GatedParameters

    cotangent, forward = _split(inputs, "d_output")
    weights, arrays = _split(forward, *GatedParameters._fields)
    arguments = {**arrays, "parameters": GatedParameters(**weights), **options}
    outputs = {"output": _call("gated.gated_cross_attention", **arguments)[""]}
    if cotangent:
        backward = "gated_backward.gated_cross_attention_backward"
        outputs |= _call(backward, **cotangent, **arguments)
    return outputs


def _head_importance(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    return _call("heads.head_importance", **inputs, **options)


def rope_of(module: str) -> Op:
    """Return how the functions of a module that are named rope and rope_backward are called."""

    def run(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
        positions = inputs["positions"]
        outputs = _call(f"{module}.rope", inputs["x"], positions, **options)
        if "d_output" in inputs:
            backward = _call(f"{module}.rope_backward", inputs["d_output"], positions, **options)
            outputs["d_x"] = backward[""]
        return outputs

    return run


def alibi_of(module: str) -> Op:
    """Return how the function of a module that is named alibi_bias is called."""

    def run(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
        heads, rule = options.pop("heads"), options.pop("slope_rule", "authors")
        computing = "float64" if dtype == "float64" else "float32"
        slopes = _call("alibi.alibi_slopes", heads, slope_rule=rule)[""].astype(computing)
        bias = _call(f"{module}.alibi_bias", slopes, **options)[""]
        return {"slopes": cast_floats(slopes, dtype), "bias": cast_floats(bias, dtype)}

    return run


def _tiles(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    return _call("flash.tile_states", **inputs, **options)


def merge_of(module: str) -> Op:
    """Return how the function of a module that is named merge is called."""
    return lambda inputs, options, dtype: _call(f"{module}.merge", **inputs, **options)


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


TILED_INPUTS = {"query", "key", "value", "mask", "keep", "d_output"}
"""Inputs of attention that the tiled listings know."""

TILED_OPTIONS = {"scale", "causal", "alignment", "keep_probability"}
"""Options of attention that the tiled listings know; any other must be at its default."""


def _tiled_attention(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    _refuse_beyond_listings(inputs, options)
    known = {key: value for key, value in options.items() if key in TILED_OPTIONS} | TILE
    operands, rest = _split(inputs, "query", "key", "value")
    cotangent, masks = _split(rest, "d_output")
    forward = _call("flash.flash_attention_forward", **operands, **masks, **known)
    outputs = {name: forward[name] for name in ("output", "logsumexp")}
    if cotangent:
        saved = {name: forward[name] for name in ("output", "row_max", "row_sum")}
        backward = "flash_backward.flash_attention_backward"
        outputs |= _call(backward, **cotangent, **operands, **saved, **masks, **known)
    return outputs


def _refuse_beyond_listings(inputs: Arrays, options: dict[str, Any]) -> None:
    """Refuse what Algorithms 2 and 4 do not have.

    Raises:
        Unsupported: an input or an option is beyond them.
    """
    from refattn.options import DEFAULTS

    beyond = sorted(set(inputs) - TILED_INPUTS)
    beyond += sorted(
        name
        for name, value in options.items()
        if name not in TILED_OPTIONS and value is not None and value != DEFAULTS.get(name)
    )
    if isinstance(options.get("alignment"), list):
        beyond.append("an alignment a batch item")
    if inputs["query"].shape[:-2] != inputs["key"].shape[:-2]:
        beyond.append("grouped heads")
    if beyond:
        raise Unsupported(f"the case has {', '.join(beyond)}, but the tiled listings do not")


def attention_of(module: str) -> Op:
    """Return how a module's functions attention and attention_backward are called."""

    def run(inputs: Arrays, options: dict[str, Any], dtype: str) -> dict[str, Any]:
        cotangents, forward = _split(inputs, "d_output", "d_logsumexp")
        outputs = _call(f"{module}.attention", **forward, **options)
        if cotangents:
            outputs |= _call(f"{module}.attention_backward", **cotangents, **forward, **options)
        return outputs

    return run


_OPS: dict[str, dict[str, Op]] = {
    "numpy": {
        "attention": _attention,
        "multihead": _multihead,
        "causal_module": _causal_module,
        "gated_cross_attention": _gated_cross_attention,
        "head_importance": _head_importance,
        "rope": rope_of("rope"),
        "alibi": alibi_of("alibi"),
        "tiles": _tiles,
        "merge": merge_of("merge"),
        "score": _score,
        "rope_decay": _rope_decay,
        "traffic": _traffic,
        "keep_mask": _keep_mask,
    },
    "numpy-tiled": {"attention": _tiled_attention},
    "numba": {"attention": attention_of("cpu"), "rope": rope_of("cpu"), "alibi": alibi_of("cpu")},
}
"""How the functions of a backend are called for each operation."""
