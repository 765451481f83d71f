"""One-node Attention models, and running them by ONNX's own evaluator."""

from __future__ import annotations

from typing import Any

import numpy as np

from optional import require
from peers.onnx_attention import INPUTS, OUTPUTS, Arrays

onnx = require("onnx")
reference = require("onnx.reference")
node_cases = require("onnx.backend.test.case.node")


def attention_model(inputs: Arrays, *, opset: int, stage: bool = False, **attributes: Any) -> Any:
    """Return a model of one Attention node on the given inputs, by their schema names.

    Its outputs are Y, with a past the present, and with `stage` the qk_matmul_output.
    """
    named = [name if name in inputs else "" for name in INPUTS["Attention"]]
    while not named[-1]:
        named.pop()
    asked = [
        name
        for name in OUTPUTS["Attention"]
        if name == "Y" or (stage if name == "qk_matmul_output" else "past_key" in inputs)
    ]
    places = [name if name in asked else "" for name in OUTPUTS["Attention"]]
    node = onnx.helper.make_node("Attention", named, places, **attributes)
    info, types = onnx.helper.make_tensor_value_info, onnx.helper.np_dtype_to_tensor_dtype
    graph = onnx.helper.make_graph(
        [node],
        "attention",
        [info(name, types(array.dtype), array.shape) for name, array in inputs.items()],
        [info(name, types(inputs["query"].dtype), None) for name in asked],
    )
    imports = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)


def evaluate(model: Any, inputs: Arrays) -> dict[str, np.ndarray]:
    """Return the outputs of a model by ONNX's evaluator."""
    with np.errstate(all="ignore"):
        outputs = reference.ReferenceEvaluator(model).run(None, inputs)
    return dict(zip([o.name for o in model.graph.output], outputs, strict=True))


def expanded(model: Any) -> Any:
    """Return the model with its node replaced by the function that defines the operator."""
    node = onnx.NodeProto()
    node.CopyFrom(model.graph.node[0])  # the helper writes into its node
    types = iter(value.type for value in model.graph.input)
    given = [next(types) if name else onnx.TypeProto() for name in node.input]
    bodies, _ = node_cases.function_testcase_helper(node, given, "body", model.opset_import)
    graph = onnx.helper.make_graph(bodies[0][0], "body", model.graph.input, model.graph.output)
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=10)
