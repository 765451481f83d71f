"""Keras's layers on the same call as ours: requests to a process that has the backend.

How far the two may be apart: as for torch's dialects, see `torch_dialect.py`.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from optional import lacking, require_device
from refattn.errors import RefattnError

WORKER = Path(__file__).with_name("keras_worker.py")

TOLERANCE = {"float64": 1e-11, "float32": 1e-5}
"""By dtype, of the largest magnitude, at least 1."""

HUNG = {"query": "attached_query_mask", "value": "value_mask", "key": "key_mask"}
"""Ours for a mask that hangs on an input."""


@contextmanager
def keras_process(backend: str) -> Iterator[Any]:
    """Give a function that has a request answered by Keras on a backend."""
    package = "tf_keras" if backend == "tf_keras" else "keras"
    require_device(package, lacking(package))
    worker = subprocess.Popen(
        [sys.executable, str(WORKER), backend],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )

    def ask(request: dict[str, Any]) -> Any:
        assert worker.stdin is not None and worker.stdout is not None
        pickle.dump(request, worker.stdin)
        worker.stdin.flush()
        return pickle.load(worker.stdout)

    try:
        yield ask
    finally:
        worker.stdin.close()  # type: ignore[union-attr]
        worker.wait()
        worker.stdout.close()  # type: ignore[union-attr]


def assert_close(
    name: str, actual: Any, expected: Any, tolerance: float | None = None, scale: float = 1.0
) -> None:
    """Assert presence, dtype, shape and values."""
    assert (actual is None) == (expected is None), name
    if actual is None:
        return
    assert actual.dtype == expected.dtype, (name, actual.dtype, expected.dtype)
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    tolerance = tolerance or TOLERANCE[actual.dtype.name]
    scale = max(scale, np.max(np.abs(expected), initial=0.0))
    difference = np.max(np.abs(actual - expected), initial=0.0)
    assert difference <= tolerance * scale, (name, difference, scale)


def compare(
    ask: Any,
    ours: Any,
    layer: str,
    named: dict[str, Any],
    inputs: dict[str, Any],
    options: dict[str, Any] | None = None,
    *,
    hung: dict[str, Any] | None = None,
    hung_names: dict[str, str] = HUNG,
    dtype: str = "float64",
    seed: int = 7,
) -> str | None:
    """Compare a call of a layer, forward and backward; return Keras's error (we err, too)."""
    options, hung = options or {}, hung or {}
    theirs = ask({
        "layer": layer, "named": named, "inputs": inputs, "options": options, "hung": hung,
        "dtype": dtype, "seed": seed,
    })  # fmt: skip
    told = options | {hung_names[name]: mask for name, mask in hung.items()}
    if isinstance(theirs, str):
        with_error = _ours(ours, named, inputs, told, dtype, None)
        assert isinstance(with_error, RefattnError), (theirs, with_error)
        return theirs
    mine = _ours(ours, named, inputs, told, dtype, theirs)
    assert not isinstance(mine, Exception), mine
    names = [name.split(":")[0].split("/")[-2:] for name in theirs["names"]]
    assert ["/".join(name) for name in names] == mine["names"]
    tolerance = TOLERANCE["float32"] if mine["fused"] else None
    if mine["sunk"]:
        tolerance = max(TOLERANCE[dtype], 1e-6)
    for name in ("output", "scores"):
        assert_close(name, mine[name], theirs[name], tolerance)
    if "gradients" in theirs and not mine["empty"]:
        by_input, by_weight = theirs["gradients"]
        expected = {f"d_{name}": gradient for name, gradient in by_input.items()}
        actual = {name: getattr(mine["gradients"], name) for name in expected}
        expected |= dict(zip(mine["names"], by_weight, strict=True))
        actual |= dict(zip(mine["names"], mine["gradients"].d_weights, strict=True))
        # of all of them: the gradient of the keys' bias is 0, and only rounding is left of it
        scale = max(np.max(np.abs(gradient), initial=1.0) for gradient in expected.values())
        for name, gradient in expected.items():
            assert_close(name, actual[name], gradient, tolerance, scale)
    return None


def _is_fused(layer: Any, inputs: Any, scores: Any) -> bool:
    """Tell whether Keras computes a call in float32, by its backend's fused attention."""
    keras3 = hasattr(layer, "flash_attention")
    return keras3 and scores is None and not layer.dropout and inputs["query"].ndim == 3


def _is_sunk(layer: Any, inputs: Any) -> bool:
    """Tell whether tf-keras subtracts a rounded logsumexp, which may be as large as 1e9."""
    axes = layer.attention_axes if hasattr(layer, "softmax_robust_masking") else 0
    return (
        inputs["query"].ndim > 3
        if axes is None
        else isinstance(axes, (tuple, list)) and len(axes) > 1
    )


def _empties_a_row(layer: Any, inputs: Any, told: Any) -> bool:
    """Tell whether a call has a row without a key; fused, its gradient is a named exception."""
    _, scores = layer(**inputs, **(told | {"return_attention_scores": True}))
    return not np.all(np.any(scores != 0, axis=-1))


def _ours(ours: Any, named: Any, inputs: Any, told: Any, dtype: str, theirs: Any) -> Any:
    """Return our results, or our error, which is one of refattn's own."""
    try:
        layer = ours(**named)
        if theirs is None:  # Keras erred: draw the weights that the layer would have
            shapes = [x.shape for x in (inputs["query"], inputs["value"])]
            key = inputs.get("key")
            found = layer.weight_shapes(*shapes, None if key is None else key.shape)
            draw = np.random.default_rng(1).normal
            weights = [draw(size=shape).astype(dtype) for shape in found.values()]
            keep, cotangents = None, None
        else:
            weights, cotangents = theirs["weights"], theirs["cotangents"]
            keep = theirs["keep"] if told.get("training") else None
        if cotangents is None and told.get("training") and 0 < named.get("dropout", 0) < 1:
            told = told | {"training": False}  # there is no keep mask where there was no result
        layer = layer.set_weights(weights)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            returned = layer(**inputs, **told, keep=keep)
            output, scores = returned if isinstance(returned, tuple) else (returned, None)
            if cotangents is None:
                return returned
            d_output, d_scores = cotangents
            found = layer.backward(d_output, **inputs, **told, keep=keep, d_scores=d_scores)
        fused = _is_fused(layer, inputs, scores)
        empty = fused and _empties_a_row(layer, inputs, told)
        results = {"output": output, "scores": scores, "gradients": found}
        results["names"] = list(layer.weights)
        return results | {"fused": fused, "empty": empty, "sunk": _is_sunk(layer, inputs)}
    except RefattnError as error:
        return error
