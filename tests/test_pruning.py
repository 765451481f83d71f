"""Pruning heads: order, number, gates, and structural removal."""

from fractions import Fraction

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn.checks import DtypeError, OptionError, ShapeError
from refattn.multihead import multihead_attention
from refattn.projections import pack_output, pack_projection
from refattn.pruning import prune_count, prune_heads, pruned_gates, pruning_order

NORMALIZED = np.array([[0.5, 0.1, 0.7], [0.2, 0.9, 0.0]])


@pytest.mark.clause("HEADS-S4b")
def test_the_least_important_head_of_all_layers_goes_first():
    assert pruning_order(NORMALIZED).tolist() == [5, 1, 3, 0, 2, 4]


@pytest.mark.clause("HEADS-S4b", "OWN-IMPORTANCE1")
@pytest.mark.parametrize(
    ("at_least", "order"), [(0, [5, 1, 3, 0, 2, 4]), (1, [5, 1, 3, 0]), (2, [5, 1]), (3, [])]
)
def test_every_layer_keeps_its_most_important_heads(at_least, order):
    assert pruning_order(NORMALIZED, at_least=at_least).tolist() == order


@pytest.mark.clause("OWN-IMPORTANCE1")
def test_of_equal_heads_the_last_is_protected():
    assert pruning_order(np.full((2, 3), 0.5), at_least=1).tolist() == [0, 1, 3, 4]


@pytest.mark.clause("HEADS-S4b", "OWN-IMPORTANCE1")
@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 99))
def test_the_order_is_ascending_and_leaves_each_layer_its_share(layers, heads, seed):
    rng = np.random.default_rng(seed)
    normalized = rng.integers(0, 4, size=(layers, heads)) / 4
    at_least = int(rng.integers(0, heads + 1))
    order = pruning_order(normalized, at_least=at_least)
    values = normalized.reshape(-1)[order]
    assert (np.diff(values) >= 0).all()
    assert len(set(order.tolist())) == layers * (heads - at_least)
    kept = np.delete(np.arange(layers * heads), order)
    assert (np.bincount(kept // heads, minlength=layers) == at_least).all()
    for layer in range(layers):
        gone = normalized[layer, order[order // heads == layer] % heads]
        left = normalized[layer, kept[kept // heads == layer] % heads]
        assert not len(gone) or not len(left) or gone.max() <= left.min()


@pytest.mark.clause("OWN-IMPORTANCE1")
@pytest.mark.parametrize(
    ("heads", "fraction", "floor", "ceil"),
    [
        (144, 0.4, 57, 58),
        (96, 0.2, 19, 20),
        (10, 0.3, 3, 3),  # the binary 0.3 is a little less
        (100, 0.29, 29, 29),  # 100 * 0.29 is 28.999999999999996
        (100, 0.07, 7, 7),  # 100 * 0.07 is 7.000000000000001
        (10, Fraction(1, 3), 3, 4),
        (7, 0, 0, 0),
        (7, 1, 7, 7),
        (0, 0.5, 0, 0),
    ],
)
def test_how_many_heads_a_share_is(heads, fraction, floor, ceil):
    assert prune_count(heads, fraction) == floor
    assert prune_count(heads, fraction, count_rule="ceil") == ceil


@pytest.mark.clause("HEADS-S23", "HEADS-S4b", "OWN-IMPORTANCE1")
def test_gates_mask_the_first_heads_of_the_order():
    gates = pruned_gates(NORMALIZED, fraction=0.4)  # 2.4 heads
    assert gates.tolist() == [[1, 0, 1], [1, 1, 0]]
    gates = pruned_gates(NORMALIZED, fraction=0.4, count_rule="ceil")
    assert gates.tolist() == [[1, 0, 1], [0, 1, 0]]
    gates = pruned_gates(NORMALIZED, fraction=1.0, at_least=1)
    assert gates.tolist() == [[0, 0, 1], [0, 1, 0]]
    assert pruned_gates(NORMALIZED, fraction=1.0).tolist() == [[0, 0, 0], [0, 0, 0]]


B, N_Q, N_K, E_Q, E_S, H, D_K, D_V, E_O = 2, 3, 5, 7, 11, 5, 2, 3, 13
SHAPES = {
    "w_query": (H, E_Q, D_K),
    "w_key": (H, E_S, D_K),
    "w_value": (H, E_S, D_V),
    "w_output": (H, D_V, E_O),
}


def _weights(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) / 2 for name, shape in SHAPES.items()}


@pytest.mark.clause("HEADS-S4c", "HEADS-S23")
@pytest.mark.parametrize("heads", [[], [0], [4, 1], [3, 0, 2, 4]])
def test_pruned_projections_give_the_output_of_zero_gates(heads):
    rng, weights = np.random.default_rng(1), _weights()
    X, Y = rng.normal(size=(B, N_Q, E_Q)), rng.normal(size=(B, N_K, E_S))
    gates = np.array([float(h not in heads) for h in range(H)])
    masked = multihead_attention(X, Y, **weights, head_gates=gates)
    pruned = prune_heads(**weights, heads=heads)
    assert pruned.w_query.shape[0] == H - len(heads)
    np.testing.assert_allclose(multihead_attention(X, Y, *pruned), masked, rtol=1e-10, atol=1e-14)


@pytest.mark.clause("HEADS-S4c", "VAS-S322b")
def test_packed_matrices_lose_columns_and_the_output_projection_loses_rows():
    weights = _weights(2)
    pruned = prune_heads(**weights, heads=[1, 3])
    gone_k, gone_v = [2, 3, 6, 7], [3, 4, 5, 9, 10, 11]
    packed = {name: pack_projection(w) for name, w in weights.items() if name != "w_output"}
    for name in ("w_query", "w_key"):
        expected = np.delete(packed[name], gone_k, axis=1)
        np.testing.assert_array_equal(pack_projection(getattr(pruned, name)), expected)
    expected = np.delete(packed["w_value"], gone_v, axis=1)
    np.testing.assert_array_equal(pack_projection(pruned.w_value), expected)
    expected = np.delete(pack_output(weights["w_output"]), gone_v, axis=0)
    np.testing.assert_array_equal(pack_output(pruned.w_output), expected)


@pytest.mark.clause("HEADS-S4c")
def test_what_is_pruned_is_never_read():
    weights = {name: w.copy() for name, w in _weights(3).items()}
    for w in weights.values():
        w[2] = np.nan
    assert all(np.isfinite(w).all() for w in prune_heads(**weights, heads=[2]))


@pytest.mark.clause("HEADS-S4b", "HEADS-S4c")
def test_only_standard_functions_are_used():
    xp = array_api_strict
    order = pruning_order(xp.asarray(NORMALIZED), at_least=1)
    assert np.asarray(order).tolist() == [5, 1, 3, 0]
    gates = pruned_gates(xp.asarray(NORMALIZED), fraction=0.4)
    assert np.asarray(gates).tolist() == [[1, 0, 1], [1, 1, 0]]
    strict = {name: xp.asarray(w) for name, w in _weights().items()}
    for actual, expected in zip(
        prune_heads(**strict, heads=[1]), prune_heads(**_weights(), heads=[1]), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(actual), expected)


@pytest.mark.clause("OWN-ROUND1", "HEADS-S23")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_gates_have_the_dtype_of_the_importances(dtype):
    gates = pruned_gates(NORMALIZED.astype(dtype), fraction=0.5)
    assert gates.dtype == dtype
    assert gates.astype(float).tolist() == [[1, 0, 1], [0, 1, 0]]


@pytest.mark.clause("HEADS-S4b", "HEADS-S4c")
def test_arguments_that_do_not_fit_are_refused():
    weights = _weights()
    with pytest.raises(OptionError, match="at_least is 4, but a layer has 3 heads; it must lie"):
        pruning_order(NORMALIZED, at_least=4)
    with pytest.raises(ShapeError, match="normalized has 1 axes"):
        pruning_order(NORMALIZED[0])
    with pytest.raises(DtypeError, match="normalized has dtype int64"):
        pruning_order(np.ones((2, 3), dtype=np.int64))
    with pytest.raises(OptionError, match=r"fraction is 1\.5, but it must lie between 0 and 1"):
        prune_count(7, 1.5)
    with pytest.raises(OptionError, match="fraction is nan"):
        prune_count(7, float("nan"))
    with pytest.raises(OptionError, match="heads is -1, but it must be an integer of at least 0"):
        prune_count(-1, 0.5)
    with pytest.raises(OptionError, match="count_rule is 'round', but it must be one of floor"):
        prune_count(7, 0.5, count_rule="round")
    for heads in ([5], [-1], [1, 1]):
        with pytest.raises(OptionError, match="but there are 5 heads; each index must lie"):
            prune_heads(**weights, heads=heads)
    with pytest.raises(OptionError, match="heads names all 5 heads, but one must remain"):
        prune_heads(**weights, heads=range(5))
    with pytest.raises(ShapeError, match="w_value has h=2, but w_query has h=5"):
        prune_heads(**weights | {"w_value": np.ones((2, E_S, D_V))}, heads=[0])
