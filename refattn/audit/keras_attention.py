"""Adapter of `keras.ops.dot_product_attention`, on whichever backend Keras runs."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np

from refattn.audit.capabilities import Capabilities
from refattn.audit.subject import Arrays, Subject

FEATURES = frozenset({"scale", "mask", "bias", "causal", "grouped_heads", "cross_lengths"})
"""What its documentation promises on every backend."""

CONVENTIONS = {
    "torch": {"empty_row": "zero", "masked": "add"},
    "jax": {},
    "tensorflow": {},
    "numpy": {},
}
"""Conventions that the results of each backend show, beside those of all."""

BACKENDS = tuple(CONVENTIONS)
"""Backends in the order of preference, where KERAS_BACKEND names none."""


def subject() -> Subject:
    """Return the subject; keras is imported here, on an installed backend."""
    if "KERAS_BACKEND" not in os.environ:
        installed = (name for name in BACKENDS if importlib.util.find_spec(name))
        os.environ["KERAS_BACKEND"] = next(installed)
    import keras

    backend = keras.backend.backend()
    capabilities = Capabilities(
        features=FEATURES,
        dtypes=("float64", "float32", "float16"),
        conventions={
            "alignment": "top_left",
            "head_map": "interleave",
            **CONVENTIONS.get(backend, {}),
        },
        layout="bnhd",
        exclusive=(
            frozenset({"mask", "bias"}),
            frozenset({"bias", "causal"}),
        ),
    )
    return Subject("keras", f"keras {keras.__version__} on {backend}", capabilities, run)


def run(inputs: Arrays, options: dict[str, Any]) -> Arrays:
    """Run the function on a case."""
    from keras import ops

    shaped = {
        name: inputs[name].reshape((1,) * (4 - inputs[name].ndim) + inputs[name].shape)
        for name in ("mask", "bias")
        if name in inputs
    }
    output = ops.dot_product_attention(
        inputs["query"],
        inputs["key"],
        inputs["value"],
        **shaped,
        scale=options.get("scale"),
        is_causal=bool(options.get("causal", False)),
    )
    return {"output": np.asarray(ops.convert_to_numpy(output))}
