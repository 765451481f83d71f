"""Attention on the CPU: every option against the reference, and what only kernels get wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest

from cpu_draws import draw, widened
from optional import require

require("numba")
import refattn  # noqa: E402
from refattn import cpu  # noqa: E402
from refattn.backends import Unsupported, load  # noqa: E402
from refattn.checks import DtypeError, OptionError, ShapeError  # noqa: E402
from refattn.cpu import pool, tiling  # noqa: E402
from refattn.cpu.host import lanes  # noqa: E402


def drawn(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def problem(n_q=97, n_k=131, d=40, d_v=24, h=3, dtype=np.float32):
    return (
        drawn(2, h, n_q, d, dtype=dtype),
        drawn(2, h, n_k, d, dtype=dtype),
        drawn(2, h, n_k, d_v, dtype=dtype, seed=1),
    )


def worst(found, exact):
    found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    assert np.array_equal(np.isfinite(found), np.isfinite(exact))
    finite = np.isfinite(exact)
    return np.abs(found[finite] - exact[finite]).max(initial=0.0)


@pytest.mark.clause("VAS-EQ1", "FA1-ALG1", "OWN-ROUND1", "OWN-GQA1", "OWN-LENGTH1", "OWN-SINK1")
@pytest.mark.parametrize("first", range(0, 120, 10))
def test_every_option_agrees_with_the_reference(first):
    for seed in range(first, first + 10):
        arrays, options = draw(seed)
        before = [array.copy() for array in arrays]
        found = cpu.attention(*arrays, threads=1 + seed % 3, **options)
        rounded = refattn.attention(*arrays, **options)
        wide, wide_options = widened(arrays, options)
        exact = refattn.attention(*wide, **wide_options)
        assert all(np.array_equal(a, b, True) for a, b in zip(before, arrays, strict=True))
        for got, same, true in zip(found, rounded, exact, strict=True):
            assert (got.shape, got.dtype) == (same.shape, same.dtype), seed
            eps = float(np.finfo(np.float64 if got.dtype == np.float64 else np.float32).eps)
            # the reference's own rounding, and that of logits of ordinary size
            assert worst(got, true) <= 3 * worst(same, true) + 64 * eps, seed


@pytest.mark.clause("OWN-POISON1")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_forbidden_is_never_read(dtype):
    query, key, value = problem(dtype=dtype)
    ways = {
        "causal": ({"causal": True}, slice(97, 131)),
        "window": ({"window": [5, 3]}, slice(101, 131)),
        "mask": ({"mask": (np.arange(131) % 7 > 0)[None, :]}, slice(0, 131, 7)),
        "lengths": ({"key_lengths": np.array([90, 50])}, slice(90, 131)),
        "bias": ({"bias": np.where(np.arange(131) < 60, 0, -np.inf).astype(dtype)}, slice(60, 131)),
        "capped": ({"causal": True, "softcap": 2.0}, slice(97, 131)),
    }
    for name, (options, rows) in ways.items():
        clean = cpu.attention(query, key, value, **options)
        for poison in (np.nan, np.inf, 1e30):
            k, v = key.copy(), value.copy()
            k[:, :, rows] = v[:, :, rows] = poison
            stained = cpu.attention(query, k, v, **options)
            assert all(map(np.array_equal, clean, stained)), (name, poison)


@pytest.mark.clause("OWN-POISON1")
def test_a_row_of_poison_reaches_the_queries_that_may_read_it_and_no_other():
    query, key, value = problem(n_q=131)
    value[:, :, 70] = np.nan
    output = cpu.attention(query, key, value, causal=True).output
    assert np.isfinite(output[:, :, :70]).all()
    assert np.isnan(output[:, :, 70:]).all()


@pytest.mark.clause("OWN-EMPTY1", "OWN-LSE1")
def test_an_empty_row_is_zero_and_its_logsumexp_is_minus_infinity():
    query, key, value = problem()
    found = cpu.attention(query, key, value, causal=True, alignment=-50)
    assert not found.output[:, :, :50].any()
    assert np.isneginf(found.logsumexp[:, :, :50]).all()
    assert np.isfinite(found.logsumexp[:, :, 50:]).all()


@pytest.mark.clause("OWN-SINK1")
def test_a_sink_alone_leaves_a_row_of_zeros_and_its_own_logit():
    query, key, value = problem()
    sinks = np.array([-2, 0.5, 7], np.float32)
    found = cpu.attention(query, key, value, sinks=sinks, query_lengths=np.array([97, 0]))
    assert not found.output[1].any()
    np.testing.assert_array_equal(found.logsumexp[1], np.repeat(sinks[:, None], 97, axis=1))


@pytest.mark.clause("FA1-ALG1")
@pytest.mark.parametrize("magnitude", [1e4, -84000.0])
def test_large_logits_neither_overflow_nor_vanish(magnitude):
    query, key, value = problem(d=16)
    key[..., 0], query[..., 0] = 1.0, magnitude
    found = cpu.attention(query, key, value, scale=1.0)
    wide = (array.astype(np.float64) for array in (query, key, value))
    exact = refattn.attention(*wide, scale=1.0)
    assert worst(found.output, exact.output) < 0.05  # a logit is off by up to 2^-24 of 84000
    assert worst(found.logsumexp / magnitude, exact.logsumexp / magnitude) < 1e-6


@pytest.mark.clause("FA1-ALG1")
@pytest.mark.parametrize("d", [1, 2, 63, 127, 256, 511, 512])
def test_any_feature_size_is_taken(d):
    query, key, value = problem(n_q=67, n_k=71, d=d, d_v=d, h=1)
    wide = (array.astype(np.float64) for array in (query, key, value))
    found, exact = cpu.attention(query, key, value), refattn.attention(*wide)
    assert worst(found.output, exact.output) < 3e-6


@pytest.mark.clause("FA1-ALG1")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_bits_do_not_depend_on_the_number_of_threads(dtype):
    query, key, value = problem(n_q=531, n_k=523, d=64, d_v=64, dtype=dtype)
    for options in ({}, {"causal": True}, {"window": [100, 20]}):
        first = cpu.attention(query, key, value, threads=1, **options)
        for threads in (1, 2, 3, 7):
            again = cpu.attention(query, key, value, threads=threads, **options)
            assert all(map(np.array_equal, first, again))


def test_the_bits_of_a_head_do_not_depend_on_the_heads_beside_it():
    query, key, value = (np.random.default_rng(3).standard_normal((2, 9, 700, 16)) for _ in "qkv")
    assert tiling.panels(18, 700, 16, 16, lanes(8)) != tiling.panels(1, 700, 16, 16, lanes(8))
    options = {"window": (150, 90)}
    whole = cpu.attention(query, key, value, **options)
    alone = cpu.attention(*(x[1:, 4:5] for x in (query, key, value)), **options)
    for a, b in zip(whole, alone, strict=True):
        assert np.array_equal(a[1:, 4:5], b)


def test_several_python_threads_may_call_at_once():
    arrays = [problem(n_q=311 + i, n_k=257, d=64, d_v=64) for i in range(4)]
    expected = [cpu.attention(*a, causal=True) for a in arrays]
    failures = []

    def work(i):
        for _ in range(5):
            found = cpu.attention(*arrays[i], causal=True, threads=2)
            if not all(map(np.array_equal, expected[i], found)):
                failures.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_the_number_of_threads_is_that_of_numba_unless_given():
    import numba

    assert pool.default_threads() == numba.config.NUMBA_NUM_THREADS
    assert pool.thread_count("f", 3) == 3
    with pytest.raises(OptionError, match="threads is 0, but it must be an integer of at least 1"):
        cpu.attention(*problem(), threads=0)


@pytest.mark.clause("OWN-MEMORY1")
def test_memory_grows_with_the_length_and_not_with_its_square():
    peaks = []
    for n in (2048, 8192):
        query, key, value = (drawn(1, 1, n, 16)[:, :, ::1] for _ in range(3))
        cpu.attention(query, key, value, causal=True)
        tracemalloc.start()
        cpu.attention(query, key, value, causal=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] <= 1.1 * 6144 * (16 + 1) * 4  # output and logsumexp


def test_strides_do_not_change_the_bits():
    query, key, value = problem()
    spread = [np.repeat(a, 2, axis=2)[:, :, ::2] for a in (query, key, value)]
    for a, b in zip(cpu.attention(query, key, value), cpu.attention(*spread), strict=True):
        assert np.array_equal(a, b)


def test_axes_are_added_where_the_reference_needs_none():
    query, key, value = problem()
    whole = cpu.attention(query, key, value)
    part = cpu.attention(query[1, 2], key[1, 2], value[1, 2])
    assert np.array_equal(part.output, whole.output[1, 2])
    assert part.logsumexp.shape == (97,)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"round_weights": True}, "round_weights is True, but the CPU kernels support False"),
    ],
)
def test_what_is_not_claimed_is_refused(options, sentence):
    with pytest.raises(Unsupported, match=sentence):
        cpu.attention(*problem(), **options)


def test_bad_arguments_are_refused_as_by_the_reference():
    query, key, value = problem()
    with pytest.raises(ShapeError, match=r"key has d_k=39, but query has d_k=40; they must be"):
        cpu.attention(query, key[..., :39], value)
    with pytest.raises(DtypeError, match="value has dtype float64, but query has dtype float32"):
        cpu.attention(query, key, value.astype(np.float64))
    with pytest.raises(OptionError, match="no_such is no option of attention"):
        cpu.attention(query, key, value, no_such=1)
    with pytest.raises(ShapeError, match="mask has shape"):
        cpu.attention(query, key, value, mask=np.ones((3, 3), bool))


def test_the_backend_declines_what_the_kernels_do_not_claim():
    inputs = dict(zip(("query", "key", "value"), problem(), strict=True))
    with pytest.raises(Unsupported, match="op is merge, but backend numba claims attention"):
        load("numba").run("merge", {}, {}, {}, "float32")
    with pytest.raises(Unsupported, match="dtype is int8, but backend numba claims float64"):
        load("numba").run("attention", inputs, {}, {}, "int8")


def test_read_only_arguments_need_no_kernel_of_their_own():
    from refattn.cpu.forward import forward

    query, key, value = problem()
    given = {"key_lengths": np.array([90, 50]), "sinks": drawn(3), "slopes": drawn(3)}
    for array in (query, key, value, *given.values()):
        array.flags.writeable = False
    cpu.attention(query, key, value, **given)
    formats = [signature[0] for signature in forward.signatures]
    assert len(formats) == len(set(formats)) <= 2


SCRIPT = """
import sys
import numpy as np
from refattn import cpu
from refattn.cpu.compiling import FOLDER
x = np.ones((1, 1, 9, 5), sys.argv[1])
assert np.array_equal(cpu.attention(x, x, x).output, x), "wrong"
print(len(list(FOLDER.glob("*.nbc"))))
"""
"""Calls the kernel once in a fresh process."""


def test_processes_that_start_at_once_share_one_cache(tmp_path):
    given = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    runs = [
        subprocess.Popen([*command, dtype], env=given, stdout=subprocess.PIPE, text=True)
        for dtype in ("float32", "float64", "float32")
    ]
    outputs = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    again = subprocess.run([*command, "float64"], env=given, capture_output=True, text=True)
    assert again.stdout.split() == ["2"], (outputs, again.stderr)  # one file a format, none twice


@pytest.mark.clause("VAS-EQ1", "FA1-ALG1", "OWN-SINK1", "OWN-LSE1")
@pytest.mark.parametrize("n_q", [1, 70])
@pytest.mark.parametrize("sinks", [None, [3.0, -np.inf]])
def test_logits_far_beyond_the_precision_of_powers_of_two_have_weights(n_q, sinks):
    # whole multiples of a large number: products and sums are exact in float32
    whole = np.random.default_rng(n_q).integers
    query, key = (
        whole(-9, 10, (1, 2, n, 4)).astype(np.float32) * np.float32(2.0**22) for n in (n_q, 301)
    )
    value = drawn(1, 2, 301, 3).astype(np.float32)
    options = {"scale": 0.3} | ({} if sinks is None else {"sinks": np.float32(sinks)})
    found = cpu.attention(query, key, value, **options)
    wide = [array.astype(np.float64) for array in (query, key, value)]
    exact = refattn.attention(*wide, **{k: np.float64(v) for k, v in options.items()})
    assert np.abs(exact.logsumexp).min() > 2.0**36
    np.testing.assert_allclose(found.output, exact.output, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.logsumexp, exact.logsumexp, rtol=1e-6)
