"""Single instructions of a Hopper, on one and in the emulation: boxes, their barrier, products."""

from __future__ import annotations

from typing import Any

import numpy as np

from refattn.arrays import numpy_dtype
from refattn_gpu.cuda import emulate, machine
from refattn_gpu.cuda.catalogue import Tile, Variant
from refattn_gpu.cuda.problem import Problem, rows_of
from refattn_gpu.cuda.records import Job
from refattn_gpu.cuda.tensor_maps import maps_of

ROWS, COLS, FEATURES = 64, 64, 128
"""Of the tiles: one warp group, two panels."""

THERE = {"query": (61, 104), "key": (53, 104), "value": (53, 120)}
"""Rows and features that the tensors have: the rest is to be zeros."""

HEADS = {"query": 1, "key": 1, "value": 0}
"""Of two, the head that is copied; of two items it is the second."""

FIRST = 16
"""The first row of V that is copied."""

IN_MEMORY = 8
"""Words that each of the 128 threads reports of K and V as they lie in shared memory."""

WORDS = IN_MEMORY + COLS // 2 + FEATURES // 2
"""And of S and O, one after another."""


def operands(dtype: str) -> dict[str, np.ndarray[Any, Any]]:
    """Return Q, K and V, small integers: every product and sum of them is exact."""
    rng = np.random.default_rng(11)
    return {
        name: rng.integers(-4, 5, (2, 2, *shape)).astype(numpy_dtype(dtype))
        for name, shape in THERE.items()
    }


def variant_of(dtype: str) -> Variant:
    """Return the kernel for a format."""
    return Variant("instructions_hopper", dtype, FEATURES, False, Tile(ROWS, COLS, 4, 1, False))


def problem_of(dtype: str) -> Problem:
    """Return the launch, whose output is the words."""
    words, job, arrays = np.zeros((WORDS, 128), np.uint32), Job(batch=2, heads=2, key_heads=2), []
    for name, numbers in operands(dtype).items():
        laid, rows = rows_of(numbers, np)
        setattr(job, name, rows)
        arrays.append(laid)
    job.output = words.ctypes.data
    (job.n_q, job.d_k), (job.n_k, _), (_, job.d_v) = THERE.values()
    return Problem(job, arrays, words, np.zeros(1, np.float32), dtype, FEATURES, False)


def emulated(dtype: str, *, backwards: bool = False) -> np.ndarray[Any, Any]:
    """Return the words of the emulation."""
    problem, variant = problem_of(dtype), variant_of(dtype)
    emulate.launch(
        emulate.compiled(variant),
        problem.job,
        1,
        problem.arrays,
        maps=maps_of(variant, problem.job),
        backwards=backwards,
    )
    return np.asarray(problem.output)


def launched(dtype: str) -> np.ndarray[Any, Any]:
    """Return the words of the device."""
    problem = problem_of(dtype)
    results = [problem.output, problem.logsumexp]
    machine.launch(variant_of(dtype), problem.job, 1, problem.arrays, results)
    return np.asarray(problem.output)


def different(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> list[int]:
    """Return the words in which two machines differ."""
    return [word for word in range(WORDS) if not np.array_equal(found[word], expected[word])]
