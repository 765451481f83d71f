"""Drawn Attention nodes by the reference, by ONNX's function and by its evaluator, in float64.

The node cases have no negative number, at most 18 keys and one option at a time; these have
numbers of both signs and any options together. In three places the evaluator of onnx 1.23
contradicts the function that defines its operator; there the reference follows the function.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optional import require
from peers.onnx_attention import run_attention
from peers.onnx_models import attention_model, evaluate, expanded

onnx = require("onnx")

CLOSE = {"rtol": 2e-6, "atol": 1e-6}
"""Two float32 runs on numbers of size 1."""

KINDS = ("none", "bool", "float", "float_with_minus_infinity")


@st.composite
def nodes(draw: st.DrawFn, opset: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Draw the inputs and the attributes of a node of an operator set."""
    batch, key_heads, group, n_q, n_new, d_k, d_v = (
        draw(st.integers(1, n)) for n in (3, 3, 3, 5, 7, 11, 5)
    )
    cache = draw(st.sampled_from(("none", "past", "nonpad")[: 2 if opset == 23 else 3]))
    past = draw(st.integers(1, 5)) if cache == "past" else 0
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from((0.1, 1.0, 6.0)))
    heads, n_k = key_heads * group, past + n_new
    inputs = {
        "query": spread * rng.normal(size=(batch, heads, n_q, d_k)),
        "key": spread * rng.normal(size=(batch, key_heads, n_new, d_k)),
        "value": spread * rng.normal(size=(batch, key_heads, n_new, d_v)),
    }
    attributes = _attributes(draw, opset)
    if draw(st.booleans()):
        for name, count in (("query", heads), ("key", key_heads), ("value", key_heads)):
            rows = inputs[name].swapaxes(1, 2)
            inputs[name] = rows.reshape(*rows.shape[:2], -1)
            attributes["q_num_heads" if name == "query" else "kv_num_heads"] = count
    if (kind := draw(st.sampled_from(KINDS))) != "none":
        shape = draw(st.sampled_from(_mask_shapes(batch, heads, n_q, n_k, opset)))
        inputs["attn_mask"] = _mask(kind, shape, rng)
    if cache == "past":
        inputs["past_key"] = spread * rng.normal(size=(batch, key_heads, past, d_k))
        inputs["past_value"] = spread * rng.normal(size=(batch, key_heads, past, d_v))
    if cache == "nonpad":
        inputs["nonpad_kv_seqlen"] = rng.integers(0, n_k, size=batch, endpoint=True)
    return inputs, attributes


def _attributes(draw: st.DrawFn, opset: int) -> dict[str, Any]:
    attributes: dict[str, Any] = {"is_causal": draw(st.integers(0, 1))}
    if draw(st.booleans()):
        attributes["scale"] = draw(st.sampled_from((0.25, 1.0)))
    if draw(st.booleans()):
        attributes["softcap"] = draw(st.sampled_from((0.5, 4.0)))
    if opset == 25 and draw(st.booleans()):
        for side in ("left", "right"):
            attributes[f"{side}_window_size"] = draw(st.integers(-1, 3))
    attributes["qk_matmul_output_mode"] = draw(st.integers(0, 3))
    return attributes


def _mask_shapes(batch: int, heads: int, n_q: int, n_k: int, opset: int) -> list[tuple[int, ...]]:
    """Return shapes of every rank; since 24, missing keys are filled up with forbidden ones."""
    short = n_k if opset == 23 else max(1, n_k - 1)
    return [
        (n_k,), (n_q, n_k), (1, n_k), (heads, n_q, n_k), (1, n_q, n_k), (n_q, short),
        (batch, heads, n_q, n_k), (batch, 1, n_q, n_k), (1, heads, 1, n_k), (batch, 1, 1, short),
    ]  # fmt: skip


def _mask(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    chosen = rng.random(shape) < 0.7
    if kind == "bool":
        return chosen
    bias = rng.normal(size=shape)
    return np.where(chosen, bias, -np.inf) if kind == "float_with_minus_infinity" else bias


def _one_row_is_causal(inputs: dict[str, np.ndarray], attributes: dict[str, Any]) -> bool:
    """Return whether the evaluator would read the causal rows from a mask that has only one."""
    if "attn_mask" not in inputs or not attributes["is_causal"]:
        return False
    windowed = any(attributes.get(f"{s}_window_size", -1) >= 0 for s in ("left", "right"))
    rows = inputs["attn_mask"].shape[-2:-1]
    n_q = inputs["query"].shape[-2 if inputs["query"].ndim == 4 else 1]
    return not windowed and rows != (n_q,)


@pytest.mark.clause(
    "VAS-EQ1", "OWN-CAUSAL1", "OWN-MASK1", "OWN-BIAS1", "OWN-GQA1", "OWN-SOFTCAP1", "OWN-WINDOW1",
    "OWN-LENGTH1", "OWN-CACHE1", "OWN-EMPTY1",
)  # fmt: skip
@pytest.mark.parametrize("opset", [23, 24, 25])
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_drawn_node_agrees_with_the_operator_and_the_evaluator(
    opset: int, data: st.DataObject
) -> None:
    inputs, attributes = data.draw(nodes(opset))
    model = attention_model(inputs, opset=opset, stage=True, **attributes)
    ours = run_attention(inputs, attributes, opset)
    # the function takes the root of a default scale in float32, whatever the inputs' dtype
    exact = "scale" in attributes
    _assert_agree(ours, evaluate(expanded(model), inputs), inputs, 1e-12 if exact else 2e-5)
    capped = attributes["qk_matmul_output_mode"] == 0 and "softcap" in attributes
    if not capped and not _one_row_is_causal(inputs, attributes):  # its errors: see below
        _assert_agree(ours, evaluate(model, inputs), inputs, 1e-12)


def _assert_agree(
    ours: dict[str, np.ndarray],
    theirs: dict[str, np.ndarray],
    inputs: dict[str, np.ndarray],
    relative: float,
) -> None:
    # an error of a logit, which reach 200, is a relative error of a weight; values are averaged
    largest = max(np.abs(inputs[n]).max() for n in ("value", "past_value") if n in inputs)
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape
        size = largest if name == "Y" else 200.0
        np.testing.assert_allclose(
            ours[name], expected, rtol=relative, atol=relative * size, err_msg=name
        )


def _inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    shapes = {"query": (1, 2, 3, 8), "key": (1, 2, 5, 8), "value": (1, 2, 5, 7)}
    mask = np.array([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0], [1, 0, 0, 1, 0]], dtype=bool)
    floats = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return floats | {"attn_mask": mask}


@pytest.mark.clause("OWN-SOFTCAP1")
def test_mode_0_is_raw_in_the_operator_and_capped_in_the_evaluator() -> None:
    inputs, attributes = _inputs(), {"softcap": 0.5, "qk_matmul_output_mode": 0}
    model = attention_model(inputs, opset=25, stage=True, **attributes)
    raw = run_attention(inputs, attributes)["qk_matmul_output"]
    np.testing.assert_allclose(evaluate(expanded(model), inputs)["qk_matmul_output"], raw, **CLOSE)
    softened = run_attention(inputs, {"softcap": 0.5, "qk_matmul_output_mode": 1})
    np.testing.assert_allclose(
        evaluate(model, inputs)["qk_matmul_output"], softened["qk_matmul_output"], **CLOSE
    )
    assert np.max(np.abs(raw - softened["qk_matmul_output"])) > 0.1


@pytest.mark.clause("OWN-CAUSAL1", "OWN-MASK1")
@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 1, 1, 5)])
def test_a_mask_for_all_rows_leaves_the_evaluator_one_causal_row(shape: tuple[int, ...]) -> None:
    inputs = _inputs()
    inputs["attn_mask"] = np.array([1, 0, 1, 1, 1], dtype=bool).reshape(shape)
    model = attention_model(inputs, opset=25, is_causal=1)
    ours = run_attention(inputs, {"is_causal": 1})["Y"]
    np.testing.assert_allclose(evaluate(expanded(model), inputs)["Y"], ours, **CLOSE)
    if not onnx.__version__.startswith("1.23."):
        return
    if len(shape) == 1:
        with pytest.raises(ValueError, match="not enough values to unpack"):
            evaluate(model, inputs)
    else:  # every row sees what row 0 may see
        first = inputs | {"attn_mask": np.array([1, 0, 0, 0, 0], dtype=bool).reshape(shape)}
        np.testing.assert_allclose(evaluate(model, inputs)["Y"], run_attention(first, {})["Y"])


@pytest.mark.clause("OWN-POISON1")
def test_a_nan_in_a_masked_key_reaches_the_row_of_the_evaluator_and_of_masked_add() -> None:
    inputs = _inputs()
    inputs["key"][0, 1, 2] = np.nan
    expected = evaluate(attention_model(inputs, opset=23), inputs)["Y"]
    assert np.isnan(expected[0, 1]).all() and np.isfinite(expected[0, 0]).all()
    ours = run_attention(inputs, {})["Y"]
    np.testing.assert_allclose(ours, expected, **CLOSE)
