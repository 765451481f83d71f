"""Rotation on the CPU: each pair by hand, the reference bit by bit, any strides and any tail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

from optional import require

require("numba")
from numba import njit, typeof  # noqa: E402

import refattn  # noqa: E402
from refattn import cpu  # noqa: E402
from refattn.backends import Unsupported  # noqa: E402
from refattn.checks import DtypeError, OptionError, ShapeError  # noqa: E402
from refattn.cpu.host import HOST  # noqa: E402
from refattn.cpu.rotation import rotate_rows  # noqa: E402
from refattn.rope import rotate  # noqa: E402

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
PAIRINGS = ["interleaved", "half_split"]
LENGTHS = [(2, 2), (3, 2), (7, 4), (17, 14), (33, 32), (64, 64), (67, 34), (131, 130)]
"""(d, rotary_dim): fewer pairs than lanes, whole vectors, and one pair more than those."""


def drawn(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def same(found, expected):
    """Tell whether two arrays are one another's copy, bit by bit."""
    bits = f"u{expected.itemsize}"
    return found.dtype == expected.dtype and np.array_equal(found.view(bits), expected.view(bits))


def turned(x, positions, r, pairing, base=10000.0):
    """Return the rotation in float64, pair by pair, by complex numbers."""
    y = x.astype(np.float64)
    for i in range(r // 2):
        first, second = (2 * i, 2 * i + 1) if pairing == "interleaved" else (i, i + r // 2)
        point = (y[..., first] + 1j * y[..., second]) * np.exp(
            1j * positions * base ** (-2 * i / r)
        )
        y[..., first], y[..., second] = point.real, point.imag
    return y


@pytest.mark.clause("ROPE-EQ34", "OWN-ROPE1", "OWN-ROPE2")
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize(("d", "r"), LENGTHS)
def test_each_pair_is_multiplied_by_a_complex_phase(pairing, d, r):
    for dtype, eps in zip(DTYPES, (2**-45, 2**-22, 2**-10, 2**-7), strict=True):
        x, positions = drawn(2, 3, 71, d, dtype=dtype), np.arange(-5, 66)
        found = cpu.rope(x, positions, rotary_dim=r, pairing=pairing).output
        exact = turned(x, positions, r, pairing)
        assert (found.shape, found.dtype) == (x.shape, dtype)
        assert np.abs(found.astype(np.float64) - exact).max() <= eps * np.abs(exact).max()


@pytest.mark.clause("ROPE-EQ34", "OWN-ROPE1", "OWN-ROUND1")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_the_bits_are_those_of_the_reference(dtype, pairing):
    for d, r in LENGTHS:
        x, positions = drawn(3, 2, 73, d, dtype=dtype), np.arange(100, 173)
        options = {"rotary_dim": r, "pairing": pairing, "base": 500.0}
        found, expected = (f(x, positions, **options) for f in (cpu.rope, refattn.rope))
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))
        back, expected = (
            f(x, positions, **options) for f in (cpu.rope_backward, refattn.rope_backward)
        )
        assert same(back, expected)


@pytest.mark.clause("ROPE-EQ34")
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_the_backward_pass_is_the_transpose_of_the_forward_pass(pairing):
    x, y, positions = drawn(2, 11, 38), drawn(2, 11, 38, seed=1), np.arange(7, 18)
    options = {"pairing": pairing, "rotary_dim": 34, "variant": {"kind": "linear", "factor": 3.0}}
    forward = (cpu.rope(x, positions, **options).output * y).sum()
    backward = (x * cpu.rope_backward(y, positions, **options)).sum()
    np.testing.assert_allclose(forward, backward, rtol=1e-13)


VARIANTS = [
    {"kind": "linear", "factor": 4.0},
    {"kind": "dynamic", "factor": 2.0, "original_length": 64, "length": 97},
    {"kind": "yarn", "factor": 4.0, "original_length": 128},
    {
        "kind": "longrope",
        "short_factor": [1.0] * 19,
        "long_factor": [1.0 + i for i in range(19)],
        "original_length": 64,
        "length": 97,
        "factor": 2.0,
    },
    {
        "kind": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_length": 64,
    },
    {"kind": "proportional", "partial_rotary_factor": 0.5},
]


@pytest.mark.clause("OWN-ROPE4")
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v["kind"])
def test_every_variant_of_the_frequencies_reaches_the_kernel(variant):
    x, positions = drawn(2, 97, 38, dtype=np.float32), np.arange(97)
    found = cpu.rope(x, positions, variant=variant)
    expected = refattn.rope(x, positions, variant=variant)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert not same(found.output, cpu.rope(x, positions).output)


def ways(x):
    """Return the same numbers (b, h, n, d) at other strides, by what is odd about them."""
    d, nan = x.shape[-1], np.full_like(x, np.nan)
    byte = np.zeros(x.nbytes + 1, np.uint8)
    shifted = byte[1:].view(x.dtype).reshape(x.shape)
    shifted[...] = x
    return {
        "heads inside": np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
        "features outside": np.ascontiguousarray(x.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0),
        "every second feature": np.repeat(x, 2, axis=-1)[..., ::2],
        "backwards": x[:, ::-1, ::-1, ::-1].copy()[:, ::-1, ::-1, ::-1],
        "part of a row": np.concatenate([nan, x, nan], -1)[..., d : 2 * d],
        "unaligned": shifted,
        "read-only": np.broadcast_to(x, x.shape),
    }


@pytest.mark.clause("ROPE-EQ34")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_strides_change_no_bit_and_nothing_beside_a_row_is_read(dtype, pairing):
    for d, r in LENGTHS:
        x, positions = drawn(2, 3, 5, d, dtype=dtype), np.array([3, 0, -7, 131071, 2])
        expected = refattn.rope(x, positions, rotary_dim=r, pairing=pairing).output
        for name, way in ways(x).items():
            before = way.copy()
            found = cpu.rope(way, positions, rotary_dim=r, pairing=pairing).output
            assert same(found, expected), name
            assert found.flags.c_contiguous
            assert np.array_equal(way, before)


def test_another_byte_order_is_given_back():
    x, positions = drawn(2, 5, 34, dtype=">f4"), np.arange(5)
    found = cpu.rope(x, positions).output
    assert found.dtype == np.dtype(">f4")
    assert np.array_equal(found, cpu.rope(x.astype(np.float32), positions).output)


@pytest.mark.clause("OWN-ROPE3")
@pytest.mark.parametrize("shape", [(5, 38), (3, 5, 38), (3, 1, 5, 38), (3, 2, 4, 5, 38)])
def test_every_item_of_a_batch_may_have_its_own_positions(shape):
    x, positions = drawn(*shape, dtype=np.float32), np.array([4, 1, 1, 90, -3])
    if len(shape) > 2:
        positions = positions + np.array([[0], [17], [1000]])
    found, expected = cpu.rope(x, positions), refattn.rope(x, positions)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.clause("ROPE-EQ34", "OWN-ROUND1")
@pytest.mark.parametrize(
    ("x", "cosine", "sine"),
    [
        ((38,), (19,), (19,)),
        ((7, 38), (19,), (7, 19)),
        ((2, 3, 7, 38), (7, 19), (2, 1, 7, 19)),
        ((2, 3, 7, 38), (3, 1, 15), (3, 1, 15)),
        ((2, 3, 7, 38), (2, 3, 7, 0), (2, 3, 7, 0)),
    ],
)
def test_given_tables_are_broadcast(x, cosine, sine):
    for dtype, table in ((np.float64, np.float64), (ml_dtypes.bfloat16, np.float32)):
        arrays = drawn(*x, dtype=dtype), drawn(*cosine, dtype=table), drawn(*sine, dtype=table)
        assert same(cpu.rotate(*arrays), rotate(*arrays))
        columns = [np.asfortranarray(array) for array in arrays]
        assert same(cpu.rotate(*columns), rotate(*arrays))


@pytest.mark.clause("OWN-ROUND1")
def test_tables_of_sixteen_bits_are_widened():
    x, cosine, sine = (drawn(*s, dtype=ml_dtypes.bfloat16) for s in ((3, 40), (3, 20), (1, 20)))
    assert same(cpu.rotate(x, cosine, sine), rotate(x, cosine, sine))
    assert same(cpu.rotate(x, cosine, sine.astype(np.float16)), rotate(x, cosine, sine))


@pytest.mark.clause("OWN-ROUND1")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_nan_and_infinity_stay_within_their_pair(dtype, pairing):
    x = drawn(7, 74, dtype=dtype)
    x[2, 5], x[4, 40] = np.nan, np.inf
    found = cpu.rope(x, np.arange(7), pairing=pairing).output
    with np.errstate(invalid="ignore"):
        expected = refattn.rope(x, np.arange(7), pairing=pairing).output
    np.testing.assert_array_equal(found.astype(np.float64), expected.astype(np.float64))
    assert (~np.isfinite(found.astype(np.float64))).sum() == 4


@pytest.mark.clause("OWN-ROPE2")
@pytest.mark.parametrize("dtype", DTYPES)
def test_features_that_do_not_rotate_keep_every_bit(dtype):
    bits = np.random.default_rng(5).integers(0, 2**16, (3, 5, 131), np.uint16)
    x = np.repeat(bits, np.dtype(dtype).itemsize // 2, axis=-1).view(dtype)
    for way in (x, np.asfortranarray(x)):
        found = cpu.rope(way, np.arange(5), rotary_dim=34).output
        assert same(found[..., 34:].copy(), x[..., 34:].copy())


@pytest.mark.parametrize("shape", [(0, 5, 38), (3, 0, 38), (0, 38)])
def test_no_rows_give_no_rows(shape):
    x = np.empty(shape, np.float32)
    assert cpu.rope(x, np.arange(shape[-2])).output.shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_do_not_depend_on_the_number_of_threads(dtype):
    from refattn.cpu.rope import SMALL

    x, positions = drawn(3, 5, 1103, 66, dtype=dtype), np.arange(1103)
    assert x.size > SMALL
    first = cpu.rope(x, positions, threads=1).output
    for threads in (None, 2, 3, 7):
        assert same(cpu.rope(x, positions, threads=threads).output, first)


X, M = np.ones((2, 3, 4)), np.arange(3)
REFUSED = {
    "short positions": (lambda m: m.rope(X, np.arange(2)), ShapeError),
    "batch": (lambda m: m.rope(X, np.ones((3, 3), int)), ShapeError),
    "float positions": (lambda m: m.rope(X, M * 1.0), DtypeError),
    "integer x": (lambda m: m.rope(X.astype(int), M), DtypeError),
    "list x": (lambda m: m.rope([[1.0, 2.0]], M), DtypeError),
    "odd": (lambda m: m.rope(X, M, rotary_dim=3), OptionError),
    "above d": (lambda m: m.rope_backward(X, M, rotary_dim=6), OptionError),
    "pairing": (lambda m: m.rope(X, M, pairing="neox"), OptionError),
    "base": (lambda m: m.rope_backward(X, M, base=0.0), OptionError),
    "variant": (lambda m: m.rope(X, M, variant={"kind": "none"}), OptionError),
    "wide table": (lambda m: m.rotate(X, X, X), ShapeError),
    "two tables": (lambda m: m.rotate(X, X[..., :2], X[..., :1]), ShapeError),
    "sine rows": (lambda m: m.rotate(X, X[..., :2], np.ones((5, 2))), ShapeError),
    "table dtype": (lambda m: m.rotate(X, X[..., :2], np.ones(2, np.float32)), DtypeError),
    "integer table": (lambda m: m.rotate(X, X[..., :2], np.ones(2, int)), DtypeError),
}


@pytest.mark.clause("ROPE-EQ34", "OWN-ROPE1", "OWN-ROPE2", "OWN-ROPE3")
@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused_as_by_the_reference(name):
    call, error = REFUSED[name]
    sentences = []
    for module in (sys.modules["refattn.rope"], cpu):
        with pytest.raises(error) as caught:
            call(module)
        sentences.append(re.sub(r"\[[\w.]+", "[", str(caught.value)))  # without the function
    assert sentences[0] == sentences[1]


def test_arrays_of_other_libraries_are_declined():
    with pytest.raises(Unsupported, match=r"x is a Array, but the CPU kernels support NumPy"):
        cpu.rope(array_api_strict.asarray(X), M)
    with pytest.raises(OptionError, match="threads is 0, but it must be an integer of at least 1"):
        cpu.rotate(X, X[..., :2], X[..., :2], threads=0)


MULTIPLIED = {
    "avx512": r"vmulp[sd]\s.*zmm",
    "avx2": r"vmulp[sd]\s.*ymm",
    "avx": r"vmulp[sd]\s.*ymm",
    "sse": r"mulp[sd]\s.*xmm",
    "neon": r"fmul\s.*(4s|2d)",
}
"""The instruction that multiplies whole vectors, by target."""


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_kernel_turns_whole_vectors(dtype):
    if HOST.name not in MULTIPLIED:
        pytest.skip(f"no instruction is known for the target {HOST.name}")
    fresh = njit(error_model="numpy")(rotate_rows.py_func)
    fresh.compile(tuple(typeof(a) for a in (dtype(0), 0, 0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code = fresh.inspect_asm(fresh.signatures[0])
    assert len(re.findall(MULTIPLIED[HOST.name], code)) >= 4
    assert not re.search(r"\bv?mulss|\bv?mulsd|fmul\s+[sd]\d", code)


SCRIPT = """
import numpy as np
from refattn import cpu
cpu.rope(np.ones((2, 6), np.float32), np.arange(2))
cpu.alibi_bias(np.ones(2, np.float32), 3, 5)
from refattn.cpu.alibi import bias_rows
from refattn.cpu.rotation import rotate_rows
print([sum(k.stats.cache_misses.values()) for k in (rotate_rows, bias_rows)])
"""


def test_a_second_process_loads_the_kernels_and_compiles_none(tmp_path):
    given = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    runs = [subprocess.run(command, env=given, capture_output=True, text=True) for _ in range(2)]
    assert [run.stdout.strip() for run in runs] == ["[1, 1]", "[0, 0]"], runs[-1].stderr
