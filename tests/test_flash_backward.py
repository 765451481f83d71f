from __future__ import annotations

import math

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from direct_attention import direct_gradients, tiles_of
from refattn.checks import DtypeError, OptionError, ShapeError
from refattn.flash import flash_attention_forward
from refattn.flash_backward import flash_attention_backward
from refattn.standard import standard_attention, standard_attention_backward

N_Q, N_K, D, D_V = 11, 13, 5, 3
TILES = {"block_rows": 4, "block_cols": 6}


def draw(seed: int, n_q=N_Q, n_k=N_K, d=D, d_v=D_V):
    rng = np.random.default_rng(seed)
    shapes = ((n_q, d_v), (n_q, d), (n_k, d), (n_k, d_v))
    return tuple(rng.standard_normal(shape) for shape in shapes)


def gradients(d_output, query, key, value, **options):
    """Return Algorithm 4 after Algorithm 2, with the same tiles and rules."""
    saved = flash_attention_forward(query, key, value, **options)
    return flash_attention_backward(
        d_output, query, key, value, saved.output, saved.row_max, saved.row_sum, **options
    )


def assert_within(actual, expected):
    """Check gradients against the definition, within what rounding may do."""
    bounds = (expected.bound_query, expected.bound_key, expected.bound_value)
    for ours, exact, bound in zip(actual, expected[:3], bounds, strict=True):
        assert (np.abs(ours - exact) <= bound).all(), float(np.max(np.abs(ours - exact) / bound))


@st.composite
def problems(draw_from):
    n_q, n_k = draw_from(st.integers(1, 13)), draw_from(st.integers(1, 17))
    d, d_v = draw_from(st.integers(1, 5)), draw_from(st.integers(1, 4))
    seed = draw_from(st.integers(0, 10**6))
    rng = np.random.default_rng(seed)
    options = {
        "block_rows": draw_from(st.integers(1, 15)),
        "block_cols": draw_from(st.integers(1, 19)),
        "scale": draw_from(st.sampled_from([1.0, 0.4, -1.5])),
    }
    allowed = np.ones((n_q, n_k), bool)
    if draw_from(st.booleans()):
        options["mask"] = allowed = rng.random((n_q, n_k)) < draw_from(st.sampled_from([0.2, 0.8]))
    if draw_from(st.booleans()):
        options |= {"causal": True, "alignment": "bottom_right"}
        offset = n_k - n_q
        allowed = allowed & (np.arange(n_k)[None, :] <= np.arange(n_q)[:, None] + offset)
    dropout = {}
    if draw_from(st.booleans()):
        keep = rng.random((n_q, n_k)) < 0.6
        options |= {"keep": keep, "keep_probability": 0.6}
        dropout = {"keep": keep, "kept": 0.6}
    return draw(seed, n_q, n_k, d, d_v), options, allowed, dropout


@pytest.mark.clause("FA1-ALG4", "OWN-EMPTY1", "OWN-DROPOUT1")
@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_gradients_by_tiles_agree_with_the_definition(problem):
    operands, options, allowed, dropout = problem
    tiles = tiles_of(len(operands[2]), options["block_cols"])
    expected = direct_gradients(
        *operands, scale=options["scale"], allowed=allowed, tiles=tiles, **dropout
    )
    assert_within(gradients(*operands, **options), expected)


@pytest.mark.clause("FA1-ALG4")
def test_gradients_by_hand():
    query, key = np.asarray([[1.0]]), np.asarray([[0.0], [math.log(3.0)]])
    value, d_output = np.asarray([[0.0], [4.0]]), np.asarray([[2.0]])
    for block_cols in (1, 2):
        d_query, d_key, d_value = gradients(
            d_output, query, key, value, block_rows=1, block_cols=block_cols, scale=1.0
        )
        # P = (1/4, 3/4), dP = (0, 8), D = 6, dS = (-3/2, 3/2)
        np.testing.assert_allclose(d_value, [[0.5], [1.5]], rtol=1e-14)
        np.testing.assert_allclose(d_key, [[-1.5], [1.5]], rtol=1e-14)
        np.testing.assert_allclose(d_query, [[1.5 * math.log(3.0)]], rtol=1e-14)


@pytest.mark.clause("FA1-ALG4")
def test_gradients_of_dropped_weights_by_hand():
    query, key = np.asarray([[1.0]]), np.asarray([[0.0], [math.log(3.0)]])
    value, d_output = np.asarray([[4.0], [4.0]]), np.asarray([[1.0]])
    options = {"block_rows": 1, "block_cols": 1, "scale": 2.0}
    keep = np.asarray([[True, False]])
    # logits (0, 2 ln 3): P = (1/10, 9/10); Z = (2, 0); dP = (8, 0); D = 0.8
    result = gradients(d_output, query, key, value, **options, keep=keep, keep_probability=0.5)
    np.testing.assert_allclose(result.d_value, [[0.2], [0.0]], rtol=1e-14)
    np.testing.assert_allclose(result.d_key, [[1.44], [-1.44]], rtol=1e-14)
    np.testing.assert_allclose(result.d_query, [[-1.44 * math.log(3.0)]], rtol=1e-14)


@pytest.mark.clause("FA1-ALG4", "OWN-DROPOUT1")
@pytest.mark.parametrize("operand", [1, 2, 3])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_gradients_are_the_slopes_of_the_forward_pass(operand, seed):
    operands = list(draw(seed))
    rng = np.random.default_rng(seed + 100)
    direction = rng.standard_normal(operands[operand].shape)
    keep = rng.random((N_Q, N_K)) < 0.7
    mask = rng.random((N_Q, N_K)) < 0.8
    options = TILES | {"mask": mask, "causal": True, "alignment": "bottom_right"}
    options |= {"keep": keep, "keep_probability": 0.7, "scale": 0.6}

    def loss(step):
        moved = list(operands)
        moved[operand] = moved[operand] + step * direction
        return float(np.sum(operands[0] * flash_attention_forward(*moved[1:], **options).output))

    h = 1e-4  # error h^4 of the five-point rule against u/h of the rounding
    slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    predicted = float(np.sum(gradients(*operands, **options)[operand - 1] * direction))
    assert slope == pytest.approx(predicted, rel=1e-9, abs=1e-10)


@pytest.mark.clause("FA1-ALG4", "FA1-ALG3")
def test_recomputation_and_stored_weights_give_the_same_gradients():
    d_output, query, key, value = draw(4)
    stored = standard_attention_backward(
        d_output, query, key, value, standard_attention(query, key, value).weights
    )
    again = gradients(d_output, query, key, value, **TILES, scale=1.0)
    for a, b in zip(stored, again, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.clause("FA1-ALG4")
def test_the_backward_pass_may_choose_other_tiles():
    d_output, query, key, value = draw(5)
    saved = flash_attention_forward(query, key, value, **TILES, causal=True)
    for tiles in ({"block_rows": 1, "block_cols": 5}, {"block_rows": 40, "block_cols": 1}):
        again = flash_attention_backward(
            d_output, query, key, value, *saved[:3], **tiles, causal=True
        )
        expected = direct_gradients(
            *draw(5), scale=1 / math.sqrt(D), allowed=np.tri(N_Q, N_K, 0, bool), tiles=N_K
        )
        assert_within(again, expected)


@pytest.mark.clause("FA1-ALG4", "OWN-EMPTY1")
def test_an_empty_row_has_no_gradient_and_gives_none():
    d_output, query, key, value = draw(6)
    mask = np.ones((N_Q, N_K), bool)
    mask[[0, 5]] = False
    mask[:, 12] = False
    result = gradients(d_output, query, key, value, **TILES, mask=mask)
    np.testing.assert_array_equal(result.d_query[[0, 5]], np.zeros((2, D)))
    np.testing.assert_array_equal(result.d_key[12], np.zeros(D))
    np.testing.assert_array_equal(result.d_value[12], np.zeros(D_V))
    rest = [i for i in range(N_Q) if i not in (0, 5)]
    short = gradients(d_output[rest], query[rest], key[:12], value[:12], **TILES)
    np.testing.assert_allclose(result.d_query[rest], short.d_query, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(result.d_key[:12], short.d_key, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(result.d_value[:12], short.d_value, rtol=1e-12, atol=1e-13)


@pytest.mark.clause("FA1-ALG4", "OWN-POISON1")
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("block_cols", [1, 6, 40])
def test_masked_cells_may_hold_anything(poison, block_cols):
    d_output, query, key, value = draw(7)
    mask = np.random.default_rng(8).random((N_Q, N_K)) < 0.7
    mask[:, [3, 12]] = False
    mask[4] = False
    options = {"block_rows": 4, "block_cols": block_cols, "mask": mask}
    clean = gradients(d_output, query, key, value, **options)
    bad_output, bad_query, bad_key, bad_value = (x.copy() for x in (d_output, query, key, value))
    bad_output[4] = bad_query[4] = bad_key[[3, 12]] = bad_value[[3, 12]] = poison
    result = gradients(bad_output, bad_query, bad_key, bad_value, **options)
    for a, b in zip(result, clean, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.clause("FA1-ALG4", "OWN-POISON1")
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", ["key", "value", "d_output"])
def test_a_poisoned_row_reaches_only_what_an_allowed_pair_joins_to_it(row, poison):
    operands = dict(zip(("d_output", "query", "key", "value"), draw(9), strict=True))
    clean = gradients(*operands.values(), **TILES, causal=True)
    operands[row][8] = poison  # causal: query 8 attends keys 0-8, key 8 is attended from row 8 on
    result = gradients(*operands.values(), **TILES, causal=True)
    np.testing.assert_array_equal(result.d_query[:8], clean.d_query[:8])
    assert not np.isfinite(result.d_query[8]).any()
    last = 9 if row == "d_output" else N_Q  # row 8 alone, or every row that attends key 8
    np.testing.assert_array_equal(result.d_key[last:], clean.d_key[last:])
    np.testing.assert_array_equal(result.d_value[last:], clean.d_value[last:])
    assert not np.isfinite(result.d_key[:8]).any()


@pytest.mark.clause("FA1-ALG4")
@pytest.mark.parametrize("level", [-84000.0, 1e4])
def test_gradients_of_logits_far_from_zero_stay_finite_and_right(level):
    d_output, _, _, value = draw(10)
    query = np.ones((N_Q, 1))
    key = level + np.arange(N_K, dtype=float)[:, None] / 8
    result = gradients(d_output, query, key, value, **TILES, scale=1.0)
    weights = np.exp(np.arange(N_K) / 8.0) / np.exp(np.arange(N_K) / 8.0).sum()
    np.testing.assert_allclose(result.d_value, np.outer(weights, d_output.sum(0)), rtol=1e-12)
    d_weights = d_output @ value.T
    d_logits = weights * (d_weights - d_weights @ weights[:, None])
    np.testing.assert_allclose(result.d_key, d_logits.sum(0)[:, None], rtol=1e-11, atol=1e-13)


@pytest.mark.clause("FA1-ALG4")
def test_leading_axes_are_independent():
    rng = np.random.default_rng(11)
    operands = [rng.standard_normal((2, 3, *x.shape)) for x in draw(0)]
    result = gradients(*operands, **TILES, causal=True)
    for b in range(2):
        for h in range(3):
            item = gradients(*(x[b, h] for x in operands), **TILES, causal=True)
            for a, whole in zip(item, result, strict=True):
                np.testing.assert_allclose(a, whole[b, h], rtol=1e-12, atol=1e-14)


@pytest.mark.clause("FA1-ALG4", "OWN-ROUND1")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bits_are_computed_in_float32_and_rounded_once(dtype):
    narrow = [x.astype(dtype) for x in draw(12)]
    saved = flash_attention_forward(*narrow[1:], **TILES)
    result = flash_attention_backward(*narrow, *saved[:3], **TILES)
    wide = flash_attention_backward(
        *(x.astype(np.float32) for x in narrow),
        saved.output.astype(np.float32),
        saved.row_max,
        saved.row_sum,
        **TILES,
    )
    for a, b in zip(result, wide, strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a, b.astype(dtype))


@pytest.mark.clause("FA1-ALG4", "FA1-ALG3")
def test_only_standard_array_functions_are_used():
    xp = array_api_strict
    operands = draw(13)
    strict = [xp.asarray(x) for x in operands]
    rng = np.random.default_rng(14)
    mask, keep = rng.random((2, N_Q, N_K)) < 0.7
    rules = {"causal": True, "keep_probability": 0.7}
    ours = gradients(*operands, **TILES, **rules, mask=mask, keep=keep)
    theirs = gradients(*strict, **TILES, **rules, mask=xp.asarray(mask), keep=xp.asarray(keep))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))


@pytest.mark.clause("FA1-ALG4")
@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"d_output": np.ones((10, 3))}, ShapeError, "d_output has n_q=10, but query has n_q=11"),
        ({"output": np.ones((11, 4))}, ShapeError, "output has d_v=4, but value has d_v=3"),
        ({"row_max": np.ones(10)}, ShapeError, "row_max has n_q=10, but query has n_q=11"),
        ({"row_sum": np.ones((2, 11))}, ShapeError, "row_sum has leading axes (2,)"),
        ({"row_sum": np.ones(11, np.float32)}, DtypeError, "row_sum has dtype float32"),
        ({"d_output": np.ones((11, 3), np.float32)}, DtypeError, "d_output has dtype float32"),
        ({"block_rows": 0}, OptionError, "block_rows is 0"),
        ({"scale": -math.inf}, OptionError, "scale is -inf"),
        ({"mask": np.ones((11, 12), bool)}, ShapeError, "mask has shape (11, 12)"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(change, error, sentence):
    d_output, query, key, value = draw(15)
    saved = flash_attention_forward(query, key, value, **TILES)
    arguments = {
        "d_output": d_output,
        "query": query,
        "key": key,
        "value": value,
        "output": saved.output,
        "row_max": saved.row_max,
        "row_sum": saved.row_sum,
    }
    with pytest.raises(error) as caught:
        flash_attention_backward(**(arguments | TILES | change))
    assert sentence in str(caught.value) and "flash_attention_backward" in str(caught.value)
    assert "\n" not in str(caught.value)
