"""The scalar rules that kernels bind: bands, heads, distances, against their clauses by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from refattn import rules
from refattn.alibi import distances
from refattn.grouped import expand_heads

SIDES = [(0, 0), (3, 0), (0, 2), (5, 1), (rules.UNBOUNDED, 0), (2, rules.UNBOUNDED)]


@pytest.mark.clause("OWN-CAUSAL1", "OWN-WINDOW1", "OWN-LENGTH1")
@pytest.mark.parametrize(("left", "right"), [*SIDES, (rules.UNBOUNDED, rules.UNBOUNDED)])
def test_the_ends_of_a_band_are_those_of_its_cells(left, right):
    for first in (-(2**62), -30, -4, 0, 3, 11, 40, 2**62):
        for rows, n_k in ((1, 1), (3, 7), (8, 13), (5, 0)):
            seen = [
                [rules.sees(left, right, first + r, j) for j in range(n_k)] for r in range(rows)
            ]
            low, high, all_low, all_high = rules.keys_seen(left, right, first, rows, n_k)
            assert all(-(2**63) <= end < 2**63 for end in (low, high, all_low, all_high))
            some = [j for j in range(n_k) if any(row[j] for row in seen)]
            whole = [j for j in range(n_k) if all(row[j] for row in seen)]
            assert [j for j in range(n_k) if low <= j < high] == some
            assert [j for j in range(n_k) if all_low <= j < all_high] == whole
            for j in range(n_k):
                keys = min(3, n_k - j)
                low, high = rules.rows_seeing(left, right, first, rows, j, keys)
                found = [r for r in range(rows) if any(seen[r][j : j + keys])]
                assert [r for r in range(rows) if low <= r < high] == found


@pytest.mark.clause("OWN-GQA1")
@pytest.mark.parametrize("head_map", ["interleave", "tile"])
@pytest.mark.parametrize(("heads", "key_heads"), [(6, 2), (6, 3), (5, 1), (7, 7)])
def test_a_query_head_reads_the_head_that_the_reference_gives_it(heads, key_heads, head_map):
    numbers = np.arange(key_heads).reshape(key_heads, 1, 1)
    expected = expand_heads(numbers, heads // key_heads, head_map=head_map).ravel().tolist()
    tiled = int(head_map == "tile")
    assert [rules.key_head(h, heads, key_heads, tiled) for h in range(heads)] == expected
    for g in range(key_heads):
        members = range(heads // key_heads)
        readers = [rules.query_head(m, g, heads, key_heads, tiled) for m in members]
        assert readers == [h for h in range(heads) if expected[h] == g]


@pytest.mark.clause("OWN-ALIBI1")
@pytest.mark.parametrize("distance", rules.DISTANCE_CODES)
def test_a_step_is_the_distance_of_the_reference(distance):
    expected = distances(5, 7, offset=-2, distance=distance)
    code = rules.DISTANCE_CODES[distance]
    assert [[rules.steps(code, i - 2, j) for j in range(7)] for i in range(5)] == expected.tolist()


@pytest.mark.clause("OWN-SOFTCAP1")
def test_the_slope_of_the_softcap_is_its_derivative():
    for x in (-7.0, -0.5, 0.0, 2.0):
        rise = (rules.soften(x + 1e-6, 3.0) - rules.soften(x - 1e-6, 3.0)) / 2e-6
        assert abs(rules.softcap_slope(x, 3.0, 1.0) - rise) < 1e-9


@pytest.mark.clause("FA1-ALG1", "OWN-EMPTY1")
def test_a_sum_over_no_key_is_rescaled_by_nothing():
    low = -math.inf
    assert rules.rescale(low, low, 0.0) == rules.rescale(low, 5.0, 0.0) == 0.0
    assert rules.rescale(2.0, 3.0, 0.0) == math.exp(-1.0)
    assert math.isnan(rules.rescale(math.inf, math.inf, 0.0))
    assert math.isnan(rules.rescale(math.nan, 1.0, 0.0))
