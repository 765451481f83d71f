"""tf.keras 2's MultiHeadAttention beside tf-keras: a grid, then drawn calls of the whole signature.

TensorFlow is large: it is in the extra `tf`, not among the peers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from peers.keras_dialect import compare, keras_process
from peers.keras_draws import mha_calls
from refattn.dialects.keras2_mha import MultiHeadAttention

pytestmark = pytest.mark.peer("tf_keras")

B, N_Q, N_K, E_Q, E_V, E_K = 2, 5, 7, 3, 4, 6

HUNG = {"query": "query_mask", "value": "value_mask", "key": "key_mask"}
"""Ours for a mask that hangs on an input."""


@pytest.fixture(scope="module")
def tf_keras() -> Iterator[Any]:
    with keras_process("tf_keras") as ask:
        yield ask


def mha(ask: Any, named: Any, inputs: Any, options: Any = None, **more: Any) -> str | None:
    named = {"num_heads": 3, "key_dim": 5} | named
    more = {"hung_names": HUNG} | more
    return compare(ask, MultiHeadAttention, "MultiHeadAttention", named, inputs, options, **more)


def _inputs(dtype: str = "float64") -> dict[str, np.ndarray]:
    normal = np.random.default_rng(3).normal
    shapes = {"query": (B, N_Q, E_Q), "value": (B, N_K, E_V), "key": (B, N_K, E_K)}
    return {name: normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def _mask() -> np.ndarray:
    mask = np.random.default_rng(4).random((B, N_Q, N_K)) < 0.6
    mask[0, 2] = False
    return mask


CALLED: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"attention_mask": _mask()},
    "mask of floats": {"attention_mask": _mask() * 0.7},
    "mask beside causal": {"attention_mask": _mask() * 0.7, "use_causal_mask": True},
    "scores": {"attention_mask": _mask(), "return_attention_scores": True},
    "causal": {"use_causal_mask": True},
    "training": {"training": True, "use_causal_mask": True, "return_attention_scores": True},
}
"""Call arguments of the grid."""


@pytest.mark.clause("VAS-S322a", "OWN-MASK1", "OWN-EMPTY1", "OWN-BIAS1", "OWN-DROPOUT1")
@pytest.mark.parametrize("options", CALLED.values(), ids=CALLED.keys())
@pytest.mark.parametrize(
    "named",
    [
        {},
        {"value_dim": 2},
        {"use_bias": False},
        {"dropout": 0.5},
        {"output_shape": (7, 2)},
        {"output_shape": 5},
        {"softmax_robust_masking": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_layer_agrees(
    tf_keras: Any, dtype: str, named: dict[str, Any], options: dict[str, Any]
) -> None:
    assert mha(tf_keras, named, _inputs(dtype), options, dtype=dtype) is None


@pytest.mark.clause("OWN-MASK1")
@pytest.mark.parametrize("robust", [False, True])
def test_masks_that_hang_on_the_inputs_are_read(tf_keras: Any, robust: bool) -> None:
    random = np.random.default_rng(7).random
    hung = {"query": random((B, N_Q)) < 0.7, "value": random((B, N_K)) < 0.7}
    hung["key"] = random((B, N_K)) < 0.9
    named = {"softmax_robust_masking": robust}
    for options in ({}, {"attention_mask": _mask()}, {"use_causal_mask": True}):
        assert mha(tf_keras, named, _inputs(), options, hung=hung) is None


@pytest.mark.clause("OWN-EMPTY1", "OWN-BIAS1")
def test_an_empty_row_keeps_its_weights_in_float64_and_loses_them_in_float32(tf_keras: Any) -> None:
    """1e9 swallows what is below 64 in float32, and below 1.2e-7 in float64."""
    for dtype, spread_out in (("float64", True), ("float32", False)):
        options = {"attention_mask": np.zeros((1, N_Q, N_K), bool)}
        options |= {"return_attention_scores": True}
        request = {
            "layer": "MultiHeadAttention", "named": {"num_heads": 1, "key_dim": 2},
            "inputs": _inputs(dtype), "options": options, "hung": {}, "dtype": dtype, "seed": 2,
        }  # fmt: skip
        theirs = tf_keras(request)["scores"]
        assert (np.ptp(theirs, axis=-1).min() > 1e-3) == spread_out
        assert mha(tf_keras, request["named"], _inputs(dtype), options, dtype=dtype) is None


@pytest.mark.clause("OWN-EMPTY1")
def test_empty_rows_over_several_axes_are_a_named_exception(tf_keras: Any) -> None:
    """In float32 each weight of such a row is 1, so that the row is the sum of all values."""
    normal = np.random.default_rng(5).normal
    x = normal(size=(1, 2, 3, 4)).astype("float32")
    options = {"attention_mask": np.zeros((2, 3, 2, 3), bool), "return_attention_scores": True}
    theirs = tf_keras({
        "layer": "MultiHeadAttention", "named": {"num_heads": 1, "key_dim": 2},
        "inputs": {"query": x, "value": x}, "options": options, "hung": {}, "dtype": "float32",
        "seed": 2,
    })  # fmt: skip
    assert (theirs["scores"] == 1).all()
    layer = MultiHeadAttention(1, 2).set_weights(theirs["weights"])
    np.testing.assert_allclose(layer(x, x, **options)[1].sum(axis=(-2, -1)), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ({"num_heads": -1}, {}),
        ({"key_dim": -1}, {}),
        ({"dropout": 1.5}, {}),
        ({"dropout": 1.0}, {"training": True}),
        ({"attention_axes": "1"}, {}),
        ({"softmax_robust_masking": True}, {"attention_mask": np.ones((N_Q, N_K), np.int64)}),
        ({}, {"attention_mask": np.ones(N_K, bool)}),
        ({}, {"attention_mask": np.ones((B, N_Q, N_K + 1), bool)}),
        ({}, {"attention_mask": np.ones((B, N_Q, N_K + 1), bool), "use_causal_mask": True}),
    ],
)
def test_misuse_is_refused_where_tf_keras_errs(
    tf_keras: Any, named: dict[str, Any], options: dict[str, Any]
) -> None:
    assert mha(tf_keras, named, _inputs(), options) is not None


@pytest.mark.clause(
    "VAS-S322a", "VAS-S323a", "OWN-MASK1", "OWN-EMPTY1", "OWN-DROPOUT1", "OWN-BACKWARD1"
)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(call=mha_calls(version=2))
def test_the_layer_agrees_on_any_drawn_call(tf_keras: Any, call: Any) -> None:
    named, inputs, options, hung = call
    mha(tf_keras, named, inputs, options, hung=hung)


def test_the_signature_is_tf_kerass_own(tf_keras: Any) -> None:
    """Ours add weights, the keep mask of dropout, and the masks that tf-keras hangs on inputs."""
    theirs = tf_keras({"about": "MultiHeadAttention"})
    training = ("_initializer", "_regularizer", "_constraint")
    expected = {n: d for n, d in theirs["init"].items() if not n.endswith(training)}
    added = {"weights", "keep", "self", *HUNG.values()}
    pairs = ((MultiHeadAttention, expected), (MultiHeadAttention.call, theirs["call"]))
    for ours, parameters in pairs:
        actual = {n: p.default for n, p in inspect.signature(ours).parameters.items()}
        found = {n: d for n, d in actual.items() if n not in added}
        assert list(found.items()) == [i for i in parameters.items() if i[0] != "self"]
