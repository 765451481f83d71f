import itertools
import struct

import ml_dtypes
import numpy as np
import pytest

from refattn.vectors.cases import recipes
from refattn.vectors.draws import (
    DrawError,
    exact_dtypes,
    normal,
    outliers,
    poisoned,
    positive,
    spread,
    tiny,
    to_eight_bits,
    unit,
    words,
)
from refattn.vectors.families import Draw, draw

# printf 'case/tensor/0' | sha256sum, and the same of 'case/tensor/1'
DIGESTS = (
    "cb55c91468c01ebbf8aea74f0f9ecb761d38c94cd6458b65c5b2582620e08f14"
    "692b3dd45ac6485fbdc0d18881349e0232828ff9a7032c1767538380829af8e1"
)
ONES = np.array([2**64 - 1], np.uint64)
NONE = np.array([0], np.uint64)


@pytest.mark.clause("OWN-DRAW1")
def test_words_are_the_digests_of_the_stream_read_little_endian():
    expected = struct.unpack("<8Q", bytes.fromhex(DIGESTS))
    assert [int(w) for w in words("case/tensor", 8)] == list(expected)
    assert [int(w) for w in words("case/tensor", 5)] == list(expected[:5])


@pytest.mark.clause("OWN-DRAW1")
def test_kinds_reach_the_ends_that_they_state():
    assert [float(unit(w)[0]) for w in (NONE, ONES)] == [0.0, 255 / 256]
    assert [float(positive(w)[0]) for w in (NONE, ONES)] == [1.0, 255 / 128]
    assert [float(normal(w)[0]) for w in (NONE, ONES)] == [-186 / 32, 186 / 32]
    assert [float(tiny(w, -149)[0]) for w in (NONE, ONES)] == [2.0**-149, -(2.0**-149)]
    assert float(spread(NONE, -3, 2)[0]) == 2.0**-3


@pytest.mark.clause("OWN-DRAW1")
def test_tiny_numbers_are_whole_multiples_below_256():
    # 24 ones are 2^24 - 1 = 65793 * 255, so the remainder is 0 and the multiple 1
    assert (2**24 - 1) % 255 == 0
    x = tiny(words("a/b", 4096), -149).astype(np.float64) * 2.0**149
    assert set(np.abs(x)) == set(range(1, 256))
    assert {int(s) for s in np.sign(x)} == {-1, 1}


@pytest.mark.clause("OWN-DRAW1")
def test_normal_numbers_have_the_stated_mean_and_deviation():
    x = normal(words("moments/x", 40_000)).astype(np.float64)
    assert abs(x.mean()) < 4 / 200  # four deviations of the mean of 40,000
    assert abs(x.std() - (1023**0.5) / 32) < 4 / 282
    assert np.abs(x).max() <= 186 / 32


@pytest.mark.clause("OWN-DRAW1")
def test_one_in_thirty_two_outliers_is_sixteen_times_as_large():
    w = words("outliers/x", 32_000)
    ratio = outliers(w).astype(np.float64) / np.where(normal(w) == 0, 1, normal(w))
    assert set(ratio) <= {0.0, 1.0, 16.0}
    assert abs((ratio == 16).mean() - 1 / 32) < 4 * (31 / 32 / 32 / 32_000) ** 0.5


@pytest.mark.clause("OWN-DRAW1")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_drawn_numbers_are_exact_in_every_format(dtype):
    w = words("exact/x", 2000)
    for x in (unit(w), positive(w), normal(w), spread(w, -10, 6), outliers(w), tiny(w, -24)):
        assert np.array_equal(x.astype(dtype).astype(np.float64), x.astype(np.float64))


def test_the_dtypes_of_a_case_are_those_in_which_casting_loses_nothing():
    assert exact_dtypes({"x": np.float32([1.0, 2.0**-24])}) == (
        "float64", "float32", "float16", "bfloat16",
    )  # fmt: skip
    assert exact_dtypes({"x": np.float32([257.0])}) == ("float64", "float32", "float16")
    assert exact_dtypes({"x": np.float32([2.0**100])}) == ("float64", "float32", "bfloat16")
    assert exact_dtypes({"x": np.float32([2.0**-149])}) == ("float64", "float32")
    assert exact_dtypes({"x": np.float32([np.nan, -np.inf])}) == (
        "float64", "float32", "float16", "bfloat16",
    )  # fmt: skip
    assert exact_dtypes({"n": np.array([2**40])}) == ("float64", "float32", "float16", "bfloat16")


def test_cutting_to_eight_bits_goes_towards_zero():
    x = np.float32([1.0, 257.0, -257.0, 1.00390625, 2.0**-20, -1.9999999])
    assert to_eight_bits(x).tolist() == [1.0, 256.0, -256.0, 1.0, 0.0, -1.9921875]


def test_poison_fills_the_listed_rows_of_an_item_and_nothing_else():
    x = np.zeros((2, 1, 3, 2), np.float32)
    y = poisoned(x, [[1], []], ["nan", "huge"])
    assert np.isnan(y[0, 0, 1]).sum() == 1
    assert (y[0, 0, 1] == 2.0**100).sum() == 1
    assert np.array_equal(y[1], x[1])
    assert np.array_equal(y[0, 0, [0, 2]], x[0, 0, [0, 2]])


def test_rising_keys_raise_the_row_maximum_in_every_tile_of_sixteen():
    q = draw("c", "query", Draw("lead", (1, 1, 5, 16))).astype(np.float64)
    k = draw("c", "key", Draw("ramp", (1, 1, 301, 16), {"peak": 80})).astype(np.float64)
    logits = (q @ k.swapaxes(2, 3))[0, 0] / 4
    tops = [logits[:, s : s + 16].max(axis=1) for s in range(0, 301, 16)]
    assert all((after > before).all() for before, after in itertools.pairwise(tops))


def test_deep_logits_lie_near_the_stated_depth_and_differ_by_order_one():
    q = draw("c", "query", Draw("deep", (1, 1, 7, 16), {"level": 155})).astype(np.float64)
    k = draw("c", "key", Draw("deep", (1, 1, 23, 16), {"level": -155})).astype(np.float64)
    logits = (q @ k.swapaxes(2, 3)) / 4
    assert np.abs(logits + 14 * 155**2 / 4).max() < 20
    assert 0.1 < logits.std() < 2


def test_alternating_rows_sum_to_zero_in_pairs():
    x = draw("c", "value", Draw("alternating", (1, 2, 7, 3)))
    assert np.array_equal(x[:, :, 0:6:2], -x[:, :, 1:6:2])
    assert x.shape == (1, 2, 7, 3)


def test_a_mask_leaves_no_row_empty_but_those_named():
    m = draw("c", "mask", Draw("mask", (1, 1, 11, 5), {"eighths": 0, "empty_rows": [4]}))
    assert m.sum(axis=-1)[0, 0].tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1]


def test_the_same_stream_gives_the_same_numbers_under_another_name():
    a = draw("one", "x", Draw("normal", (3, 5), {"stream": "shared/x"}))
    b = draw("two", "y", Draw("normal", (3, 5), {"stream": "shared/x"}))
    c = draw("two", "y", Draw("normal", (3, 5)))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize(
    "how", [Draw("gauss", (2,)), Draw("normal", (2,), {"sigma": 2}), Draw("spread", (2,))]
)
def test_an_unknown_kind_or_option_is_refused(how):
    with pytest.raises(DrawError, match=r"^case/x cannot be drawn as"):
        draw("case", "x", how)


def test_every_recipe_of_the_core_draws_and_is_exact_in_float32():
    for recipe in recipes("core"):
        inputs = {name: draw(recipe.id, name, how) for name, how in recipe.draws.items()}
        assert exact_dtypes(inputs)[:2] == ("float64", "float32"), recipe.id
        for name, how in recipe.draws.items():
            assert inputs[name].shape == tuple(how.shape), (recipe.id, name)
