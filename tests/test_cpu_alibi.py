"""The bias of ALiBi on the CPU: every distance and alignment by hand, and the reference's bits."""

from __future__ import annotations

import math

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

from optional import require

require("numba")
import refattn  # noqa: E402
from refattn import cpu  # noqa: E402
from refattn.backends import Unsupported  # noqa: E402
from refattn.checks import DtypeError, MemoryLimitError, OptionError, ShapeError  # noqa: E402

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
DISTANCES = ["absolute", "signed", "column"]
LENGTHS = [(1, 1), (1, 131), (131, 1), (3, 5), (7, 17), (16, 16), (37, 29), (29, 67)]


def same(found, expected):
    """Tell whether two arrays are one another's copy, bit by bit."""
    bits = f"u{expected.itemsize}"
    return found.dtype == expected.dtype and np.array_equal(found.view(bits), expected.view(bits))


def by_hand(slopes, n_q, n_k, offset, distance):
    """Return the bias of one batch item in float64, number by number."""
    forms = {
        "absolute": lambda i, j: -abs(i + offset - j),
        "signed": lambda i, j: j - (i + offset),
        "column": lambda i, j: j,
    }
    rows = [[forms[distance](i, j) for j in range(n_k)] for i in range(n_q)]
    return slopes.astype(np.float64)[:, None, None] * np.array(rows, np.float64)


@pytest.mark.clause("ALIBI-S3a", "OWN-ALIBI1")
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right", 5, -9])
def test_the_bias_is_slope_times_distance(distance, alignment):
    slopes = refattn.alibi_slopes(6)
    for n_q, n_k in LENGTHS:
        offset = {"top_left": 0, "bottom_right": n_k - n_q}.get(alignment, alignment)
        found = cpu.alibi_bias(slopes, n_q, n_k, alignment=alignment, distance=distance)
        assert same(found, by_hand(slopes, n_q, n_k, offset, distance))


@pytest.mark.clause("ALIBI-S3a")
def test_the_slope_of_a_head_is_its_power_of_two():
    found = cpu.alibi_bias(refattn.alibi_slopes(8), 1, 3, distance="column")
    assert np.array_equal(found[:, 0, 2], [2 * 2.0**-h for h in range(1, 9)])
    geometric = refattn.alibi_slopes(6, slope_rule="geometric")
    found = cpu.alibi_bias(geometric, 2, 2)
    expected = [-math.pow(2, -8 * h / 6) for h in range(1, 7)]
    np.testing.assert_allclose(found[:, 1, 0], expected, rtol=1e-15)


@pytest.mark.clause("ALIBI-S3a", "OWN-ALIBI1", "OWN-ROUND1")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", DISTANCES)
def test_the_bits_are_those_of_the_reference(dtype, distance):
    slopes = refattn.alibi_slopes(5).astype(dtype)
    for n_q, n_k in LENGTHS:
        for alignment in ("bottom_right", [3, 0, -40], [], 2**24 + 1, -(2**40) - 1, 2**62):
            options = {"alignment": alignment, "distance": distance}
            found = cpu.alibi_bias(slopes, n_q, n_k, **options)
            expected = refattn.alibi_bias(slopes, n_q, n_k, **options)
            assert found.shape == expected.shape
            assert same(found, expected), (n_q, n_k, alignment)


@pytest.mark.clause("OWN-ROUND1")
def test_what_a_format_cannot_hold_is_infinite_and_a_nan_stays_in_its_head():
    slopes = np.array([0.5, np.nan, 1e-3, -0.5], np.float16)
    found = cpu.alibi_bias(slopes, 2, 140001, distance="column")
    assert np.array_equal(np.isposinf(found[0]), np.arange(140001) >= np.full((2, 1), 131040))
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[2]).all()
    assert np.isneginf(found[3, 0, -1])


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_an_axis_of_no_length_gives_no_numbers(shape):
    heads, n_q, n_k = shape
    assert cpu.alibi_bias(np.ones(heads), n_q, n_k).shape == shape
    assert cpu.alibi_bias(np.ones(heads), n_q, n_k, alignment=[1, 2]).shape == (2, *shape)


def test_slopes_may_be_strided_read_only_or_of_another_byte_order():
    slopes = refattn.alibi_slopes(5)
    expected = cpu.alibi_bias(slopes, 7, 19)
    spread = np.repeat(slopes, 2)[::2]
    spread.flags.writeable = False
    assert same(cpu.alibi_bias(spread, 7, 19), expected)
    swapped = cpu.alibi_bias(slopes.astype(">f8"), 7, 19)
    assert swapped.dtype == np.dtype(">f8")
    assert np.array_equal(swapped, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_do_not_depend_on_the_number_of_threads(dtype):
    from refattn.cpu.alibi import SMALL

    slopes = refattn.alibi_slopes(5).astype(dtype)
    first = cpu.alibi_bias(slopes, 463, 467, threads=1)
    assert first.size > SMALL
    for threads in (None, 2, 3, 7):
        assert same(cpu.alibi_bias(slopes, 463, 467, threads=threads), first)


M = np.ones(3)
REFUSED = {
    "matrix": (lambda f: f(np.ones((3, 1)), 2, 5), ShapeError),
    "integers": (lambda f: f(np.ones(3, int), 2, 5), DtypeError),
    "list": (lambda f: f([1.0], 2, 5), DtypeError),
    "n_q": (lambda f: f(M, -1, 5), OptionError),
    "n_k": (lambda f: f(M, 2, 5.0), OptionError),
    "distance": (lambda f: f(M, 2, 5, distance="near"), OptionError),
    "alignment": (lambda f: f(M, 2, 5, alignment="left"), OptionError),
    "far": (lambda f: f(M, 2, 5, alignment=2**62 + 1), OptionError),
}


@pytest.mark.clause("ALIBI-S3a", "OWN-ALIBI1")
@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused_as_by_the_reference(name):
    call, error = REFUSED[name]
    sentences = []
    for function in (refattn.alibi_bias, cpu.alibi_bias):
        with pytest.raises(error) as caught:
            call(function)
        sentences.append(str(caught.value).replace("[cpu.", "["))
    assert sentences[0] == sentences[1]


@pytest.mark.clause("OWN-MEMORY1")
def test_a_bias_beyond_the_free_memory_is_refused():
    with pytest.raises(MemoryLimitError, match=r"GiB are free \[cpu.alibi_bias\]"):
        cpu.alibi_bias(np.ones(8), 2**30, 2**30)


def test_arrays_of_other_libraries_are_declined():
    with pytest.raises(Unsupported, match="slopes is a Array, but the CPU kernels support NumPy"):
        cpu.alibi_bias(array_api_strict.asarray(M), 2, 5)
    with pytest.raises(OptionError, match="threads is 0, but it must be an integer of at least 1"):
        cpu.alibi_bias(M, 2, 5, threads=0)
