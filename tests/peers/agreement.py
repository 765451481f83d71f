"""Comparing a peer with the reference: what both are asked, and how far apart they may be."""

from __future__ import annotations

from typing import Any

import numpy as np

from refattn.attention import attention
from refattn.attention_backward import attention_backward
from refattn.bounds import coefficients, profile_of
from refattn.certify.units import units

Arrays = dict[str, np.ndarray]

TENSORS = ("mask", "keep", "query_lengths", "key_lengths")
"""Options that the table of operations counts among the inputs."""

PARAMETERS = ("scale", "causal", "window", "softcap", "keep_probability")
"""Options that it counts among the parameters; the rest are conventions."""


def run_ours(arrays: Arrays, d_output: np.ndarray, **options: Any) -> Arrays:
    """Return our output, and our gradients for the same inputs."""
    bias = {"bias": arrays["bias"]} if "bias" in arrays else {}
    features = {name: arrays[name] for name in ("query", "key", "value")}
    result = attention(**features, **bias, **options)
    gradients = attention_backward(d_output, **features, **bias, **options)
    names = [f"d_{name}" for name in arrays]
    return {"output": result.output, **{name: getattr(gradients, name) for name in names}}


def allowed_between(
    op: str, inputs: Arrays, parameters: dict[str, Any], conventions: dict[str, Any], dtype: str
) -> Arrays:
    """Return how far two correct runs of an operation may be apart, element by element.

    Each is within the derived bound of the exact value (NUM-MODEL1), so they are within twice
    that.
    """
    found, magnitudes = units(op, inputs, parameters, conventions)
    return {
        name: 2 * (a * found[f"{name}.unit"] + b * found.get(f"{name}.unit_logit", 0.0) + floor)
        for name, (a, b, floor) in coefficients(op, profile_of(dtype), magnitudes).items()
    }


def allowances(arrays: Arrays, d_output: np.ndarray, **options: Any) -> Arrays:
    """Return how far two correct runs of attention may be apart, by the names of `run_ours`."""
    inputs = arrays | {"d_output": d_output}
    inputs |= {name: options.pop(name) for name in TENSORS if name in options}
    inputs = {n: a if n.endswith("_lengths") else _to_four_axes(a) for n, a in inputs.items()}
    given = {name: option for name, option in options.items() if option is not None}
    parameters = {name: given.pop(name) for name in PARAMETERS if name in given}
    allowed = allowed_between("attention", inputs, parameters, given, arrays["query"].dtype.name)
    shapes = {"output": d_output.shape} | {f"d_{n}": a.shape for n, a in arrays.items()}
    return {name: allowed[name].reshape(shape) for name, shape in shapes.items()}


def _to_four_axes(array: np.ndarray) -> np.ndarray:
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def assert_agree(ours: Arrays, theirs: Arrays, allowed: Arrays) -> None:
    """Assert that both have the same names, shapes, and values within what is allowed."""
    assert set(ours) == set(theirs) == set(allowed)
    for name, actual in ours.items():
        assert actual.shape == theirs[name].shape == allowed[name].shape, name
        excess = np.abs(actual.astype(np.float64) - theirs[name]) - allowed[name]
        where = np.unravel_index(np.argmax(excess), excess.shape)
        assert np.all(excess <= 0), (
            f"{name}{[int(i) for i in where]}: {actual[where]!r} and {theirs[name][where]!r} "
            f"differ by more than {allowed[name][where]:.3g}"
        )
