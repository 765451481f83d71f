"""The reference beside Keras in float32: the operation, and the multi-head layer.

The layer has two answers to a row that its mask empties: its fused path returns the uniform
average, and the path that also returns the weights returns zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from optional import require
from peers.agreement import allowed_between
from refattn.attention import attention, attention_weights
from refattn.multihead import multihead_attention

keras = require("keras")

B, H, N_Q, N_K, D, E_Q, E_S = 2, 3, 5, 7, 11, 13, 17
"""Sizes of every test."""


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _mask(*, empty: bool) -> np.ndarray:
    mask = np.random.default_rng(5).random((B, N_Q, N_K)) < 0.6
    mask[..., 0] = True
    if empty:
        mask[:, 2] = False
    return mask


@pytest.mark.clause("VAS-EQ1", "OWN-CAUSAL1", "OWN-SCALE1", "OWN-BIAS1")
@pytest.mark.parametrize(
    ("asked", "same"),
    [
        ({}, {}),
        ({"scale": 0.2}, {"scale": 0.2}),
        ({"is_causal": True}, {"causal": True}),
        ({"bias": _normal(1, 1, H, N_Q, N_K)}, {"bias": _normal(1, 1, H, N_Q, N_K)}),
    ],
    ids=["plain", "scale", "causal", "bias"],
)
def test_the_operation_agrees(asked: dict[str, Any], same: dict[str, Any]) -> None:
    query, key, value = _normal(2, B, H, N_Q, D), _normal(3, B, H, N_K, D), _normal(4, B, H, N_K, D)
    swapped = (np.swapaxes(a, 1, 2) for a in (query, key, value))
    theirs = np.swapaxes(np.asarray(keras.ops.dot_product_attention(*swapped, **asked)), 1, 2)
    ours = attention(query, key, value, **same).output
    inputs = {"query": query, "key": key, "value": value}
    inputs |= {name: same[name] for name in same if name == "bias"}
    numbers = {name: same[name] for name in same if name != "bias"}
    allowed = allowed_between("attention", inputs, numbers, {}, "float32")["output"]
    assert (np.abs(ours - theirs) <= allowed).all()


def _layer() -> tuple[Any, dict[str, np.ndarray]]:
    """Return a layer with its weights in our layout: (h, e, d) and (h, d, e).

    On jax, Keras 3.15 refuses a value_dim that is not key_dim.
    """
    layer = keras.layers.MultiHeadAttention(H, D, use_bias=False, seed=1)
    layer.build((B, N_Q, E_Q), (B, N_K, E_S))
    w_query, w_key, w_value, w_output = (np.asarray(w.value) for w in layer.weights)
    return layer, {
        "w_query": w_query.transpose(1, 0, 2),
        "w_key": w_key.transpose(1, 0, 2),
        "w_value": w_value.transpose(1, 0, 2),
        "w_output": w_output,
    }


@pytest.mark.clause("VAS-S322a", "VAS-S323a", "VAS-S323b")
@pytest.mark.parametrize("causal", [False, True])
def test_the_layer_agrees(causal: bool) -> None:
    layer, weights = _layer()
    x, y = _normal(6, B, N_Q, E_Q), _normal(7, B, N_K, E_S)
    theirs = np.asarray(layer(x, y, use_causal_mask=causal))
    ours = multihead_attention(x, y, **weights, causal=causal)
    inputs = {"query_input": x, "source_input": y, **weights}
    allowed = allowed_between("multihead", inputs, {"causal": causal}, {}, "float32")["output"]
    assert (np.abs(ours - theirs) <= allowed).all()


@pytest.mark.clause("OWN-EMPTY1", "OWN-MASK1")
@pytest.mark.parametrize(("with_weights", "empty_row"), [(False, "uniform"), (True, "zero")])
def test_the_layer_has_two_answers_to_an_empty_row(with_weights: bool, empty_row: str) -> None:
    layer, weights = _layer()
    x, y, mask = _normal(8, B, N_Q, E_Q), _normal(9, B, N_K, E_S), _mask(empty=True)
    answer = layer(x, y, attention_mask=mask, return_attention_scores=with_weights)
    query = np.einsum("bne,hed->bhnd", x, weights["w_query"])
    key = np.einsum("bne,hed->bhnd", y, weights["w_key"])
    value = np.einsum("bne,hed->bhnd", y, weights["w_value"])
    options = {"mask": mask[:, None], "empty_row": empty_row}
    heads = attention(query, key, value, **options).output
    ours = np.einsum("bhnd,hde->bne", heads, weights["w_output"])
    theirs = answer[0] if with_weights else answer
    # sums of at most 17 products of numbers below 4, four deep
    np.testing.assert_allclose(ours, np.asarray(theirs), rtol=0, atol=1e-5)
    assert (np.abs(ours[:, 2]).max() == 0) == (empty_row == "zero")
    if with_weights:
        P = attention_weights(query, key, value, **options)
        np.testing.assert_allclose(P, np.asarray(answer[1]), rtol=0, atol=1e-5)
