"""The SIMD layer by itself: each operation in both formats, the register tile, the machine code."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import ml_dtypes
import mpmath
import numpy as np
import pytest

from optional import require

require("numba")
from numba import njit, typeof, types  # noqa: E402

from refattn.cpu import bytes, elementary, products, simd  # noqa: E402
from refattn.cpu.copying import (  # noqa: E402
    BFLOAT16,
    FLOAT16,
    NATIVE,
    copy_rows,
    copy_transposed,
    write_vector,
)
from refattn.cpu.host import HOST, VECTORS, describe_host, lanes  # noqa: E402

FORMATS = [np.float32, np.float64]


def each(function, *arrays):
    """Apply a function of vectors to arrays, vector by vector."""
    padded = -len(arrays[0]) % lanes(arrays[0].itemsize)
    filled = [np.concatenate([a, np.ones(padded, a.dtype)]) for a in arrays]
    result = np.empty_like(filled[0])
    _loops[len(arrays)](function, *filled, result)
    return result[: len(arrays[0])]


@njit
def _unary(function, a, result):
    zero = a[0]
    p, out = simd.pointer(a.ctypes.data, zero), simd.pointer(result.ctypes.data, zero)
    for i in range(0, a.size, simd.lane_count(zero)):
        simd.store(out, i, function(simd.load(p, i)))


@njit
def _binary(function, a, b, result):
    zero = a[0]
    p, q = simd.pointer(a.ctypes.data, zero), simd.pointer(b.ctypes.data, zero)
    out = simd.pointer(result.ctypes.data, zero)
    for i in range(0, a.size, simd.lane_count(zero)):
        simd.store(out, i, function(simd.load(p, i), simd.load(q, i)))


_loops = {1: _unary, 2: _binary}


@njit
def _sum_of_products(a, b):
    return simd.add(simd.mul(a, b), simd.sub(simd.div(a, b), simd.fma(a, b, a)))


@njit
def _greater(a, b):
    return simd.maximum(a, b)


@njit
def _smaller(a, b):
    return simd.where_less(a, b, a, b)


@pytest.mark.parametrize("dtype", FORMATS)
def test_arithmetic_is_that_of_the_format(dtype):
    a, b = np.random.default_rng(1).standard_normal((2, 37)).astype(dtype)
    fused = (a.astype(np.longdouble) * b + a).astype(dtype) if HOST.fused else a * b + a
    assert np.array_equal(each(_sum_of_products, a, b), a * b + (a / b - fused))


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_maximum_drops_a_nan_on_the_left_and_keeps_one_on_the_right(dtype):
    nan, inf = np.nan, np.inf
    a = np.array([1, nan, 2, -inf, 5, nan], dtype)
    b = np.array([2, 1, nan, -inf, -inf, nan], dtype)
    assert np.array_equal(each(_greater, a, b), np.array([2, 1, nan, -inf, 5, nan]), equal_nan=True)
    assert np.array_equal(each(_smaller, a, b), np.array([1, 1, nan, -inf, -inf, nan]), True)


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_fitted_polynomial_is_as_close_as_its_constant_says(dtype):
    said = {np.float32: 9.2e-9, np.float64: 2.1e-17}[dtype]
    with mpmath.workdps(40):
        coefficients = [mpmath.mpf(c) for c in elementary.GROWTH[8 * np.dtype(dtype).itemsize]]
        for i in range(-500, 501):
            f = mpmath.mpf(i) / 1000
            growth = functools.reduce(lambda sum_, c: sum_ * f + c, coefficients)  # Horner
            assert abs((1 + f * growth) / 2**f - 1) <= said


EXPONENTIALS = [elementary.exp2, njit(error_model="numpy")(elementary.exp2_by_shift)]
"""The host's, and the one that every host has."""


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("exp2", EXPONENTIALS)
def test_powers_of_two_are_right_to_an_ulp(dtype, exp2):
    low = {np.float32: -125, np.float64: -1021}[dtype]
    x = np.concatenate([np.linspace(low, 100, 40001), np.linspace(-1, 1, 4001)]).astype(dtype)
    exact = np.exp2(x.astype(np.longdouble))
    error = np.abs(each(exp2, x).astype(np.longdouble) / exact - 1)
    assert error.max() <= np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("exp2", EXPONENTIALS)
def test_powers_of_two_of_what_is_no_ordinary_number(dtype, exp2):
    x = np.array([-np.inf, -1e30, -5000, 0, np.nan, 1], dtype)
    assert np.array_equal(each(exp2, x), np.array([0, 0, 0, 1, np.nan, 2]), True)
    payload = np.array([0x7FC00001 if dtype == np.float32 else 0x7FF8000000000001])
    odd = payload.astype(f"u{np.dtype(dtype).itemsize}").view(dtype)
    assert np.isnan(each(exp2, odd)).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_hyperbolic_tangent_is_right_relative_to_itself(dtype):
    small = np.logspace(-30, 1.5, 4001)
    x = np.concatenate([-small, small]).astype(dtype)
    exact = np.tanh(x.astype(np.longdouble))
    assert np.abs(each(elementary.tanh, x) / exact - 1).max() <= 4 * np.finfo(dtype).eps
    ends = np.array([-np.inf, np.inf, 0, np.nan], dtype)
    assert np.array_equal(each(elementary.tanh, ends), np.array([-1, 1, 0, np.nan]), True)


@njit
def _lane_sum(a):
    return simd.splat(simd.sum_lanes(a))


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_lanes_of_a_vector_are_summed(dtype):
    a = np.arange(lanes(np.dtype(dtype).itemsize)).astype(dtype)
    assert np.array_equal(each(_lane_sum, a), np.full(a.shape, a.sum()))


@njit
def _even(a, b):
    return simd.even_lanes(a, b)


@njit
def _odd(a, b):
    return simd.odd_lanes(a, b)


@njit
def _low(a, b):
    return simd.zip_low(a, b)


@njit
def _high(a, b):
    return simd.zip_high(a, b)


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_lanes_of_two_vectors_are_taken_in_turn_and_back(dtype):
    n = lanes(np.dtype(dtype).itemsize)
    every = np.arange(2 * n).astype(dtype)
    a, b = every[:n], every[n:]
    assert np.array_equal(each(_even, a, b), every[0::2])
    assert np.array_equal(each(_odd, a, b), every[1::2])
    turns = np.stack([a, b], axis=1).reshape(-1)
    assert np.array_equal(each(_low, a, b), turns[:n])
    assert np.array_equal(each(_high, a, b), turns[n:])


@njit
def _write(numbers, halves, storage):
    zero = numbers[0]
    p = simd.pointer(numbers.ctypes.data, zero)
    for i in range(0, numbers.size, simd.lane_count(zero)):
        write_vector(zero, halves.ctypes.data, i, simd.load(p, i), storage)


@pytest.mark.clause("OWN-ROUND1")
@pytest.mark.parametrize(("dtype", "storage"), [(np.float16, 1), (ml_dtypes.bfloat16, 2)])
def test_a_number_is_rounded_once_to_the_nearest_of_sixteen_bits_and_to_the_even_one(
    dtype, storage
):
    every = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    finite = np.sort(every[np.isfinite(every)])
    ties = finite[:-1] + (finite[1:] - finite[:-1]) / 2  # exact: one bit more
    beyond = np.float32([65519.996, 65520, 3.3953e38, 3.4e38, 1e-45, -1e-45, 2**-149])
    found = [every, ties, beyond]
    found += [np.nextafter(x, np.float32(end)) for x in (ties, finite) for end in (-np.inf, np.inf)]
    numbers = np.concatenate(found)
    numbers = np.concatenate([numbers, np.zeros(-numbers.size % 64, np.float32)])
    halves = np.empty(numbers.size, np.uint16)
    _write(numbers, halves, storage)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = numbers.astype(dtype)
    nan = np.isnan(numbers)
    assert np.array_equal(halves[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(halves.view(dtype)[nan].astype(np.float32)).all()


@njit
def _equal(a, b):
    return simd.where_equal(a, b, a, simd.add(b, b))


@pytest.mark.parametrize("dtype", FORMATS)
def test_lanes_that_are_equal_are_told_from_others(dtype):
    a = np.array([1, np.nan, -np.inf, 0, 3], dtype)
    b = np.array([1, np.nan, -np.inf, -0.0, 4], dtype)
    assert np.array_equal(each(_equal, a, b), np.array([1, np.nan, -np.inf, 0, 8]), True)


@njit
def _put(flags, row, target, target_row, number, first):
    out = simd.pointer(target.ctypes.data, number)
    source = simd.pointer(flags.ctypes.data, types.uint8(0))
    bytes.put_where_zero(simd.advance(source, first), row, out, target_row, number)
    return bytes.load_word(source, first)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_square_of_bytes_is_turned_and_its_zeros_are_written(dtype):
    n = lanes(np.dtype(dtype).itemsize)
    drawn = np.random.default_rng(n)
    flags = drawn.integers(0, 3, (n, n + 5)).astype(np.uint8)  # 2 is True as well
    target = drawn.standard_normal((n, n + 3)).astype(dtype)
    expected = target.copy()
    expected[:, :n][flags[:, 3 : n + 3].T == 0] = -np.inf
    word = _put(flags, n + 5, target, n + 3, dtype(-np.inf), 3)
    assert np.array_equal(target, expected)
    assert word == int.from_bytes(flags.tobytes()[3:11], sys.byteorder)


@njit
def _copy(zero, source, storage, row, column, rows, columns, target):
    out = simd.pointer(target.ctypes.data, zero)
    copy_rows(zero, source, storage, row, column, rows, columns, out, columns)


@pytest.mark.parametrize(("dtype", "storage"), [(np.float16, 1), (ml_dtypes.bfloat16, 2)])
@pytest.mark.parametrize("column", [1, 2])
def test_every_number_of_sixteen_bits_is_widened_exactly(dtype, storage, column):
    assert storage == {np.float16: FLOAT16}.get(dtype, BFLOAT16)
    every = np.arange(2**16, dtype=np.uint16).repeat(column)
    target = np.full(2**16, -1, np.float32)
    zero = np.float32(0)
    _copy(zero, every.ctypes.data, storage, 0, column, 1, 2**16, target)
    expected = every[::column].view(dtype).astype(np.float32)
    assert np.array_equal(target, expected, equal_nan=True)


@njit
def _turn(zero, source, storage, row, column, rows, columns, target, width, buffer):
    out, spare = simd.pointer(target.ctypes.data, zero), simd.pointer(buffer.ctypes.data, zero)
    copy_transposed(zero, source, storage, row, column, rows, columns, out, width, spare)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (37, 23), (64, 64)])
def test_a_transposed_copy_fills_what_is_missing_with_zeros(dtype, rows, columns):
    n = lanes(np.dtype(dtype).itemsize)
    width = -(-rows // n) * n
    drawn = np.random.default_rng(rows).standard_normal((rows, 2 * columns)).astype(dtype)
    for given in (drawn[:, :columns], drawn[:, ::2]):
        target = np.full((columns, width), np.nan, dtype)
        strides = [s // given.itemsize for s in given.strides]
        room = np.empty(n * columns, dtype)
        start = given.ctypes.data
        _turn(dtype(0), start, NATIVE, *strides, rows, columns, target, width, room)
        assert np.array_equal(target[:, :rows], given.T)
        assert not target[:, rows:].any()


@njit
def _multiply(zero, a, b, c, vectors, mode, scales):
    A, B = simd.pointer(a.ctypes.data, zero), simd.pointer(b.ctypes.data, zero)
    C, s = simd.pointer(c.ctypes.data, zero), simd.pointer(scales.ctypes.data, zero)
    row, depth, width = a.shape[1], a.shape[1], b.shape[1]
    products.multiply(zero, A, row, 1, a.shape[0], B, width, depth, C, width, vectors, mode, s)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("vectors", range(1, VECTORS + 1))
@pytest.mark.parametrize("rows", [8, 16, 24, 40])
def test_a_product_stores_adds_or_scales(dtype, rows, vectors):
    width = vectors * lanes(np.dtype(dtype).itemsize)
    drawn = np.random.default_rng(vectors)
    a, b, c, s = (
        drawn.integers(-9, 10, shape).astype(dtype)
        for shape in ((rows, 7), (7, width), (rows, width), (width,))
    )
    for mode, expected in ((0, a @ b), (1, c + a @ b), (2, c * s + a @ b)):
        found = c.copy()
        _multiply(dtype(0), a, b, found, vectors, mode, s)
        assert np.array_equal(found, expected)


def test_no_two_products_share_the_name_by_which_cached_kernels_are_linked():
    found = [getattr(products, f"_product_{v}").py_func.__qualname__ for v in (1, 2, 3, 4)]
    assert len(set(found)) == 4


PACKED = {
    "avx512": {"float32": r"vfmadd\w+ps\s.*zmm", "float64": r"vfmadd\w+pd\s.*zmm"},
    "avx2": {"float32": r"vfmadd\w+ps\s.*ymm", "float64": r"vfmadd\w+pd\s.*ymm"},
    "avx": {"float32": r"vmulps\s.*ymm", "float64": r"vmulpd\s.*ymm"},
    "sse": {"float32": r"mulps\s.*xmm", "float64": r"mulpd\s.*xmm"},
    "neon": {"float32": r"fmla\s.*(4s|s\[)", "float64": r"fmla\s.*(2d|d\[)"},
}
"""The instruction that multiplies whole vectors, by target and format."""


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_kernel_multiplies_whole_vectors(dtype):
    if HOST.name not in PACKED:
        pytest.skip(f"no instruction is known for the target {HOST.name}")
    from refattn.cpu.attention import plan_job
    from refattn.cpu.forward import forward
    from refattn.cpu.plan import flatten

    x = np.zeros((1, 1, 4, 8), dtype)
    job = plan_job("test", x, x, x, {})
    fresh = njit(error_model="numpy")(forward)  # what is cached cannot be read
    integers, reals = np.array(flatten(job.plan)), np.array(job.numbers, dtype)
    fresh.compile(tuple(typeof(a) for a in (dtype(0), 0, 0, integers, reals, *job.rules)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code = fresh.inspect_asm(fresh.signatures[0])
    found = re.findall(PACKED[HOST.name][np.dtype(dtype).name], code)
    # each width of panel has a register tile of its own, and exp2 a polynomial
    assert len(found) >= sum(products.ROWS[v] * v for v in range(1, VECTORS + 1))
    scalar = {"x86": r"vfmadd\w+s[sd]\s", "neon": r"fmadd\s"}[
        "neon" if HOST.name == "neon" else "x86"
    ]
    assert len(re.findall(scalar, code)) < 16
    assert not re.search(r"\b(fmaf?|exp2?f?|tanhf?)@PLT|callq?\s+\**(fmaf?|exp2?f?)\b", code)


def test_the_vector_width_follows_the_target():
    x86, arm = "x86_64-unknown-linux-gnu", "aarch64-apple-darwin"
    wide = "+avx512f,+avx512dq,+avx512vl,+avx2,+avx,+fma"
    assert describe_host(x86, wide)[:3] == ("avx512", 64, 32)
    assert describe_host(x86, wide.replace("+avx512f", "-avx512f"))[:3] == ("avx2", 32, 16)
    assert describe_host(x86, "+avx,-fma") == ("avx", 32, 16, False)
    assert describe_host(x86, "") == ("sse", 16, 16, False)
    assert describe_host(arm, "+neon") == ("neon", 16, 32, True)
    assert describe_host("riscv64-linux", "+v").vector_bytes == 16


RESTRICTED = {
    "avx2": ("haswell", "+avx,+avx2,+fma,+sse4.2,+bmi,+bmi2,+popcnt"),
    "sse": ("generic", ""),
}
"""A processor's name and features for each restricted target."""


@pytest.mark.clause("OWN-ROUND1")
@pytest.mark.parametrize("name", RESTRICTED)
def test_a_restricted_target_computes_the_same_within_rounding(name, tmp_path):
    if HOST.name not in ("avx512", "avx2"):
        pytest.skip(f"the target {HOST.name} cannot be restricted to {name}")
    cpu, features = RESTRICTED[name]
    given = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    script = Path(__file__).with_name("cpu_restricted.py")
    run = subprocess.run(
        [sys.executable, str(script)], env=os.environ | given, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found["host"]["name"] == name
    assert max(found["errors"]) < 4e-6
    assert found["rotations"] == [True] * 12
