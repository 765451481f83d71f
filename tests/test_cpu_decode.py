"""A few queries against many keys: parts of a fixed size, merged in order."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cpu_draws import lay, widened
from optional import require

require("numba")
import refattn  # noqa: E402
from refattn import cpu  # noqa: E402
from refattn.cpu.attention import plan_job  # noqa: E402
from refattn.cpu.decode import PART, parts_of, suits  # noqa: E402


def drawn(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def problem(h, h_k, n_q, n_k, d_k, d_v, dtype=np.float32):
    shapes = ((2, h, n_q, d_k), (2, h_k, n_k, d_k), (2, h_k, n_k, d_v))
    return [drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


CASES = [
    ((3, 3, 1, 1031, 128, 128), {}),
    ((4, 2, 2, PART + 1, 40, 24), {}),
    ((4, 1, 1, 3 * PART, 17, 33), {"causal": True, "alignment": 1400}),
    ((4, 2, 1, 601, 16, 16), {"sinks": [1.0, -2.0, 0.5, 3.0], "key_lengths": [0, 511]}),
    ((2, 2, 1, 997, 64, 80), {"window": [130, 0], "alignment": "bottom_right"}),
    ((2, 2, 1, 5, 3, 2), {"scale": -0.4, "query_lengths": [1, 0]}),
    ((4, 2, 2, 700, 8, 8), {"head_map": "tile"}),
    ((1, 1, 1, 700, 8, 8), {"causal": True, "alignment": -3}),
    ((2, 2, 5, 1031, 64, 40), {"causal": True, "alignment": "bottom_right"}),
    ((4, 2, 7, 1100, 19, 48), {"window": [63, 11], "alignment": [511, 1090]}),
    ((3, 3, 11, 577, 72, 31), {"causal": True, "alignment": -4, "sinks": [0.5, -1.0, 2.0]}),
    ((8, 1, 13, 523, 33, 16), {"query_lengths": [13, 6], "head_map": "tile"}),
    ((2, 2, 23, 601, 48, 96), {"window": [600, None], "query_lengths": [0, 19]}),
    ((2, 1, 64, 1031, 16, 24), {"causal": True, "alignment": "bottom_right", "scale": -0.3}),
]
"""Sizes (h, h_k, n_q, n_k, d_k, d_v) and options."""


@pytest.mark.clause("FA1-ALG1", "OWN-CACHE1", "OWN-SINK1", "OWN-EMPTY1", "OWN-GQA1")
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize(("sizes", "given"), CASES)
def test_parts_that_are_merged_agree_with_the_whole(sizes, given, dtype):
    arrays = problem(*sizes, dtype=dtype)
    options = dict(given)
    for name in ("key_lengths", "query_lengths", "alignment"):
        if isinstance(options.get(name), list):
            options[name] = np.array(options[name])
    wide = dict(options)
    if "sinks" in options:
        options["sinks"], wide["sinks"] = (np.array(options["sinks"], t) for t in (dtype, float))
    assert suits(plan_job("test", *arrays, options).plan)
    found = cpu.attention(*arrays, **options)
    exact = refattn.attention(*(a.astype(np.float64) for a in arrays), **wide)
    assert (found.output.dtype, found.output.shape) == (np.dtype(dtype), exact.output.shape)
    assert np.array_equal(np.isneginf(found.logsumexp), np.isneginf(exact.logsumexp))
    finite = np.isfinite(exact.logsumexp)
    bound = 16 * float(np.finfo(np.promote_types(dtype, np.float32)).eps)
    rounding = float(np.finfo(dtype).eps) * np.abs(exact.output) if dtype == np.float16 else 0
    assert (np.abs(found.output - exact.output) <= bound + rounding).all()
    assert (np.abs(found.logsumexp[finite] - exact.logsumexp[finite]) <= bound).all()


@pytest.mark.clause("FA1-ALG1")
def test_the_bits_do_not_depend_on_the_number_of_threads():
    arrays = problem(4, 4, 1, 2999, 64, 64)
    first = cpu.attention(*arrays, threads=1)
    for threads in (2, 3, 8):
        assert all(map(np.array_equal, first, cpu.attention(*arrays, threads=threads)))


@pytest.mark.clause("OWN-POISON1")
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_keys_that_the_query_may_not_see_are_never_read(poison):
    query, key, value = problem(2, 2, 1, 900, 24, 24)
    options = {"causal": True, "alignment": 640, "window": [600, None]}
    clean = cpu.attention(query, key, value, **options)
    for rows in (slice(0, 40), slice(641, 900)):
        key[:, :, rows] = value[:, :, rows] = poison
    assert all(map(np.array_equal, clean, cpu.attention(query, key, value, **options)))


TERMS = [
    {"slopes": [0.25, 0.01], "distance": "absolute", "causal": True},
    {"slopes": [0.25, -0.01], "distance": "signed", "softcap": 3.0},
    {"slopes": [0.02, 0.01], "distance": "column", "softcap": 3.0, "softcap_order": "after_bias"},
    {"softcap": 2.0, "softcap_order": "after_bias"},
    {"scale": 0.0},
    {"bias": (2, 4, 3, 1103), "softcap": 5.0, "softcap_order": "before_bias"},
    {"bias": (4, 1, 1103), "softcap": 5.0, "softcap_order": "after_bias", "slopes": [0.1, 0.2]},
    {"bias": (2, 1, 3, 1), "window": [700, 0]},
    {"bias": (1, 1103), "head_map": "tile", "sinks": [0.5, 1.0]},
    {"mask": (2, 1, 1, 1103)},
    {"mask": (2, 4, 3, 1103), "causal": True, "head_map": "tile", "scale": -0.2},
    {"mask": (4, 3, 1), "slopes": [0.001, 0.002], "key_lengths": [1100, 513]},
    {"mask": (3, 1103), "bias": (1103,), "query_lengths": [3, 2]},
]
"""Options with shapes in place of masks and biases, two numbers for any number of heads."""


def given(options, dtype):
    """Return options for two items, four heads, three queries and 1103 keys."""
    drawn, found = np.random.default_rng(5), {"alignment": 1090, **options}
    for name in ("slopes", "sinks"):
        if name in found:
            found[name] = np.tile(np.array(found[name], dtype), 2)
    for name in ("key_lengths", "query_lengths"):
        if name in found:
            found[name] = np.array(found[name])
    if "bias" in found:
        found["bias"] = drawn.standard_normal(found["bias"]).astype(dtype)
        found["bias"][drawn.random(found["bias"].shape) < 0.2] = -np.inf
    if "mask" in found:
        found["mask"] = drawn.random(found["mask"]) < 0.6
        found["mask"][..., 512:1024] = False  # a part that nobody may see
    return found


@pytest.mark.clause("OWN-SOFTCAP1", "ALIBI-S3a", "OWN-ALIBI1", "OWN-BIAS1", "OWN-MASK1")
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("way", [0, 3])
@pytest.mark.parametrize("options", TERMS, ids=lambda o: "-".join(o))
def test_few_rows_take_every_term_of_the_logits(options, way, dtype):
    arrays = problem(4, 2, 3, 1103, 24, 40, dtype=dtype)
    options = given(options, dtype)
    wide = widened(arrays, options)
    for name in ("mask", "bias"):
        if name in options and options[name].ndim == 4:
            options[name] = lay(options[name], way)
    assert suits(plan_job("test", *arrays, options).plan)
    found = cpu.attention(*(lay(array, way) for array in arrays), **options)
    exact = refattn.attention(*wide[0], **wide[1])
    assert np.array_equal(np.isneginf(found.logsumexp), np.isneginf(exact.logsumexp))
    finite = np.isfinite(exact.logsumexp)
    eps = float(ml_dtypes.finfo(np.promote_types(dtype, np.float32)).eps)
    rounding = float(ml_dtypes.finfo(dtype).eps) * np.abs(exact.output)
    # an exponent of up to a thousand is rounded before its power is taken
    bound = 16 * eps * max(1.0, np.abs(exact.logsumexp[finite]).max())
    off = np.abs(found.output.astype(np.float64) - exact.output)
    assert (off <= bound + rounding).all()
    assert (np.abs(found.logsumexp[finite] - exact.logsumexp[finite]) <= bound).all()


@pytest.mark.clause("OWN-MASK1", "OWN-BIAS1", "OWN-POISON1")
@pytest.mark.parametrize("name", ["mask", "bias"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_keys_that_a_mask_or_a_bias_forbids_are_never_read(poison, name):
    query, key, value = problem(4, 2, 3, 1103, 24, 40)
    allowed = np.random.default_rng(1).random((2, 1, 1, 1103)) < 0.5
    allowed[:, :, :, 500:1080] = False
    options = {name: allowed if name == "mask" else np.where(allowed, 0, -np.inf).astype("f4")}
    clean = cpu.attention(query, key, value, **options)
    for b in range(2):
        key[b][:, ~allowed[b, 0, 0]] = value[b][:, ~allowed[b, 0, 0]] = poison
    found = cpu.attention(query, key, value, **options)
    assert all(map(np.array_equal, clean, found))


@pytest.mark.clause("FA1-ALG1", "OWN-GQA1")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_q", [*range(1, 34), 47, 65, 97])
def test_any_number_of_rows_shares_the_lanes_rightly(n_q, dtype):
    query, key, value = problem(1, 1, n_q, 101, 37, 29, dtype=dtype)
    assert suits(plan_job("test", query, key, value, {}).plan)
    found = cpu.attention(query, key, value).output
    exact = refattn.attention(*(a.astype(np.float64) for a in (query, key, value))).output
    assert (np.abs(found - exact) <= 16 * np.finfo(dtype).eps).all()


@pytest.mark.clause("FA1-ALG1")
@pytest.mark.parametrize("way", range(5))
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_rows_at_any_strides_give_the_same_bits(way, dtype):
    arrays = problem(2, 2, 3, 587, 48, 64)
    plain = [array.astype(dtype) for array in arrays]
    expected = cpu.attention(*plain)
    found = cpu.attention(*(lay(array, way) for array in plain))
    assert all(map(np.array_equal, expected, found))


@pytest.mark.clause("FA1-ALG1")
@pytest.mark.parametrize("d", [1, 2, 3, 4, 7, 8, 15, 16, 17, 64, 129, 257])
def test_no_number_beyond_a_row_or_the_last_key_is_read(d):
    arrays = [np.full((1, 2, n + 1, d + 1), np.nan, np.float32) for n in (6, 71, 71)]
    for array, clean in zip(arrays, problem(2, 2, 6, 71, d, d), strict=True):
        array[:, :, :-1, :-1] = clean[:1]
    inside = [array[:, :, :-1, :-1] for array in arrays]
    found = cpu.attention(*inside)
    assert all(map(np.array_equal, found, cpu.attention(*(a.copy() for a in inside))))
    assert np.isfinite(found.output).all()


@pytest.mark.clause("FA1-ALG1")
def test_an_item_has_the_same_bits_in_every_batch():
    arrays = problem(4, 2, 6, 1201, 40, 40)
    options = {"causal": True, "alignment": np.array([1195, 700])}
    both = cpu.attention(*arrays, **options)
    for b, offset in enumerate(options["alignment"]):
        alone = cpu.attention(*(a[b : b + 1] for a in arrays), causal=True, alignment=int(offset))
        assert np.array_equal(alone.output[0], both.output[b])
        assert np.array_equal(alone.logsumexp[0], both.logsumexp[b])


@pytest.mark.clause("OWN-POISON1")
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_row_reads_no_key_that_only_other_rows_may_see(poison):
    query, key, value = problem(2, 2, 4, 1100, 24, 40)
    options = {"causal": True, "alignment": 1000, "window": [990, None]}
    clean = cpu.attention(query, key, value, **options)
    key[:, :, 1003] = value[:, :, 1003] = poison  # the last row's last key
    key[:, :, 10] = value[:, :, 10] = poison  # the first row's first key
    found = cpu.attention(query, key, value, **options)
    assert np.array_equal(found.output[:, :, 1:3], clean.output[:, :, 1:3])
    assert np.array_equal(found.logsumexp[:, :, 1:3], clean.logsumexp[:, :, 1:3])
    assert not np.isfinite(found.output[:, :, [0, 3]]).any()


@pytest.mark.clause("OWN-LENGTH1", "OWN-POISON1")
def test_rows_beyond_the_query_length_make_no_key_read():
    query, key, value = problem(2, 1, 5, 700, 16, 16)
    options = {"causal": True, "alignment": 600, "query_lengths": np.array([2, 0])}
    clean = cpu.attention(query, key, value, **options)
    query[0, :, 2:] = query[1] = np.nan
    key[:, :, 602:] = value[:, :, 602:] = np.nan
    assert all(map(np.array_equal, clean, cpu.attention(query, key, value, **options)))
    assert not clean.output[1].any()


def test_few_rows_of_a_head_are_decoded_and_more_are_not():
    def decoded(h, h_k, n_q, **options):
        return suits(plan_job("test", *problem(h, h_k, n_q, 9, 8, 8), options).plan)

    assert decoded(8, 8, 32)
    assert not decoded(8, 8, 33)
    assert decoded(16, 2, 16)
    assert not decoded(16, 2, 17)
    assert decoded(2, 2, 128)
    assert not decoded(2, 2, 129)
    assert parts_of(plan_job("test", *problem(1, 1, 1, PART + 1, 2, 2), {}).plan) == 2
