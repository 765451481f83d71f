"""Device memory against the number of keys: linear, where standard attention's is a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refattn_gpu import cuda, numba_cuda
from refattn_gpu.cuda import machine
from refattn_gpu.stages.ground import Ground, Put, attempt, drawn
from refattn_gpu.stages.standard import standard_attention

KEYS = (1024, 4096, 16384, 65536, 131072)
"""Lengths of key and value."""

QUERIES = 1024
"""Query rows at every length of these."""

SQUARE = 16384
"""Rows of a query and of a key, where both are long."""

HEADS, FEATURES = 4, 64
"""Of the problem, float32; float16 for the kernels in CUDA C++."""

LARGEST_STANDARD = 16384
"""Keys up to which the matrices of standard attention are formed."""

SIMULATED = ((16, 32), 8, 32, 1, 8)
"""Keys, queries, a square, heads and features of the simulation."""


def run(on: Ground, put: Put) -> None:
    """Report bytes taken during a call, what it returns included, by pass and lengths."""
    lengths, queries, square, heads, features = (
        SIMULATED if on.simulated else (KEYS, QUERIES, SQUARE, HEADS, FEATURES)
    )
    for n_q, n_k in [*((queries, n) for n in lengths), (square, square)]:
        row, column = (1, heads, n_q, features), (1, heads, n_k, features)
        arrays = drawn(on, "float32", row, column, column, row)
        for name, call in _calls(on, arrays, n_k).items():

            def find(call: Callable[[], Any] = call) -> dict[str, Any]:
                call()  # what is compiled and loaded once is not counted
                return {"taken": on.extra_bytes(call)}

            attempt(put, f"{name} {n_q} x {n_k}", find)


def _calls(on: Ground, arrays: list[Any], n: int) -> dict[str, Callable[[], Any]]:
    query, key, value, d_output = arrays
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: numba_cuda.attention(query, key, value),
        "backward": lambda: numba_cuda.attention_backward(d_output, query, key, value),
    }
    if not machine.absent():
        halves = [array.astype("float16") for array in arrays]
        calls["cuda-cpp forward"] = lambda: cuda.attention(*halves[:3])
        calls["cuda-cpp backward"] = lambda: cuda.attention_backward(halves[3], *halves[:3])
        if n <= LARGEST_STANDARD:
            calls["standard float16"] = lambda: standard_attention(on.xp, *halves[:3])
    if n <= LARGEST_STANDARD:
        calls["standard forward"] = lambda: standard_attention(on.xp, query, key, value)
    return calls
