"""Single instructions, on a device and in the emulation: what the emulation says of PTX is so.

The emulation encodes a reading of NVIDIA's manual; one launch on a device confirms it by the word.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refattn.arrays import numpy_dtype
from refattn_gpu.cuda import emulate, machine
from refattn_gpu.cuda.catalogue import Tile, Variant
from refattn_gpu.cuda.problem import Problem, address, aligned
from refattn_gpu.cuda.records import Job, Rows

WORDS = 37
"""What each of the 32 lanes reports."""

CLOSE = (35, 36)
"""The words of powers of 2, whose last bits are the machine's own."""

ROWS = (16, 13)
"""Rows of Q and of K, whose tiles have 16: the rest is to be zeros."""

FEATURES = 24
"""Features that are copied of 32: likewise."""


def operands(dtype: str) -> list[np.ndarray[Any, Any]]:
    """Return Q and K, small integers: every product and sum of them is exact."""
    rng = np.random.default_rng(7)
    return [rng.integers(-8, 9, (n, 32)).astype(numpy_dtype(dtype)) for n in ROWS]


def variant_of(dtype: str) -> Variant:
    """Return the kernel for a format: one warp, a tile of 16 by 16."""
    return Variant("instructions", dtype, 32, False, Tile(16, 16, 1, 1, False))


def problem_of(dtype: str) -> Problem:
    """Return the launch, whose output is the words."""
    arrays = [aligned(x.view(np.uint16)[None, None], np) for x in operands(dtype)]
    words = np.zeros((WORDS, 32), np.uint32)
    query, key = (Rows(address(x), 0, 0, 32) for x in arrays)
    job = Job(query=query, key=key, output=address(words), d_k=FEATURES)
    job.n_q, job.n_k = ROWS
    return Problem(job, arrays, words, np.zeros(1, np.float32), dtype, 32, False)


def emulated(dtype: str, *, backwards: bool = False) -> np.ndarray[Any, Any]:
    """Return the words of the emulation."""
    problem, code = problem_of(dtype), emulate.compiled(variant_of(dtype))
    emulate.launch(code, problem.job, 1, problem.arrays, backwards=backwards)
    return np.asarray(problem.output)


def launched(dtype: str) -> np.ndarray[Any, Any]:
    """Return the words of the device."""
    problem = problem_of(dtype)
    results = [problem.output, problem.logsumexp]
    machine.launch(variant_of(dtype), problem.job, 1, problem.arrays, results)
    return np.asarray(problem.output)


def different(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> list[int]:
    """Return the words in which two machines differ; powers may, by 2^-21 of their size."""
    words = [word for word in range(CLOSE[0]) if not np.array_equal(found[word], expected[word])]
    for word in CLOSE:
        powers = [x[word].view(np.float32).astype(np.float64) for x in (found, expected)]
        far = np.abs(powers[0] - powers[1]) > 2.0**-21 * np.abs(powers[1]) + 2.0**-149
        words += [word] * bool(far.any())
    return words
