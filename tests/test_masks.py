"""Which query may attend which key."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn.checks import OptionError, ShapeError
from refattn.masks import (
    allowed_pairs,
    causal_mask,
    check_lengths,
    check_window,
    length_mask,
    position_offset,
    relative_positions,
    window_mask,
)


def _rows(mask):
    """One string a row: 1 = attend."""
    return ["".join("1" if cell else "." for cell in row) for row in np.asarray(mask)]


@pytest.mark.clause("VAS-S323b")
def test_the_decoder_sees_itself_and_the_past():
    assert _rows(causal_mask(3, 3)) == ["1..", "11.", "111"]


@pytest.mark.clause("OWN-CAUSAL1")
@pytest.mark.parametrize(
    ("n_q", "n_k", "alignment", "rows"),
    [
        (2, 5, "top_left", ["1....", "11..."]),
        (2, 5, "bottom_right", ["1111.", "11111"]),
        (5, 2, "top_left", ["1.", "11", "11", "11", "11"]),
        (5, 2, "bottom_right", ["..", "..", "..", "1.", "11"]),
        (2, 5, 2, ["111..", "1111."]),
        (2, 5, -1, [".....", "1...."]),
    ],
)
def test_alignment_places_the_diagonal(n_q, n_k, alignment, rows):
    assert _rows(causal_mask(n_q, n_k, alignment=alignment)) == rows


@pytest.mark.clause("OWN-CAUSAL1", "OWN-LENGTH1")
def test_bottom_right_uses_the_lengths_of_each_item():
    offset = position_offset(
        "f",
        3,
        7,
        alignment="bottom_right",
        query_lengths=np.asarray([3, 1]),
        key_lengths=np.asarray([7, 2]),
    )
    assert offset.tolist() == [[[[4]]], [[[1]]]]


@pytest.mark.clause("OWN-CAUSAL1")
def test_one_offset_an_item_shifts_each_item_alone():
    mask = causal_mask(2, 3, alignment=[0, -1])
    assert _rows(mask[0, 0]) == ["1..", "11."]
    assert _rows(mask[1, 0]) == ["...", "1.."]


@pytest.mark.clause("OWN-WINDOW1")
@pytest.mark.parametrize(
    ("window", "rows"),
    [
        ((1, 0), ["1....", "11...", ".11.."]),
        ((0, 2), ["111..", ".111.", "..111"]),
        ((None, 0), ["1....", "11...", "111.."]),
        ((0, None), ["11111", ".1111", "..111"]),
        ((None, None), ["11111", "11111", "11111"]),
    ],
)
def test_both_ends_of_a_window_are_inclusive(window, rows):
    assert _rows(window_mask(relative_positions(3, 5), window)) == rows


@pytest.mark.clause("OWN-WINDOW1")
@given(st.integers(0, 11), st.integers(1, 13), st.integers(1, 13))
def test_an_unbounded_left_window_with_no_future_is_the_causal_mask(offset, n_q, n_k):
    relative = relative_positions(n_q, n_k, offset=offset)
    expected = causal_mask(n_q, n_k, alignment=offset)
    assert np.array_equal(window_mask(relative, (None, 0)), expected)


@pytest.mark.clause("OWN-LENGTH1")
def test_rows_beyond_a_length_are_invalid():
    assert _rows(length_mask(3, np.asarray([0, 2, 3]))) == ["...", "11.", "111"]


@pytest.mark.clause("OWN-MASK1", "OWN-BIAS1")
def test_rules_are_joined_by_and():
    mask = np.asarray([[True, True, False], [True, True, True], [True, True, True]])
    bias = np.asarray([[0.0, 0.0, 0.0], [-np.inf, 0.0, 0.0], [-1e30, 0.0, 0.0]])
    allowed = allowed_pairs(3, 3, causal=True, window=(1, None), mask=mask, bias=bias)
    assert _rows(allowed) == ["1..", ".1.", ".11"]


@pytest.mark.clause("OWN-LENGTH1")
def test_a_query_beyond_its_length_may_attend_nothing():
    allowed = allowed_pairs(2, 2, query_lengths=np.asarray([1, 2]), key_lengths=np.asarray([2, 1]))
    assert _rows(allowed[0, 0]) == ["11", ".."]
    assert _rows(allowed[1, 0]) == ["1.", "1."]


@pytest.mark.clause("OWN-CAUSAL1")
@pytest.mark.parametrize("alignment", ["middle", 1.5, True, None, [0.5], [[1]]])
def test_an_unknown_alignment_is_refused(alignment):
    with pytest.raises(OptionError, match="but it must be top_left, bottom_right"):
        position_offset("f", 2, 3, alignment=alignment)


@pytest.mark.clause("OWN-WINDOW1")
@pytest.mark.parametrize("window", [(-1, 0), (1,), (1, 2, 3), (0.5, 1)])
def test_a_window_that_is_not_two_counts_is_refused(window):
    with pytest.raises(OptionError, match=r"window is .* but it must be"):
        check_window("f", window)


@pytest.mark.clause("OWN-LENGTH1")
def test_lengths_outside_the_sequence_are_refused():
    for lengths, error in (
        (np.asarray([1, 8]), OptionError),
        (np.asarray([-1, 2]), OptionError),
        (np.asarray([1.0, 2.0]), OptionError),
        (np.asarray([1]), ShapeError),
    ):
        with pytest.raises(error, match="but"):
            check_lengths("f", "key_lengths", lengths, 2, 7, np)
