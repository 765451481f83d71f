"""Every certified vector of attention in 16 bits, on the emulated kernels in CUDA C++."""

from __future__ import annotations

import numpy as np
import pytest

from cuda_cases import CASES, GRADED, JUDGED, RUN, backward, complaints, forward
from optional import require_device
from refattn_gpu.cuda import emulate
from refattn_gpu.cuda.catalogue import SMALL

LEAST = 792
"""Vectors that run, one in each of three formats counted three times."""

LEAST_GRADED = 416
"""Those of them whose gradients are asked for, likewise."""


@pytest.fixture(autouse=True)
def _gxx() -> None:
    require_device("gxx", emulate.no_gxx())


@pytest.mark.parametrize(("name", "dtype"), JUDGED)
def test_the_kernels_agree_with_the_certified_values(name: str, dtype: str) -> None:
    for tile in (SMALL, None):
        assert not complaints(CASES[name], forward(CASES[name], dtype, tile), dtype)


@pytest.mark.parametrize(("name", "dtype"), GRADED)
def test_the_gradients_agree_with_the_certified_values(name: str, dtype: str) -> None:
    for tile in (SMALL, None):
        assert not complaints(CASES[name], backward(CASES[name], dtype, tile), dtype)


def test_enough_vectors_run() -> None:
    assert len(JUDGED) >= LEAST
    assert len(GRADED) >= LEAST_GRADED


@pytest.mark.parametrize("name", RUN[::7])
def test_the_order_of_threads_changes_nothing(name: str) -> None:
    results = [forward(CASES[name], "float16", SMALL, backwards=way) for way in (False, True)]
    for there, back in zip(*(r.values() for r in results), strict=True):
        assert np.array_equal(there, back, equal_nan=True)
