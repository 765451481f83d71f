"""The backward pass in CUDA C++, emulated: every option, and what only kernels get wrong."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import refattn
from cpu_draws import draw, widened
from cuda_cases import differentiated
from optional import require_device
from refattn.backends import Unsupported
from refattn.checks import DtypeError, ShapeError
from refattn_gpu import cuda
from refattn_gpu.cuda import emulate, machine
from refattn_gpu.cuda.attention import emulated
from refattn_gpu.cuda.attention_backward import emulated as emulated_kernel
from refattn_gpu.cuda.attention_backward import gradients_of, prepare
from refattn_gpu.cuda.catalogue import SMALL, Tile, Variant, backward_variants, variants
from refattn_gpu.cuda.problem import address, problem_of

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}

SIZES = [1, 5, 17, 33, 67, 129], [1, 3, 16, 31, 65, 97], [1, 8, 15, 24, 33, 64]
"""Queries, keys and features; tiles end off the edges of most."""

WIDE = Tile(64, 32, 2, 1, False)
"""A tile whose warps have 32 rows."""


@pytest.fixture(autouse=True)
def _gxx() -> None:
    require_device("gxx", emulate.no_gxx())


def problem(
    n_q: int = 37, n_k: int = 53, d: int = 24, d_v: int = 16, h: int = 2, dtype: str = "float16"
) -> list[np.ndarray]:
    """Return dO, Q, K and V."""
    shapes = (2, h, n_q, d_v), (2, h, n_q, d), (2, h, n_k, d), (2, h, n_k, d_v)
    drawn = np.random.default_rng([n_q, n_k, d])
    return [drawn.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes]


def run(arrays: list[np.ndarray], tile: Tile | None, **options: Any) -> Any:
    given: Any = {n: x for n, x in options.items() if n not in ("backwards", "d_logsumexp")}
    more = {"backwards": options.get("backwards", False)}
    d_logsumexp = options.get("d_logsumexp")
    return differentiated(arrays[1:], arrays[0], d_logsumexp, given, tile, **more)


def exact(arrays: list[np.ndarray], **options: Any) -> Any:
    if (dL := options.get("d_logsumexp")) is not None:
        options["d_logsumexp"] = dL.astype(np.float64)
    wide, wide_options = widened(arrays, options)
    return refattn.attention_backward(*wide, **wide_options)


def off(found: Any, true: Any) -> float:
    """Return the largest error over the largest number, or over 1."""
    if true is None:
        return 0.0 if found is None else np.inf
    found, true = np.asarray(found, np.float64), np.asarray(true, np.float64)
    assert found.shape == true.shape
    assert np.array_equal(np.isfinite(found), np.isfinite(true))
    finite = np.isfinite(true)
    size = 1 + np.abs(true[finite]).max(initial=0.0)
    return float(np.abs(found[finite] - true[finite]).max(initial=0.0) / size)


def near(dtype: np.dtype) -> float:
    """Return the error granted to a gradient of ordinary size."""
    return 4e-5 if dtype == np.float32 else 8 * float(ml_dtypes.finfo(dtype).eps)


@pytest.mark.clause("FA1-ALG4", "OWN-BACKWARD1", "OWN-GQA1", "OWN-LENGTH1", "OWN-SINK1")
@pytest.mark.clause("OWN-EMPTY1", "OWN-SOFTCAP1", "ALIBI-S3a", "OWN-WINDOW1", "OWN-DROPOUT1")
@pytest.mark.parametrize("first", range(0, 60, 10))
def test_every_option_agrees_with_the_reference(first: int) -> None:
    for seed in range(first, first + 10):
        arrays, options = draw(seed, *SIZES)
        dtype = list(DTYPES.values())[seed % 3]
        narrow = {
            n: x.astype(dtype) if n in ("bias", "slopes", "sinks") else x
            for n, x in options.items()
        } | {"empty_row": "zero", "masked": "select"}
        drawn = np.random.default_rng(seed)
        d_output = drawn.standard_normal((*arrays[0].shape[:3], arrays[2].shape[3])).astype(dtype)
        arrays = [d_output, *(array.astype(dtype) for array in arrays)]
        before = [array.copy() for array in arrays]
        if seed % 2:
            narrow["d_logsumexp"] = drawn.standard_normal(d_output.shape[:3]).astype(dtype)
        found, true = run(arrays, SMALL, **narrow), exact(arrays, **narrow)
        assert all(np.array_equal(a, b, True) for a, b in zip(before, arrays, strict=True))
        for name, a, b in zip(found._fields, found, true, strict=True):
            loose = 16 if name == "d_slopes" else 1  # distances weigh the error of D
            assert off(a, b) <= loose * near(dtype), (seed, name)
            assert a is None or a.dtype == dtype


@pytest.mark.clause("FA1-ALG4")
@pytest.mark.parametrize(
    "variant",
    [variant for variant in variants() if variant.kernel == "backward_query"],
    ids=lambda variant: variant.name,
)
def test_the_tiles_of_a_device_give_the_gradients(variant: Variant) -> None:
    d = variant.features - 8
    arrays = problem(n_q=131, n_k=139, d=d, d_v=d, h=1, dtype=variant.dtype)
    options: dict[str, Any] = {"causal": True, "alignment": "bottom_right"}
    if variant.terms:
        options["softcap"] = 20.0
    found, true = run(arrays, None, **options), exact(arrays, **options)
    assert max(map(off, found[:3], true[:3])) <= near(DTYPES[variant.dtype])


@pytest.mark.parametrize("tile", [SMALL, WIDE])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_bits_depend_neither_on_the_order_of_threads_nor_on_the_batch(
    tile: Tile, dtype: str
) -> None:
    arrays = problem(dtype=dtype)
    whole = run(arrays, tile, causal=True)[:3]
    again = run(arrays, tile, causal=True, backwards=True)[:3]
    assert all(map(np.array_equal, whole, again))
    alone = run([array[1:, 1:] for array in arrays], tile, causal=True)[:3]
    assert all(np.array_equal(a[1:, 1:], b) for a, b in zip(whole, alone, strict=True))


def test_a_query_does_not_depend_on_the_rows_after_it() -> None:
    arrays = problem(n_q=53)
    whole = run(arrays, SMALL, causal=True).d_query
    for n in (16, 17, 32, 48):
        cut = run([array[:, :, :n] for array in arrays], SMALL, causal=True).d_query
        assert np.array_equal(whole[:, :, :n], cut)


@pytest.mark.clause("OWN-POISON1")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_forbidden_is_never_read(dtype: str) -> None:
    arrays = problem(n_q=11, n_k=19, dtype=dtype)
    forbidding = {
        "causal": ({"causal": True}, slice(11, 19)),
        "mask": ({"mask": (np.arange(19) % 7 > 0)[None, :]}, slice(0, 19, 7)),
        "lengths": ({"key_lengths": np.array([9, 9])}, slice(9, 19)),
    }
    for name, (options, rows) in forbidding.items():
        clean = run(arrays, SMALL, **options)
        d_output, query, key, value = (array.copy() for array in arrays)
        key[:, :, rows], value[:, :, rows] = np.inf, np.nan
        stained = run([d_output, query, key, value], SMALL, **options)
        for a, b in zip(stained[:3], clean[:3], strict=True):
            assert off(a, b) <= near(DTYPES[dtype]), name  # rows made again keep float32
        assert not stained.d_key[:, :, rows].astype(np.float32).any(), name


@pytest.mark.clause("OWN-POISON1")
def test_a_query_that_nothing_reads_may_hold_anything() -> None:
    arrays = problem(n_q=19, n_k=11)
    lengths, sinks = np.array([13, 13]), np.float16([0.5, -1])
    options: dict[str, Any] = {"causal": True, "query_lengths": lengths, "sinks": sinks}
    clean = run(arrays, SMALL, **options)
    d_output, query, key, value = (array.copy() for array in arrays)
    d_output[:, :, 13:], query[:, :, 13:] = np.nan, np.inf
    stained = run([d_output, query, key, value], SMALL, **options)
    assert all(map(np.array_equal, stained[:3], clean[:3]))
    assert np.array_equal(stained.d_sinks, clean.d_sinks)
    assert stained.d_sinks.all()
    assert not clean.d_query[:, :, 13:].any()


def test_a_poisoned_gradient_reaches_the_keys_that_its_row_reads_and_no_other() -> None:
    d_output, query, key, value = problem(n_q=37, n_k=37)
    d_output[:, :, 9] = np.nan
    found = run([d_output, query, key, value], SMALL, causal=True)
    for gradient in (found.d_key, found.d_value):
        assert np.isnan(gradient[:, :, :10]).all()
        assert np.isfinite(gradient[:, :, 10:]).all()
    assert np.isnan(found.d_query).all(axis=(0, 1, 3)).nonzero()[0].tolist() == [9]


@pytest.mark.clause("OWN-CAUSAL1", "OWN-EMPTY1")
@pytest.mark.parametrize("offset", [-(2**62), 2**62])
def test_the_farthest_offsets_leave_no_key_or_every_key(offset: int) -> None:
    arrays = problem()
    found = run(arrays, SMALL, causal=True, alignment=offset)
    if offset < 0:
        assert not any(gradient.any() for gradient in found[:3])
    else:
        assert all(map(np.array_equal, found[:3], run(arrays, SMALL)[:3]))


def test_a_forward_result_that_is_given_is_not_computed_again() -> None:
    d_output, *arrays = problem(n_q=19, n_k=11)
    forward = cuda.attention(*arrays)
    given = cuda.attention_backward(d_output, *arrays, forward=forward)
    again = cuda.attention_backward(d_output, *arrays)
    assert all(map(np.array_equal, given[:3], again[:3]))
    assert max(map(off, again[:3], exact([d_output, *arrays])[:3])) <= near(DTYPES["float16"])
    other = forward._replace(logsumexp=forward.logsumexp + 1)
    moved = cuda.attention_backward(d_output, *arrays, forward=other)
    assert not np.array_equal(moved.d_value, given.d_value)


def test_a_job_may_be_moved_to_copies_of_its_arrays() -> None:
    d_output, *operands = problem(d=16)
    options: Any = {"slopes": np.float16([0.5, 0.25]), "bias": np.zeros((37, 53), np.float16)}
    here = run([d_output, *operands], SMALL, **options)
    there = problem_of("test", *operands, options)
    emulated(there, SMALL)
    gradients = prepare(there, d_output, None, None, options)
    for variant in backward_variants("float16", 16, terms=True):
        hosts = [*there.arrays, there.logsumexp, *gradients]
        copies = [aligned_copy(machine.raw_bytes(host)) for host in hosts]
        job = machine.relocated(there.job, hosts, [address(copy) for copy in copies])
        moved = there._replace(job=job, arrays=copies)
        emulated_kernel(variant, moved, gradients, tile=SMALL)
        for host, copy in zip(gradients, copies[-len(gradients) :], strict=True):
            machine.raw_bytes(host)[:] = copy
    found = gradients_of(there, gradients, tuple(operands), options)
    assert all(map(np.array_equal, here[:5], found[:5]))
    assert here.d_bias.any()


def aligned_copy(data: np.ndarray) -> np.ndarray:
    room = np.zeros(data.size + 16, np.uint8)
    copy = room[-address(room) % 16 :][: data.size]
    copy[:] = data
    return copy


def test_axes_are_added_where_the_reference_needs_none() -> None:
    arrays = [array[1, 1] for array in problem()]
    found = cuda.attention_backward(*arrays)
    assert max(map(off, found[:3], exact(arrays)[:3])) <= near(DTYPES["float16"])
    empty = cuda.attention_backward(arrays[0][:0], arrays[1][:0], *arrays[2:])
    assert empty.d_query.shape == (0, 24)
    assert not empty.d_key.any()
    assert not empty.d_value.any()


def test_what_is_not_claimed_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"257 features, but .* at most 256 in float16 \[cuda.at"):
        cuda.attention_backward(*problem(d=257))
    with pytest.raises(Unsupported, match=r"129 features, but .* at most 128 in float32"):
        cuda.attention_backward(*problem(d=129, dtype="float32"))
    with pytest.raises(Unsupported, match="empty_row is 'nan'"):
        cuda.attention_backward(*problem(), empty_row="nan")


def test_bad_arguments_are_refused_as_by_the_reference() -> None:
    d_output, query, key, value = problem()
    with pytest.raises(ShapeError, match="d_output"):
        cuda.attention_backward(d_output[:, :, 1:], query, key, value)
    with pytest.raises(DtypeError, match="d_output has dtype float32"):
        cuda.attention_backward(d_output.astype(np.float32), query, key, value)
    forward = refattn.attention(*(x.astype(np.float32) for x in (query, key, value)))
    with pytest.raises(DtypeError, match="output has dtype float32"):
        cuda.attention_backward(d_output, query, key, value, forward=forward)
