"""The kernels in CUDA C++, emulated: every option, and what only kernels get wrong."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import refattn
from cpu_draws import draw, widened
from optional import require_device
from refattn.backends import BackendAbsent, Unsupported
from refattn.checks import DtypeError, OptionError, ShapeError
from refattn_gpu import cuda
from refattn_gpu.cuda import emulate, machine
from refattn_gpu.cuda.attention import emulated, result_of
from refattn_gpu.cuda.catalogue import FORMATS, SMALL, Tile, variant_of, variants
from refattn_gpu.cuda.problem import address, aligned, problem_of

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}

SIZES = [1, 5, 17, 33, 67, 129], [1, 3, 16, 31, 65, 97], [1, 8, 15, 24, 33, 64]
"""Queries, keys and features; tiles end off the edges of most."""

WIDE = Tile(64, 32, 2, 1, False)
"""A tile whose warps have 32 rows, as the widest of a device."""


@pytest.fixture(autouse=True)
def _gxx() -> None:
    require_device("gxx", emulate.no_gxx())


def problem(
    n_q: int = 37, n_k: int = 53, d: int = 24, d_v: int = 16, h: int = 2, dtype: str = "float16"
) -> list[np.ndarray]:
    shapes = (2, h, n_q, d), (2, h, n_k, d), (2, h, n_k, d_v)
    drawn = np.random.default_rng([n_q, n_k, d])
    return [drawn.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes]


def run(arrays: list[np.ndarray], tile: Tile, **options: Any) -> Any:
    given: Any = {n: x for n, x in options.items() if n != "backwards"}
    found = problem_of("test", *arrays, given)
    emulated(found, tile, backwards=options.get("backwards", False))
    return result_of(found, arrays[0], arrays[2])


def exact(arrays: list[np.ndarray], **options: Any) -> Any:
    wide, wide_options = widened(arrays, options)
    return refattn.attention(*wide, **wide_options)


def near(dtype: np.dtype) -> float:
    """Return the error granted to an output of ordinary size."""
    return 1e-5 if dtype == np.float32 else 4 * float(ml_dtypes.finfo(dtype).eps)


def off(found: Any, true: Any) -> float:
    found, true = np.asarray(found, np.float64), np.asarray(true, np.float64)
    assert np.array_equal(np.isfinite(found), np.isfinite(true))
    finite = np.isfinite(true)
    return float(np.abs(found[finite] - true[finite]).max(initial=0.0))


@pytest.mark.clause("VAS-EQ1", "FA1-ALG1", "OWN-ROUND1", "OWN-GQA1", "OWN-LENGTH1", "OWN-SINK1")
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
        before = [array.astype(dtype) for array in arrays]
        arrays = [array.copy() for array in before]
        found = run(arrays, SMALL, **narrow)
        assert all(np.array_equal(a, b, True) for a, b in zip(before, arrays, strict=True))
        true = exact(arrays, **narrow)
        size = 1 + np.abs(true.output).max(initial=0)
        assert off(found.output, true.output) <= near(dtype) * size, seed
        assert off(found.logsumexp, true.logsumexp) <= 1e-4, seed
        assert found.output.dtype == dtype
        assert found.logsumexp.dtype == np.float32


@pytest.mark.clause("FA1-ALG1")
@pytest.mark.parametrize(
    "variant",
    [variant for variant in variants() if variant.kernel == "forward"],
    ids=lambda variant: variant.name,
)
def test_the_tiles_of_a_device_give_what_the_small_ones_give(variant: Any) -> None:
    d = variant.features - 8
    arrays = problem(n_q=131, n_k=139, d=d, d_v=d, h=1, dtype=variant.dtype)
    options: dict[str, Any] = {"causal": True, "alignment": "bottom_right"}
    if variant.terms:
        options["softcap"] = 20.0
    assert variant_of(variant.dtype, d, variant.terms) == variant
    found = run(arrays, variant.tile, **options)
    true = exact(arrays, **options)
    size = 1 + np.abs(true.output).max()
    assert off(found.output, true.output) <= near(DTYPES[variant.dtype]) * size
    assert off(found.logsumexp, true.logsumexp) <= 1e-4


@pytest.mark.parametrize("tile", [SMALL, WIDE])
def test_the_bits_depend_neither_on_the_order_of_threads_nor_on_the_batch(tile: Tile) -> None:
    arrays = problem()
    whole = run(arrays, tile, causal=True)
    again = run(arrays, tile, causal=True, backwards=True)
    assert all(map(np.array_equal, whole, again))
    alone = run([array[1:, 1:] for array in arrays], tile, causal=True)
    assert all(np.array_equal(a[1:, 1:], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("n", [16, 17, 32, 48])
def test_a_row_does_not_depend_on_the_rows_after_it(n: int) -> None:
    arrays = problem(n_q=53)
    whole = run(arrays, SMALL, causal=True)
    cut = run([array[:, :, :n] for array in arrays], SMALL, causal=True)
    assert np.array_equal(whole.output[:, :, :n], cut.output)
    assert np.array_equal(whole.logsumexp[:, :, :n], cut.logsumexp)


@pytest.mark.clause("OWN-POISON1")
@pytest.mark.parametrize("dtype", FORMATS)
def test_what_is_forbidden_is_never_read(dtype: str) -> None:
    arrays = problem(n_q=11, n_k=19, dtype=dtype)
    forbidding = {
        "causal": ({"causal": True}, slice(11, 19)),
        "window": ({"window": [5, 3]}, slice(14, 19)),
        "mask": ({"mask": (np.arange(19) % 7 > 0)[None, :]}, slice(0, 19, 7)),
        "lengths": ({"key_lengths": np.array([9, 9])}, slice(9, 19)),
        "bias": (
            {"bias": np.where(np.arange(19) < 6, 0, -np.inf).astype(DTYPES[dtype])},
            slice(6, 19),
        ),
    }
    for name, (options, rows) in forbidding.items():
        clean = run(arrays, SMALL, **options)
        query, key, value = (array.copy() for array in arrays)
        key[:, :, rows], value[:, :, rows] = np.inf, np.nan
        stained = run([query, key, value], SMALL, **options)
        assert off(stained.output, clean.output) <= 0.02, name  # rows made again keep float32
        assert np.array_equal(clean.logsumexp, stained.logsumexp), name


@pytest.mark.clause("OWN-POISON1", "OWN-ROUND1")
def test_a_value_of_poison_reaches_the_queries_that_may_read_it_and_no_other() -> None:
    query, key, value = problem(n_q=53)
    value[:, :, 9] = np.nan
    output = run([query, key, value], SMALL, causal=True).output
    assert np.isfinite(output[:, :, :9]).all()
    assert np.isnan(output[:, :, 9:]).all()


@pytest.mark.clause("FA1-ALG1", "OWN-SCALE1")
@pytest.mark.parametrize("scale", [600.0, -600.0, 0.0, 1e-30])
def test_any_scale_neither_overflows_nor_vanishes(scale: float) -> None:
    arrays = problem()
    found, true = run(arrays, SMALL, scale=scale), exact(arrays, scale=scale)
    assert off(found.output, true.output) <= 0.02
    assert off(found.logsumexp, true.logsumexp) <= 2e-6 * np.abs(true.logsumexp).max() + 1e-5


@pytest.mark.clause("OWN-EMPTY1", "OWN-LSE1", "OWN-CAUSAL1")
@pytest.mark.parametrize("offset", [-(2**62), 2**62])
def test_the_farthest_offsets_leave_no_key_or_every_key(offset: int) -> None:
    arrays = problem()
    found = run(arrays, SMALL, causal=True, alignment=offset)
    if offset < 0:
        assert not found.output.any()
        assert np.isneginf(found.logsumexp).all()
    else:
        assert all(map(np.array_equal, found, run(arrays, SMALL)))


@pytest.mark.parametrize("way", ["transposed", "reversed", "stepped", "shifted", "broadcast"])
def test_any_layout_gives_the_same_bits(way: str) -> None:
    query, key, value = problem(d=16)
    laid = {
        "transposed": lambda x: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
        "reversed": lambda x: x[:, :, ::-1].copy()[:, :, ::-1],
        "stepped": lambda x: np.repeat(x, 2, axis=3)[..., ::2],
        "shifted": lambda x: np.concatenate([x[..., :1], x], axis=3)[..., 1:],
        "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    }[way]
    copied = [np.ascontiguousarray(laid(x)) for x in (query, key, value)]
    found = run([laid(x) for x in (query, key, value)], SMALL)
    assert all(map(np.array_equal, found, run(copied, SMALL)))


def test_rows_of_whole_chunks_are_not_copied() -> None:
    room = np.zeros(2 * 3 * 5 * 16 + 8, np.uint16)
    first = -address(room) % 16 // 2
    rows = room[first : first + 2 * 3 * 5 * 16].reshape(2, 5, 3, 16).swapaxes(1, 2)
    assert aligned(rows, np) is rows
    words = room[first : first + 2 * 5 * 3 * 8].view(np.uint32).reshape(2, 5, 3, 4)
    assert aligned(words, np) is words
    for other in (rows[..., 1:9], rows[..., :15], rows.astype(np.uint32).view(np.uint16)[..., ::2]):
        copy = aligned(other, np)
        assert copy is not other
        assert np.array_equal(copy[..., : other.shape[3]], other)
        assert not copy[..., other.shape[3] :].any()
        assert address(copy) % 16 == 0


@pytest.mark.parametrize("n_q", [0, 1])
def test_axes_are_added_where_the_reference_needs_none(n_q: int) -> None:
    query, key, value = (array[1, 1] for array in problem())
    found = cuda.attention(query[:n_q], key, value)
    assert (found.output.shape, found.logsumexp.shape) == ((n_q, 16), (n_q,))
    if n_q:
        assert off(found.output, exact([query[:1], key, value]).output) < 0.005


@pytest.mark.clause("OWN-EMPTY1")
def test_axes_without_numbers_are_taken() -> None:
    query, key, value = problem()
    assert cuda.attention(query, key, value[..., :0]).output.shape == (2, 2, 37, 0)
    assert cuda.attention(query[:0], key[:0], value[:0]).output.shape == (0, 2, 37, 16)
    assert machine.raw_bytes(value[..., :0]).size == 0


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_outliers_cost_no_more_than_standard_attention_loses(dtype: str) -> None:
    drawn, format_ = np.random.default_rng(5), DTYPES[dtype]
    shape = (1, 1, 257, 64)
    query, key, value = (
        (
            drawn.standard_normal(shape)
            + 10 * drawn.standard_normal(shape) * (drawn.random(shape) < 0.001)
        ).astype(format_)
        for _ in range(3)
    )
    true = exact([query, key, value]).output
    S = (query.astype(np.float32) @ key.astype(np.float32).swapaxes(2, 3)).astype(format_)
    P = np.exp((S - S.max(-1, keepdims=True)) / format_.type(8))
    P /= P.sum(-1, keepdims=True)  # a matrix is rounded to the format whenever it is stored
    standard = (P.astype(np.float32) @ value.astype(np.float32)).astype(format_)
    found = run([query, key, value], SMALL).output

    def rms(output: np.ndarray) -> float:
        return float(np.sqrt(((output.astype(np.float64) - true) ** 2).mean()))

    assert 0 < rms(found) <= rms(standard)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"empty_row": "nan"}, "empty_row is 'nan', but the CUDA kernels support 'zero'"),
        ({"masked": "add"}, "masked is 'add', but the CUDA kernels support 'select'"),
        ({"round_weights": True}, "round_weights is True, but the CUDA kernels support False"),
    ],
)
def test_what_is_not_claimed_is_refused(options: Any, sentence: str) -> None:
    with pytest.raises(Unsupported, match=sentence):
        cuda.attention(*problem(), **options)
    with pytest.raises(Unsupported, match=r"a head has 257 features, but .* at most 256"):
        cuda.attention(*problem(d=257))
    wide = [array.astype(np.float64) for array in problem()]
    with pytest.raises(Unsupported, match=r"dtype float64, but .* float16, bfloat16, float32 \["):
        cuda.attention(*wide)
    with pytest.raises(Unsupported, match=r"257 features, but .* at most 256 in float32"):
        cuda.attention(*problem(d=257, dtype="float32"))


def test_bad_arguments_are_refused_as_by_the_reference() -> None:
    query, key, value = problem()
    with pytest.raises(ShapeError, match=r"key has d_k=4, but query has d_k=24; they must be"):
        cuda.attention(query, key[..., :4], value)
    with pytest.raises(DtypeError, match="value has dtype float32, but query has dtype float16"):
        cuda.attention(query, key, value.astype(np.float32))
    with pytest.raises(OptionError, match="no_such is no option of attention"):
        cuda.attention(query, key, value, no_such=1)


def test_without_a_device_and_a_compiler_both_remedies_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "absent_device", lambda: "cupy is not installed: pip install it")
    monkeypatch.setattr(emulate, "no_gxx", lambda: "g++ was not found: install a C++ compiler")
    with pytest.raises(BackendAbsent, match=r"here: cupy is not .* emulate one, g\+\+ was"):
        cuda.attention(*problem())


def test_a_job_may_be_moved_to_copies_of_its_arrays() -> None:
    query, key, value = problem(d=16)
    options: Any = {"slopes": np.float16([0.5, 0.25]), "mask": np.ones((37, 53), bool)[:, ::-1]}
    arrays = [query, key[:, :, ::-1], value]
    here = run(arrays, SMALL, **options)
    there = problem_of("test", *arrays, options)
    hosts = [*there.arrays, there.output, there.logsumexp]
    copies = [aligned_copy(machine.raw_bytes(host)) for host in hosts]
    job = machine.relocated(there.job, hosts, [address(copy) for copy in copies])
    moved = there._replace(job=job, arrays=copies[:-2])
    for host in hosts[:-2]:
        machine.raw_bytes(host)[:] = 0xFF
    emulated(moved, SMALL)
    for host, copy in zip(hosts[-2:], copies[-2:], strict=True):
        machine.raw_bytes(host)[:] = copy
    assert all(map(np.array_equal, here, result_of(there, *arrays[::2])))


def aligned_copy(data: np.ndarray) -> np.ndarray:
    room = np.zeros(data.size + 16, np.uint8)
    copy = room[-address(room) % 16 :][: data.size]
    copy[:] = data
    return copy
