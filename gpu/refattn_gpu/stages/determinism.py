"""The same bits in every run, and for an item of a batch whatever the other items are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

from refattn_gpu import cuda, numba_cuda
from refattn_gpu.cuda import machine
from refattn_gpu.cuda.attention import kernels
from refattn_gpu.numba_cuda.attention import FORMS
from refattn_gpu.stages.ground import Ground, Put, attempt, drawn

Call: TypeAlias = Callable[..., tuple[Any, ...]]
"""A pass as a function of query, key, value and the output's gradient."""

RUNS = 100
"""Runs that are compared."""

BATCHES = (2, 5, 16)
"""Sizes of batches in which the first item must stay what it was alone."""

SHAPE = (3, 211, 96)
"""Heads, rows and features: primes, and a tile that ends within them."""

SIMULATED = (2, (2, 3), (1, 13, 8))
"""Runs, batches and shape of the simulation."""


def run(on: Ground, put: Put) -> None:
    """Report by format, form and pass how many different results there were: 1 is right."""
    runs, batches, shape = SIMULATED if on.simulated else (RUNS, BATCHES, SHAPE)
    for words, dtype, call in _subjects():

        def find(call: Call = call, dtype: str = dtype) -> dict[str, Any]:
            alone = drawn(on, dtype, *[(1, *shape)] * 4)
            bits = {_bits(on, call(*alone)) for _ in range(runs)}
            firsts = {n: _bits(on, _first(on, call, alone, n)) for n in batches}
            moved = [n for n in batches if firsts[n] not in bits]
            return {"runs": runs, "results": len(bits), "batches": batches, "moved": moved}

        attempt(put, words, find)


def _subjects() -> Iterator[tuple[str, str, Call]]:
    """Yield every pass, as it is named, in the format of its operands."""
    if not machine.absent():
        for dtype in ("float16", "bfloat16", "float32"):
            yield f"backward cuda-cpp {dtype}", dtype, _fast_backward
            for kernel in kernels(dtype):
                yield f"forward cuda-cpp {kernel} {dtype}", dtype, partial(_fast, kernel)
    for dtype in ("float32", "float64"):
        for form in FORMS:
            for name, call in _passes(form).items():
                yield f"{name} {form} {dtype}", dtype, call


def _fast(kernel: str, query: Any, key: Any, value: Any, d_output: Any) -> tuple[Any, ...]:
    return tuple(cuda.attention(query, key, value, kernel=kernel, causal=True))


def _fast_backward(query: Any, key: Any, value: Any, d_output: Any) -> tuple[Any, ...]:
    return tuple(cuda.attention_backward(d_output, query, key, value, causal=True)[:3])


def _passes(form: str) -> dict[str, Call]:
    """Return forward and backward as functions of query, key, value and the output's gradient."""

    def forward(query: Any, key: Any, value: Any, d_output: Any) -> tuple[Any, ...]:
        return tuple(numba_cuda.attention(query, key, value, form=form, causal=True))

    def backward(query: Any, key: Any, value: Any, d_output: Any) -> tuple[Any, ...]:
        gradients = numba_cuda.attention_backward(
            d_output, query, key, value, form=form, causal=True
        )
        return tuple(x for x in gradients if x is not None)

    return {"forward": forward, "backward": backward}


def _bits(on: Ground, arrays: tuple[Any, ...]) -> str:
    """Return a hash of arrays, bit by bit."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(on.asnumpy(array).tobytes())
    return digest.hexdigest()


def _first(on: Ground, call: Call, alone: list[Any], batch: int) -> tuple[Any, ...]:
    """Return the results of the first item of a batch whose others are drawn anew."""
    others = drawn(on, alone[0].dtype.name, *[(batch - 1, *a.shape[1:]) for a in alone], seed=batch)
    whole = [on.xp.concatenate(pair) for pair in zip(alone, others, strict=True)]
    return tuple(result[:1] for result in call(*whole))
