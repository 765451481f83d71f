"""Attention under every option, backward."""

import math

import array_api_strict
import numpy as np
import pytest

from refattn.attention import attention, attention_weights
from refattn.attention_backward import attention_backward
from refattn.checks import ShapeError

B, H, H_K, N_Q, N_K, D_K, D_V = 2, 6, 3, 5, 7, 4, 3


def _inputs(seed, *extra):
    rng = np.random.default_rng(seed)
    arrays = {
        "query": rng.normal(size=(B, H, N_Q, D_K)),
        "key": rng.normal(size=(B, H_K, N_K, D_K)),
        "value": rng.normal(size=(B, H_K, N_K, D_V)),
    }
    shapes = {"bias": (1, H, N_Q, 1), "slopes": (H,), "sinks": (H,)}
    arrays |= {name: rng.normal(size=shapes[name]) for name in extra}
    cotangents = rng.normal(size=(B, H, N_Q, D_V)), rng.normal(size=(B, H, N_Q))
    return arrays, cotangents, rng


def _loss(arrays, cotangents, options):
    output, logsumexp = attention(**arrays, **options)
    finite = np.where(np.isfinite(logsumexp), logsumexp, 0.0)
    return float((output * cotangents[0]).sum() + (finite * cotangents[1]).sum())


def _gradients(arrays, cotangents, options):
    rest = {name: a for name, a in arrays.items() if name not in ("query", "key", "value")}
    return attention_backward(
        cotangents[0],
        arrays["query"],
        arrays["key"],
        arrays["value"],
        d_logsumexp=cotangents[1],
        **rest,
        **options,
    )._asdict()


def _check_directional_derivatives(seed, extra, options):
    arrays, cotangents, rng = _inputs(seed, *extra)
    gradients = _gradients(arrays, cotangents, options)
    step = 1e-5
    for name, array in arrays.items():
        direction = rng.normal(size=array.shape)
        ahead = _loss(arrays | {name: array + step * direction}, cotangents, options)
        behind = _loss(arrays | {name: array - step * direction}, cotangents, options)
        numeric = (ahead - behind) / (2 * step)
        analytic = float((gradients[f"d_{name}"] * direction).sum())
        assert abs(analytic) > 1e-3, f"d_{name} is all but zero: this direction proves nothing"
        assert math.isclose(analytic, numeric, rel_tol=1e-6, abs_tol=1e-7), name


KEEP = np.random.default_rng(5).random((B, H, N_Q, N_K)) < 0.8
MASK = np.random.default_rng(6).random((N_Q, N_K)) < 0.8


@pytest.mark.clause("OWN-BACKWARD1", "VAS-EQ1", "FA1-ALG3", "OWN-LSE1")
def test_plain_gradients_match_central_differences():
    _check_directional_derivatives(0, (), {})


@pytest.mark.clause(
    "OWN-BACKWARD1", "OWN-SOFTCAP1", "OWN-BIAS1", "OWN-ALIBI1", "OWN-DROPOUT1", "OWN-WINDOW1"
)
@pytest.mark.parametrize("order", ["before_bias", "after_bias"])
@pytest.mark.parametrize("distance", ["absolute", "signed", "column"])
@pytest.mark.parametrize("head_map", ["interleave", "tile"])
def test_gradients_of_all_stages_match_central_differences(order, distance, head_map):
    options = {
        "softcap": 1.5,
        "softcap_order": order,
        "distance": distance,
        "head_map": head_map,
        "window": (3, 2),
        "keep": KEEP,
        "keep_probability": 0.8,
        "mask": MASK,
    }
    _check_directional_derivatives(1, ("bias", "slopes"), options)


@pytest.mark.clause("OWN-BACKWARD1", "OWN-SINK1")
def test_gradients_of_sinks_match_central_differences():
    _check_directional_derivatives(2, ("sinks", "slopes"), {"causal": True, "alignment": -2})


@pytest.mark.clause("OWN-BACKWARD1", "OWN-LENGTH1", "OWN-CAUSAL1", "OWN-EMPTY1")
@pytest.mark.parametrize("empty_row", ["zero", "uniform"])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right", 1, [0, -3]])
def test_gradients_with_lengths_match_central_differences(empty_row, alignment):
    options = {
        "causal": True,
        "alignment": alignment,
        "empty_row": empty_row,
        "query_lengths": np.asarray([3, 5]),
        "key_lengths": np.asarray([7, 4]),
    }
    _check_directional_derivatives(3, ("bias",), options)


@pytest.mark.clause("OWN-BACKWARD1")
def test_one_key_has_no_gradient_in_its_logit():
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, 1, n, 3)) for n in (5, 1, 1))
    d_output = rng.normal(size=(1, 1, 5, 3))
    g = attention_backward(d_output, query, key, value)
    assert np.abs(g.d_query).max() < 1e-15
    assert np.abs(g.d_key).max() < 1e-15
    assert np.allclose(g.d_value, d_output.sum(axis=-2, keepdims=True), rtol=1e-14)


@pytest.mark.clause("OWN-BACKWARD1", "OWN-BIAS1")
def test_two_keys_by_hand():
    # P = (1/4, 3/4), dP = (4, 8): D = 7, dS = (-3/4, 3/4)
    query = np.ones((1, 1, 1, 1))
    key = np.asarray([0.0, math.log(3.0)]).reshape(1, 1, 2, 1)
    value = np.asarray([4.0, 8.0]).reshape(1, 1, 2, 1)
    bias = np.zeros((1, 1, 1, 2))
    g = attention_backward(np.ones((1, 1, 1, 1)), query, key, value, bias=bias)
    assert np.allclose(g.d_value.ravel(), [0.25, 0.75], rtol=1e-15)
    assert np.allclose(g.d_bias.ravel(), [-0.75, 0.75], rtol=1e-14)
    assert np.allclose(g.d_key.ravel(), [-0.75, 0.75], rtol=1e-14)
    assert np.allclose(g.d_query.ravel(), [0.75 * math.log(3.0)], rtol=1e-14)


@pytest.mark.clause("OWN-LSE1", "OWN-BACKWARD1")
def test_the_gradient_through_the_logsumexp_alone_is_the_weights():
    arrays, (d_output, _), _ = _inputs(4, "bias")
    bias = np.zeros((B, H, N_Q, N_K))
    rest = {"query": arrays["query"], "key": arrays["key"], "value": arrays["value"]}
    g = attention_backward(
        np.zeros_like(d_output), **rest, bias=bias, d_logsumexp=np.ones((B, H, N_Q))
    )
    assert np.allclose(g.d_bias, attention_weights(**rest), rtol=1e-13, atol=1e-16)
    assert not g.d_value.any()


@pytest.mark.clause("OWN-EMPTY1", "OWN-BACKWARD1")
@pytest.mark.parametrize("policy", ["zero", "nan", "uniform"])
def test_gradients_of_an_empty_row_follow_its_policy(policy):
    rng = np.random.default_rng(1)
    query, key, value = (rng.normal(size=(1, 1, n, 3)) for n in (2, 5, 5))
    mask = np.asarray([[True] * 5, [False] * 5])
    d_output = np.concatenate([np.zeros((1, 1, 1, 3)), np.ones((1, 1, 1, 3))], axis=-2)
    g = attention_backward(d_output, query, key, value, mask=mask, empty_row=policy)
    if policy == "nan":
        assert np.isnan(g.d_query[0, 0, 1]).all()
        assert np.isnan(g.d_key).all()
        assert np.isnan(g.d_value).all()
        return
    assert not g.d_query.any()
    assert not g.d_key.any()
    assert np.allclose(g.d_value, 0.2 if policy == "uniform" else 0.0, rtol=1e-15)


@pytest.mark.clause("OWN-POISON1", "OWN-BACKWARD1")
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e300])
def test_gradients_never_read_a_forbidden_cell(poison):
    rng = np.random.default_rng(2)
    query, key, value = (rng.normal(size=(1, 1, n, 3)) for n in (5, 7, 7))
    d_output = rng.normal(size=(1, 1, 5, 3))
    options = {"key_lengths": np.asarray([4]), "query_lengths": np.asarray([3]), "softcap": 2.0}
    clean = attention_backward(d_output, query, key, value, **options)
    key[..., 4:, :] = value[..., 4:, :] = poison
    query[..., 3:, :] = poison
    dirty = attention_backward(d_output, query, key, value, **options)
    for a, b in zip(clean[:3], dirty[:3], strict=True):
        assert np.allclose(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.clause("OWN-EMPTY1", "OWN-POISON1")
def test_an_empty_row_has_no_gradient_even_where_masking_adds():
    rng = np.random.default_rng(3)
    query, key, value = (rng.normal(size=(1, 1, n, 3)) for n in (2, 5, 5))
    value[..., 4, :] = math.nan
    mask = np.asarray([[True] * 5, [False] * 5])
    g = attention_backward(np.ones((1, 1, 2, 3)), query, key, value, mask=mask, masked="add")
    assert np.isnan(g.d_query[0, 0, 0]).all()
    assert not g.d_query[0, 0, 1].any()


@pytest.mark.clause("OWN-EMPTY1", "OWN-POISON1")
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_zeros_of_an_empty_row_meet_what_it_reads_in_the_backward_pass(softcap):
    rng = np.random.default_rng(4)
    mask = np.asarray([[True] * 4 + [False], [False] * 5])
    reads = {("select", "zero"): "", ("select", "uniform"): "d_output"}
    reads |= {("add", policy): "query key d_output" for policy in ("zero", "uniform")}
    for (masked, policy), names in reads.items():
        for name, gradient in (("query", 1), ("key", 0), ("d_output", 2)):
            arrays = {n: rng.normal(size=(1, 1, 5, 3)) for n in ("key", "value")}
            arrays |= {n: rng.normal(size=(1, 1, 2, 3)) for n in ("query", "d_output")}
            arrays[name][0, 0, 4 if name == "key" else 1, 2] = math.nan
            found = attention_backward(
                **arrays, mask=mask, masked=masked, empty_row=policy, softcap=softcap
            )[gradient][0, 0]
            rows = found[1:] if name == "key" else found
            expected = np.zeros(rows.shape, bool)
            expected[:, 2] = name in names
            assert np.array_equal(np.isnan(rows), expected), (masked, policy, name)


@pytest.mark.clause("OWN-GQA1", "OWN-BACKWARD1")
def test_a_shared_head_receives_the_sum_over_its_group():
    arrays, cotangents, _ = _inputs(7)
    shared = _gradients(arrays, cotangents, {"causal": True})
    own = arrays | {n: np.repeat(arrays[n], H // H_K, axis=1) for n in ("key", "value")}
    apart = _gradients(own, cotangents, {"causal": True})
    for name in ("d_key", "d_value"):
        expected = apart[name].reshape(B, H_K, H // H_K, N_K, -1).sum(axis=2)
        assert np.allclose(shared[name], expected, rtol=1e-13, atol=1e-14)


@pytest.mark.clause("OWN-ROUND1", "OWN-BACKWARD1")
def test_any_array_library_runs_the_same_text():
    xp = array_api_strict
    arrays, cotangents, _ = _inputs(8, "bias", "slopes", "sinks")
    options = {"causal": True, "softcap": 2.0, "softcap_order": "after_bias"}
    expected = _gradients(arrays, cotangents, options)
    strict = _gradients(
        {name: xp.asarray(a) for name, a in arrays.items()},
        tuple(xp.asarray(a) for a in cotangents),
        options,
    )
    for name, array in expected.items():
        assert np.array_equal(np.from_dlpack(strict[name]), array), name


@pytest.mark.clause("OWN-ROUND1", "OWN-BACKWARD1")
def test_sixteen_bit_gradients_round_once():
    arrays, cotangents, _ = _inputs(9, "sinks")
    half = {name: a.astype(np.float16) for name, a in arrays.items()}
    wide = {name: a.astype(np.float32) for name, a in half.items()}
    d_half = cotangents[0].astype(np.float16), cotangents[1].astype(np.float32)
    result = _gradients(half, d_half, {})
    expected = _gradients(wide, (d_half[0].astype(np.float32), d_half[1]), {})
    for name, array in result.items():
        if array is not None:
            assert array.dtype == np.float16
            assert np.array_equal(array, expected[name].astype(np.float16)), name


@pytest.mark.clause("OWN-BACKWARD1")
def test_a_cotangent_of_another_shape_is_refused():
    x = np.ones((1, 1, 3, 2))
    with pytest.raises(ShapeError, match="d_output has 5=4, but the contract has 5=5"):
        attention_backward(np.ones((1, 1, 4, 2)), np.ones((1, 1, 5, 2)), x, x)
