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

CONVENTIONS = {"alignment": "top_left", "head_map": "interleave"}
"""Conventions that its results show on every backend; its empty rows follow no single one."""

TAKEN = ("query", "key", "value", "mask", "bias")
"""Tensors that it takes."""

BACKENDS = ("torch", "jax", "tensorflow")
"""Backends in the order of preference, where KERAS_BACKEND names none."""


def subject() -> Subject:
    """Return the subject; keras is imported here, on an installed backend."""
    if "KERAS_BACKEND" not in os.environ:
        installed = (name for name in BACKENDS if importlib.util.find_spec(name))
        os.environ["KERAS_BACKEND"] = next(installed, BACKENDS[0])
    import keras

    backend = keras.backend.backend()
    capabilities = Capabilities(
        features=FEATURES,
        dtypes=("float64", "float32", "float16"),
        conventions=CONVENTIONS,
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

    tensors = {  # a bare float64 array would be made float32, Keras's default
        name: ops.convert_to_tensor(_four(array), dtype=array.dtype.name)
        for name, array in inputs.items()
        if name in TAKEN
    }
    output = ops.dot_product_attention(
        **tensors,
        scale=options.get("scale"),
        is_causal=bool(options.get("causal", False)),
    )
    return {"output": np.asarray(ops.convert_to_numpy(output))}


def _four(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return an array with leading axes of one, up to four axes."""
    return array.reshape((1,) * (4 - array.ndim) + array.shape)
