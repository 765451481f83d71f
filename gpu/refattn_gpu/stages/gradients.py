"""The backward pass beside torch's own, turn by turn as in `timing`; forward is not in the time.

torch is asked for deterministic algorithms, since ours has no others: in its flash attention that
chooses another kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from refattn_gpu import cuda, numba_cuda
from refattn_gpu.cuda import machine
from refattn_gpu.stages.ground import Ground, Put, attempt, drawn
from refattn_gpu.stages.timing import (
    SDPA,
    SIMULATED,
    Plan,
    Subject,
    problems_of,
    products,
    race,
    rows_of,
    words_of,
)

PLAN = Plan(
    lengths=(4096, 1024, 16384), features=(64, 128), rows=65536, heads=4, rounds=(5, 15), budget=3.0
)
"""What is timed, the most telling first."""

PASSES = 2.5
"""Products of a backward pass for those of a forward pass, as everybody counts them."""


def run(on: Ground, put: Put) -> None:
    """Report each shape: medians and spread, and who refused it and why."""
    plan = Plan(*SIMULATED) if on.simulated else PLAN
    for shape, causal in problems_of(plan):
        attempt(put, words_of(shape, causal), partial(_timed, on, plan, shape, causal))


def _timed(on: Ground, plan: Plan, shape: tuple[int, ...], causal: bool) -> dict[str, Any]:
    """Time every subject that takes a shape."""
    arrays = drawn(on, "float32", *[shape] * 4)
    times, told = race(on, plan, _subjects(arrays, causal))
    rows = rows_of(times, PASSES * products(shape, causal))
    return {"shape": shape, "causal": causal, **told, "subjects": rows}


def _subjects(arrays: list[Any], causal: bool) -> Iterator[Subject]:
    """Yield what makes gradients of Q, K and V from dO, Q, K and V."""
    halves = [array.astype("float16") for array in arrays]
    for dtype, operands in (("float16", halves), ("float32", arrays)):
        if not machine.absent():
            yield Subject("refattn cuda-cpp", dtype, _ours(cuda, operands, causal))
    yield Subject("refattn tiles", "float32", _ours(numba_cuda, arrays, causal))
    for dtype, operands in (("float16", halves), ("float32", arrays)):
        for name, word in SDPA.items():
            yield Subject(f"torch {name}", dtype, _theirs(word, operands, causal))


def _ours(package: Any, operands: list[Any], causal: bool) -> Callable[[], Any]:
    """Return the call of a package's backward pass; the forward pass runs at the first call."""
    d_output, *inputs = operands
    made: list[Any] = []

    def call() -> Any:
        if not made:
            made.append(package.attention(*inputs, causal=causal))
        return package.attention_backward(d_output, *inputs, forward=made[0], causal=causal)

    return call


def _theirs(word: str, operands: list[Any], causal: bool) -> Callable[[], Any]:
    """Return the same of one of torch's ways to compute attention."""
    made: list[Any] = []

    def call() -> Any:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if not made:
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.use_deterministic_algorithms(True, warn_only=True)
            d_output, *inputs = (torch.from_dlpack(array) for array in operands)
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            attend = torch.nn.functional.scaled_dot_product_attention
            with sdpa_kernel(getattr(SDPBackend, word)):
                output = attend(*leaves, is_causal=causal)
            made.extend((output, leaves, d_output))
        return torch.autograd.grad(*made, retain_graph=True)

    return call
