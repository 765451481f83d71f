"""A few queries against many keys: parts of a fixed size, merged in order."""

from __future__ import annotations

import numpy as np
import pytest

from optional import require

require("numba")
import refattn  # noqa: E402
from refattn import cpu  # noqa: E402
from refattn.cpu.attention import plan_job  # noqa: E402
from refattn.cpu.decode import PART, parts_of, suits  # noqa: E402


def drawn(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def problem(h, h_k, n_q, n_k, d_k, d_v, dtype=np.float32):
    shapes = ((2, h, n_q, d_k), (2, h_k, n_k, d_k), (2, h_k, n_k, d_v))
    return [drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


CASES = [
    ((3, 3, 1, 1031, 128, 128), {}),
    ((4, 2, 2, PART + 1, 40, 24), {}),
    ((4, 1, 1, 3 * PART, 17, 33), {"causal": True, "alignment": 1400}),
    ((4, 2, 1, 601, 16, 16), {"sinks": [1.0, -2.0, 0.5, 3.0], "key_lengths": [0, 511]}),
    ((2, 2, 1, 997, 64, 80), {"window": [130, 0], "alignment": "bottom_right"}),
    ((2, 2, 1, 5, 3, 2), {"scale": -0.4, "query_lengths": [1, 0]}),
    ((4, 2, 2, 700, 8, 8), {"head_map": "tile"}),
    ((1, 1, 1, 700, 8, 8), {"causal": True, "alignment": -3}),
]
"""Sizes (h, h_k, n_q, n_k, d_k, d_v) and options."""


@pytest.mark.clause("FA1-ALG1", "OWN-CACHE1", "OWN-SINK1", "OWN-EMPTY1", "OWN-GQA1")
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize(("sizes", "given"), CASES)
def test_parts_that_are_merged_agree_with_the_whole(sizes, given, dtype):
    arrays = problem(*sizes, dtype=dtype)
    options = dict(given)
    for name in ("key_lengths", "query_lengths"):
        if name in options:
            options[name] = np.array(options[name])
    wide = dict(options)
    if "sinks" in options:
        options["sinks"], wide["sinks"] = (np.array(options["sinks"], t) for t in (dtype, float))
    assert suits(plan_job("test", *arrays, options).plan)
    found = cpu.attention(*arrays, **options)
    exact = refattn.attention(*(a.astype(np.float64) for a in arrays), **wide)
    assert (found.output.dtype, found.output.shape) == (np.dtype(dtype), exact.output.shape)
    assert np.array_equal(np.isneginf(found.logsumexp), np.isneginf(exact.logsumexp))
    finite = np.isfinite(exact.logsumexp)
    bound = 16 * float(np.finfo(np.promote_types(dtype, np.float32)).eps)
    rounding = float(np.finfo(dtype).eps) * np.abs(exact.output) if dtype == np.float16 else 0
    assert (np.abs(found.output - exact.output) <= bound + rounding).all()
    assert (np.abs(found.logsumexp[finite] - exact.logsumexp[finite]) <= bound).all()


@pytest.mark.clause("FA1-ALG1")
def test_the_bits_do_not_depend_on_the_number_of_threads():
    arrays = problem(4, 4, 1, 2999, 64, 64)
    first = cpu.attention(*arrays, threads=1)
    for threads in (2, 3, 8):
        assert all(map(np.array_equal, first, cpu.attention(*arrays, threads=threads)))


@pytest.mark.clause("OWN-POISON1")
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_keys_that_the_query_may_not_see_are_never_read(poison):
    query, key, value = problem(2, 2, 1, 900, 24, 24)
    options = {"causal": True, "alignment": 640, "window": [600, None]}
    clean = cpu.attention(query, key, value, **options)
    for rows in (slice(0, 40), slice(641, 900)):
        key[:, :, rows] = value[:, :, rows] = poison
    assert all(map(np.array_equal, clean, cpu.attention(query, key, value, **options)))


def test_a_plan_with_masks_or_many_rows_goes_to_the_other_kernel():
    assert not suits(plan_job("test", *problem(2, 2, 5, 9, 8, 8), {}).plan)
    few = problem(2, 2, 2, 9, 8, 8)
    assert suits(plan_job("test", *few, {}).plan)
    assert not suits(plan_job("test", *few, {"causal": True}).plan)
    assert not suits(plan_job("test", *few, {"softcap": 3.0}).plan)
    assert parts_of(plan_job("test", *problem(1, 1, 1, PART + 1, 2, 2), {}).plan) == 2
