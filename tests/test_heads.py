"""Attention as a sum of heads, and the importance of a head."""

from math import log

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from directional import check_gradients
from refattn.checks import DtypeError, OptionError, ShapeError
from refattn.head_sum import head_outputs, single_head_attention, sum_of_heads
from refattn.heads import gate_importance, head_importance, importance_order, normalize_by_layer
from refattn.multihead import multihead_attention, project
from refattn.multihead_backward import multihead_attention_backward

X, N_Q, N_K, E, H, D_H = 5, 3, 7, 11, 3, 2
SHAPES = {
    "query_input": (X, N_Q, E),
    "source_input": (X, N_K, E),
    "w_query": (H, E, D_H),
    "w_key": (H, E, D_H),
    "w_value": (H, E, D_H),
    "w_output": (H, D_H, E),
}


def _arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) / 2 for name, shape in SHAPES.items()}


def _example(arrays, x):
    return {n: a if n.startswith("w_") else a[x : x + 1] for n, a in arrays.items()}


@pytest.mark.clause("HEADS-S21")
def test_single_head_attention_by_hand():
    # d = 4, d_h = 1: the logits 2 ln 3 and 0 over √4 give weights 3/4 and 1/4
    x = np.array([[log(3.0), 8.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.0]])
    q = np.array([2.0, 0.0, 0.0, 0.0])
    first, second = np.array([[1.0, 0, 0, 0]]), np.array([[0, 1.0, 0, 0]])
    out = single_head_attention(x, q, first, first, second, np.array([[1.0], [0], [-2], [0]]))
    np.testing.assert_allclose(out, [6.0, 0.0, -12.0, 0.0], rtol=1e-15)


@pytest.mark.clause("HEADS-S21", "HEADS-EQ1", "VAS-S322a")
def test_the_sum_over_single_heads_is_multi_head_attention():
    a = _arrays(1)
    expected = multihead_attention(**a, scale=E**-0.5)
    for x in range(X):
        for i in range(N_Q):
            heads = [
                single_head_attention(
                    a["source_input"][x],
                    a["query_input"][x, i],
                    *(a[name][h].T for name in ("w_query", "w_key", "w_value", "w_output")),
                )
                for h in range(H)
            ]
            np.testing.assert_allclose(sum(heads), expected[x, i], rtol=1e-10)


@pytest.mark.clause("HEADS-S21", "OWN-BACKWARD1")
def test_the_gradients_of_a_single_head_are_those_of_one_of_many():
    rng = np.random.default_rng(14)
    shapes = {
        "source_input": (N_K, E),
        "query_input": (E,),
        "w_query": (D_H, E),
        "w_key": (D_H, E),
        "w_value": (D_H, E),
        "w_output": (E, D_H),
    }
    a, d_output = {n: rng.normal(size=s) for n, s in shapes.items()}, rng.normal(size=E)
    as_many = {n: x.T[None] if n.startswith("w_") else x.reshape(1, -1, E) for n, x in a.items()}
    gradients = multihead_attention_backward(d_output[None, None], **as_many, scale=E**-0.5)
    check_gradients(
        lambda changed: float(single_head_attention(**changed) @ d_output),
        a,
        {n: _as_one(getattr(gradients, f"d_{n}")[0], a[n].shape) for n in a},
    )


def _as_one(gradient, shape):
    """Return a gradient of row vectors in the layout of column vectors."""
    return gradient.T if gradient.T.shape == shape else gradient.reshape(shape)


@pytest.mark.clause("HEADS-S23", "HEADS-S4c")
def test_a_gate_of_zero_does_not_silence_a_nan():
    a = _arrays(15)
    a["w_value"][1] = np.nan
    gated = multihead_attention(**a, head_gates=np.array([1.0, 0.0, 1.0]))
    assert np.isnan(gated).all()


@pytest.mark.clause("HEADS-EQ1", "HEADS-S23", "VAS-S322a")
@pytest.mark.parametrize("gates", [None, [1.0, 0.0, 1.0], [0.5, -2.0, 0.0]])
def test_the_gated_sum_equals_the_concatenation(gates):
    a = _arrays(2)
    gates = None if gates is None else np.array(gates)
    total = sum_of_heads(head_outputs(**a), head_gates=gates)
    np.testing.assert_allclose(total, multihead_attention(**a, head_gates=gates), rtol=1e-10)


@pytest.mark.clause("HEADS-S23")
def test_masks_by_hand():
    heads = np.array([[[[1.0, 10.0]], [[2.0, 20.0]], [[4.0, 40.0]]]])
    assert sum_of_heads(heads).tolist() == [[[7.0, 70.0]]]
    assert sum_of_heads(heads, head_gates=np.array([1.0, 0.0, 1.0])).tolist() == [[[5.0, 50.0]]]
    assert sum_of_heads(heads, head_gates=np.zeros(3)).tolist() == [[[0.0, 0.0]]]


@pytest.mark.clause("HEADS-S23", "HEADS-EQ1")
def test_the_gradients_of_the_gated_sum_are_those_of_the_concatenation():
    a = _arrays(3) | {"head_gates": np.array([1.0, 0.0, 0.5])}
    d_output = np.random.default_rng(4).normal(size=(X, N_Q, E))

    def loss(changed):
        rest = dict(changed)
        gates = rest.pop("head_gates")
        return float((sum_of_heads(head_outputs(**rest), head_gates=gates) * d_output).sum())

    gradients = multihead_attention_backward(d_output, **a)._asdict()
    check_gradients(loss, a, {n.removeprefix("d_"): g for n, g in gradients.items()})


def _gate_gradients(a, d_output):
    """∂L(x)/∂ξ at ξ = 1, one example at a time: (1, x, h)."""
    rows = [
        multihead_attention_backward(
            d_output[x : x + 1], **_example(a, x), head_gates=np.ones(H)
        ).d_head_gates
        for x in range(X)
    ]
    return np.stack(rows)[None]


@pytest.mark.clause("HEADS-EQ2")
def test_the_gradient_of_a_gate_is_the_loss_s_slope():
    a = _arrays(5)
    d_output = np.random.default_rng(6).normal(size=(X, N_Q, E))
    gradients = _gate_gradients(a, d_output)
    step = 1e-6
    for x in range(X):
        for h in range(H):
            one = step * np.eye(H)[h]
            ahead, behind = (
                (multihead_attention(**_example(a, x), head_gates=1 + s) * d_output[x]).sum()
                for s in (one, -one)
            )
            assert gradients[0, x, h] == pytest.approx((ahead - behind) / (2 * step), rel=1e-6)


@pytest.mark.clause("HEADS-EQ2", "HEADS-EQ1")
def test_both_forms_of_importance_are_equal():
    a = _arrays(7)
    d_output = np.random.default_rng(8).normal(size=(X, N_Q, E))
    by_gates = gate_importance(_gate_gradients(a, d_output))
    # every term of the sum over heads receives the gradient of the sum
    full = head_outputs(**a)[None]
    d_full = np.broadcast_to(d_output[None, :, None], full.shape).copy()
    np.testing.assert_allclose(head_importance(full, d_full).importance, by_gates, rtol=1e-11)


@pytest.mark.clause("HEADS-EQ2")
def test_a_head_before_its_output_projection_has_the_same_importance():
    a = _arrays(9)
    d_output = np.random.default_rng(10).normal(size=(X, N_Q, E))
    Q, K, V = project(
        *(a[n] for n in ("query_input", "source_input", "w_query", "w_key", "w_value"))
    )
    S = Q @ K.swapaxes(-1, -2) / np.sqrt(D_H)
    P = np.exp(S) / np.exp(S).sum(-1, keepdims=True)
    d_context = d_output[:, None] @ a["w_output"].swapaxes(-1, -2)
    by_context = head_importance((P @ V)[None], d_context[None]).importance
    np.testing.assert_allclose(
        by_context, gate_importance(_gate_gradients(a, d_output)), rtol=1e-10
    )


GRAIN = np.array([[1.0, -2.0], [3.0, -1.0]])  # Σ_d Att·dAtt by example and row


@pytest.mark.clause("HEADS-EQ2", "OWN-IMPORTANCE1")
@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        ("token", 1.75),  # (1 + 2 + 3 + 1) / 4
        ("example", 1.5),  # (|1 - 2| + |3 - 1|) / 2
        ("batch", 0.5),  # |1 - 2 + 3 - 1| / 2
    ],
)
def test_importance_by_hand(granularity, expected):
    heads = np.stack([GRAIN, 2 * GRAIN], axis=-1)[:, None, :, :].reshape(1, 2, 1, 2, 2)
    d_heads = np.array([1.0, 0.0]) * np.ones_like(heads)
    assert head_importance(heads, d_heads, granularity=granularity).importance == expected
    d_heads = np.array([1.0, 1.0]) * np.ones_like(heads)
    assert head_importance(heads, d_heads, granularity=granularity).importance == 3 * expected


def _pair(seed, shape=(2, 3, 5, 7, 2)):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=shape)


@pytest.mark.clause("OWN-IMPORTANCE1")
@given(st.integers(0, 1000))
def test_a_coarser_granularity_is_never_above_a_finer_one(seed):
    token, example, batch = (
        head_importance(*_pair(seed), granularity=g).importance
        for g in ("token", "example", "batch")
    )
    assert (7 * token >= example * (1 - 1e-12)).all()
    assert (example >= batch * (1 - 1e-12)).all()


@pytest.mark.clause("OWN-IMPORTANCE1")
def test_granularities_agree_where_there_is_nothing_to_cancel():
    one = _pair(0, (2, 1, 5, 1, 3))
    results = [head_importance(*one, granularity=g) for g in ("token", "example", "batch")]
    for result in results[1:]:
        np.testing.assert_array_equal(result.importance, results[0].importance)


@pytest.mark.clause("OWN-IMPORTANCE1")
def test_the_default_granularity_is_the_paper_s():
    default, example = head_importance(*_pair(1)), head_importance(*_pair(1), granularity="example")
    np.testing.assert_array_equal(default.importance, example.importance)
    token = head_importance(*_pair(1), granularity="token")
    assert abs(default.importance - token.importance).min() > 1e-3


@pytest.mark.clause("HEADS-S4a")
def test_each_layer_is_divided_by_its_own_norm():
    importance = np.array([[3.0, 4.0, 0.0], [5.0, 0.0, 12.0]])
    expected = [[0.6, 0.8, 0.0], [5 / 13, 0.0, 12 / 13]]
    np.testing.assert_allclose(normalize_by_layer(importance), expected, rtol=1e-15)
    norms = (head_importance(*_pair(2)).normalized ** 2).sum(axis=1)
    np.testing.assert_allclose(norms, 1.0, rtol=1e-14)


@pytest.mark.clause("HEADS-S4a", "OWN-IMPORTANCE1")
def test_a_layer_of_zeros_stays_zero():
    assert normalize_by_layer(np.array([[0.0, 0.0], [0.0, 2.0]])).tolist() == [[0, 0], [0, 1]]


@pytest.mark.clause("HEADS-S4a")
@pytest.mark.parametrize("size", [1e-30, 1e-42, 1e30])
def test_the_norm_holds_where_squares_leave_the_range(size):
    importance = np.array([[3.0, 4.0]], dtype=np.float32) * np.float32(size)
    np.testing.assert_allclose(normalize_by_layer(importance), [[0.6, 0.8]], rtol=1e-3)


@pytest.mark.clause("HEADS-S4a")
def test_what_is_no_number_stays_in_its_layer():
    normalized = normalize_by_layer(np.array([[1.0, np.nan], [3.0, 4.0]]))
    assert np.isnan(normalized[0]).all()
    np.testing.assert_allclose(normalized[1], [0.6, 0.8])


@pytest.mark.clause("HEADS-S4b", "OWN-IMPORTANCE1")
def test_the_order_runs_over_all_layers_and_breaks_ties_by_index():
    normalized = np.array([[0.5, 0.1, 0.5], [0.1, 0.9, 0.0]])
    assert importance_order(normalized).tolist() == [5, 1, 3, 0, 2, 4]


@pytest.mark.clause("HEADS-S4b")
def test_normalising_by_layer_changes_the_order():
    heads = np.array([[1.0, 2.0], [10.0, 30.0]]).reshape(2, 1, 2, 1, 1)
    result = head_importance(heads, np.ones_like(heads))
    assert result.importance.tolist() == [[1.0, 2.0], [10.0, 30.0]]
    assert result.order.tolist() == [2, 0, 1, 3]  # 0.316, 0.447, 0.894, 0.949
    assert result.order.dtype == np.int64


@pytest.mark.clause("HEADS-EQ2", "HEADS-S4b", "OWN-ROUND1")
def test_only_standard_functions_are_used():
    xp, pair = array_api_strict, _pair(3)
    for granularity in ("token", "example", "batch"):
        strict = head_importance(*(xp.asarray(a) for a in pair), granularity=granularity)
        plain = head_importance(*pair, granularity=granularity)
        for actual, expected in zip(strict, plain, strict=True):
            np.testing.assert_allclose(np.asarray(actual), expected, rtol=1e-14)
    a = {name: xp.asarray(array) for name, array in _arrays(11).items()}
    total = sum_of_heads(head_outputs(**a), head_gates=xp.ones(H))
    np.testing.assert_allclose(np.asarray(total), multihead_attention(**_arrays(11)), rtol=1e-10)
    single = (a["source_input"][0, ...], a["query_input"][0, 0, :])
    weights = [a[n][0, ...].T for n in ("w_query", "w_key", "w_value", "w_output")]
    assert single_head_attention(*single, *weights).shape == (E,)
    gates = gate_importance(xp.ones((1, 3, 2)))
    np.testing.assert_array_equal(np.asarray(gates), [[1.0, 1.0]])


@pytest.mark.clause("OWN-ROUND1", "HEADS-EQ1")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_inputs_are_widened_and_the_result_is_rounded_once(dtype):
    narrow = {n: a.astype(dtype) for n, a in _arrays(12).items()}
    wide = {n: a.astype(np.float32) for n, a in narrow.items()}
    outputs = head_outputs(**narrow)
    np.testing.assert_array_equal(outputs, head_outputs(**wide).astype(dtype))
    gates = np.array([1.0, 0.5, 0.0], dtype=dtype)
    total = sum_of_heads(outputs, head_gates=gates)
    expected = sum_of_heads(outputs.astype(np.float32), head_gates=gates.astype(np.float32))
    np.testing.assert_array_equal(total, expected.astype(dtype))
    pair = [a.astype(dtype) for a in _pair(13)]
    importance = head_importance(*pair)
    expected = head_importance(*(a.astype(np.float32) for a in pair))
    assert importance.importance.dtype == importance.normalized.dtype == dtype
    np.testing.assert_array_equal(importance.importance, expected.importance.astype(dtype))
    np.testing.assert_array_equal(importance.order, expected.order)


@pytest.mark.clause("OWN-ROUND1", "OWN-IMPORTANCE1")
def test_the_order_is_taken_before_rounding():
    # 1 + 2^-9 and 1 are one bfloat16; as computed, the second head is the less important
    heads = np.array([[1.0, 2.0**-9], [1.0, 0.0]]).reshape(1, 1, 2, 1, 2)
    narrow = heads.astype(ml_dtypes.bfloat16)
    result = head_importance(narrow, np.ones_like(narrow))
    assert result.importance[0, 0] == result.importance[0, 1]
    assert result.order.tolist() == [1, 0]


@pytest.mark.clause("HEADS-EQ2", "HEADS-S21", "HEADS-S23")
def test_arguments_that_do_not_fit_are_refused():
    a, pair = _arrays(), _pair(0)
    with pytest.raises(OptionError, match="granularity is 'word', but it must be one of token, ex"):
        head_importance(*pair, granularity="word")
    with pytest.raises(ShapeError, match="d_head_outputs has n=6, but head_outputs has n=7"):
        head_importance(pair[0], pair[1][:, :, :, :6])
    with pytest.raises(ShapeError, match="x is 0, but every size must be at least 1"):
        head_importance(pair[0][:, :0], pair[1][:, :0])
    with pytest.raises(DtypeError, match="d_head_outputs has dtype float32, but head_outputs has"):
        head_importance(pair[0], pair[1].astype(np.float32))
    with pytest.raises(ShapeError, match="importance has 1 axes"):
        normalize_by_layer(np.ones(3))
    with pytest.raises(ShapeError, match="head_gates has h=2, but outputs has h=3"):
        sum_of_heads(head_outputs(**a), head_gates=np.ones(2))
    with pytest.raises(ShapeError, match="w_key has d_k=3, but w_query has d_k=2"):
        head_outputs(**a | {"w_key": np.ones((H, E, 3))})
    with pytest.raises(ShapeError, match="query_input has d=2, but source_input has d=4"):
        single_head_attention(np.ones((5, 4)), np.ones(2), *[np.ones((4, 4))] * 4)
