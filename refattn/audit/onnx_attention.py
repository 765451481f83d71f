"""Adapter of the ONNX operator Attention (opset 23) on ONNX Runtime's CPU provider."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from refattn.audit.capabilities import Capabilities
from refattn.audit.subject import Arrays, Subject

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
    given = inputs.get("mask", inputs.get("bias"))
    if given is not None:
        # the provider wants the last two axes written out, though the operator broadcasts
        rows = (inputs["query"].shape[2], inputs["key"].shape[2])
        shape = np.broadcast_shapes(given.shape, rows)
        fed["attn_mask"] = np.ascontiguousarray(np.broadcast_to(given, shape))
    attributes = {
        ours: float(options[ours]) for ours in ("scale", "softcap") if options.get(ours) is not None
    }
    attributes |= {"is_causal": 1} if options.get("causal") else {}
    types = tuple((name, array.dtype.name, array.ndim) for name, array in fed.items())
    (output,) = _session(types, tuple(sorted(attributes.items()))).run(None, fed)
    return {"output": output}


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
