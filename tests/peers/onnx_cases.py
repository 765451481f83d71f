"""The node cases of ONNX's Attention and RotaryEmbedding, collected from the installed package."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np

from optional import require
from peers import onnx_attention

onnx = require("onnx")
require("onnx.backend.test.case.node")

COUNTS = {"Attention": 93, "RotaryEmbedding": 8}
"""Single-node cases of onnx 1.23 by operator; each has a function-expanded twin, left out."""


class Case(NamedTuple):
    """One node with its inputs by name, its expected outputs, and ONNX's own tolerance."""

    name: str
    op: str
    opset: int
    attributes: dict[str, Any]
    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    rtol: float
    atol: float


def _cases() -> list[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cases of other operators overflow on purpose
        collected = onnx.backend.test.case.node.collect_testcases(None)
    single = [c for c in collected if len(c.model.graph.node) == 1 and "expanded" not in c.name]
    return [_case(c) for c in single if c.model.graph.node[0].op_type in COUNTS]


def _case(collected: Any) -> Case:
    (node,), ((values, expected),) = collected.model.graph.node, collected.data_sets
    named = zip(onnx_attention.OUTPUTS[node.op_type], node.output, strict=False)
    present = [ours for ours, given in named if given]
    return Case(
        collected.name,
        node.op_type,
        collected.model.opset_import[0].version,
        {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute},
        onnx_attention.node_inputs(node, values),
        dict(zip(present, expected, strict=True)),
        collected.rtol,
        collected.atol,
    )


CASES = _cases()
