"""Every Attention and RotaryEmbedding node case of ONNX, run on the reference.

Since onnx 1.23 the cases are built in memory, by its reference evaluator. All of them are run, in
the dtype of the case, and none is an exception: what the attributes leave unsaid is named in
`onnx_attention.CONVENTIONS`. The evaluator alone differs from its own specification in one place,
which no case covers (mode 0 with a softcap); it has a test of its own.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest

from optional import require
from peers import onnx_attention

onnx = require("onnx")
require("onnx.backend.test.case.node")

COUNTS = {"Attention": 93, "RotaryEmbedding": 8}
"""Single-node cases of onnx 1.23 by operator; each has a function-expanded twin, left out."""

OWN_TOLERANCE = {"float32": 2e-6, "float16": 2**-10, "bfloat16": 2**-6}
"""Relative difference allowed beside ONNX's own: 2 roundings of the 16-bit formats, 16 of float32.

The expected values are themselves computed in the dtype of the case, stage by stage.
"""


class Case(NamedTuple):
    """One node with its inputs by name, its expected outputs, and ONNX's own tolerance."""

    name: str
    op: str
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
        {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute},
        onnx_attention.node_inputs(node, values),
        dict(zip(present, expected, strict=True)),
        collected.rtol,
        collected.atol,
    )


CASES = _cases()


def _run(case: Case, **conventions: str) -> dict[str, np.ndarray]:
    if case.op == "Attention":
        return onnx_attention.run_attention(case.inputs, case.attributes, **conventions)
    return {"output": onnx_attention.run_rotary(case.inputs, case.attributes)}


def _assert_close(case: Case, name: str, actual: np.ndarray, rtol: float) -> None:
    expected = case.expected[name]
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    np.testing.assert_allclose(
        actual.astype(np.float64),
        expected.astype(np.float64),
        rtol=rtol,
        atol=case.atol,
        err_msg=f"{case.name}: {name}",
    )


def test_every_node_case_was_collected() -> None:
    counts = {op: sum(case.op == op for case in CASES) for op in COUNTS}
    if onnx.__version__.startswith("1.23."):
        assert counts == COUNTS
    else:
        assert all(counts[op] >= COUNTS[op] for op in COUNTS), onnx.__version__


def _proves(case: Case) -> pytest.MarkDecorator:
    """Return the mark of the clauses that a node of this operator is about."""
    if case.op == "RotaryEmbedding":
        return pytest.mark.clause("ROPE-EQ34", "OWN-ROPE1", "OWN-ROPE2")
    return pytest.mark.clause(
        "VAS-EQ1", "OWN-CAUSAL1", "OWN-MASK1", "OWN-BIAS1", "OWN-GQA1", "OWN-SOFTCAP1",
        "OWN-WINDOW1", "OWN-LENGTH1", "OWN-CACHE1", "OWN-EMPTY1",
    )  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=_proves(case), id=case.name) for case in CASES]
)
def test_the_reference_returns_what_the_node_case_expects(case: Case) -> None:
    actual = _run(case)
    for name, expected in case.expected.items():
        dtype = expected.dtype.name
        # ONNX's own runner allows bfloat16 outputs two units in the last place
        _assert_close(case, name, actual[name], max(case.rtol, 2**-6 if dtype == "bfloat16" else 0))
        _assert_close(case, name, actual[name], OWN_TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("convention", "other"),
    [
        pytest.param("head_map", "tile", marks=pytest.mark.clause("OWN-GQA1")),
        pytest.param("softcap_order", "after_bias", marks=pytest.mark.clause("OWN-SOFTCAP1")),
        pytest.param("empty_row", "nan", marks=pytest.mark.clause("OWN-EMPTY1")),
        pytest.param("empty_row", "uniform", marks=pytest.mark.clause("OWN-EMPTY1")),
        pytest.param("alignment", "bottom_right", marks=pytest.mark.clause("OWN-CAUSAL1")),
        pytest.param("alignment", "top_left", marks=pytest.mark.clause("OWN-CAUSAL1")),
    ],
)
def test_some_node_case_sees_each_convention(convention: str, other: str) -> None:
    disagree = 0
    for case in CASES:
        if case.op == "Attention":
            actual = _run(case, **{convention: other})["Y"].astype(np.float64)
            expected = case.expected["Y"].astype(np.float64)
            disagree += not np.allclose(actual, expected, rtol=2**-6, atol=1e-7)
    assert disagree > 0


def _node(outputs: int, **attributes: Any) -> Any:
    names = ["Y", "present_key", "present_value", "qk_matmul_output"][:outputs]
    node = onnx.helper.make_node("Attention", ["Q", "K", "V", "attn_mask"], names, **attributes)
    info = onnx.helper.make_tensor_value_info
    types = {"Q": 1, "K": 1, "V": 1, "attn_mask": onnx.TensorProto.BOOL}
    shapes = {"Q": [1, 2, 3, 8], "K": [1, 2, 5, 8], "V": [1, 2, 5, 7], "attn_mask": [3, 5]}
    graph = onnx.helper.make_graph(
        [node],
        "attention",
        [info(name, types[name], shapes[name]) for name in types],
        [info(name, 1, None) for name in names],
    )
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10
    )


def _feed() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    Q, K, V = (rng.normal(size=s).astype("f4") for s in ((1, 2, 3, 8), (1, 2, 5, 8), (1, 2, 5, 7)))
    mask = np.array([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0], [1, 0, 0, 1, 0]], dtype=bool)
    return {"Q": Q, "K": K, "V": V, "attn_mask": mask}


def _evaluate(model: Any, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    from onnx.reference import ReferenceEvaluator

    with np.errstate(all="ignore"):
        return ReferenceEvaluator(model).run(None, feed)


def _ours(feed: dict[str, np.ndarray], **attributes: Any) -> dict[str, np.ndarray]:
    names = ("query", "key", "value", "attn_mask")
    return onnx_attention.run_attention(dict(zip(names, feed.values(), strict=True)), attributes)


@pytest.mark.clause("OWN-SOFTCAP1")
def test_mode_0_is_raw_by_the_specification_and_capped_in_the_evaluator() -> None:
    feed = _feed()
    capped = _evaluate(_node(4, softcap=0.5), feed)[3]
    raw, softened = (
        _ours(feed, softcap=0.5, qk_matmul_output_mode=mode)["qk_matmul_output"] for mode in (0, 1)
    )
    np.testing.assert_allclose(capped, softened, rtol=2e-6, atol=1e-7)
    assert np.max(np.abs(raw - softened)) > 0.1
    runtime = require("onnxruntime")
    session = runtime.InferenceSession(
        _node(4, softcap=0.5).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    np.testing.assert_allclose(session.run(None, feed)[3], raw, rtol=2e-6, atol=1e-6)


@pytest.mark.clause("OWN-POISON1")
def test_a_nan_in_a_masked_key_reaches_the_row_of_the_evaluator_and_of_masked_add() -> None:
    feed = _feed()
    feed["K"][0, 1, 2] = np.nan
    expected = _evaluate(_node(1), feed)[0]
    assert np.isnan(expected[0, 1]).all() and np.isfinite(expected[0, 0]).all()
    np.testing.assert_allclose(_ours(feed)["Y"], expected, rtol=2e-6, atol=1e-7)
