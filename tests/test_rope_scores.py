"""Attention with positions in queries and keys, and the relative form of their product."""

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refattn.checks import DtypeError, OptionError, ShapeError
from refattn.rope import rope
from refattn.rope_scores import (
    position_aware_attention,
    position_aware_attention_backward,
    position_aware_projections,
    relative_scores,
    relative_scores_backward,
)

OFFSETS = st.integers(-(2**31), 2**31)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def weights(e=7, d=6, d_v=3):
    return {
        "w_query": normal(e, d, seed=1),
        "w_key": normal(e, d, seed=2),
        "w_value": normal(e, d_v, seed=3),
    }


@pytest.mark.clause("ROPE-EQ1", "ROPE-EQ14")
def test_queries_and_keys_are_projected_and_turned_and_values_only_projected():
    x, m, w = normal(2, 5, 7), np.array([3, 1, 4, 1, 5]), weights()
    query, key, value = position_aware_projections(x, m, **w)
    np.testing.assert_allclose(value, x @ w["w_value"], rtol=1e-14)
    for turned, weight in ((query, "w_query"), (key, "w_key")):
        flat = x @ w[weight]
        for n, position in enumerate(m):
            for i in range(3):
                z = (flat[:, n, 2 * i] + 1j * flat[:, n, 2 * i + 1]) * np.exp(
                    1j * position * 10000 ** (-2 * i / 6)
                )
                np.testing.assert_allclose(turned[:, n, 2 * i], z.real, rtol=0, atol=1e-13)
                np.testing.assert_allclose(turned[:, n, 2 * i + 1], z.imag, rtol=0, atol=1e-13)


@pytest.mark.clause("ROPE-EQ2")
def test_two_tokens_by_hand():
    w = {"w_query": np.eye(2), "w_key": np.eye(2), "w_value": np.eye(2)}
    x = np.array([[1.0, 0.0], [0.0, 1.0]])
    # q_0 = (1, 0); k_0 = (1, 0), k_1 = (-sin 11, cos 11); scores 1/√2 and -sin(11)/√2.
    a = np.exp(np.array([1.0, 0.9999902065507035]) / np.sqrt(2))
    expected = a / a.sum()
    output = position_aware_attention(x, np.array([0, 11]), **w)
    np.testing.assert_allclose(output[0], expected, rtol=1e-14)


@pytest.mark.clause("ROPE-EQ2", "ROPE-EQ11")
@given(offset=OFFSETS, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_moving_every_position_leaves_attention_unchanged(offset, seed):
    x, m = normal(5, 7, seed=seed), np.array([0, 2, 3, 7, 90])
    here = position_aware_attention(x, m, **weights())
    there = position_aware_attention(x, m + offset, **weights())
    np.testing.assert_allclose(there, here, rtol=0, atol=2e-13)


@pytest.mark.clause("ROPE-EQ2")
def test_equal_positions_are_attention_without_positions():
    x, w = normal(5, 7), weights()
    S = (x @ w["w_query"]) @ (x @ w["w_key"]).T / np.sqrt(6)
    P = np.exp(S) / np.exp(S).sum(axis=-1, keepdims=True)
    output = position_aware_attention(x, np.full(5, 12345), **w)
    np.testing.assert_allclose(output, P @ (x @ w["w_value"]), rtol=1e-11)


@pytest.mark.clause("ROPE-EQ1", "ROPE-EQ2")
@pytest.mark.parametrize("pairing", ["interleaved", "half_split"])
def test_gradients_of_position_aware_attention_match_central_differences(pairing):
    x, m, w = normal(2, 5, 7), np.array([0, 2, 3, 7, 90]), weights()
    d_output = normal(2, 5, 3, seed=9)
    options = {"pairing": pairing, "rotary_dim": 4}
    gradients = position_aware_attention_backward(d_output, x, m, **w, **options)
    inputs = {"x": x, **w}
    for k, (name, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        direction, step = normal(*inputs[name].shape, seed=20 + k), 2.0**-12
        losses = []
        for side in (1, -1):
            moved = {**inputs, name: inputs[name] + side * step * direction}
            output = position_aware_attention(moved.pop("x"), m, **moved, **options)
            losses.append(np.sum(d_output * output))
        difference = (losses[0] - losses[1]) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * direction), difference, rtol=1e-5)


@pytest.mark.clause("ROPE-EQ11", "ROPE-EQ16")
@given(m=OFFSETS, n=OFFSETS, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_scores_depend_on_relative_position_only(m, n, seed):
    q, k = normal(1, 10, seed=seed), normal(1, 10, seed=seed + 1)
    turned = rope(q, np.array([m])).output[0] @ rope(k, np.array([n])).output[0]
    at_origin = rope(q, np.array([m - n])).output[0] @ k[0]
    relative = relative_scores(
        q, k, query_positions=np.array([m]), key_positions=np.array([n]), base=10000.0
    )
    np.testing.assert_allclose(turned, at_origin, rtol=0, atol=2e-14)
    np.testing.assert_allclose(relative[0, 0], turned, rtol=0, atol=2e-14)


@pytest.mark.clause("ROPE-EQ16")
def test_one_relative_score_by_hand():
    # q = k = (1, 0): qᵀ R_{n-m} k = cos(n - m), whichever comes first.
    q = k = np.array([[1.0, 0.0]])
    for m, n in ((4, 5), (5, 4)):
        score = relative_scores(q, k, query_positions=np.array([m]), key_positions=np.array([n]))
        np.testing.assert_allclose(score, [[0.5403023058681398]], rtol=1e-15)
    # q = (1, 0), k = (0, 1): -sin(n - m).
    score = relative_scores(
        q, np.array([[0.0, 1.0]]), query_positions=np.array([4]), key_positions=np.array([5])
    )
    np.testing.assert_allclose(score, [[-0.8414709848078965]], rtol=1e-15)


@pytest.mark.clause("ROPE-EQ16")
def test_gradients_of_the_relative_form_match_central_differences():
    q, k, dg = normal(2, 3, 6), normal(2, 5, 6, seed=1), normal(2, 3, 5, seed=2)
    positions = {"query_positions": np.array([0, 7, 3]), "key_positions": np.arange(5) * 11}
    gradients = relative_scores_backward(dg, q, k, **positions)
    for k_input, gradient in enumerate(gradients):
        direction = normal(*gradient.shape, seed=30 + k_input)
        losses = []
        for side in (1, -1):
            moved = [q, k]
            moved[k_input] = moved[k_input] + side * direction
            losses.append(np.sum(dg * relative_scores(*moved, **positions)))
        difference = (losses[0] - losses[1]) / 2  # exact: the form is bilinear
        np.testing.assert_allclose(np.sum(gradient * direction), difference, rtol=1e-12)


@pytest.mark.clause("ROPE-EQ1", "ROPE-EQ2", "ROPE-EQ16")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bit_inputs_are_widened_and_rounded_once(dtype):
    x, m = normal(5, 7).astype(dtype), np.arange(5)
    w = {name: weight.astype(dtype) for name, weight in weights().items()}
    output = position_aware_attention(x, m, **w)
    wide = {name: weight.astype(np.float32) for name, weight in w.items()}
    expected = position_aware_attention(x.astype(np.float32), m, **wide)
    assert output.dtype == dtype
    np.testing.assert_array_equal(output, expected.astype(dtype))


def calls(xp):
    x, m = xp.asarray(normal(2, 5, 7)), xp.asarray([3, 1, 4, 1, 5])
    w = {name: xp.asarray(weight) for name, weight in weights().items()}
    q, k = xp.asarray(normal(2, 5, 6)), xp.asarray(normal(2, 5, 6, seed=1))
    at = {"query_positions": m, "key_positions": m + 1}
    return {
        "projections": position_aware_projections(x, m, **w),
        "attention": (position_aware_attention(x, m, **w),),
        "backward": position_aware_attention_backward(xp.ones((2, 5, 3)), x, m, **w),
        "scores": (relative_scores(q, k, **at),),
        "scores backward": relative_scores_backward(xp.ones((2, 5, 5)), q, k, **at),
    }


@pytest.mark.clause("ROPE-EQ1", "ROPE-EQ2", "ROPE-EQ11", "ROPE-EQ16")
@pytest.mark.parametrize("name", calls(np))
def test_only_functions_of_the_array_standard_are_used(name):
    for strict, plain in zip(calls(array_api_strict)[name], calls(np)[name], strict=True):
        np.testing.assert_allclose(np.asarray(strict), plain, rtol=1e-12, atol=1e-13)


X, M = np.ones((3, 7)), np.arange(3)
REFUSED = {
    "embedding": (
        lambda: position_aware_attention(np.ones((3, 5)), M, **weights()),
        ShapeError,
        "w_query has e=7, but x has e=5",
    ),
    "query and key": (
        lambda: position_aware_projections(X, M, **{**weights(), "w_key": np.ones((7, 4))}),
        ShapeError,
        "w_key has d=4, but w_query has d=6",
    ),
    "odd": (
        lambda: position_aware_attention(X, M, **weights(d=5)),
        OptionError,
        "rotary_dim is 5, but it must be even",
    ),
    "dtype": (
        lambda: position_aware_attention(X.astype(np.float32), M, **weights()),
        DtypeError,
        "w_query has dtype float64, but x has dtype float32",
    ),
    "cotangent": (
        lambda: position_aware_attention_backward(np.ones((3, 2)), X, M, **weights()),
        ShapeError,
        "w_value has d_v=3, but d_output has d_v=2",
    ),
    "key positions": (
        lambda: relative_scores(X[:, :6], X[:, :6], query_positions=M, key_positions=M[:2]),
        ShapeError,
        "key_positions has n_k=2, but key has n_k=3",
    ),
    "odd features": (
        lambda: relative_scores(X, X, query_positions=M, key_positions=M),
        OptionError,
        "rotary_dim is 7, but it must be even",
    ),
}


@pytest.mark.clause("ROPE-EQ1", "ROPE-EQ2", "ROPE-EQ16")
@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_both_sides(name):
    call, error, sentence = REFUSED[name]
    with pytest.raises(error, match=sentence):
        call()
