"""Contracts, their error sentences, and the rounding model."""

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

from refattn.arrays import dtype_name, narrow, numpy_dtype, widen
from refattn.checks import (
    DtypeError,
    OptionError,
    ShapeError,
    check_finite,
    check_floats,
    check_option,
    check_positive,
    check_shapes,
)


def _shape_error(**contracts):
    with pytest.raises(ShapeError) as caught:
        check_shapes("f", **contracts)
    return str(caught.value)


@pytest.mark.clause("OWN-ROUND1")
@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_a_dtype_has_one_name_in_every_library(name):
    assert dtype_name(np.zeros(2, dtype=numpy_dtype(name))) == name


@pytest.mark.clause("OWN-ROUND1")
def test_a_strict_array_has_the_bare_dtype_name():
    assert dtype_name(array_api_strict.zeros(2, dtype=array_api_strict.float32)) == "float32"


@pytest.mark.clause("OWN-ROUND1")
def test_only_sixteen_bit_arrays_are_widened():
    for dtype, wide in (
        (np.float16, np.float32),
        (ml_dtypes.bfloat16, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float64),
    ):
        assert widen(np.ones(3, dtype=dtype)).dtype == wide


@pytest.mark.clause("OWN-ROUND1")
def test_narrowing_rounds_to_nearest_even():
    # 1 + 2^-11 lies half way between two float16; 1 + 3·2^-11 likewise, above an odd one
    exact = np.asarray([1 + 2.0**-11, 1 + 3 * 2.0**-11], dtype=np.float32)
    expected = [1.0, 1 + 2.0**-9]
    assert narrow(exact, np.zeros(1, dtype=np.float16)).tolist() == expected


def test_an_error_states_both_sides_and_every_shape():
    query, key = np.ones((2, 3, 64)), np.ones((2, 5, 16))
    assert _shape_error(query=(query, "... n_q d_k"), key=(key, "... n_k d_k")) == (
        "key has d_k=16, but query has d_k=64; they must be equal "
        "[f: query (2, 3, 64), key (2, 5, 16)]"
    )


def test_a_rank_too_low_or_not_exact_is_refused():
    assert "x has 1 axes, but (..., n, d) has at least 2" in _shape_error(x=(np.ones(3), "... n d"))
    assert "x has 3 axes, but (n, d) has 2" in _shape_error(x=(np.ones((1, 2, 3)), "n d"))


def test_a_number_in_a_contract_is_a_fixed_size():
    assert "x has 4=3, but the contract has 4=4" in _shape_error(x=(np.ones((2, 3)), "n 4"))


def test_sizes_are_bound_by_letter_and_absent_arrays_are_skipped():
    sizes = check_shapes("f", x=(np.ones((2, 3, 5)), "... n d"), y=(None, "d or None"))
    assert sizes == {"n": 3, "d": 5}


def test_mixed_and_integer_dtypes_are_refused():
    x = np.ones(2)
    with pytest.raises(DtypeError, match="y has dtype float32, but x has dtype float64"):
        check_floats("f", x=x, y=x.astype(np.float32))
    with pytest.raises(DtypeError, match="x has dtype bool, but it must be one of float64"):
        check_floats("f", x=x.astype(bool))


def test_numbers_and_names_outside_their_range_are_refused():
    with pytest.raises(OptionError, match="base is 0, but it must be finite and above zero"):
        check_positive("f", base=0)
    with pytest.raises(OptionError, match="scale is nan, but it must be finite"):
        check_finite("f", scale=float("nan"))
    with pytest.raises(OptionError, match="kind is 'c', but it must be one of a, b"):
        check_option("f", "kind", "c", ("a", "b"))
