"""Every Attention node case of ONNX, run on the dialects, and every RotaryEmbedding case.

Since onnx 1.23 the cases are built in memory, by its reference evaluator. All of them are run, in
the dtype of the case and by the dialect of its operator set, and none is an exception. Where the
evaluator contradicts its own operator, no case looks: see test_onnx_evaluator.
"""

from __future__ import annotations

import numpy as np
import pytest

from optional import require
from peers import onnx_attention
from peers.onnx_cases import CASES, COUNTS, Case

onnx = require("onnx")

OWN_TOLERANCE = {"float32": 2e-6, "float16": 2**-10, "bfloat16": 2**-6}
"""Relative difference allowed beside ONNX's own: 2 roundings of the 16-bit formats, 16 of float32.

The expected values are themselves computed in the dtype of the case, stage by stage.
"""


def _run(case: Case, **conventions: str) -> dict[str, np.ndarray]:
    if case.op == "Attention":
        return onnx_attention.run_attention(case.inputs, case.attributes, case.opset, **conventions)
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
