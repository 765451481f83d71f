"""Masks, biases, dropout, empty rows on the CPU: every layout, and cells that no one may read."""

from __future__ import annotations

import itertools
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from optional import require

require("numba")
import refattn  # noqa: E402
from refattn import cpu  # noqa: E402

N_Q, N_K, H = 151, 293, 3
"""Neither is a multiple of a vector, of a panel or of a tile."""

POISONS = (np.nan, np.inf, 1e30)


def drawn(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def problem(dtype=np.float32, n_q=N_Q, n_k=N_K):
    shapes = ((2, H, n_q, 24), (2, H, n_k, 24), (2, H, n_k, 17), (2, H, n_q, 17))
    return [drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def layouts(array):
    """Yield the same numbers, (b, h, n_q, n_k), at other strides."""
    yield np.ascontiguousarray(array.swapaxes(2, 3)).swapaxes(2, 3)
    yield np.repeat(array, 2, axis=3)[..., ::2]
    yield np.repeat(array, 3, axis=2)[:, :, ::3]
    yield array[:, :, ::-1, ::-1].copy()[:, :, ::-1, ::-1]
    wide = np.concatenate([array, array], axis=3)
    yield wide[..., : array.shape[3]]


def shapes(n_q=N_Q, n_k=N_K):
    """Return the shapes that broadcast to the logits."""
    return [
        (2, H, n_q, n_k), (1, 1, n_q, n_k), (2, 1, 1, n_k), (1, H, 1, n_k), (2, H, n_q, 1),
        (1, 1, n_q, 1), (2, H, 1, 1), (n_q, n_k), (n_k,), (1,),
    ]  # fmt: skip


def same(first, second):
    return all(
        (a is None and b is None) or np.array_equal(a, b, equal_nan=True)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.clause("OWN-MASK1", "OWN-BIAS1")
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_a_bias_means_the_same_at_any_strides_and_broadcast(dtype):
    *arrays, d_output = problem(dtype)
    for shape in shapes():
        bias = drawn(*shape, seed=7).astype(dtype)
        bias[drawn(*shape, seed=8) > 1] = -np.inf
        full = np.broadcast_to(bias, (2, H, N_Q, N_K)).copy()
        whole = cpu.attention(*arrays, bias=full)
        assert same(whole, cpu.attention(*arrays, bias=bias)), shape
        assert same(whole, cpu.attention(*arrays, bias=np.broadcast_to(bias, full.shape)))
    for view in layouts(full := drawn(2, H, N_Q, N_K).astype(dtype)):
        assert same(cpu.attention(*arrays, bias=full), cpu.attention(*arrays, bias=view))
        both = (cpu.attention_backward(d_output, *arrays, bias=b) for b in (full, view))
        assert same(*both)


@pytest.mark.clause("OWN-MASK1")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["mask", "keep"])
def test_a_mask_means_the_same_at_any_strides_and_broadcast(name, dtype):
    *arrays, d_output = problem(dtype)
    more = {"keep_probability": 0.7} if name == "keep" else {}
    for shape in shapes():
        flags = drawn(*shape, seed=3) < 0.6
        full = np.broadcast_to(flags, (2, H, N_Q, N_K)).copy()
        for given in (flags, np.broadcast_to(flags, full.shape)):
            found = cpu.attention(*arrays, **{name: given}, **more)
            assert same(cpu.attention(*arrays, **{name: full}, **more), found), shape
    full = drawn(2, H, N_Q, N_K) < 0.6
    for view in layouts(full):
        found = (
            cpu.attention_backward(d_output, *arrays, **{name: flags}, **more)
            for flags in (full, view)
        )
        assert same(*found)
    odd = (full * np.uint8(6)).view(bool)  # True is any byte but 0
    assert same(*(cpu.attention(*arrays, **{name: f}, **more) for f in (full, odd)))


@pytest.mark.clause("OWN-MASK1")
def test_masks_whose_tiles_are_all_true_or_all_false_agree_with_the_reference():
    *arrays, d_output = problem(n_q=257, n_k=517)
    i, j = np.arange(257)[:, None], np.arange(517)[None, :]
    ways = [
        np.ones((257, 517), bool),
        np.zeros((257, 517), bool),
        i // 64 == j // 128,
        (j >= 384) & (i >= 0),
        (i < 128) & (j >= 0),
        (j < 200)[None, None],
        (i != 70) | (j != 500),
        (i == 70) & (j == 500),
    ]
    for number, mask in enumerate(ways):
        found, exact = (f(*arrays, mask=mask) for f in (cpu.attention, refattn.attention))
        assert np.array_equal(np.isneginf(found.logsumexp), np.isneginf(exact.logsumexp)), number
        assert np.abs(found.output - exact.output).max() < 3e-6, number
        found, exact = (
            f(d_output, *arrays, mask=mask)
            for f in (cpu.attention_backward, refattn.attention_backward)
        )
        for a, b in zip(found[:3], exact[:3], strict=True):
            assert np.abs(a - b).max() <= 3e-6 * max(1, np.abs(b).max()), number


@pytest.mark.clause("OWN-POISON1", "OWN-MASK1", "OWN-BIAS1")
@pytest.mark.parametrize("name", ["mask", "bias"])
@pytest.mark.parametrize("softcap_order", [None, "before_bias", "after_bias"])
def test_what_a_mask_or_a_bias_forbids_is_never_read(name, softcap_order):
    *arrays, d_output = problem()
    query, key, value = arrays
    stained = np.zeros(N_K, bool)
    stained[[0, 5, 17, 130, 131, 255, 292]] = stained[140:260] = True  # a whole tile among them
    allowed = (drawn(2, H, N_Q, N_K) < 0.8) & ~stained
    more = {"softcap": 3.0, "softcap_order": softcap_order} if softcap_order else {}
    for flags in (~stained[None, :], np.broadcast_to(~stained, (N_Q, N_K)).copy(), allowed):
        given = {name: flags}
        if name == "bias":
            given = {"bias": np.where(flags, np.float32(0.5), np.float32(-np.inf))}
        given |= more
        clean = cpu.attention(*arrays, **given)
        gradients = cpu.attention_backward(d_output, *arrays, **given)
        for poison in POISONS:
            k, v = key.copy(), value.copy()
            k[:, :, stained] = v[:, :, stained] = poison
            found = cpu.attention(query, k, v, **given)
            for a, b in zip(clean, found, strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)  # other loops, other sums
            again = cpu.attention_backward(d_output, query, k, v, **given)
            for a, b in zip(gradients[:3], again[:3], strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.clause("OWN-POISON1", "OWN-DROPOUT1")
def test_a_dropped_weight_reads_its_value_and_a_forbidden_one_does_not():
    query, key, value, d_output = problem()
    keep = drawn(2, H, N_Q, N_K) < 0.5
    mask = drawn(2, H, N_Q, N_K, seed=1) < 0.5
    value[:, :, 100, 3] = np.nan
    d_output[:, :, 40, 5] = np.nan
    given = {"keep": keep, "keep_probability": 0.5, "mask": mask}
    found = cpu.attention(query, key, value, **given).output
    exact = refattn.attention(query, key, value, **given).output
    assert np.array_equal(np.isnan(found), np.isnan(exact))
    assert np.array_equal(np.isnan(found[..., 3]), mask[:, :, :, 100])
    value[:, :, 100, 3] = 0
    found = cpu.attention_backward(d_output, query, key, value, **given)
    exact = refattn.attention_backward(d_output, query, key, value, **given)
    for a, b in zip(found[:3], exact[:3], strict=True):
        assert np.array_equal(np.isnan(a), np.isnan(b))


@pytest.mark.clause("OWN-POISON1")
@pytest.mark.parametrize(
    ("name", "poison"),
    [("query", np.nan), ("key", np.nan), ("key", np.inf), ("value", np.inf), ("d_output", np.nan)],
)
def test_where_minus_infinity_is_added_every_cell_is_read(name, poison):
    *arrays, d_output = problem()
    row = {"query": 70, "d_output": 80}.get(name, 288)
    spoilt = arrays[["query", "key", "value"].index(name)] if name != "d_output" else d_output
    spoilt[1, 1, row, 4] = poison
    ways = [
        {"causal": True},
        {"window": [30, 9], "alignment": 60},
        {"key_lengths": np.array([200, 280])},
        {"mask": np.arange(N_K) < 150},
        {"bias": np.where(np.arange(N_K) < 150, 0, -np.inf).astype(np.float32), "softcap": 4.0},
    ]
    for options in ways:
        given = {"masked": "add", **options}
        found, exact = (f(*arrays, **given) for f in (cpu.attention, refattn.attention))
        for a, b in zip(found, exact, strict=True):
            assert np.array_equal(np.isnan(a), np.isnan(b)), options
        found, exact = (
            f(d_output, *arrays, **given)
            for f in (cpu.attention_backward, refattn.attention_backward)
        )
        for a, b in zip(found[:3], exact[:3], strict=True):
            assert np.array_equal(np.isnan(a), np.isnan(b)), options


@pytest.mark.clause("OWN-EMPTY1", "OWN-POISON1")
def test_an_empty_row_reads_what_its_policy_says():
    query, key, value, _ = problem()
    arrays = (query, key, value)
    given = {"query_lengths": np.array([100, 151]), "causal": True, "alignment": -30}
    empty = np.zeros((2, H, N_Q), bool)
    empty[0, :, 100:] = empty[:, :, :30] = True
    value[:, :, 9, 2] = np.inf
    for policy, masked in (("zero", "select"), ("zero", "add"), ("nan", "add"), ("uniform", "add")):
        found = cpu.attention(*arrays, **given, empty_row=policy, masked=masked)
        assert np.array_equal(np.isneginf(found.logsumexp), empty), (policy, masked)
        rows = found.output[empty]
        if policy == "zero":
            assert np.isnan(rows[:, 2]).all() == (masked == "add")  # 0 · ∞
            assert not np.nan_to_num(rows).any()
        elif policy == "nan":
            assert np.isnan(rows).all()
        else:
            exact = np.broadcast_to(value.mean(axis=2)[:, :, None], found.output.shape)[empty]
            np.testing.assert_allclose(rows, exact, rtol=1e-4, atol=1e-6)
    sinks = drawn(H)
    found = cpu.attention(query, key, value, **given, empty_row="nan", sinks=sinks)
    assert not found.output[empty].any()  # a row with a sink is not empty


@pytest.mark.clause("OWN-EMPTY1", "OWN-POISON1", "OWN-BACKWARD1")
@pytest.mark.parametrize("masked", ["select", "add"])
@pytest.mark.parametrize("name", ["query", "key", "value", "d_output"])
def test_what_is_not_a_number_goes_where_the_reference_lets_it_beside_empty_rows(name, masked):
    *arrays, d_output = problem(n_q=37, n_k=61)
    spoilt = d_output if name == "d_output" else arrays[("query", "key", "value").index(name)]
    bias = np.where(np.arange(61) < 40, 0.5, -np.inf).astype(np.float32) * np.ones((37, 1))
    bias = np.where(np.arange(37)[:, None] == 11, -np.inf, bias).astype(np.float32)
    ways = [
        {"query_lengths": np.array([9, 0]), "key_lengths": np.array([50, 61])},
        {"query_lengths": np.array([9, 0]), "sinks": drawn(H)},
        {"causal": True, "alignment": -12, "softcap": 3.0},
        {"bias": bias, "softcap": 3.0, "softcap_order": "after_bias"},
    ]
    for row in (7, 11, 36):  # seen, empty, and beyond every length of the queries
        before = spoilt[0, 1, row, 5]
        spoilt[0, 1, row, 5] = np.nan
        for options, policy in itertools.product(ways, ("zero", "nan", "uniform")):
            given = {"masked": masked, "empty_row": policy, **options}
            forward = (f(*arrays, **given) for f in (cpu.attention, refattn.attention))
            back = (
                f(d_output, *arrays, **given)
                for f in (cpu.attention_backward, refattn.attention_backward)
            )
            for found, exact in (forward, back):
                for a, b in zip(found, exact, strict=True):
                    assert (a is None) == (b is None)
                    assert a is None or np.array_equal(np.isnan(a), np.isnan(b)), (row, given)
        spoilt[0, 1, row, 5] = before


@pytest.mark.clause("OWN-EMPTY1", "OWN-POISON1", "OWN-BACKWARD1")
def test_a_uniform_row_passes_an_infinite_gradient_on_to_every_value():
    *arrays, d_output = problem(n_q=5, n_k=23)
    d_output[0, 1, 3, 2] = np.inf
    mask = np.arange(5)[:, None] != 3
    for masked in ("select", "add"):
        given = {"mask": mask, "empty_row": "uniform", "masked": masked}
        d_value = cpu.attention_backward(d_output, *arrays, **given).d_value
        assert np.isposinf(d_value[0, 1, :, 2]).all(), masked
        assert np.isfinite(d_value).sum() == d_value.size - 23


@pytest.mark.clause("OWN-BIAS1", "OWN-BACKWARD1")
@pytest.mark.parametrize("group", [1, 3])
def test_the_gradient_of_a_bias_is_the_sum_over_all_that_it_is_added_to(group):
    query, key, value, d_output = problem(np.float64)
    key, value = (a[:, :: 3 if group == 3 else 1] for a in (key, value))
    full = np.zeros((2, H, N_Q, N_K))
    every = cpu.attention_backward(d_output, query, key, value, bias=full, causal=True).d_bias
    for shape in [*shapes(), (1, H, N_Q, N_K), (2, 1, N_Q, N_K), ()]:
        given = {"bias": np.zeros(shape), "causal": True}
        found = [
            cpu.attention_backward(d_output, query, key, value, threads=n, **given).d_bias
            for n in (1, 2, 3)
        ]
        lead = (1,) * (4 - len(shape)) + shape
        axes = tuple(a for a, n in enumerate(lead) if n == 1)
        np.testing.assert_allclose(
            found[0], every.sum(axis=axes, keepdims=True).reshape(shape), atol=1e-12
        )
        assert same(found, [found[0]] * 3), shape


@pytest.mark.clause("OWN-BIAS1")
def test_the_gradient_of_a_shared_bias_takes_no_matrix_a_head():
    n, heads = 512, 16
    query, key, value, d_output = (drawn(1, heads, n, 16, seed=i) for i in range(4))
    bias = drawn(1, 1, n, n)
    cpu.attention_backward(d_output, query, key, value, bias=bias)
    tracemalloc.start()
    cpu.attention_backward(d_output, query, key, value, bias=bias)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < heads * n * n * 4


@pytest.mark.clause("ALIBI-S3a", "NUM-MODEL1")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_below_the_normal_numbers_vanish_and_arithmetic_outside_keeps_them(dtype):
    *arrays, d_output = problem(dtype)
    slopes = np.array([0.7, 2.0, 9.0], dtype)
    found, exact = (f(*arrays, slopes=slopes) for f in (cpu.attention, refattn.attention))
    assert np.abs(found.output - exact.output).max() < 64 * np.finfo(dtype).eps
    cpu.attention_backward(d_output, *arrays, slopes=slopes)
    tiny = np.finfo(dtype).tiny
    assert (np.full(9, tiny) / dtype(4)).all()  # the control word is as it was
