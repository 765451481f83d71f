"""Multi-head attention: splitting, projections, concatenation, gates, gradients."""

from math import log

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from directional import check_gradients
from refattn.attention import scaled_dot_product_attention
from refattn.checks import DtypeError, OptionError, ShapeError
from refattn.multihead import multihead_attention
from refattn.multihead_backward import multihead_attention_backward
from refattn.projections import (
    merge_heads,
    pack_output,
    pack_projection,
    split_heads,
    unpack_output,
    unpack_projection,
)

B, N_Q, N_K, E_Q, E_S, H, D_K, D_V, E_O = 2, 3, 5, 7, 11, 3, 2, 5, 13
SHAPES = {
    "query_input": (B, N_Q, E_Q),
    "source_input": (B, N_K, E_S),
    "w_query": (H, E_Q, D_K),
    "w_key": (H, E_S, D_K),
    "w_value": (H, E_S, D_V),
    "w_output": (H, D_V, E_O),
}


def _arrays(seed=0, **extra):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) / 2 for name, shape in (SHAPES | extra).items()}


def _softmax(S):
    e = np.exp(S - S.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _loop(query_input, source_input, w_query, w_key, w_value, w_output, head_gates=None):
    """The equation, one batch item and one head after the other."""
    items = []
    for X, Y in zip(query_input, source_input, strict=True):
        heads = []
        for h in range(H):
            S = (X @ w_query[h]) @ (Y @ w_key[h]).T / np.sqrt(D_K)
            gate = 1.0 if head_gates is None else head_gates[h]
            heads.append(gate * (_softmax(S) @ (Y @ w_value[h])))
        W_O = np.concatenate(list(w_output), axis=0)
        items.append(np.concatenate(heads, axis=1) @ W_O)
    return np.stack(items)


@pytest.mark.clause("VAS-S322b")
def test_head_h_owns_a_block_of_features():
    x = np.arange(12.0).reshape(1, 2, 6)
    split = split_heads(x, 3)
    assert split.shape == (1, 3, 2, 2)
    assert split[0, 0].tolist() == [[0, 1], [6, 7]]
    assert split[0, 2].tolist() == [[4, 5], [10, 11]]
    assert (split != x.reshape(1, 3, 2, 2)).any()  # a reshape alone mixes rows with heads


@pytest.mark.clause("VAS-S322b", "VAS-S322a")
@given(st.integers(0, 3), st.integers(0, 5), st.integers(1, 4), st.integers(0, 5))
def test_merging_undoes_splitting(b, n, heads, d):
    x = np.arange(float(b * n * heads * d)).reshape(b, n, heads * d)
    split = split_heads(x, heads)
    assert split.shape == (b, heads, n, d)
    np.testing.assert_array_equal(merge_heads(split), x)
    np.testing.assert_array_equal(split_heads(merge_heads(split), heads), split)


@pytest.mark.clause("VAS-S322b")
def test_one_packed_matrix_projects_all_heads():
    arrays = _arrays()
    X, W = arrays["query_input"], arrays["w_query"]
    packed = pack_projection(W)
    assert packed.shape == (E_Q, H * D_K)
    assert packed[1].tolist() == [*W[0, 1], *W[1, 1], *W[2, 1]]
    np.testing.assert_allclose(split_heads(X @ packed, H), X[:, None] @ W, rtol=1e-13)
    np.testing.assert_array_equal(unpack_projection(packed, H), W)


@pytest.mark.clause("VAS-S322a", "HEADS-EQ1")
def test_the_packed_output_projection_is_the_stack_of_the_heads():
    W = _arrays()["w_output"]
    packed = pack_output(W)
    np.testing.assert_array_equal(packed, np.concatenate(list(W), axis=0))
    np.testing.assert_array_equal(unpack_output(packed, H), W)


@pytest.mark.clause("VAS-S322b", "OWN-BACKWARD1")
def test_the_gradient_of_splitting_is_merging():
    rng = np.random.default_rng(1)
    x, d_split = rng.normal(size=(B, N_Q, H * D_K)), rng.normal(size=(B, H, N_Q, D_K))
    check_gradients(
        lambda a: float((split_heads(a["x"], H) * d_split).sum()),
        {"x": x},
        {"x": merge_heads(d_split)},
    )


@pytest.mark.clause("VAS-S322a")
def test_two_heads_by_hand():
    # head 1: query 1, keys ln 3 and 0, so weights 3/4 and 1/4; head 2: query 0, weights 1/2
    inputs = {
        "query_input": [[[1.0, 0.0]]],
        "source_input": [[[log(3.0), 4.0, 100.0], [0.0, 8.0, 300.0]]],
        "w_query": [[[1.0], [0.0]], [[0.0], [1.0]]],
        "w_key": [[[1.0], [0.0], [0.0]]] * 2,
        "w_value": [[[0.0], [1.0], [0.0]], [[0.0], [0.0], [1.0]]],
        "w_output": [[[2.0, 0.0]], [[1.0, -1.0]]],
    }
    arrays = {name: np.array(values) for name, values in inputs.items()}
    # heads: 3/4·4 + 1/4·8 = 5 and (100 + 300)/2 = 200; output: (2·5 + 200, -200)
    np.testing.assert_allclose(multihead_attention(**arrays), [[[210.0, -200.0]]], rtol=1e-15)
    gated = multihead_attention(**arrays, head_gates=np.array([1.0, 0.0]))
    np.testing.assert_allclose(gated, [[[10.0, 0.0]]], rtol=1e-15)


@pytest.mark.clause("VAS-S322a", "VAS-S323a", "HEADS-S23")
@pytest.mark.parametrize("gated", [False, True])
def test_a_loop_over_heads_gives_the_same(gated):
    arrays = _arrays(2, head_gates=(H,)) if gated else _arrays(2)
    np.testing.assert_allclose(multihead_attention(**arrays), _loop(**arrays), rtol=1e-11)


@pytest.mark.clause("VAS-S322a", "VAS-EQ1")
def test_one_head_with_unit_projections_is_attention():
    rng = np.random.default_rng(3)
    X, Y = rng.normal(size=(B, N_Q, 5)), rng.normal(size=(B, N_K, 5))
    unit = np.eye(5)[None]
    np.testing.assert_allclose(
        multihead_attention(X, Y, unit, unit, unit, unit),
        scaled_dot_product_attention(X, Y, Y),
        rtol=1e-13,
    )


@pytest.mark.clause("VAS-S322a")
def test_the_order_of_the_heads_does_not_matter():
    arrays = _arrays(4)
    turned = {n: a[[2, 0, 1]] if n.startswith("w_") else a for n, a in arrays.items()}
    np.testing.assert_allclose(
        multihead_attention(**turned), multihead_attention(**arrays), rtol=1e-12
    )


@pytest.mark.clause("VAS-S323a")
def test_cross_attention_does_not_depend_on_the_order_of_the_source():
    arrays = _arrays(5)
    shuffled = arrays | {"source_input": arrays["source_input"][:, [3, 1, 4, 0, 2]]}
    np.testing.assert_allclose(
        multihead_attention(**shuffled), multihead_attention(**arrays), rtol=1e-11
    )


@pytest.mark.clause("VAS-S323a")
def test_each_batch_item_attends_to_its_own_source():
    arrays = _arrays(6)
    alone = {n: a if n.startswith("w_") else a[1:] for n, a in arrays.items()}
    whole = multihead_attention(**arrays)
    np.testing.assert_allclose(multihead_attention(**alone), whole[1:], rtol=1e-13)


def _self_attention(seed=7, n=5):
    arrays = _arrays(seed, query_input=(B, n, E_S), w_query=(H, E_S, D_K))
    return arrays | {"source_input": arrays["query_input"]}


@pytest.mark.clause("VAS-S323b")
def test_in_the_decoder_later_positions_change_nothing_earlier():
    arrays = _self_attention()
    before = multihead_attention(**arrays, causal=True)
    x = arrays["query_input"].copy()
    x[:, 3:] += 1.0
    after = multihead_attention(**arrays | {"query_input": x, "source_input": x}, causal=True)
    np.testing.assert_allclose(after[:, :3], before[:, :3], rtol=1e-12)
    assert abs(after[:, 3:] - before[:, 3:]).min() > 1e-4


@pytest.mark.clause("VAS-S323b")
def test_the_first_position_of_the_decoder_returns_its_own_value():
    arrays = _self_attention(8)
    first = multihead_attention(**arrays, causal=True)[:, 0]
    values = np.einsum("be,hev,hvo->bo", arrays["source_input"][:, 0], *_value_output(arrays))
    np.testing.assert_allclose(first, values, rtol=1e-11)


def _value_output(arrays):
    return arrays["w_value"], arrays["w_output"]


@pytest.mark.clause("VAS-S323b", "OWN-CAUSAL1", "OWN-EMPTY1")
def test_alignment_and_empty_rows_reach_the_heads():
    arrays = _arrays(9, source_input=(B, 2, E_S))  # 3 queries, 2 keys
    lower = {"causal": True, "alignment": "bottom_right"}
    assert (multihead_attention(**arrays, **lower)[:, 0] == 0).all()
    assert np.isnan(multihead_attention(**arrays, **lower, empty_row="nan")[:, 0]).all()
    plain = multihead_attention(**arrays)
    np.testing.assert_allclose(
        multihead_attention(**arrays, **lower)[:, 2], plain[:, 2], rtol=1e-13
    )
    assert abs(multihead_attention(**arrays, causal=True)[:, 0]).min() > 0


@pytest.mark.clause("VAS-S322a", "VAS-S323a", "VAS-S323b", "HEADS-S23", "OWN-BACKWARD1")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.75},
        {"causal": True},
        {"causal": True, "alignment": "bottom_right"},
        {"causal": True, "alignment": -1, "empty_row": "uniform"},
    ],
    ids=str,
)
def test_all_gradients_match_central_differences(options):
    arrays = _arrays(10, head_gates=(H,))
    d_output = np.random.default_rng(11).normal(size=(B, N_Q, E_O))
    gradients = multihead_attention_backward(d_output, **arrays, **options)._asdict()
    check_gradients(
        lambda a: float((multihead_attention(**a, **options) * d_output).sum()),
        arrays,
        {name.removeprefix("d_"): g for name, g in gradients.items()},
    )


@pytest.mark.clause("VAS-S323a", "OWN-BACKWARD1")
def test_self_attention_receives_the_sum_of_both_gradients():
    arrays = _self_attention(12)
    weights = {n: a for n, a in arrays.items() if n.startswith("w_")}
    d_output = np.random.default_rng(13).normal(size=(B, 5, E_O))
    both = multihead_attention_backward(d_output, **arrays, causal=True)
    assert both.d_head_gates is None

    def loss(a):
        return float((multihead_attention(a["x"], a["x"], **weights, causal=True) * d_output).sum())

    gradient = both.d_query_input + both.d_source_input
    check_gradients(loss, {"x": arrays["query_input"]}, {"x": gradient})


@pytest.mark.clause("HEADS-S23")
def test_a_gate_of_zero_stops_every_gradient_of_its_head_but_the_gate_s():
    arrays = _arrays(14) | {"head_gates": np.array([1.0, 0.0, 1.0])}
    d_output = np.random.default_rng(15).normal(size=(B, N_Q, E_O))
    gradients = multihead_attention_backward(d_output, **arrays)
    for name in ("d_w_query", "d_w_key", "d_w_value", "d_w_output"):
        assert (getattr(gradients, name)[1] == 0).all()
        assert (getattr(gradients, name)[[0, 2]] != 0).all()
    assert abs(gradients.d_head_gates[1]) > 1e-3


@pytest.mark.clause("OWN-ROUND1", "VAS-S322a")
def test_only_standard_functions_are_used():
    arrays = _arrays(16, head_gates=(H,))
    strict = {name: array_api_strict.asarray(a) for name, a in arrays.items()}
    options = {"causal": True, "alignment": "bottom_right"}
    output = multihead_attention(**strict, **options)
    expected = multihead_attention(**arrays, **options)
    np.testing.assert_allclose(np.asarray(output), expected, rtol=1e-14)
    gradients = multihead_attention_backward(output, **strict, **options)
    plain = multihead_attention_backward(np.asarray(output), **arrays, **options)
    for actual, wanted in zip(gradients, plain, strict=True):
        np.testing.assert_allclose(np.asarray(actual), wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.clause("OWN-ROUND1", "VAS-S322a")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_inputs_are_widened_and_the_result_is_rounded_once(dtype):
    narrow = {n: a.astype(dtype) for n, a in _arrays(17, head_gates=(H,)).items()}
    wide = {n: a.astype(np.float32) for n, a in narrow.items()}
    output = multihead_attention(**narrow)
    assert output.dtype == dtype
    np.testing.assert_array_equal(output, multihead_attention(**wide).astype(dtype))
    d_output = np.ones_like(output)
    gradients = multihead_attention_backward(d_output, **narrow)
    expected = multihead_attention_backward(d_output.astype(np.float32), **wide)
    for actual, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted.astype(dtype))


@pytest.mark.clause("OWN-ROUND1", "VAS-S322a")
def test_a_value_beyond_float16_may_stand_between_the_projections():
    # V = 256·512 = 131072 is above float16's largest 65504; W^O brings it back to 32
    one = np.ones((1, 1, 1), dtype=np.float16)
    output = multihead_attention(one, 256 * one, one, one, 512 * one, one / 4096)
    assert output.dtype == np.float16
    assert output.tolist() == [[[32.0]]]


@pytest.mark.clause("VAS-S322a")
def test_arguments_that_do_not_fit_are_refused():
    arrays = _arrays()
    cases = {
        "w_key has d_k=3, but w_query has d_k=2": {"w_key": np.ones((H, E_S, 3))},
        "w_value has h=2, but w_query has h=3": {"w_value": np.ones((2, E_S, D_V))},
        "w_key has e_s=7, but source_input has e_s=11": {"w_key": np.ones((H, E_Q, D_K))},
        "source_input has b=1, but query_input has b=2": {"source_input": np.ones((1, N_K, E_S))},
        "w_output has d_v=7, but w_value has d_v=5": {"w_output": np.ones((H, 7, E_O))},
        "head_gates has h=2, but w_query has h=3": {"head_gates": np.ones(2)},
        "query_input has 2 axes": {"query_input": np.ones((N_Q, E_Q))},
    }
    for sentence, changed in cases.items():
        with pytest.raises(ShapeError, match=sentence):
            multihead_attention(**arrays | changed)
    with pytest.raises(
        DtypeError, match="w_key has dtype float32, but query_input has dtype float64"
    ):
        multihead_attention(**arrays | {"w_key": arrays["w_key"].astype(np.float32)})
    with pytest.raises(OptionError, match="alignment is 'left'"):
        multihead_attention(**arrays, alignment="left")
    with pytest.raises(OptionError, match="scale is inf, but it must be finite"):
        multihead_attention(**arrays, scale=float("inf"))
    with pytest.raises(ShapeError, match="d_output has n_q=2, but query_input has n_q=3"):
        multihead_attention_backward(np.ones((B, 2, E_O)), **arrays)


@pytest.mark.clause("VAS-S322b")
def test_features_that_heads_do_not_divide_are_refused():
    with pytest.raises(ShapeError, match="x has 7 features, but heads is 3; the first must"):
        split_heads(np.ones((2, 7)), 3)
    with pytest.raises(ShapeError, match="weight has 7 features, but heads is 2"):
        unpack_projection(np.ones((5, 7)), 2)
    with pytest.raises(OptionError, match="heads is 0, but it must be an integer of at least 1"):
        unpack_output(np.ones((5, 7)), 0)
    with pytest.raises(ShapeError, match=r"x has 2 axes, .* \[merge_heads: x \(2, 7\)\]$"):
        merge_heads(np.ones((2, 7)))
