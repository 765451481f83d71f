"""A pytest plugin for Keras's own tests: its attention layers call ours.

`KERAS_BACKEND=torch PYTHONPATH=tests/peers pytest -p keras_posing --pyargs \
keras.src.layers.attention`, with `-c /dev/null` so that this project's settings stay out of it. A
layer keeps its projections' weights, its masks and its configuration; what it computes, forward
and backward, is ours. Where ours refuses, Keras must err, too, and its own error is what its test
sees. A subclass with its own attention keeps that.
"""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import numpy as np
import pytest
from keras.src import backend
from keras.src.layers.attention.grouped_query_attention import GroupedQueryAttention
from keras.src.layers.attention.multi_head_attention import MultiHeadAttention

from refattn.dialects.keras3_gqa import GroupQueryAttention as OurGroups
from refattn.dialects.keras3_mha import MultiHeadAttention as OurHeads
from refattn.errors import RefattnError

COUNTS: Counter[str] = Counter()
"""Calls that were ours, that both refused, and that were left to Keras."""

TORCH = backend.backend() == "torch"

if TORCH:
    import torch

    class Ours(torch.autograd.Function):
        """Ours as one operation of torch: `run` gives results, `back` the gradients."""

        @staticmethod
        def forward(ctx: Any, run: Any, back: Any, *tensors: Any) -> Any:
            """Run ours on arrays."""
            ctx.back = back
            ctx.dtypes = [t.dtype for t in tensors]
            return tuple(torch.from_numpy(np.ascontiguousarray(r)) for r in run(tensors))

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            """Return our gradients; None for what is no input."""
            found = ctx.back(*(c.detach().cpu().numpy() for c in cotangents))
            gradients = zip(found, ctx.dtypes, strict=True)
            return (None, None, *(torch.from_numpy(np.array(g)).to(t) for g, t in gradients))


def ours_like(layer: Any) -> Any:
    """Return our layer of the same configuration."""
    kind = OurHeads if isinstance(layer, MultiHeadAttention) else OurGroups
    named = {n: getattr(layer, f"_{n}", getattr(layer, n, None)) for n in _parameters(kind)}
    if named.get("attention_axes") is not None:
        named["attention_axes"] = tuple(named["attention_axes"])
    return kind(**named)


def _parameters(kind: Any) -> list[str]:
    return [n for n in inspect.signature(kind).parameters if n != "weights"]


def weights_of(layer: Any) -> list[Any]:
    """Return kernels and biases in order, as the projections see them: adapters are in them."""
    parts = [
        "query",
        "key",
        *(["gate"] if hasattr(layer, "_gate_dense") else []),
        "value",
        "output",
    ]
    found = []
    for part in parts:
        dense = getattr(layer, f"_{part}_dense")
        found += [dense.kernel, *([] if dense.bias is None else [dense.bias])]
    return [w.value if hasattr(w, "value") else w for w in found]


def arrays(values: Any) -> list[Any]:
    """Return tensors as NumPy's arrays."""
    return [v.detach().cpu().numpy() if hasattr(v, "detach") else np.asarray(v) for v in values]


def posed(own: Any) -> Any:
    """Return a layer's `call` with ours in its place."""
    signature = inspect.signature(own)

    def call(layer: Any, *given: Any, **named: Any) -> Any:
        bound = signature.bind(layer, *given, **named)
        bound.apply_defaults()
        told = dict(list(bound.arguments.items())[1:])
        tensors = [told[n] for n in ("query", "value", "key") if told[n] is not None]
        # int8 kernels come with scales of their own: they are no weights of this dialect
        quantized = layer._query_dense.quantization_mode is not None
        if type(layer) not in LAYERS or quantized or any(_is_meta(t) for t in tensors):
            COUNTS["left to Keras"] += 1
            return own(layer, *given, **named)
        hung = backend.get_keras_mask(told["query"])
        try:
            results = _run(layer, told, hung)
        except RefattnError as error:
            COUNTS["both refuse"] += 1
            own(layer, *given, **named)
            raise AssertionError("ours refuses what Keras takes") from error
        COUNTS["ours"] += 1
        if isinstance(layer, MultiHeadAttention):
            for tensor in tensors:
                backend.set_keras_mask(tensor, None)
            if hung is not None:
                backend.set_keras_mask(results[0], hung)
        return tuple(results) if told["return_attention_scores"] else results[0]

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _is_meta(value: Any) -> bool:
    return bool(getattr(value, "is_meta", False))


LAYERS = (MultiHeadAttention, GroupedQueryAttention)
"""The layers whose calls are ours."""


def _run(layer: Any, told: dict[str, Any], hung: Any) -> list[Any]:
    """Return the results of ours as the backend's tensors."""
    ours = ours_like(layer)
    names = [n for n in ("query", "value", "key") if told[n] is not None]
    options = {
        n: arrays([v])[0] if n.endswith("_mask") and v is not None and n != "use_causal_mask" else v
        for n, v in told.items()
        if n not in ("query", "value", "key")
    }
    if isinstance(layer, MultiHeadAttention):
        options["attached_query_mask"] = None if hung is None else arrays([hung])[0]
    for flag in ("training", "use_causal_mask"):  # Keras takes 0 and 1, too: a named exception
        options[flag] = bool(options[flag])
    weights = weights_of(layer)
    if options["training"] and 0 < ours.dropout < 1:
        options["keep"] = _keep(
            ours, dict(zip(names, arrays(told[n] for n in names), strict=True)), weights, options
        )
    dtype = layer.compute_dtype

    def run(tensors: Any) -> list[Any]:
        values = [a.astype(dtype) for a in arrays(tensors)]
        returned = ours.set_weights(values[len(names) :])(
            **dict(zip(names, values, strict=False)), **options
        )
        return list(returned) if isinstance(returned, tuple) else [returned]

    def back(*cotangents: Any) -> list[Any]:
        values = [a.astype(dtype) for a in arrays(tensors)]
        scores = {"d_scores": cotangents[1]} if len(cotangents) > 1 else {}
        found = ours.set_weights(values[len(names) :]).backward(
            cotangents[0], **dict(zip(names, values, strict=False)), **options, **scores
        )
        return [*(getattr(found, f"d_{n}") for n in names), *found.d_weights]

    tensors = [*(told[n] for n in names), *weights]
    if not TORCH:
        return run(tensors)
    return list(Ours.apply(run, back, *tensors))


def _keep(ours: Any, inputs: Any, weights: Any, options: Any) -> Any:
    """Return a keep mask of the scores' shape, drawn here: whose dropout it is does not matter."""
    told = {n: v for n, v in options.items() if n not in ("training", "return_attention_scores")}
    ours = ours.set_weights(arrays(weights))
    _, scores = ours(**inputs, **told, return_attention_scores=True)
    return np.random.default_rng(1).random(scores.shape) >= ours.dropout


for _layer in LAYERS:
    _layer.call = posed(_layer.call)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many calls were ours."""
    line = ", ".join(f"{COUNTS[kind]} {kind}" for kind in ("ours", "both refuse", "left to Keras"))
    terminalreporter.write_line(f"calls: {line}")
