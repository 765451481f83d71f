"""Few queries and many keys: keys are split among blocks and warps, and parts become one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import refattn
from cpu_draws import draw, widened
from cuda_cases import CASES, RUN, complaints, fits, forward
from optional import require_device
from refattn.arrays import numpy_dtype
from refattn_gpu import cuda
from refattn_gpu.cuda import emulate
from refattn_gpu.cuda.attention import emulated, kernel_for, parts_of, result_of
from refattn_gpu.cuda.catalogue import FORMATS, SMALL_SPLIT, Tile, Variant, variant_of, variants
from refattn_gpu.cuda.problem import problem_of

JUDGED = [(name, dtype) for name in RUN for dtype in FORMATS if fits(CASES[name], dtype, "split")]
"""Vectors and formats that the kernel claims."""

LEAST = 792
"""Those that run."""

SIZES = [1, 2, 5, 17, 33], [1, 3, 31, 65, 97, 193], [1, 8, 15, 24, 33, 64]
"""Queries, keys and features; splits end off the edges of most."""


@pytest.fixture(autouse=True)
def _gxx() -> None:
    require_device("gxx", emulate.no_gxx())


def problem(
    n_q: int = 3, n_k: int = 149, d: int = 24, h: int = 4, h_k: int = 2, dtype: str = "float16"
) -> list[np.ndarray]:
    shapes = (2, h, n_q, d), (2, h_k, n_k, d), (2, h_k, n_k, 16)
    drawn = np.random.default_rng([n_q, n_k, d])
    return [drawn.standard_normal(shape).astype(numpy_dtype(dtype)) for shape in shapes]


def run(
    arrays: list[np.ndarray], tile: Tile = SMALL_SPLIT, backwards: bool = False, **options: Any
) -> Any:
    given: Any = options
    found = problem_of("test", *arrays, given)
    emulated(found, tile, kernel="split", backwards=backwards)
    return result_of(found, arrays[0], arrays[2])


def off(found: Any, true: Any) -> float:
    found, true = np.asarray(found, np.float64), np.asarray(true, np.float64)
    assert np.array_equal(np.isfinite(found), np.isfinite(true))
    finite = np.isfinite(true)
    return float(np.abs(found[finite] - true[finite]).max(initial=0.0))


@pytest.mark.parametrize(("name", "dtype"), JUDGED)
def test_the_kernel_agrees_with_the_certified_values(name: str, dtype: str) -> None:
    for tile in (SMALL_SPLIT, None) if dtype == "float16" else (SMALL_SPLIT,):
        outputs = forward(CASES[name], dtype, tile, kernel="split")
        assert not complaints(CASES[name], outputs, dtype)


def test_enough_vectors_run() -> None:
    assert len(JUDGED) >= LEAST


@pytest.mark.clause("VAS-EQ1", "FA1-ALG1", "OWN-ROUND1", "OWN-GQA1", "OWN-LENGTH1", "OWN-SINK1")
@pytest.mark.clause("OWN-EMPTY1", "OWN-SOFTCAP1", "ALIBI-S3a", "OWN-WINDOW1", "OWN-DROPOUT1")
@pytest.mark.parametrize("first", range(0, 60, 10))
def test_every_option_agrees_with_the_reference(first: int) -> None:
    for seed in range(first, first + 10):
        arrays, options = draw(seed, *SIZES)
        dtype = numpy_dtype(FORMATS[seed % 3])
        narrow = {
            n: x.astype(dtype) if n in ("bias", "slopes", "sinks") else x
            for n, x in options.items()
        } | {"empty_row": "zero", "masked": "select"}
        arrays = [array.astype(dtype) for array in arrays]
        found = run(arrays, **narrow)
        wide, wide_options = widened(arrays, narrow)
        true = refattn.attention(*wide, **wide_options)
        near = {"float16": 4e-3, "bfloat16": 4e-2, "float32": 1e-5}[dtype.name]
        assert off(found.output, true.output) <= near * (1 + np.abs(true.output).max(initial=0))
        assert off(found.logsumexp, true.logsumexp) <= 1e-4, seed


@pytest.mark.clause("FA1-ALG1")
@pytest.mark.parametrize(
    "variant",
    [variant for variant in variants() if variant.kernel == "split"],
    ids=lambda variant: variant.name,
)
def test_the_tiles_of_a_device_agree_with_the_reference(variant: Variant) -> None:
    d = variant.features - 8
    arrays = problem(n_k=variant.tile.split + 67, d=d, dtype=variant.dtype)
    options: Any = {"softcap": 20.0} if variant.terms else {}
    found = run(arrays, variant.tile, **options)
    wide, wide_options = widened(arrays, options)
    true = refattn.attention(*wide, **wide_options)
    near = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 1e-5}[variant.dtype]
    assert off(found.output, true.output) <= near
    assert off(found.logsumexp, true.logsumexp) <= 1e-4


def test_the_bits_depend_neither_on_the_order_of_threads_nor_on_what_stands_beside() -> None:
    arrays = problem(n_q=7)  # rows of 14 a key-value head
    whole = run(arrays, causal=True)
    assert all(map(np.array_equal, whole, run(arrays, causal=True, backwards=True)))
    alone = run([array[1:, -1:] for array in arrays], causal=True)
    assert all(np.array_equal(a[1:, -1:], b) for a, b in zip(whole, alone, strict=True))
    query, key, value = arrays
    later = run([query[:, :, 4:], key, value], causal=True, alignment=4)
    assert all(np.array_equal(a[:, :, 4:], b) for a, b in zip(whole, later, strict=True))


@pytest.mark.parametrize("n_k", [40, 64, 97])
def test_keys_that_a_row_does_not_see_change_no_bit_of_it(n_k: int) -> None:
    query, key, value = problem()
    whole = run([query, key, value], causal=True, alignment=n_k - 3)
    cut = run([query, key[:, :, :n_k], value[:, :, :n_k]], causal=True, alignment=n_k - 3)
    assert all(map(np.array_equal, whole, cut))
    shorter = run([query, key, value], key_lengths=np.array([n_k, n_k]))
    assert np.array_equal(shorter.output, run([query, key[:, :, :n_k], value[:, :, :n_k]]).output)


@pytest.mark.clause("OWN-POISON1")
@pytest.mark.parametrize("dtype", FORMATS)
def test_what_is_forbidden_is_never_read(dtype: str) -> None:
    query, key, value = problem(dtype=dtype)
    lengths = np.array([70, 70])
    clean = run([query, key, value], key_lengths=lengths)
    seen = run([query, key, value], mask=np.arange(149) % 5 > 0)
    key, value = key.copy(), value.copy()
    key[:, :, 70:], value[:, :, 70:] = np.inf, np.nan
    assert all(map(np.array_equal, clean, run([query, key, value], key_lengths=lengths)))
    query, key, value = problem(dtype=dtype)
    key[:, :, ::5], value[:, :, ::5] = np.inf, np.nan
    stained = run([query, key, value], mask=np.arange(149) % 5 > 0)
    assert off(stained.output, seen.output) <= 0.02  # rows made again keep float32
    assert np.array_equal(stained.logsumexp, seen.logsumexp)


@pytest.mark.clause("OWN-EMPTY1", "OWN-LSE1")
@pytest.mark.parametrize("sunk", [False, True])
def test_a_row_without_keys_is_zeros(sunk: bool) -> None:
    query, key, value = problem()
    sinks = {"sinks": np.float16([0.5, -1, 0, 2])} if sunk else {}
    for options in (
        {"key_lengths": np.array([0, 0])},
        {"causal": True, "alignment": -(2**40)},
        {"mask": np.zeros(149, bool)},
    ):
        found = run([query, key, value], **options, **sinks)
        assert not found.output.any()
        expected = np.float32([0.5, -1, 0, 2])[None, :, None] if sunk else -np.inf
        assert np.array_equal(found.logsumexp, np.broadcast_to(expected, (2, 4, 3)))


@pytest.mark.parametrize("n_q", [0, 1])
def test_axes_without_numbers_are_taken(n_q: int) -> None:
    query, key, value = problem(n_q=1)
    assert run([query[:, :, :n_q], key, value]).output.shape == (2, 4, n_q, 16)
    assert run([query[:0], key[:0], value[:0]]).output.shape == (0, 4, 1, 16)


def test_a_few_queries_are_split_whatever_the_batch_and_the_keys() -> None:
    for b, n_k in ((1, 3), (1, 149), (2, 149)):
        query, key, value = (array[:b] for array in problem(n_k=n_k))
        assert kernel_for(problem_of("test", query, key, value, {})) == "split"
    many = problem(n_q=9)  # 18 rows a key-value head
    assert kernel_for(problem_of("test", *many, {})) == "forward"
    assert kernel_for(problem_of("test", *problem(n_q=16, h_k=4), {})) == "split"
    assert kernel_for(problem_of("test", *problem(d=200, dtype="float32"), {})) == "ffma"
    arrays = problem()
    assert all(
        map(np.array_equal, cuda.attention(*arrays), cuda.attention(*arrays, kernel="split"))
    )


def test_parts_take_the_room_that_is_told() -> None:
    found = problem_of("test", *problem(), {})
    tile = variant_of("float16", 24, terms=False, kernel="split").tile
    room = parts_of(variant_of("float16", 24, terms=False, kernel="split"), found)
    parts = 2 * 4 * 3 * -(-149 // tile.split) * tile.warps
    assert sum(array.nbytes for array in room) == 4 * parts * (16 + 2)
    assert parts_of(variant_of("float16", 24, terms=False), found) == []
