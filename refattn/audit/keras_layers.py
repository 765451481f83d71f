"""Adapter of Keras's layers as dialects: with identities for their projections."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from refattn.audit.capabilities import Capabilities
from refattn.audit.subject import Arrays, Subject
from refattn.dialects import keras2_mha, keras3_gqa, keras3_mha
from refattn.dialects.conventions import Dialect, choices
from refattn.errors import RefattnError
from refattn.projections import merge_heads, split_heads

FEATURES = frozenset({"mask", "causal", "cross_lengths", "dropout", "backward"})
"""What every layer takes."""

MORE = {
    keras3_mha.DIALECT.name: frozenset({"window", "value_size"}),
    keras3_gqa.DIALECT.name: frozenset({"window", "grouped_heads"}),
    keras2_mha.DIALECT.name: frozenset({"value_size"}),
}
"""What each layer takes besides."""


def dialect(told: Dialect) -> Subject:
    """Return the dialect's text, as a call without scores answers: Keras 3's is in float32."""
    in_float32 = "float32" in choices(told.conventions["softmax_dtype"])
    dtypes = ("float32",) if in_float32 else ("float64", "float32")
    offered = Capabilities(features=FEATURES | MORE[told.name], dtypes=dtypes)
    return Subject(told.name, told.version, offered, partial(_run, told.name))


def _run(name: str, inputs: Arrays, options: dict[str, Any]) -> Arrays:
    """Run a layer on a case, and its gradients if the case has a d_output."""
    layer = _layer(name, inputs, options)
    query, key, value = (merge_heads(inputs[n]) for n in ("query", "key", "value"))
    batch, heads, n_q, _ = inputs["query"].shape
    call: dict[str, Any] = {"use_causal_mask": bool(options.get("causal"))}
    if "mask" in inputs:
        logits = (batch, heads, n_q, key.shape[1])
        call["attention_mask"] = np.broadcast_to(inputs["mask"], logits)
    if "keep" in inputs:
        call |= {"keep": inputs["keep"], "training": True}
    outputs = {"output": split_heads(layer(query, value, key, **call), heads)}
    if "d_output" in inputs:
        found = layer.backward(merge_heads(inputs["d_output"]), query, value, key, **call)
        for part in ("query", "key", "value"):
            count = inputs[part].shape[1]
            outputs[f"d_{part}"] = split_heads(getattr(found, f"d_{part}"), count)
    return outputs


def _layer(name: str, inputs: Arrays, options: dict[str, Any]) -> Any:
    """Return a layer whose projections leave heads as they are."""
    (_, h, _, d_k), (_, h_k, _, _), (_, _, _, d_v) = (
        inputs[n].shape for n in ("query", "key", "value")
    )
    made: dict[str, Any] = {"use_bias": False}
    if "keep" in inputs:
        made["dropout"] = 1 - options["keep_probability"]
    if "window" in options:
        made["sliding_window"] = _reach(options) + 1  # Keras counts the first key beyond it
    layer: Any
    if name == keras3_gqa.DIALECT.name:
        layer = keras3_gqa.GroupQueryAttention(d_k, h, h_k, **made)
    else:
        room = keras3_mha if name == keras3_mha.DIALECT.name else keras2_mha
        layer = room.MultiHeadAttention(h, d_k, d_v, output_shape=h * d_v, **made)
    dtype = inputs["query"].dtype
    into = [
        np.eye(n * d, dtype=dtype).reshape(n * d, n, d)
        for n, d in ((h, d_k), (h_k, d_k), (h_k, d_v))
    ]
    return layer.set_weights([*into, np.eye(h * d_v, dtype=dtype).reshape(h, d_v, h * d_v)])


def _reach(options: dict[str, Any]) -> int:
    """Return how many tokens a window reaches on either side.

    Raises:
        RefattnError: its sides differ, which Keras has no argument for.
    """
    left, right = options["window"]
    if left is None or not (left == right or (options.get("causal") and right in (0, None))):
        raise RefattnError("it has no argument for a window whose sides differ")
    return int(left)
