"""Keras 3's layers beside Keras, on its torch and numpy backends: a grid, then drawn calls."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from peers.keras_dialect import compare, keras_process
from peers.keras_draws import gqa_calls, mha_calls
from refattn.dialects.keras3_gqa import GroupQueryAttention
from refattn.dialects.keras3_mha import MultiHeadAttention

pytestmark = pytest.mark.peer("keras")

B, N_Q, N_K, E_Q, E_V, E_K = 2, 5, 7, 3, 4, 6

LEFT_OUT = {
    f"{kind}_{what}"
    for kind in ("kernel", "bias")
    for what in ("initializer", "regularizer", "constraint")
} | {"activity_regularizer"}
"""Arguments of a constructor that belong to training: a named exception."""


@pytest.fixture(scope="module")
def torch_keras() -> Iterator[Any]:
    with keras_process("torch") as ask:
        yield ask


@pytest.fixture(scope="module")
def numpy_keras() -> Iterator[Any]:
    with keras_process("numpy") as ask:
        yield ask


def mha(ask: Any, named: Any, inputs: Any, options: Any = None, **more: Any) -> str | None:
    return compare(ask, MultiHeadAttention, "MultiHeadAttention", named, inputs, options, **more)


def gqa(ask: Any, named: Any, inputs: Any, options: Any = None, **more: Any) -> str | None:
    return compare(ask, GroupQueryAttention, "GroupQueryAttention", named, inputs, options, **more)


def _inputs(dtype: str = "float64", *, with_key: bool = True) -> dict[str, np.ndarray]:
    normal = np.random.default_rng(3).normal
    shapes = {"query": (B, N_Q, E_Q), "value": (B, N_K, E_V), "key": (B, N_K, E_K)}
    found = {name: normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    return found if with_key else {n: x for n, x in found.items() if n != "key"}


def _mask(*, empty: bool = True) -> np.ndarray:
    mask = np.random.default_rng(4).random((B, N_Q, N_K)) < 0.6
    mask[..., 0] = True
    if empty:
        mask[0, 2] = False
    return mask


CONSTRUCTED = {
    "plain": {},
    "value_dim": {"value_dim": 2},
    "no bias": {"use_bias": False},
    "gate": {"use_gate": True},
    "dropout": {"dropout": 0.5},
    "all dropped": {"dropout": 1.0},
    "output_shape": {"output_shape": (7, 2)},
    "output_shape int": {"output_shape": 5},
    "sliding_window": {"sliding_window": 2},
    "flash_attention": {"flash_attention": False},
}
"""Constructor arguments of the grid, by what they try."""

CALLED: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"attention_mask": _mask()},
    "mask of integers": {"attention_mask": 2 * _mask().astype(np.int64)},
    "scores": {"attention_mask": _mask(), "return_attention_scores": True},
    "causal": {"use_causal_mask": True},
    "training": {"training": True, "use_causal_mask": True, "return_attention_scores": True},
    "masks of inputs": {
        "attention_mask": _mask(empty=False),
        "value_mask": np.arange(N_K) < np.array([[4], [7]]),
        "key_mask": np.arange(N_K) < np.array([[7], [6]]),
        "query_mask": np.arange(N_Q) < np.array([[3], [5]]),
    },
}
"""Call arguments of the grid."""


@pytest.mark.clause(
    "VAS-S322a", "VAS-S322b", "OWN-MASK1", "OWN-EMPTY1", "OWN-DROPOUT1", "OWN-BACKWARD1",
    "OWN-WINDOW1", "OWN-WEIGHTS1", "OWN-GATE1",
)  # fmt: skip
@pytest.mark.parametrize("options", CALLED.values(), ids=CALLED.keys())
@pytest.mark.parametrize("named", CONSTRUCTED.values(), ids=CONSTRUCTED.keys())
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_layer_agrees_on_torch(
    torch_keras: Any, dtype: str, named: dict[str, Any], options: dict[str, Any]
) -> None:
    named = {"num_heads": 3, "key_dim": 5} | named
    assert mha(torch_keras, named, _inputs(dtype), options, dtype=dtype) is None


@pytest.mark.clause("VAS-S322a", "OWN-MASK1", "OWN-EMPTY1", "OWN-DROPOUT1", "OWN-WINDOW1")
@pytest.mark.parametrize("options", CALLED.values(), ids=CALLED.keys())
@pytest.mark.parametrize("named", CONSTRUCTED.values(), ids=CONSTRUCTED.keys())
def test_the_layer_agrees_on_numpy(
    numpy_keras: Any, named: dict[str, Any], options: dict[str, Any]
) -> None:
    named = {"num_heads": 3, "key_dim": 5} | named
    assert mha(numpy_keras, named, _inputs("float32"), options, dtype="float32") is None


@pytest.mark.clause("OWN-GQA1", "OWN-MASK1", "OWN-EMPTY1", "OWN-BACKWARD1")
@pytest.mark.parametrize("options", CALLED.values(), ids=CALLED.keys())
@pytest.mark.parametrize("heads", [(6, 2), (3, 1), (2, 2)], ids=str)
def test_grouped_queries_agree(
    torch_keras: Any, numpy_keras: Any, heads: tuple[int, int], options: dict[str, Any]
) -> None:
    named = {"num_query_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 5}
    for named_too in ({}, {"dropout": 0.5}, {"use_gate": True, "sliding_window": 2}):
        assert gqa(torch_keras, named | named_too, _inputs(), options) is None
        small = _inputs("float32", with_key=False)
        assert gqa(numpy_keras, named | named_too, small, options, dtype="float32") is None


@pytest.mark.clause("OWN-AXES1", "OWN-MASK1")
@pytest.mark.parametrize(
    ("axes", "lead"),
    [(None, (2, 3)), ((1, 2), (2, 3)), ((2, 1), (2, 3)), (1, (2, 5)), ((2,), (2, 3)), (-2, (2, 3))],
    ids=str,
)
def test_several_axes_are_attended_jointly(torch_keras: Any, axes: Any, lead: Any) -> None:
    """Axes that are not attended are batch axes; scores have the attended ones in their order."""
    normal = np.random.default_rng(5).normal
    query, value = normal(size=(*lead, 4, 5)), normal(size=(*lead, 4, 3))
    named = {"num_heads": 2, "key_dim": 3, "attention_axes": axes}
    options = {"return_attention_scores": True}
    assert mha(torch_keras, named, {"query": query, "value": value}, options) is None
    assert mha(torch_keras, named, {"query": query, "value": value}) is None


@pytest.mark.clause("OWN-MASK1")
@pytest.mark.parametrize(
    "shape", [(N_Q, N_K), (B, N_Q, N_K), (1, N_Q, N_K), (B, 3, N_Q, N_K), (B, 1, 1, N_K)], ids=str
)
@pytest.mark.parametrize("scores", [False, True])
def test_missing_batch_and_head_axes_of_a_mask_broadcast(
    torch_keras: Any, shape: tuple[int, ...], scores: bool
) -> None:
    mask = np.random.default_rng(6).random(shape) < 0.6
    options = {"attention_mask": mask, "return_attention_scores": scores}
    assert mha(torch_keras, {"num_heads": 3, "key_dim": 2}, _inputs(), options) is None


@pytest.mark.clause("OWN-MASK1")
def test_beside_another_mask_a_mask_by_head_must_broadcast_to_it(torch_keras: Any) -> None:
    """Keras merges before it adds the axis of heads: (b, h, n, n) meets (1, n, n)."""
    mask = np.ones((B, 3, N_Q, N_K), bool)
    options = {"attention_mask": mask, "value_mask": np.ones((B, N_K), bool)}
    error = mha(torch_keras, {"num_heads": 3, "key_dim": 2}, _inputs(), options)
    assert error is not None


@pytest.mark.clause("OWN-MASK1")
def test_masks_that_hang_on_the_inputs_are_read(torch_keras: Any) -> None:
    random = np.random.default_rng(7).random
    hung = {"query": random((B, N_Q)) < 0.7, "value": random((B, N_K)) < 0.7}
    hung["key"] = random((B, N_K)) < 0.9
    named = {"num_heads": 3, "key_dim": 2}
    for options in ({}, {"return_attention_scores": True}, {"use_causal_mask": True}):
        assert mha(torch_keras, named, _inputs(), options, hung=hung) is None


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ({"num_heads": 0}, {}),
        ({"key_dim": -1}, {}),
        ({"value_dim": 0}, {}),
        ({"dropout": 1.5}, {}),
        ({"dropout": -0.5}, {}),
        ({"sliding_window": 0}, {}),
        ({"output_shape": 2.5}, {}),
        ({"attention_axes": "1"}, {}),
        ({"dropout": 0.5, "flash_attention": True}, {}),
        ({"flash_attention": True}, {"return_attention_scores": True}),
        ({}, {"attention_mask": np.ones(N_K, bool)}),
        ({}, {"attention_mask": np.ones((B, N_Q, N_K + 1), bool)}),
        ({}, {"attention_mask": np.ones((B, N_Q, N_K + 1), bool), "use_causal_mask": True}),
        ({}, {"attention_mask": np.ones((1, B, 3, N_Q, N_K)), "return_attention_scores": True}),
        ({}, {"value_mask": np.ones((B, N_K + 1), bool)}),
        ({}, {"key_mask": np.ones((B + 1, N_K), bool), "value_mask": np.ones((B, N_K), bool)}),
    ],
)  # fmt: skip
def test_misuse_is_refused_where_keras_errs(
    torch_keras: Any, named: dict[str, Any], options: dict[str, Any]
) -> None:
    assert mha(torch_keras, {"num_heads": 3, "key_dim": 2} | named, _inputs(), options) is not None


@pytest.mark.parametrize("changed", [
    {"key": np.ones((B, N_K + 1, E_K))}, {"value": np.ones((B + 1, N_K, E_V))},
    {"query": np.ones((B, 2, N_Q, E_Q))}, {"query": np.ones((B, E_Q)), "value": np.ones((B, E_V))},
])  # fmt: skip
def test_shapes_that_do_not_fit_are_refused_where_keras_errs(
    torch_keras: Any, changed: dict[str, Any]
) -> None:
    inputs = _inputs(with_key="key" in changed) | changed
    assert mha(torch_keras, {"num_heads": 3, "key_dim": 2}, inputs) is not None


@pytest.mark.clause(
    "VAS-S322a", "VAS-S323a", "OWN-MASK1", "OWN-EMPTY1", "OWN-DROPOUT1", "OWN-BACKWARD1",
    "OWN-BATCH1",
)  # fmt: skip
@settings(max_examples=200, deadline=None, derandomize=True)
@given(call=mha_calls(version=3))
def test_the_layer_agrees_on_any_drawn_call(torch_keras: Any, call: Any) -> None:
    named, inputs, options, hung = call
    mha(torch_keras, named, inputs, options, hung=hung)


@pytest.mark.clause("OWN-GQA1", "OWN-MASK1", "OWN-EMPTY1", "OWN-DROPOUT1", "OWN-BACKWARD1")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(call=gqa_calls())
def test_grouped_queries_agree_on_any_drawn_call(torch_keras: Any, call: Any) -> None:
    named, inputs, options = call
    gqa(torch_keras, named, inputs, options)


@pytest.mark.clause("VAS-S322a", "OWN-MASK1", "OWN-EMPTY1")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(call=mha_calls(version=3, dtype="float32", some_keys=True))
def test_the_layer_agrees_on_numpy_on_any_drawn_call(numpy_keras: Any, call: Any) -> None:
    named, inputs, options, _ = call
    mha(numpy_keras, named, inputs, options, dtype="float32")


@pytest.mark.clause("OWN-EMPTY1", "OWN-BIAS1")
def test_the_gradient_of_an_empty_fused_row_is_a_named_exception(torch_keras: Any) -> None:
    """PyTorch gives n_k times the derivative of the mean that it returned; `d_value` shows it."""
    inputs = _inputs(with_key=False)
    mask = np.zeros((B, N_Q, N_K), bool)
    theirs = torch_keras({
        "layer": "MultiHeadAttention", "named": {"num_heads": 1, "key_dim": 2}, "inputs": inputs,
        "options": {"attention_mask": mask}, "hung": {}, "dtype": "float64", "seed": 1,
    })  # fmt: skip
    layer = MultiHeadAttention(1, 2).set_weights(theirs["weights"])
    ours = layer.backward(theirs["cotangents"][0], **inputs, attention_mask=mask)
    expected = theirs["gradients"][1][layer_index(layer, "value/kernel")]
    actual = ours.d_weights[layer_index(layer, "value/kernel")]
    np.testing.assert_allclose(expected, N_K * actual, rtol=1e-4)


def layer_index(layer: MultiHeadAttention, name: str) -> int:
    return list(layer.weights).index(name)


@pytest.mark.clause("OWN-POISON1")
@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_finite_travels_as_in_keras(
    torch_keras: Any, numpy_keras: Any, poison: float, where: str, scores: bool
) -> None:
    inputs = _inputs("float32")
    inputs[where][:, 3] = poison
    mask = _mask()
    mask[:, ::2, 3] = False
    for ask in (torch_keras, numpy_keras) if scores else (torch_keras,):
        options = {"attention_mask": mask, "return_attention_scores": scores}
        theirs = ask({
            "layer": "MultiHeadAttention", "named": {"num_heads": 2, "key_dim": 3}, "seed": 1,
            "inputs": inputs, "options": options, "hung": {}, "dtype": "float32",
        })  # fmt: skip
        layer = MultiHeadAttention(2, 3).set_weights(theirs["weights"])
        returned = layer(**inputs, **options)
        ours = returned[0] if scores else returned
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs["output"]))
        np.testing.assert_allclose(ours, theirs["output"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "ours"),
    [("MultiHeadAttention", MultiHeadAttention), ("GroupQueryAttention", GroupQueryAttention)],
)
def test_the_signatures_are_kerass_own(numpy_keras: Any, name: str, ours: Any) -> None:
    """Ours add weights, the keep mask of dropout, and a mask that Keras hangs on the query."""
    theirs = numpy_keras({"about": name})
    expected = {n: d for n, d in theirs["init"].items() if n not in LEFT_OUT}
    added = {"weights", "keep", "attached_query_mask", "self"}
    actual = {n: p.default for n, p in inspect.signature(ours).parameters.items()}
    empty = inspect.Parameter.empty
    assert {n: d for n, d in actual.items() if n not in added} == expected
    assert list(n for n in actual if n not in added) == list(expected)
    actual = {n: p.default for n, p in inspect.signature(ours.call).parameters.items()}
    assert {n: d for n, d in actual.items() if n not in added} == {
        n: d for n, d in theirs["call"].items() if n != "self"
    }
    assert empty in actual.values()
