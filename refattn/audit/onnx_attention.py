"""Adapter of ONNX Runtime's Attention (operator set 23), and of the operator's dialects."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np

from refattn.audit.capabilities import Capabilities
from refattn.audit.subject import Arrays, Subject
from refattn.dialects.conventions import Dialect
from refattn.errors import RefattnError

CAPABILITIES = Capabilities(
    features=frozenset(
        {
            "scale",
            "mask",
            "bias",
            "causal",
            "softcap",
            "grouped_heads",
            "value_size",
            "cross_lengths",
        }
    ),
    dtypes=("float64", "float32", "float16"),
    conventions={
        "alignment": "top_left",
        "head_map": "interleave",
        "softcap_order": "before_bias",
        "empty_row": "zero",
    },
    exclusive=(frozenset({"mask", "bias"}),),  # attn_mask is the one or the other
)
"""What the operator's text promises, and the conventions that the provider's results show."""

OPSET = 23
"""Version of the operator set that has Attention first."""

LENGTHS_SINCE, WINDOWS_SINCE = 24, 25
"""Versions that have nonpad_kv_seqlen first, and windows."""

IR_VERSION = 11
"""Version of the file form that goes with it."""


def subject() -> Subject:
    """Return the subject; onnx and onnxruntime are imported here."""
    import onnx
    import onnxruntime

    version = f"onnxruntime {onnxruntime.__version__}, onnx {onnx.__version__}, opset {OPSET}"
    return Subject("onnxruntime", version, CAPABILITIES, run)


def run(inputs: Arrays, options: dict[str, Any]) -> Arrays:
    """Run a model of the one operator on a case."""
    fed = {"Q": inputs["query"], "K": inputs["key"], "V": inputs["value"]}
    mask = _written_out(inputs)
    if mask is not None:
        fed["attn_mask"] = mask
    attributes = {
        ours: float(options[ours]) for ours in ("scale", "softcap") if options.get(ours) is not None
    }
    attributes |= {"is_causal": 1} if options.get("causal") else {}
    types = tuple((name, array.dtype.name, array.ndim) for name, array in fed.items())
    (output,) = _session(types, tuple(sorted(attributes.items()))).run(None, fed)
    return {"output": output}


def dialect(told: Dialect) -> Subject:
    """Return the text of an operator set, or of a release: lengths since 24, windows since 25."""
    opset = int(told.name.split("_")[2])
    more = {"lengths"} if opset >= LENGTHS_SINCE else set()
    more |= {"window"} if opset >= WINDOWS_SINCE else set()
    offered = replace(CAPABILITIES, features=CAPABILITIES.features | more)
    module, _, name = told.functions[0].rpartition(".")
    attend = getattr(importlib.import_module(module), name)
    return Subject(told.name, told.version, offered, partial(_run_dialect, attend))


def _run_dialect(attend: Any, inputs: Arrays, options: dict[str, Any]) -> Arrays:
    if "query_lengths" in inputs:
        raise RefattnError("it has no argument for query_lengths")
    attributes: dict[str, Any] = {"is_causal": int(options.get("causal", False))}
    attributes |= {n: options[n] for n in ("scale", "softcap") if options.get(n) is not None}
    if "window" in options:
        left, right = (-1 if end is None else end for end in options["window"])
        attributes |= {"left_window_size": left, "right_window_size": right}
    if "key_lengths" in inputs:
        attributes["nonpad_kv_seqlen"] = inputs["key_lengths"].astype(np.int64)
    mask = _written_out(inputs)
    found = attend(inputs["query"], inputs["key"], inputs["value"], mask, **attributes)
    return {"output": found.Y}


def _written_out(inputs: Arrays) -> np.ndarray[Any, Any] | None:
    """Return attn_mask with its last two axes, which ONNX does not always broadcast."""
    given = inputs.get("mask", inputs.get("bias"))
    if given is None:
        return None
    rows = (inputs["query"].shape[2], inputs["key"].shape[2])
    return np.ascontiguousarray(np.broadcast_to(given, np.broadcast_shapes(given.shape, rows)))


@cache
def _session(types: tuple[tuple[str, str, int], ...], attributes: tuple[Any, ...]) -> Any:
    """Return a session of a model with one Attention node."""
    import onnxruntime
    from onnx import helper

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    values = {
        name: helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), [None] * rank
        )
        for name, dtype, rank in types
    }
    element = helper.np_dtype_to_tensor_dtype(np.dtype(types[0][1]))
    node = helper.make_node("Attention", list(values), ["Y"], **dict(attributes))
    result = helper.make_tensor_value_info("Y", element, [None] * 4)
    graph = helper.make_graph([node], "attention", list(values.values()), [result])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
