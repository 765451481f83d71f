"""Rounding in the CUDA C++ kernels, emulated with the multiply-adds that a device's compiler makes."""

from __future__ import annotations

import numpy as np
import pytest

import refattn
from optional import require_device
from refattn_gpu.cuda import emulate, store
from refattn_gpu.cuda.attention import emulated, result_of
from refattn_gpu.cuda.catalogue import SMALL
from refattn_gpu.cuda.problem import problem_of

CONTRACTED = ("-O2", "-march=native", "-ffp-contract=fast")
"""A product and a sum are one operation, rounded once, wherever the host has it."""


@pytest.mark.clause("NUM-MODEL1")
@pytest.mark.parametrize("scale", [0.3, 1e-19])
def test_a_maximum_that_stays_turns_nothing_however_many_tiles_follow(
    scale: float, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_device("gxx", emulate.no_gxx())
    monkeypatch.setattr(store, "folder", lambda: tmp_path)  # not in the cache of other machines
    monkeypatch.setattr(emulate, "FLAGS", (*emulate.FLAGS, *CONTRACTED))
    n = 4096
    query = np.full((1, 1, 8), 7.0, np.float32)
    key = np.full((1, n, 8), 23.3 / (56 * scale), np.float32)  # every logit is 23.3
    value = np.linspace(-1, 1, n, dtype=np.float32).reshape(1, n, 1)
    problem = problem_of("test", query, key, value, {"scale": scale})
    emulated(problem, SMALL)
    found = result_of(problem, query, value)
    true = refattn.attention(*(x.astype(np.float64) for x in (query, key, value)), scale=scale)
    assert np.abs(found.logsumexp - true.logsumexp).max() < 2e-5
    assert np.abs(found.output - true.output).max() < 2e-6
