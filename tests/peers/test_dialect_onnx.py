"""The dialects of ONNX's Attention beside ONNX: signatures, misuse, exceptions, ONNX Runtime.

The node cases are in test_onnx_node_cases, and drawn nodes in test_onnx_evaluator.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from optional import require
from peers.onnx_attention import run_attention
from peers.onnx_cases import CASES
from peers.onnx_models import attention_model, evaluate, expanded
from peers.sameness import attempt, ours_or_error
from refattn.dialects import find, onnx_attention

onnx = require("onnx")
runtime = require("onnxruntime")

pytestmark = [pytest.mark.peer("onnx"), pytest.mark.peer("onnxruntime")]

OPSETS = (23, 24, 25)

B, H, H_K, N_Q, N_K, D = 2, 4, 2, 3, 5, 8


def operands(dtype: str = "float64", *, flat: bool = False) -> dict[str, np.ndarray]:
    """Return query, key and value of 4 axes, or of 3."""
    rng = np.random.default_rng(23)
    shapes = {"query": (B, H, N_Q, D), "key": (B, H_K, N_K, D), "value": (B, H_K, N_K, D + 1)}
    if flat:
        shapes = {name: (b, n, h * d) for name, (b, h, n, d) in shapes.items()}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def both(inputs: dict[str, Any], opset: int, **attributes: Any) -> tuple[Any, Any]:
    """Return what the evaluator says of a node and what the operator's function says, or errors."""

    def run(body: bool) -> Any:
        model = attention_model(inputs, opset=opset, stage=True, **attributes)
        return evaluate(expanded(model) if body else model, inputs)

    return tuple(attempt(lambda body=body: run(body), (Exception,)) for body in (False, True))


def _default(attribute: Any) -> Any:
    value = onnx.helper.get_attribute_value(attribute.default_value)
    return None if attribute.default_value.type == 0 else value


@pytest.mark.parametrize("opset", OPSETS)
def test_the_signature_is_that_of_the_schema(opset: int) -> None:
    schema = onnx.defs.get_schema("Attention", opset)
    parameters = inspect.signature(getattr(onnx_attention, f"attention_{opset}")).parameters
    ours = [(p.name, p.kind.name, p.default) for p in parameters.values()]
    inputs = [(i.name, "POSITIONAL_OR_KEYWORD") for i in schema.inputs]
    assert [(name, kind) for name, kind, _ in ours if kind[0] == "P"] == inputs
    attributes = {(name, _default(a)) for name, a in schema.attributes.items()}
    assert {(name, default) for name, kind, default in ours if kind[0] == "K"} == attributes


MISUSE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mask of more keys": ({"attn_mask": np.ones((N_Q, N_K + 1), bool)}, {}),
    "mask of other heads": ({"attn_mask": np.ones((3, N_Q, N_K), bool)}, {}),
    "heads that do not divide": ({"query": np.ones((B, 3, N_Q, D))}, {}),
    "another width of keys": ({"key": np.ones((B, H_K, N_K, D + 1))}, {}),
    "no key": ({n: np.ones((B, H_K, 0, D)) for n in ("key", "value")}, {}),
    "past_key alone": ({"past_key": np.ones((B, H_K, 1, D))}, {}),
    "another width of the past": (
        {"past_key": np.ones((B, H_K, 1, D)), "past_value": np.ones((B, H_K, 1, D))},
        {},
    ),
    "3 axes without numbers of heads": (operands(flat=True), {}),
    "3 axes that heads do not divide": (
        operands(flat=True),
        {"q_num_heads": 5, "kv_num_heads": H_K},
    ),
    "precision of no dtype": ({}, {"softmax_precision": 0}),
}
"""Calls that both the evaluator and the function refuse, whatever the operator set."""


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", MISUSE)
def test_where_onnx_errs_the_dialect_errs(name: str, opset: int) -> None:
    changed, attributes = MISUSE[name]
    inputs = operands() | changed
    assert all(isinstance(found, Exception) for found in both(inputs, opset, **attributes))
    ours = ours_or_error(lambda: run_attention(inputs, attributes, opset))
    assert isinstance(ours, Exception) and "\n" not in str(ours)


SINCE_25: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "heads beside 4 axes": ({}, {"q_num_heads": H, "kv_num_heads": H_K}),
    "window of less than -1": ({}, {"left_window_size": -2}),
    "two caches": (
        {"nonpad_kv_seqlen": np.array([3, 5])}
        | {"past_key": np.ones((B, H_K, 1, D)), "past_value": np.ones((B, H_K, 1, D + 1))},
        {},
    ),
}


@pytest.mark.parametrize("name", SINCE_25)
def test_where_operator_set_25_errs_the_dialect_errs(name: str) -> None:
    changed, attributes = SINCE_25[name]
    inputs = operands() | changed
    assert all(isinstance(found, Exception) for found in both(inputs, 25, **attributes))
    assert isinstance(ours_or_error(lambda: run_attention(inputs, attributes, 25)), Exception)


@pytest.mark.clause("OWN-BIAS1", "OWN-MASK1")
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "float32", "float64"])
def test_numbers_of_any_dtype_are_added(dtype: str, opset: int) -> None:
    mask = np.arange(N_Q * N_K).reshape(N_Q, N_K).astype(dtype)
    inputs = operands() | {"attn_mask": mask}
    ours = run_attention(inputs, {"scale": 0.25}, opset)["Y"]
    for theirs in both(inputs, opset, scale=0.25):
        np.testing.assert_allclose(ours, theirs["Y"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(("precision", "close"), [(1, 1e-6), (11, 1e-12), (10, 1e-2), (16, 5e-2)])
def test_a_precision_of_the_softmax_is_met(precision: int, close: float, opset: int) -> None:
    inputs, attributes = operands(), {"softmax_precision": precision, "qk_matmul_output_mode": 3}
    ours = run_attention(inputs, attributes | {"scale": 0.25}, opset)
    for theirs in both(inputs, opset, **attributes, scale=0.25):
        for name in ("Y", "qk_matmul_output"):
            assert ours[name].dtype == theirs[name].dtype
            np.testing.assert_allclose(ours[name], theirs[name], rtol=close, atol=close)


@pytest.mark.clause("OWN-MASK1")
def test_a_mask_of_one_key_is_for_all_before_24_and_padded_since() -> None:
    inputs = operands() | {"attn_mask": np.array([[True], [True], [False]])}
    for opset, seen in ((23, N_K), (24, 1), (25, 1)):
        attributes = {"scale": 0.25, "qk_matmul_output_mode": 3}
        weights = run_attention(inputs, attributes, opset)["qk_matmul_output"]
        assert (weights[0, 0, 0] > 0).sum() == seen
        theirs = both(inputs, opset, **attributes)[1]["qk_matmul_output"]
        np.testing.assert_allclose(weights, theirs, rtol=1e-12)


EXCEPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "scale <": ({}, {"scale": -1.0}),
    "numbers that": ({}, {"qk_matmul_output_mode": 4}),
    "numbers that the": ({}, {"is_causal": 2}),
    "q_num_heads": ({}, {"q_num_heads": H, "kv_num_heads": H_K}),
    "q_num_heads and": ({"query": np.ones((1, H, N_Q, D))}, {}),
    "q_num_heads and kv_num_heads": ({"attn_mask": np.ones((1, B, 1, N_Q, N_K), bool)}, {}),
    "value of": ({"value": np.ones((B, H_K, N_K, D), np.float32)}, {}),
}
"""Calls that the evaluator takes and we refuse, by the opening of the exception."""


@pytest.mark.parametrize("opening", EXCEPTIONS)
def test_what_is_refused_although_the_evaluator_takes_it_is_named(opening: str) -> None:
    changed, attributes = EXCEPTIONS[opening]
    inputs = operands() | changed
    assert not isinstance(both(inputs, 23, **attributes)[0], Exception)
    assert isinstance(ours_or_error(lambda: run_attention(inputs, attributes, 23)), Exception)
    assert any(text.startswith(opening) for text in find("onnx_23").exceptions)


def test_a_short_mask_of_operator_set_23_is_a_named_exception() -> None:
    inputs = operands() | {"attn_mask": np.ones((N_Q, N_K - 1), bool)}
    evaluator, function = both(inputs, 23)
    assert not isinstance(evaluator, Exception) and isinstance(function, Exception)
    assert isinstance(ours_or_error(lambda: run_attention(inputs, {}, 23)), Exception)
    assert any(text.startswith("evaluator, attn_mask of f") for text in find("onnx_23").exceptions)
    assert not any(
        text.startswith("evaluator, attn_mask of f") for text in find("onnx_24").exceptions
    )


@pytest.mark.clause("OWN-POISON1")
def test_a_forbidden_value_is_read() -> None:
    inputs = operands() | {"attn_mask": np.tri(N_Q, N_K, -1, dtype=bool)}
    inputs["value"][0, 0, N_K - 1, 0] = np.nan
    ours = run_attention(inputs, {"scale": 0.25}, 24)["Y"]
    assert np.isnan(ours[0, 0, :, 0]).all() and np.isfinite(ours[..., 1:]).all()
    for theirs in both(inputs, 24, scale=0.25):
        np.testing.assert_allclose(ours, theirs["Y"], rtol=1e-12, atol=1e-12)


def _runtime(inputs: dict[str, Any], opset: int, *, stage: bool = False, **attributes: Any) -> Any:
    """Return what ONNX Runtime's CPU provider says, or its error."""
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    model = attention_model(inputs, opset=opset, stage=stage, **attributes).SerializeToString()
    providers = ["CPUExecutionProvider"]
    return attempt(
        lambda: runtime.InferenceSession(model, options, providers=providers).run(None, inputs),
        (Exception,),
    )


RUN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "scale": ({}, {"scale": 0.3}),
    "causal": ({}, {"is_causal": 1}),
    "mask": ({"attn_mask": np.tri(N_Q, N_K, 1, dtype=bool)}, {}),
    "empty row": ({"attn_mask": np.tri(N_Q, N_K, -1, dtype=bool)}, {}),
    "mask by head, causal": (
        {"attn_mask": np.random.default_rng(2).random((B, H, N_Q, N_K)) < 0.7},
        {"is_causal": 1},
    ),
    "bias": ({"attn_mask": np.random.default_rng(3).normal(size=(N_Q, N_K))}, {}),
    "softcap": ({}, {"softcap": 0.7}),
    "softcap and mask": ({"attn_mask": np.tri(N_Q, N_K, dtype=bool)}, {"softcap": 0.7}),
    "3 axes": (operands(flat=True), {"q_num_heads": H, "kv_num_heads": H_K}),
    "past, causal": (
        {"past_key": np.full((B, H_K, 2, D), 0.1), "past_value": np.ones((B, H_K, 2, D + 1))},
        {"is_causal": 1},
    ),
    "valid keys": ({"nonpad_kv_seqlen": np.array([4, 3])}, {}),
}
"""What ONNX Runtime is asked; valid keys from operator set 24 on."""


@pytest.mark.clause("OWN-CAUSAL1", "OWN-CACHE1", "OWN-SOFTCAP1", "OWN-GQA1", "OWN-EMPTY1")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("name", RUN)
def test_onnx_runtime_agrees_with_the_dialect(name: str, opset: int, dtype: str) -> None:
    changed, attributes = RUN[name]
    if "nonpad_kv_seqlen" in changed and opset == 23:
        changed = {}
    inputs = {
        n: a.astype(dtype) if a.dtype.kind == "f" else a for n, a in (operands() | changed).items()
    }
    theirs = _runtime(inputs, opset, **attributes)
    assert not isinstance(theirs, Exception), theirs
    ours = run_attention(inputs, attributes, opset)
    for name, array in zip(("Y", "present_key", "present_value"), theirs, strict=False):
        assert array.shape == ours[name].shape
        np.testing.assert_allclose(array, ours[name], rtol=1e-5, atol=1e-5)


ANSWERED = 87
"""Attention node cases that ONNX Runtime 1.32 answers; it declines the others of the 93."""

NEAR = {"float32": 1e-5, "float16": 2e-3}
"""Absolute and relative, of numbers of size 1."""


def test_what_onnx_runtime_answers_of_the_node_cases_is_the_dialects_answer() -> None:
    answered = 0
    for case in CASES:
        stage = "qk_matmul_output" in case.expected
        if case.op != "Attention":
            continue
        theirs = _runtime(case.inputs, case.opset, stage=stage, **case.attributes)
        if isinstance(theirs, Exception):
            continue
        ours = run_attention(case.inputs, case.attributes, case.opset)
        if "past_key" not in case.inputs:
            ours = {name: ours[name] for name in ("Y", "qk_matmul_output")}
        for (name, mine), array in zip(ours.items(), theirs, strict=False):
            near, lowest = NEAR[array.dtype.name], np.finfo(array.dtype).min / 2
            sunk = array <= lowest  # it writes the lowest number for -∞
            np.testing.assert_array_equal(sunk, mine <= lowest)
            pair = (np.where(sunk, 0, a).astype(np.float64) for a in (array, mine))
            np.testing.assert_allclose(*pair, rtol=near, atol=near, err_msg=f"{case.name}: {name}")
        answered += 1
    assert answered >= ANSWERED
