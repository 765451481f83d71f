from __future__ import annotations

import math
from functools import reduce
from itertools import pairwise

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from direct_attention import assert_logsumexp, assert_output, assert_statistics, direct
from refattn.checks import DtypeError, ShapeError
from refattn.flash import FlashResult, flash_attention_forward
from refattn.merge import PartState, merge, merge_states

N_Q, N_K, D, D_V = 7, 19, 5, 3


def draw(seed: int, n_q=N_Q, n_k=N_K):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((n_q, D)),
        rng.standard_normal((n_k, D)),
        rng.standard_normal((n_k, D_V)),
    )


def parts_of(query, key, value, cuts, mask=None):
    """Return attention over the keys between neighbouring cuts, an empty range included."""
    edges = [0, *sorted(cuts), len(key)]
    mask = np.ones((len(query), len(key)), bool) if mask is None else mask
    return [
        flash_attention_forward(
            query,
            key[a:b],
            value[a:b],
            block_rows=5,
            block_cols=4,
            scale=1.0,
            mask=mask[:, a:b],
        )
        if a < b
        else no_part(query, value)
        for a, b in pairwise(edges)
    ]


def no_part(query, value):
    """Return what attention over no key comes to: O = 0, m = -∞, l = 0, L = -∞."""
    rows, nothing = len(query), -np.inf
    return FlashResult(
        np.zeros((rows, value.shape[-1])),
        np.full(rows, nothing),
        np.zeros(rows),
        np.full(rows, nothing),
    )


def state(part) -> PartState:
    return PartState(part.row_max, part.row_sum, part.output)


def stacked(parts):
    return np.stack([p.output for p in parts]), np.stack([p.logsumexp for p in parts])


cuts = st.lists(st.integers(0, N_K), max_size=6)


# ---- (output, logsumexp)


@pytest.mark.clause("OWN-MERGE1")
def test_parts_by_hand():
    outputs = np.asarray([[[4.0, 0.0]], [[8.0, -4.0]]])
    logsumexps = np.asarray([[0.0], [math.log(3.0)]])
    result = merge(outputs, logsumexps)
    np.testing.assert_allclose(result.output, [[7.0, -3.0]], rtol=1e-15)
    np.testing.assert_allclose(result.logsumexp, [math.log(4.0)], rtol=1e-15)


@pytest.mark.clause("OWN-MERGE1", "FA1-S31")
@settings(deadline=None)
@given(cuts=cuts, seed=st.integers(0, 999), density=st.sampled_from([0.15, 0.6, 1.0]))
def test_any_cut_of_the_keys_gives_attention_over_all_of_them(cuts, seed, density):
    query, key, value = draw(seed)
    mask = np.random.default_rng(seed).random((N_Q, N_K)) < density
    result = merge(*stacked(parts_of(query, key, value, cuts, mask)))
    expected = direct(query, key, value, allowed=mask, tiles=N_K)
    assert_output(result.output, expected)
    assert_logsumexp(result.logsumexp, expected)


@pytest.mark.clause("OWN-MERGE1", "OWN-POISON1", "OWN-EMPTY1")
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_an_empty_part_is_ignored_whatever_its_output_holds(poison):
    query, key, value = draw(1)
    outputs, logsumexps = stacked(parts_of(query, key, value, [5, 11]))
    outputs[1, 3] = outputs[0, 6] = 0.0
    logsumexps[1, 3] = logsumexps[0, 6] = -np.inf
    clean = merge(outputs, logsumexps)
    outputs[1, 3] = outputs[0, 6] = poison
    result = merge(outputs, logsumexps)
    np.testing.assert_array_equal(result.output, clean.output)
    np.testing.assert_array_equal(result.logsumexp, clean.logsumexp)
    without = merge(outputs[[0, 2]], logsumexps[[0, 2]])
    np.testing.assert_array_equal(result.output[3], without.output[3])


@pytest.mark.clause("OWN-MERGE1", "OWN-EMPTY1")
def test_a_row_that_is_empty_in_every_part_is_zero():
    outputs = np.full((3, 2, D_V), np.nan)
    outputs[1, 0] = 5.0
    logsumexps = np.asarray([[-np.inf, -np.inf], [-2.0, -np.inf], [-np.inf, -np.inf]])
    result = merge(outputs, logsumexps)
    np.testing.assert_array_equal(result.output, [[5.0] * D_V, [0.0] * D_V])
    np.testing.assert_array_equal(result.logsumexp, [-2.0, -np.inf])


@pytest.mark.clause("OWN-MERGE1")
def test_one_part_is_returned_to_the_bit():
    query, key, value = draw(2)
    outputs, logsumexps = stacked(parts_of(query, key, value, []))
    result = merge(outputs, logsumexps)
    np.testing.assert_array_equal(result.output, outputs[0])
    np.testing.assert_array_equal(result.logsumexp, logsumexps[0])


@pytest.mark.clause("OWN-MERGE1")
@pytest.mark.parametrize("level", [-84000.0, -1e4, 1e4])
def test_logsumexps_far_from_zero_neither_overflow_nor_vanish(level):
    outputs = np.asarray([[[4.0]], [[8.0]]])
    result = merge(outputs, np.asarray([[level], [level + 1.0]]))
    share = 1 / (1 + math.e)
    np.testing.assert_allclose(result.output, [[4 * share + 8 * (1 - share)]], rtol=1e-15)
    np.testing.assert_allclose(result.logsumexp, [level + math.log(1 + math.e)], rtol=1e-15)


@pytest.mark.clause("OWN-MERGE1")
@settings(deadline=None)
@given(order=st.permutations(range(4)), split=st.integers(1, 3))
def test_order_and_tree_of_the_parts_do_not_matter(order, split):
    query, key, value = draw(3)
    outputs, logsumexps = stacked(parts_of(query, key, value, [2, 9, 10]))
    outputs, logsumexps = outputs[list(order)], logsumexps[list(order)]
    left = merge(outputs[:split], logsumexps[:split])
    right = merge(outputs[split:], logsumexps[split:])
    tree = merge(np.stack([left.output, right.output]), np.stack([left.logsumexp, right.logsumexp]))
    expected = direct(query, key, value, tiles=N_K)
    assert_output(tree.output, expected)
    assert_logsumexp(tree.logsumexp, expected)


# ---- (m, l, O)


@pytest.mark.clause("FA1-S31", "OWN-MERGE1")
def test_the_softmax_of_a_concatenation_by_hand():
    # x = [0, ln 2 | ln 4, 0]: m = ln 4, f = [1/4, 1/2, 1, 1/4], l = 2
    first = PartState(np.log([2.0]), np.asarray([1.5]), np.asarray([[1 / 3, 2 / 3, 0.0, 0.0]]))
    second = PartState(np.log([4.0]), np.asarray([1.25]), np.asarray([[0.0, 0.0, 0.8, 0.2]]))
    result = merge_states(first, second)
    np.testing.assert_array_equal(result.row_max, np.log([4.0]))
    np.testing.assert_allclose(result.row_sum, [2.0], rtol=1e-15)
    np.testing.assert_allclose(result.output, [[0.125, 0.25, 0.5, 0.125]], rtol=1e-14)


@pytest.mark.clause("FA1-S31", "OWN-MERGE1")
@settings(deadline=None)
@given(cuts=cuts, seed=st.integers(0, 999), rnd=st.randoms(use_true_random=False))
def test_states_merge_in_any_tree_to_the_state_of_all_keys(cuts, seed, rnd):
    query, key, value = draw(seed)
    mask = np.random.default_rng(seed).random((N_Q, N_K)) < 0.3
    states = [state(p) for p in parts_of(query, key, value, cuts, mask)]
    while len(states) > 1:  # any two, in any order
        first = states.pop(rnd.randrange(len(states)))
        second = states.pop(rnd.randrange(len(states)))
        states.append(merge_states(first, second))
    expected = direct(query, key, value, allowed=mask, tiles=N_K)
    assert_statistics(states[0].row_max, states[0].row_sum, expected)
    assert_output(states[0].output, expected)


@pytest.mark.clause("OWN-MERGE1", "OWN-POISON1", "OWN-EMPTY1")
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_an_empty_state_changes_nothing_whatever_it_holds(poison):
    query, key, value = draw(4)
    full = state(parts_of(query, key, value, [])[0])
    empty = PartState(np.full(N_Q, -np.inf), np.full(N_Q, poison), np.full((N_Q, D_V), poison))
    for result in (merge_states(full, empty), merge_states(empty, full)):
        np.testing.assert_array_equal(result.row_max, full.row_max)
        np.testing.assert_array_equal(result.row_sum, full.row_sum)
        np.testing.assert_allclose(result.output, full.output, rtol=4e-16)
    nothing = merge_states(empty, empty)
    np.testing.assert_array_equal(nothing.row_max, np.full(N_Q, -np.inf))
    np.testing.assert_array_equal(nothing.row_sum, np.zeros(N_Q))
    np.testing.assert_array_equal(nothing.output, np.zeros((N_Q, D_V)))


@pytest.mark.clause("OWN-MERGE1")
def test_both_forms_of_a_part_merge_to_the_same():
    query, key, value = draw(5)
    parts = parts_of(query, key, value, [4, 13])
    by_states = reduce(merge_states, [state(p) for p in parts])
    by_logsumexp = merge(*stacked(parts))
    np.testing.assert_allclose(by_states.output, by_logsumexp.output, rtol=1e-13, atol=1e-14)
    logsumexp = by_states.row_max + np.log(by_states.row_sum)
    np.testing.assert_allclose(logsumexp, by_logsumexp.logsumexp, rtol=1e-14)


# ---- dtypes, libraries, errors


@pytest.mark.clause("OWN-MERGE1", "OWN-ROUND1")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bits_are_merged_in_float32_and_rounded_once(dtype):
    query, key, value = (x.astype(dtype) for x in draw(6))
    parts = parts_of(query, key, value, [4, 13])
    outputs, logsumexps = stacked(parts)
    assert (outputs.dtype, logsumexps.dtype) == (dtype, np.float32)
    result = merge(outputs, logsumexps)
    wide = merge(outputs.astype(np.float32), logsumexps)
    assert (result.output.dtype, result.logsumexp.dtype) == (dtype, np.float32)
    np.testing.assert_array_equal(result.output, wide.output.astype(dtype))
    narrow = merge(outputs, logsumexps.astype(dtype))
    assert narrow.logsumexp.dtype == np.float32
    pair = merge_states(state(parts[0]), state(parts[1]))
    assert (pair.output.dtype, pair.row_max.dtype) == (dtype, np.float32)


@pytest.mark.clause("OWN-MERGE1")
def test_leading_axes_are_independent():
    rng = np.random.default_rng(7)
    outputs, logsumexps = (
        rng.standard_normal((3, 2, 5, N_Q, D_V)),
        rng.standard_normal((3, 2, 5, N_Q)),
    )
    result = merge(outputs, logsumexps)
    assert result.output.shape == (2, 5, N_Q, D_V) and result.logsumexp.shape == (2, 5, N_Q)
    item = merge(outputs[:, 1, 4], logsumexps[:, 1, 4])
    np.testing.assert_array_equal(result.output[1, 4], item.output)


@pytest.mark.clause("OWN-MERGE1", "FA1-S31")
def test_only_standard_array_functions_are_used():
    query, key, value = draw(8)
    parts = parts_of(query, key, value, [4, 4, 13])
    outputs, logsumexps = stacked(parts)
    strict = [array_api_strict.asarray(x) for x in (outputs, logsumexps)]
    for a, b in zip(merge(outputs, logsumexps), merge(*strict), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))
    one, two = state(parts[0]), state(parts[1])
    theirs = merge_states(*(PartState(*map(array_api_strict.asarray, s)) for s in (one, two)))
    for a, b in zip(merge_states(one, two), theirs, strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))


@pytest.mark.clause("OWN-MERGE1")
@pytest.mark.parametrize(
    ("outputs", "logsumexps", "error", "sentence"),
    [
        (np.ones((2, 3, 4)), np.ones((2, 5)), ShapeError, "logsumexps has n=5, but outputs has n="),
        (np.ones((2, 3, 4)), np.ones((3, 3)), ShapeError, "logsumexps has leading axes (3,)"),
        (np.ones((0, 3, 4)), np.ones((0, 3)), ShapeError, "at least one part"),
        (np.ones((3, 4)), np.ones(3), ShapeError, "at least one part"),
        (np.ones((2, 3, 4), int), np.ones((2, 3)), DtypeError, "outputs has dtype int64"),
        (
            np.ones((2, 3, 4)),
            np.ones((2, 3), np.float32),
            DtypeError,
            "logsumexps has dtype float32",
        ),
    ],
)
def test_bad_parts_are_refused_in_one_sentence(outputs, logsumexps, error, sentence):
    with pytest.raises(error) as caught:
        merge(outputs, logsumexps)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.clause("OWN-MERGE1")
@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"row_max": np.ones(6)}, ShapeError, "second.row_max has n=6, but first.row_max has n=7"),
        ({"row_sum": np.ones(7, np.float32)}, DtypeError, "second.row_sum has dtype float32"),
        ({"output": np.ones((2, 7, 3))}, ShapeError, "second.output has leading axes (2,)"),
    ],
)
def test_bad_states_are_refused_in_one_sentence(change, error, sentence):
    good = PartState(np.ones(7), np.ones(7), np.ones((7, 3)))
    with pytest.raises(error) as caught:
        merge_states(good, good._replace(**change))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
