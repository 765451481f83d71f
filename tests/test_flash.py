from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from direct_attention import assert_logsumexp, assert_output, assert_statistics, direct, tiles_of
from refattn.checks import DtypeError, OptionError, ShapeError
from refattn.flash import (
    block_sizes,
    flash_attention,
    flash_attention_forward,
    tile_states,
)

N_Q, N_K, D, D_V = 13, 17, 5, 3
TILES = {"block_rows": 4, "block_cols": 6}


def draw(seed: int, n_q=N_Q, n_k=N_K, d=D, d_v=D_V, spread=1.0):
    rng = np.random.default_rng(seed)
    return (
        spread * rng.standard_normal((n_q, d)),
        spread * rng.standard_normal((n_k, d)),
        rng.standard_normal((n_k, d_v)),
    )


def assert_within(result, expected):
    """Check every field of a result against the definition."""
    assert_output(result.output, expected)
    assert_statistics(result.row_max, result.row_sum, expected)
    assert_logsumexp(result.logsumexp, expected)


shapes = st.tuples(*(st.integers(1, n) for n in (19, 23, 7, 5)))
tile_sizes = st.tuples(st.integers(1, 25), st.integers(1, 25))


# ---- block sizes


@pytest.mark.clause("FA1-ALG1")
@pytest.mark.parametrize(
    ("sram", "d", "block_rows", "block_cols"),
    [(1000, 7, 7, 36), (5, 64, 1, 1), (256, 64, 1, 1), (257, 64, 2, 2), (98304, 64, 64, 384)],
)
def test_block_sizes_are_rounded_up_and_rows_stay_within_d(sram, d, block_rows, block_cols):
    assert block_sizes(sram=sram, d=d) == (block_rows, block_cols)


@pytest.mark.clause("FA1-ALG1")
@settings(deadline=None)
@given(sram=st.integers(1, 10**12), d=st.integers(1, 10**6))
def test_block_sizes_are_exact_for_large_numbers(sram, d):
    quarter = math.ceil(Fraction(sram, 4 * d))
    assert block_sizes(sram=sram, d=d) == (min(quarter, d), quarter)


# ---- Algorithm 1


@pytest.mark.clause("FA1-ALG1", "FA1-THM1")
def test_two_tiles_of_one_key_by_hand():
    query, key = np.asarray([[1.0]]), np.asarray([[0.0], [math.log(3.0)]])
    value = np.asarray([[4.0, 8.0], [0.0, -8.0]])
    states = tile_states(query, key, value, block_rows=1, block_cols=1)
    np.testing.assert_allclose(states.row_max, [[0.0], [math.log(3.0)]], rtol=1e-15)
    np.testing.assert_allclose(states.row_sum, [[1.0], [4.0 / 3.0]], rtol=1e-15)
    np.testing.assert_allclose(states.states, [[[4.0, 8.0]], [[1.0, -4.0]]], rtol=1e-14)
    result = flash_attention(query, key, value, block_rows=1, block_cols=1)
    np.testing.assert_allclose(result.logsumexp, [math.log(4.0)], rtol=1e-15)


@pytest.mark.clause("FA1-THM1", "FA1-ALG1")
@settings(deadline=None)
@given(shape=shapes, tiles=tile_sizes, scale=st.sampled_from([1.0, 0.25, -2.0]))
def test_tiling_leaves_the_output_unchanged(shape, tiles, scale):
    query, key, value = draw(sum(shape), *shape)
    result = flash_attention(
        query, key, value, block_rows=tiles[0], block_cols=tiles[1], scale=scale
    )
    expected = direct(query, key, value, scale=scale, tiles=tiles_of(shape[1], tiles[1]))
    assert_within(result, expected)


@pytest.mark.clause("FA1-THM1", "FA1-ALG1")
@pytest.mark.parametrize("block_cols", [1, 6, 16, 17, 40])
def test_after_each_outer_step_the_state_is_attention_over_the_keys_so_far(block_cols):
    query, key, value = draw(3)
    states = tile_states(query, key, value, block_rows=4, block_cols=block_cols, scale=0.5)
    steps = tiles_of(N_K, block_cols)
    assert states.row_max.shape == states.row_sum.shape == (steps, N_Q)
    assert states.states.shape == (steps, N_Q, D_V)
    for j in range(steps):
        seen = min((j + 1) * block_cols, N_K)
        expected = direct(query, key[:seen], value[:seen], scale=0.5, tiles=j + 1)
        assert_output(states.states[j], expected)
        assert_statistics(states.row_max[j], states.row_sum[j], expected)


@pytest.mark.clause("FA1-ALG1")
def test_the_last_state_is_the_result():
    query, key, value = draw(4)
    states = tile_states(query, key, value, **TILES)
    result = flash_attention(query, key, value, **TILES)
    np.testing.assert_array_equal(states.states[-1], result.output)
    np.testing.assert_array_equal(states.row_max[-1], result.row_max)
    np.testing.assert_array_equal(states.row_sum[-1], result.row_sum)


@pytest.mark.clause("FA1-THM1")
def test_tiles_of_queries_leave_the_statistics_unchanged_to_the_bit():
    query, key, value = (np.round(64 * x) / 64 for x in draw(5))  # products exact in any order
    whole = tile_states(query, key, value, block_rows=N_Q, block_cols=6)
    for block_rows in (1, 4, 12, 50):
        tiled = tile_states(query, key, value, block_rows=block_rows, block_cols=6)
        np.testing.assert_array_equal(tiled.row_max, whole.row_max)
        np.testing.assert_array_equal(tiled.row_sum, whole.row_sum)
        np.testing.assert_allclose(tiled.states, whole.states, rtol=1e-13, atol=1e-14)


@pytest.mark.clause("FA1-THM1", "FA1-S31")
def test_the_order_of_the_keys_does_not_matter():
    query, key, value = draw(6)
    order = np.random.default_rng(7).permutation(N_K)
    for block_cols in (1, 6):
        result = flash_attention(
            query, key[order], value[order], block_rows=4, block_cols=block_cols
        )
        assert_within(result, direct(query, key, value, tiles=tiles_of(N_K, block_cols)))


@pytest.mark.clause("FA1-ALG1")
@pytest.mark.parametrize("rising", [True, False])
def test_maxima_that_change_at_every_tile_rescale_what_came_before(rising):
    n = 11
    logits = np.arange(n, dtype=float) * (0.75 if rising else -0.75)
    query, key = np.ones((1, 1)), logits[:, None]
    value = np.random.default_rng(8).standard_normal((n, D_V))
    for block_cols in (1, 2, 3):
        result = flash_attention(query, key, value, block_rows=1, block_cols=block_cols)
        weights = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(result.output[0], weights @ value, rtol=1e-13)
        assert result.row_max[0] == logits.max()


@pytest.mark.clause("FA1-ALG1", "FA1-THM1")
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_logits_of_ten_thousand_neither_overflow_nor_vanish(dtype):
    logits = np.asarray([-1e4, 1e4, -1e4, 1e4 - 1.0, 0.0, 1e4, -1e4], dtype=dtype)
    value = np.random.default_rng(9).standard_normal((7, D_V)).astype(dtype)
    result = flash_attention(
        np.ones((1, 1), dtype), logits[:, None], value, block_rows=1, block_cols=2
    )
    weights = np.asarray([0, 1, 0, math.exp(-1.0), 0, 1, 0]) / (2 + math.exp(-1.0))
    np.testing.assert_allclose(result.output[0], weights @ value, rtol=20 * np.finfo(dtype).eps)
    assert result.row_max[0] == 1e4
    np.testing.assert_allclose(
        float(result.logsumexp[0]), 1e4 + math.log(2 + math.exp(-1.0)), rtol=np.finfo(dtype).eps
    )


@pytest.mark.clause("FA1-ALG1", "FA1-ALG2")
@pytest.mark.parametrize("attend", [flash_attention, flash_attention_forward])
@pytest.mark.parametrize("block_cols", [1, 2])
def test_each_row_of_a_tile_has_its_own_maximum(attend, block_cols):
    query, key = np.asarray([[1.0], [-1.0]]), np.asarray([[1e4], [1e4 + 1.0]])
    value = np.asarray([[4.0], [8.0]])
    result = attend(query, key, value, block_rows=2, block_cols=block_cols, scale=1.0)
    share = 1 / (1 + math.e)
    np.testing.assert_allclose(result.output, [[8 - 4 * share], [4 + 4 * share]], rtol=1e-14)
    np.testing.assert_array_equal(result.row_max, [1e4 + 1.0, -1e4])


@pytest.mark.clause("FA1-ALG1", "FA1-ALG2")
@pytest.mark.parametrize("attend", [flash_attention, flash_attention_forward])
def test_logits_that_are_all_far_below_zero_are_not_empty(attend):
    key = np.full((5, 1), -84000.0)
    value = np.arange(10.0).reshape(5, 2)
    result = attend(np.ones((2, 1)), key, value, block_rows=1, block_cols=2, scale=1.0)
    np.testing.assert_allclose(result.output, [[4.0, 5.0]] * 2, rtol=1e-15)
    np.testing.assert_array_equal(result.row_max, [-84000.0] * 2)
    np.testing.assert_allclose(result.logsumexp, [-84000.0 + math.log(5.0)] * 2, rtol=1e-15)


@pytest.mark.clause("FA1-ALG1", "FA1-ALG2", "OWN-EXACT1")
@pytest.mark.parametrize("attend", [flash_attention, flash_attention_forward])
def test_one_key_returns_its_value_to_the_bit(attend):
    query, key, value = draw(10, n_k=1)
    result = attend(query, key, value, **TILES)
    np.testing.assert_array_equal(result.output, np.repeat(value, N_Q, axis=0))
    np.testing.assert_array_equal(result.row_sum, np.ones(N_Q))
    np.testing.assert_array_equal(result.logsumexp, result.row_max)


@pytest.mark.clause("FA1-ALG1", "FA1-ALG2")
@pytest.mark.parametrize("attend", [flash_attention, flash_attention_forward, tile_states])
def test_no_query_is_no_error_but_no_key_is_refused_as_by_attention(attend):
    query, key, value = draw(11)
    assert attend(query[:0], key, value, **TILES).row_max.size == 0
    with pytest.raises(ShapeError, match="key has n_k=0, but it must be at least 1"):
        attend(query, key[:0], value[:0], **TILES)


@pytest.mark.clause("FA1-THM1")
def test_extra_memory_grows_with_the_length_and_not_with_its_square():
    n, size = 4099, 128
    query, key, value = draw(12, n_q=n, n_k=n, d=2, d_v=1)
    tracemalloc.start()
    try:
        flash_attention(query, key, value, block_rows=size, block_cols=size)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < n * n * 8 / 20


# ---- Algorithm 2


@pytest.mark.clause("FA1-ALG2")
def test_without_mask_and_dropout_the_full_listing_is_the_short_one():
    query, key, value = draw(13)
    short = flash_attention(query, key, value, **TILES, scale=0.3)
    full = flash_attention_forward(query, key, value, **TILES, scale=0.3)
    for a, b in zip(short, full, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.clause("FA1-ALG2")
def test_mask_and_dropout_by_hand():
    query = np.ones((2, 1))
    key = np.log(np.asarray([[1.0], [2.0], [5.0]]))
    value = np.asarray([[8.0], [16.0], [32.0]])
    mask = np.asarray([[True, False, True], [True, True, False]])
    keep = np.asarray([[True, True, False], [False, True, True]])
    for block_cols in (1, 2, 3):
        result = flash_attention_forward(
            query,
            key,
            value,
            block_rows=1,
            block_cols=block_cols,
            scale=1.0,
            mask=mask,
            keep=keep,
            keep_probability=0.5,
        )
        # weights 1/6, 5/6 then 1/3, 2/3; dropped and doubled
        np.testing.assert_allclose(result.output, [[8.0 / 3], [64.0 / 3]], rtol=1e-14)
        np.testing.assert_allclose(result.logsumexp, np.log([6.0, 3.0]), rtol=1e-14)


@st.composite
def problems(draw_from):
    n_q, n_k, d, d_v = draw_from(shapes)
    seed = draw_from(st.integers(0, 10**6))
    rng = np.random.default_rng(seed)
    query, key, value = draw(seed, n_q, n_k, d, d_v)
    mask = rng.random((n_q, n_k)) < draw_from(st.sampled_from([0.1, 0.5, 0.9]))
    options = {"block_rows": draw_from(st.integers(1, 25)), "scale": None}
    options["block_cols"] = draw_from(st.integers(1, 25))
    allowed = np.ones((n_q, n_k), bool)
    if draw_from(st.booleans()):
        options["mask"] = mask
        allowed = allowed & mask
    if draw_from(st.booleans()):
        alignment = draw_from(st.sampled_from(["top_left", "bottom_right", -2, 3]))
        offset = {"top_left": 0, "bottom_right": n_k - n_q}.get(alignment, alignment)
        options |= {"causal": True, "alignment": alignment}
        allowed = allowed & (np.arange(n_k)[None, :] <= np.arange(n_q)[:, None] + offset)
    dropout = {}
    if draw_from(st.booleans()):
        keep = rng.random((n_q, n_k)) < 0.7
        options |= {"keep": keep, "keep_probability": 0.7}
        dropout = {"keep": keep, "kept": 0.7}
    return (query, key, value), options, allowed, dropout


@pytest.mark.clause("FA1-ALG2", "OWN-EMPTY1", "OWN-CAUSAL1", "OWN-MASK1", "OWN-DROPOUT1")
@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_tiles_with_mask_and_dropout_agree_with_the_definition(problem):
    operands, options, allowed, dropout = problem
    result = flash_attention_forward(*operands, **options)
    n_k, d = operands[1].shape
    expected = direct(
        *operands,
        scale=1 / math.sqrt(d),
        allowed=allowed,
        tiles=tiles_of(n_k, options["block_cols"]),
        **dropout,
    )
    assert_within(result, expected)


@pytest.mark.clause("OWN-EMPTY1", "FA1-ALG2")
@pytest.mark.parametrize("block_cols", [1, 6, 17])
def test_a_row_without_a_key_is_zero_in_every_tile(block_cols):
    query, key, value = draw(14)
    mask = np.ones((N_Q, N_K), bool)
    mask[2] = mask[7] = False
    mask[3, :12] = False  # its first tiles are empty, its last is not
    result = flash_attention_forward(
        query, key, value, block_rows=4, block_cols=block_cols, mask=mask
    )
    np.testing.assert_array_equal(result.output[[2, 7]], np.zeros((2, D_V)))
    np.testing.assert_array_equal(result.row_max[[2, 7]], [-np.inf] * 2)
    np.testing.assert_array_equal(result.row_sum[[2, 7]], [0.0] * 2)
    np.testing.assert_array_equal(result.logsumexp[[2, 7]], [-np.inf] * 2)
    expected = direct(query, key, value, scale=1 / math.sqrt(D), allowed=mask, tiles=17)
    assert_within(result, expected)


@pytest.mark.clause("OWN-CAUSAL1", "FA1-ALG2")
def test_causal_rows_before_the_first_key_are_empty():
    query, key, value = draw(15, n_q=11, n_k=5)
    result = flash_attention_forward(
        query, key, value, **TILES, causal=True, alignment="bottom_right"
    )
    assert (result.row_sum[:6] == 0).all() and (result.row_sum[6:] > 0).all()
    np.testing.assert_array_equal(result.output[6], value[0])


@pytest.mark.clause("OWN-MASK1", "FA1-ALG2")
def test_mask_and_causal_are_both_applied():
    query, key, value = draw(16)
    mask = np.random.default_rng(17).random((N_Q, N_K)) < 0.6
    both = flash_attention_forward(query, key, value, **TILES, mask=mask, causal=True)
    one = flash_attention_forward(query, key, value, **TILES, mask=mask & np.tri(N_Q, N_K, 0, bool))
    for a, b in zip(both, one, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.clause("OWN-POISON1", "FA1-ALG2")
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30, -1e300])
@pytest.mark.parametrize("block_cols", [1, 6, 40])
def test_a_masked_cell_may_hold_anything(poison, block_cols):
    query, key, value = draw(18)
    mask = np.random.default_rng(19).random((N_Q, N_K)) < 0.7
    mask[:, [5, 16]] = False  # keys that no query may attend
    mask[4] = False  # and a query that may attend no key
    hostile, bad_key, bad_value = query.copy(), key.copy(), value.copy()
    hostile[4] = bad_key[[5, 16]] = bad_value[[5, 16]] = poison
    options = {"block_rows": 4, "block_cols": block_cols, "mask": mask}
    clean = flash_attention_forward(query, key, value, **options)
    result = flash_attention_forward(hostile, bad_key, bad_value, **options)
    for a, b in zip(result, clean, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.clause("OWN-POISON1", "FA1-ALG2")
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_value_reaches_exactly_the_rows_that_may_attend_it(poison):
    query, key, value = draw(20)
    bad = value.copy()
    bad[9, 1] = poison
    options = {"block_rows": 4, "block_cols": 6, "causal": True}
    clean = flash_attention_forward(query, key, value, **options)
    result = flash_attention_forward(query, key, bad, **options)
    np.testing.assert_array_equal(result.output[:9], clean.output[:9])
    np.testing.assert_array_equal(result.output[:, [0, 2]], clean.output[:, [0, 2]])
    assert not np.isfinite(result.output[9:, 1]).any()


@pytest.mark.clause("OWN-DROPOUT1", "OWN-LSE1", "FA1-ALG2")
def test_dropout_leaves_the_statistics_alone():
    query, key, value = draw(21)
    keep = np.random.default_rng(22).random((N_Q, N_K)) < 0.5
    plain = flash_attention_forward(query, key, value, **TILES)
    dropped = flash_attention_forward(query, key, value, **TILES, keep=keep, keep_probability=0.5)
    np.testing.assert_array_equal(plain.row_max, dropped.row_max)
    np.testing.assert_array_equal(plain.row_sum, dropped.row_sum)
    assert not np.allclose(plain.output, dropped.output)


@pytest.mark.clause("FA1-ALG2")
def test_leading_axes_are_independent_and_the_mask_broadcasts_over_them():
    rng = np.random.default_rng(23)
    query = rng.standard_normal((2, 3, N_Q, D))
    key = rng.standard_normal((2, 3, N_K, D))
    value = rng.standard_normal((2, 3, N_K, D_V))
    mask = rng.random((2, 1, N_Q, N_K)) < 0.6
    result = flash_attention_forward(query, key, value, **TILES, mask=mask)
    for b in range(2):
        for h in range(3):
            item = flash_attention_forward(
                query[b, h], key[b, h], value[b, h], **TILES, mask=mask[b, 0]
            )
            for a, whole in zip(item, result, strict=True):
                np.testing.assert_allclose(a, whole[b, h], rtol=1e-14, atol=1e-15)
    states = tile_states(query, key, value, **TILES)
    assert states.states.shape == (3, 2, 3, N_Q, D_V) and states.row_max.shape == (3, 2, 3, N_Q)


# ---- dtypes, libraries, errors


@pytest.mark.clause("OWN-ROUND1", "FA1-ALG1", "FA1-ALG2")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("attend", [flash_attention, flash_attention_forward])
def test_sixteen_bits_are_computed_in_float32_and_rounded_once(attend, dtype):
    narrow = [x.astype(dtype) for x in draw(24)]
    result = attend(*narrow, **TILES)
    wide = attend(*(x.astype(np.float32) for x in narrow), **TILES)
    assert result.output.dtype == dtype
    np.testing.assert_array_equal(result.output, wide.output.astype(dtype))
    for name in ("row_max", "row_sum", "logsumexp"):
        assert getattr(result, name).dtype == np.float32
        np.testing.assert_array_equal(getattr(result, name), getattr(wide, name))


@pytest.mark.clause("OWN-ROUND1", "FA1-ALG1")
def test_float32_stays_float32():
    result = flash_attention(*(x.astype(np.float32) for x in draw(25)), **TILES)
    assert {x.dtype for x in result} == {np.dtype(np.float32)}


@pytest.mark.clause("FA1-ALG1", "FA1-ALG2")
def test_only_standard_array_functions_are_used():
    xp = array_api_strict
    operands = draw(26)
    strict = [xp.asarray(x) for x in operands]
    rng = np.random.default_rng(27)
    mask, keep = rng.random((2, N_Q, N_K)) < 0.7
    pairs = [
        (flash_attention(*operands, **TILES), flash_attention(*strict, **TILES)),
        (tile_states(*operands, **TILES), tile_states(*strict, **TILES)),
        (
            flash_attention_forward(
                *operands, **TILES, mask=mask, causal=True, keep=keep, keep_probability=0.7
            ),
            flash_attention_forward(
                *strict,
                **TILES,
                mask=xp.asarray(mask),
                causal=True,
                keep=xp.asarray(keep),
                keep_probability=0.7,
            ),
        ),
    ]
    for ours, theirs in pairs:
        for a, b in zip(ours, theirs, strict=True):
            assert type(b) is type(strict[0])
            np.testing.assert_array_equal(a, np.asarray(b))


@pytest.mark.clause("FA1-ALG1", "FA1-ALG2")
def test_arguments_are_not_written_to():
    operands = draw(28)
    mask = np.random.default_rng(29).random((N_Q, N_K)) < 0.7
    for x in (*operands, mask):
        x.setflags(write=False)
    flash_attention(*operands, **TILES)
    flash_attention_forward(*operands, **TILES, mask=mask, keep=mask, keep_probability=0.5)


@pytest.mark.clause("FA1-ALG1", "FA1-ALG2")
@pytest.mark.parametrize("attend", [flash_attention, flash_attention_forward, tile_states])
@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"block_rows": 0}, OptionError, "block_rows is 0, but it must be an integer of at least"),
        ({"block_cols": -3}, OptionError, "block_cols is -3, but it must be an integer of at le"),
        ({"block_cols": 2.5}, OptionError, "block_cols is 2.5, but it must be an integer"),
        ({"block_rows": True}, OptionError, "block_rows is True, but it must be an integer"),
        ({"scale": math.nan}, OptionError, "scale is nan, but it must be finite"),
        ({"scale": math.inf}, OptionError, "scale is inf, but it must be finite"),
        ({"key": np.ones((17, 4))}, ShapeError, "key has d_k=4, but query has d_k=5"),
        ({"value": np.ones((16, 3))}, ShapeError, "value has n_k=16, but key has n_k=17"),
        ({"value": np.ones((2, 17, 3))}, ShapeError, "value has leading axes"),
        ({"query": np.ones(5)}, ShapeError, "query has 1 axes"),
        ({"query": np.ones((13, 5), np.float32)}, DtypeError, "dtype float64, but query has dtype"),
        ({"value": np.ones((17, 3), np.int64)}, DtypeError, "value has dtype int64"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(attend, change, error, sentence):
    names = ("query", "key", "value")
    arguments = dict(zip(names, draw(30), strict=True)) | TILES | change
    operands = [arguments.pop(name) for name in names]
    with pytest.raises(error) as caught:
        attend(*operands, **arguments)
    assert sentence in str(caught.value) and attend.__name__ in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.clause("FA1-ALG2")
@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"mask": np.ones((13, 16), bool)}, ShapeError, "mask has shape (13, 16)"),
        ({"mask": np.ones((2, 13, 17), bool)}, ShapeError, "mask has shape (2, 13, 17)"),
        ({"mask": np.ones((13, 17))}, DtypeError, "mask has dtype float64"),
        ({"causal": True, "alignment": "left"}, OptionError, "alignment is 'left'"),
        ({"causal": True, "alignment": [0, 1]}, OptionError, "takes one offset"),
        ({"keep": np.ones((13, 17), bool)}, OptionError, "they come together"),
        ({"keep_probability": 0.5}, OptionError, "they come together"),
        (
            {"keep": np.ones((13, 17), bool), "keep_probability": 0.0},
            OptionError,
            "keep_probability is 0.0",
        ),
        (
            {"keep": np.ones((13, 17), np.int8), "keep_probability": 0.5},
            DtypeError,
            "keep has dtype int8",
        ),
    ],
)
def test_bad_rules_are_refused_in_one_sentence(options, error, sentence):
    with pytest.raises(error) as caught:
        flash_attention_forward(*draw(31), **TILES, **options)
    assert sentence in str(caught.value)


@pytest.mark.clause("FA1-ALG1")
@pytest.mark.parametrize(
    "sizes", [{"sram": 0, "d": 3}, {"sram": 64, "d": 0}, {"sram": 1.5, "d": 1}]
)
def test_block_sizes_refuse_what_is_no_count(sizes):
    with pytest.raises(OptionError, match="must be an integer of at least 1"):
        block_sizes(**sizes)
