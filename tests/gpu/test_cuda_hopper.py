"""The kernel for a Hopper, emulated: every certified vector, every layout, and who chooses it."""

from __future__ import annotations

import ctypes
from typing import Any
from unittest.mock import Mock

import ml_dtypes
import numpy as np
import pytest

import refattn
from cpu_draws import draw, widened
from cuda_cases import CASES, JUDGED, RUN, complaints, forward
from optional import require_device
from refattn.backends import Unsupported
from refattn.errors import RefattnError
from refattn_gpu import cuda
from refattn_gpu.cuda import catalogue, emulate, machine, tensor_maps
from refattn_gpu.cuda.attention import emulated, kernel_for, result_of
from refattn_gpu.cuda.catalogue import HOPPERS, SMALL_HOPPER, Tile, variant_of, variants
from refattn_gpu.cuda.problem import Problem, address, problem_of
from refattn_gpu.cuda.records import BYTES
from refattn_gpu.stages import determinism, timing
from refattn_gpu.stages.ground import ground

LEAST = 520
"""Vectors that run, one in each of two formats counted twice."""

RUNS = [(name, dtype) for name, dtype in JUDGED if dtype != "float32"]

SIZES = [1, 5, 65, 67, 131], [1, 3, 16, 31, 65, 97], [1, 8, 33, 64, 65, 96]
"""Queries, keys and features; tiles and panels end off the edges of most."""


@pytest.fixture(autouse=True)
def _gxx() -> None:
    require_device("gxx", emulate.no_gxx())


def problem(n_q: int = 71, n_k: int = 53, d: int = 24, d_v: int = 16) -> list[np.ndarray]:
    shapes = (2, 2, n_q, d), (2, 2, n_k, d), (2, 2, n_k, d_v)
    drawn = np.random.default_rng([n_q, n_k, d])
    return [drawn.standard_normal(shape).astype(np.float16) for shape in shapes]


def run(arrays: list[np.ndarray], tile: Tile = SMALL_HOPPER, **options: Any) -> Any:
    given: Any = {n: x for n, x in options.items() if n != "backwards"}
    found = problem_of("test", *arrays, given)
    emulated(found, tile, kernel="hopper", backwards=options.get("backwards", False))
    return result_of(found, arrays[0], arrays[2])


def off(found: Any, true: Any) -> float:
    found, true = np.asarray(found, np.float64), np.asarray(true, np.float64)
    assert np.array_equal(np.isfinite(found), np.isfinite(true))
    finite = np.isfinite(true)
    return float(np.abs(found[finite] - true[finite]).max(initial=0.0))


def check(arrays: list[np.ndarray], found: Any, **options: Any) -> None:
    wide, wide_options = widened(arrays, options)
    true: Any = refattn.attention(*wide, **wide_options)
    near = 4 * float(ml_dtypes.finfo(arrays[0].dtype).eps)
    assert off(found.output, true.output) <= near * (1 + np.abs(true.output).max(initial=0))
    assert off(found.logsumexp, true.logsumexp) <= 1e-4


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_the_kernel_agrees_with_the_certified_values(name: str, dtype: str) -> None:
    for tile in (SMALL_HOPPER, None):
        results = forward(CASES[name], dtype, tile, kernel="hopper")
        assert not complaints(CASES[name], results, dtype)


def test_enough_vectors_run() -> None:
    assert len(RUNS) >= LEAST


@pytest.mark.parametrize("name", RUN[::7])
def test_the_order_of_threads_and_of_arrivals_changes_nothing(name: str) -> None:
    one, other = (
        forward(CASES[name], "float16", SMALL_HOPPER, kernel="hopper", backwards=way)
        for way in (False, True)
    )
    for there, back in zip(one.values(), other.values(), strict=True):
        assert np.array_equal(there, back, equal_nan=True)


@pytest.mark.clause("VAS-EQ1", "FA1-ALG1", "OWN-ROUND1", "OWN-GQA1", "OWN-LENGTH1", "OWN-SINK1")
@pytest.mark.clause("OWN-EMPTY1", "OWN-SOFTCAP1", "ALIBI-S3a", "OWN-WINDOW1", "OWN-DROPOUT1")
@pytest.mark.parametrize("first", range(0, 60, 20))
def test_every_option_agrees_with_the_reference(first: int) -> None:
    for seed in range(first, first + 20):
        arrays, options = draw(seed, *SIZES)
        dtype = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))[seed % 2]
        narrow = {
            n: x.astype(dtype) if n in ("bias", "slopes", "sinks") else x
            for n, x in options.items()
        } | {"empty_row": "zero", "masked": "select"}
        arrays = [array.astype(dtype) for array in arrays]
        check(arrays, run(arrays, **narrow), **narrow)


@pytest.mark.clause("FA1-ALG1")
@pytest.mark.parametrize(
    "variant",
    [variant for variant in variants() if variant.kernel == "hopper"],
    ids=lambda variant: variant.name,
)
def test_the_tiles_of_a_device_give_what_the_reference_gives(variant: Any) -> None:
    d = variant.features - 8
    dtype = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[variant.dtype]
    arrays = [array[:1, :1].astype(dtype) for array in problem(n_q=131, n_k=419, d=d, d_v=d)]
    options: dict[str, Any] = {"causal": True, "alignment": "bottom_right"}
    if variant.terms:
        options["softcap"] = 20.0
    assert variant_of(variant.dtype, d, variant.terms, "hopper") == variant
    check(arrays, run(arrays, variant.tile, **options), **options)


@pytest.mark.parametrize("tile", [SMALL_HOPPER, HOPPERS[64]])
def test_the_bits_depend_neither_on_the_order_of_threads_nor_on_the_batch(tile: Tile) -> None:
    arrays = problem(n_k=301)
    whole = run(arrays, tile, causal=True, alignment="bottom_right")
    again = run(arrays, tile, causal=True, alignment="bottom_right", backwards=True)
    assert all(map(np.array_equal, whole, again))
    alone = run([x[1:, 1:] for x in arrays], tile, causal=True, alignment="bottom_right")
    assert all(np.array_equal(a[1:, 1:], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.clause("OWN-POISON1", "OWN-LENGTH1")
def test_rows_beyond_the_length_of_an_item_may_hold_anything() -> None:
    query, key, value = problem()
    lengths: Any = {"key_lengths": np.array([9, 40]), "query_lengths": np.array([70, 3])}
    clean = run([query, key, value], **lengths)
    for item, n in enumerate(lengths["key_lengths"]):
        key[item, :, n:], value[item, :, n:] = np.inf, np.nan
    for item, n in enumerate(lengths["query_lengths"]):
        query[item, :, n:] = np.nan
    stained = run([query, key, value], **lengths)
    assert off(stained.output, clean.output) <= 0.02  # rows made again keep float32
    assert np.array_equal(clean.logsumexp, stained.logsumexp)


LAYOUTS = {
    "packed": lambda x: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
    "reversed": lambda x: x[:, :, ::-1].copy()[:, :, ::-1],
    "reversed heads": lambda x: x[:, ::-1].copy()[:, ::-1],
    "items of one tensor": lambda x: np.broadcast_to(x[:1], x.shape),
    "heads of one tensor": lambda x: np.broadcast_to(x[:, :1], x.shape),
    "rows of one row": lambda x: np.broadcast_to(x[:, :, :1], x.shape),
    "shifted": lambda x: np.concatenate([x[..., :1], x], axis=3)[..., 1:],
    "overlapping": lambda x: np.lib.stride_tricks.as_strided(
        aligned_zeros(x), x.shape, (*x.strides[:2], 16, 2)
    ),
}
MAPPED = ("packed", "items of one tensor", "heads of one tensor")
"""What is not copied."""


def aligned_zeros(x: np.ndarray) -> np.ndarray:
    room = np.zeros(x.size + 8, x.dtype)
    numbers = room[-address(room) % 16 // 2 :][: x.size]
    numbers[...] = x.ravel()
    return numbers


def laid(x: np.ndarray, way: str) -> np.ndarray:
    found = LAYOUTS[way](aligned_zeros(x).reshape(x.shape))
    return np.asarray(found)


@pytest.mark.parametrize("way", LAYOUTS)
def test_any_layout_gives_the_same_bits(way: str) -> None:
    there = [laid(x, way) for x in problem(d=16)]
    copied = [np.ascontiguousarray(x) for x in there]
    assert all(map(np.array_equal, run(there), run(copied)))


@pytest.mark.parametrize("way", MAPPED)
def test_what_a_map_can_describe_is_not_copied(way: str) -> None:
    arrays = [laid(x, way) for x in problem(d=16)]
    before: Problem = problem_of("test", *arrays, {})
    after = tensor_maps.mapped(before)
    assert all(a is b for a, b in zip(before.arrays, after.arrays, strict=True))
    assert before.job.key.data == after.job.key.data


@pytest.mark.clause("OWN-EMPTY1")
def test_axes_without_numbers_are_taken() -> None:
    query, key, value = problem()
    found = run([query, key, value[..., :0]])
    assert found.output.shape == (2, 2, 71, 0)
    assert off(found.logsumexp, run([query, key, value]).logsumexp) == 0
    assert run([query[:0], key[:0], value[:0]]).output.shape == (0, 2, 71, 16)


def test_a_caller_may_name_the_kernel() -> None:
    arrays = problem()
    if machine.absent_device():
        found = cuda.attention(*arrays, kernel="hopper")
        assert all(map(np.array_equal, found, run(arrays, HOPPERS[64])))
    wide = [array.astype(np.float32) for array in arrays]
    with pytest.raises(Unsupported, match="float32, but kernel hopper supports float16, bfloat16"):
        cuda.attention(*wide, kernel="hopper")


def test_only_a_hopper_is_given_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (problem_of("test", *problem(d=d), {}) for d in (32, 33))
    single = problem_of("test", *[x.astype(np.float32) for x in problem(d=33)], {})
    monkeypatch.setattr(machine, "absent_device", lambda: "there is none")
    assert kernel_for(large) == "forward"
    monkeypatch.setattr(machine, "absent_device", lambda: "")
    for capability, name in (((9, 0), "hopper"), ((8, 0), "forward"), ((10, 0), "forward")):
        monkeypatch.setattr(machine, "capability", lambda found=capability: found)
        assert kernel_for(large) == name
        assert kernel_for(small) == kernel_for(single) == "forward"
    with pytest.raises(Unsupported, match=r"has compute capability \(10, 0\), but kernel hopper"):
        cuda.attention(*problem(), kernel="hopper")


def test_a_hopper_measures_both_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = [array.astype(np.float32) for array in problem(d=33, d_v=33)]
    monkeypatch.setattr(machine, "absent_device", lambda: "")
    for is_hopper in (False, True):
        monkeypatch.setattr(machine, "is_hopper", lambda found=is_hopper: found)
        timed = [f"{s.name} {s.dtype}" for s in timing.subjects_of(ground(True), arrays, True)]
        compared = [name for name, *_ in determinism._subjects()]
        for dtype in ("float16", "bfloat16"):
            assert (f"refattn cuda-cpp mma.sync {dtype}" in timed) == is_hopper
            assert f"forward cuda-cpp forward {dtype}" in compared
            assert (f"forward cuda-cpp hopper {dtype}" in compared) == is_hopper
        assert "refattn cuda-cpp mma.sync float32" not in timed


def test_only_what_runs_on_a_device_is_compiled_for_it() -> None:
    for target, kernels in (("sm_80", 0), ("sm_89", 0), ("sm_90a", len(HOPPERS) * 4)):
        there = [variant.kernel for variant in variants() if variant.runs_on(target)]
        assert there.count("hopper") == kernels
        assert there.count("forward") > 0


def test_the_driver_is_told_every_number_of_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def driver(record: Any, *rest: Any) -> int:
        told.append([list(x) if hasattr(x, "_length_") else x.value for x in rest])
        assert record.value % 64 == 0
        ctypes.memset(record.value, len(told), 128)
        return 0

    monkeypatch.setattr(tensor_maps, "_encoder", lambda: driver)
    found = problem_of("test", *[laid(x, "packed") for x in problem(d=16)], {})
    maps = tensor_maps.maps_of(variant_of("float16", 16, False, "hopper"), found.job)
    record = tensor_maps.encoded(maps)
    assert record.tobytes() == b"\1" * 128 + b"\2" * 128 + b"\3" * 128
    assert record.shape == ()
    sizes, strides, box = [16, 53, 2, 2], [64, 32, 3392], [64, 128, 1, 1]
    assert told[1] == [1, 4, found.job.key.data, sizes, strides, box, [1] * 4, 0, 3, 3, 0]
    monkeypatch.setattr(tensor_maps, "_encoder", lambda: lambda *rest: 1)
    with pytest.raises(RefattnError, match=r"the driver answers 1 to a tensor map of \[16, 71,"):
        tensor_maps.encoded(maps)


def test_a_launch_hands_the_maps_over_beside_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(machine, "_cupy", Mock())
    monkeypatch.setattr(machine, "_function", lambda *_: lambda *a, **k: started.append((a, k)))
    monkeypatch.setattr(tensor_maps, "_encoder", lambda: lambda *_: 0)
    found = problem_of("test", *problem(), {})
    for kernel, sizes in (("hopper", (BYTES, 3 * 128)), ("forward", (BYTES,))):
        variant = variant_of("float16", 24, False, kernel)
        machine._start(variant, found.job, 5)
        (blocks, threads, records), more = started.pop()
        assert (blocks, more["shared_mem"]) == ((5,), variant.shared_bytes)
        assert threads == (384 if kernel == "hopper" else 128,)
        assert tuple(record.nbytes for record in records) == sizes


def test_a_tile_of_a_device_fits_a_wgmma() -> None:
    for tiles in (catalogue.HOPPERS, catalogue.HOPPERS_TERMS):
        for features, tile in tiles.items():
            assert tile.rows == 16 * tile.warps
            assert {features, tile.cols} <= {32, 64, 128, 256}
