"""Beside torch's attention and standard attention: one process, turn by turn, medians and spread.

All subjects launch on the default stream and are timed there by events, several calls in a row, so
that the device never waits for Python. flash and cuDNN take no float32. What the device can give
at all, a product of square matrices shows: cuBLAS's, of as many FLOP as the problem.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from refattn.arrays import numpy_dtype
from refattn_gpu import cuda, numba_cuda
from refattn_gpu.cuda import machine
from refattn_gpu.numba_cuda.attention import FORMS
from refattn_gpu.stages.ground import Ground, Put, attempt, drawn
from refattn_gpu.stages.machine import clocks
from refattn_gpu.stages.standard import standard_attention

LENGTHS = (4096, 1024, 16384, 2048, 8192)
"""N, the most telling first: time may run out."""

FEATURES = (64, 128)
"""d."""

ROWS = 65536
"""b · h · N at every length."""

HEADS = 4
"""h; the batch makes up the rest."""

GPT2 = (64, 16, 1024, 64)
"""(b, h, N, d) of GPT-2 medium's attention, causal, as the paper times it (FA1, section 4.1)."""

TURN = 0.02
"""Seconds of calls in a row, at least."""

ROUNDS = (5, 21)
"""Fewest and most turns of a subject."""

BUDGET = 6.0
"""Seconds of turns a shape, if the fewest rounds allow it."""

STANDARD_BYTES = 2**36
"""Bytes of the matrices beyond which standard attention is not asked."""

SIMULATED = ((16,), (8,), 32, 2, (2, 2), 0.0)
"""Lengths, features, rows, heads, rounds and seconds of the simulation."""

HALVES = ("float16", "bfloat16")
"""Formats of 16 bits."""

SDPA = {
    "math": "MATH",
    "efficient": "EFFICIENT_ATTENTION",
    "flash": "FLASH_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
}
"""torch's ways to compute attention, by its names for them."""


class Subject(NamedTuple):
    """Something that computes the problem."""

    name: str
    dtype: str
    call: Callable[[], Any]
    flops: float = 0.0
    """Of a call, where they are not the problem's."""


class Plan(NamedTuple):
    """How much is timed."""

    lengths: tuple[int, ...]
    features: tuple[int, ...]
    rows: int
    heads: int
    rounds: tuple[int, int]
    budget: float


def run(on: Ground, put: Put) -> None:
    """Report each shape: medians and spread, and who refused it and why."""
    plan = (
        Plan(*SIMULATED) if on.simulated else Plan(LENGTHS, FEATURES, ROWS, HEADS, ROUNDS, BUDGET)
    )
    problems = [] if on.simulated else [(GPT2, True)]
    for shape, causal in problems + problems_of(plan):
        attempt(put, words_of(shape, causal), partial(_timed, on, plan, shape, causal))


def problems_of(plan: Plan) -> list[tuple[tuple[int, ...], bool]]:
    """Return the shapes of a plan, (b, h, N, d), each in full and causal."""
    return [
        ((max(1, plan.rows // plan.heads // n), plan.heads, n, d), causal)
        for n in plan.lengths
        for d in plan.features
        for causal in (False, True)
    ]


def words_of(shape: tuple[int, ...], causal: bool) -> str:
    """Return the name of a problem in the results."""
    return f"{','.join(map(str, shape))} {'causal' if causal else 'full'}"


def _timed(on: Ground, plan: Plan, shape: tuple[int, ...], causal: bool) -> dict[str, Any]:
    """Time every subject that takes a shape."""
    arrays = drawn(on, "float32", *[shape] * 3)
    flops = products(shape, causal)
    subjects = itertools.chain(subjects_of(on, arrays, causal), _products(arrays, flops))
    times, told = race(on, plan, subjects)
    return {"shape": shape, "causal": causal, **told, "subjects": rows_of(times, flops)}


def products(shape: tuple[int, ...], causal: bool) -> float:
    """Return the FLOP of a forward pass, as everybody counts them."""
    return 4 * math.prod(shape) * shape[2] / (2 if causal else 1)


def race(
    on: Ground, plan: Plan, candidates: Iterator[Subject]
) -> tuple[dict[Subject, list[float]], dict[str, Any]]:
    """Time subjects turn by turn.

    Returns:
        times: seconds of a call in each turn, of each subject that ran.
        told: turns, clocks before and after, and why the other subjects did not run.
    """
    subjects, refused = able(candidates)
    calls, rounds = _turns(on, plan, subjects)
    before = clocks()
    times: dict[Subject, list[float]] = {subject: [] for subject in subjects}
    for _ in range(rounds):
        for subject in subjects:
            times[subject].append(on.seconds(subject.call, calls[subject]))
    return times, {"rounds": rounds, "clocks": [before, clocks()], "refused": refused}


def rows_of(times: dict[Subject, list[float]], flops: float) -> dict[str, dict[str, float]]:
    """Return the row of each subject, by its name and format.

    Args:
        times: of `race`.
        flops: of the problem.
    """
    return {f"{s.name} {s.dtype}": _row(seconds, s.flops or flops) for s, seconds in times.items()}


def _row(times: list[float], flops: float) -> dict[str, float]:
    """Return the median and the spread of some times, and the rate that they are."""
    ordered = sorted(times)
    median = statistics.median(ordered)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return {"seconds": median, "low": low, "high": high, "tflops": flops / median / 1e12}


def _turns(on: Ground, plan: Plan, subjects: list[Subject]) -> tuple[dict[Subject, int], int]:
    """Return calls in a row of each subject, and rounds."""
    once = {s: max(on.seconds(s.call, 1), 1e-7) for s in subjects}
    turn = 0.0 if on.simulated else TURN
    calls = {s: max(1, math.ceil(turn / once[s])) for s in subjects}
    whole = sum(calls[s] * once[s] for s in subjects)
    fewest, most = plan.rounds
    return calls, min(most, max(fewest, int(plan.budget / max(whole, 1e-9))))


def able(subjects: Iterator[Subject]) -> tuple[list[Subject], dict[str, str]]:
    """Call each subject twice; return those that ran, and why the others did not."""
    able, refused = [], {}
    for subject in subjects:
        try:
            subject.call()
            subject.call()
            able.append(subject)
        except Exception as error:  # whatever a library says
            words = " ".join(str(error).split())[:200] or type(error).__name__
            refused[f"{subject.name} {subject.dtype}"] = words
    return able, refused


def subjects_of(on: Ground, arrays: list[Any], causal: bool) -> Iterator[Subject]:
    """Yield what computes attention: ours, standard attention's and torch's.

    Args:
        on: the ground.
        arrays: Q, K and V, float32, on the ground's memory.
        causal: whether a query sees the keys up to its own position only.
    """
    query, key, value = arrays
    if not machine.absent():
        for dtype in (*HALVES, "float32"):
            operands = [array.astype(numpy_dtype(dtype)) for array in arrays]

            def fast(operands: list[Any] = operands) -> Any:
                return cuda.attention(*operands, causal=causal).output

            yield Subject("refattn cuda-cpp", dtype, fast)
            if machine.is_hopper() and dtype in HALVES:

                def elsewhere(operands: list[Any] = operands) -> Any:
                    return cuda.attention(*operands, causal=causal, kernel="forward").output

                yield Subject("refattn cuda-cpp mma.sync", dtype, elsewhere)

        def plain() -> Any:
            return cuda.attention(query, key, value, kernel="ffma", causal=causal).output

        yield Subject("refattn cuda-cpp ffma", "float32", plain)
    for form in FORMS:

        def ours(form: str = form) -> Any:
            return numba_cuda.attention(query, key, value, form=form, causal=causal).output

        yield Subject(f"refattn {form}", "float32", ours)
    if _fits(arrays):
        yield Subject(
            f"{on.xp.__name__} standard",
            "float32",
            lambda: standard_attention(on.xp, query, key, value, causal),
        )
    yield from _torch(arrays, causal)


def _fits(arrays: list[Any]) -> bool:
    """Return whether the matrices of standard attention in float32 fit the memory."""
    query, key, _ = arrays
    numbers = int(math.prod(query.shape[:3])) * int(key.shape[2])
    return 3 * numbers * int(query.itemsize) <= STANDARD_BYTES


def _torch(arrays: list[Any], causal: bool) -> Iterator[Subject]:
    """Yield torch's ways to compute attention, and standard attention as one writes it there.

    math is no such thing in 16 bits: it computes in float32.
    """
    with contextlib.suppress(ImportError):
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        torch.backends.cuda.matmul.allow_tf32 = False
        attend = torch.nn.functional.scaled_dot_product_attention
        tensors = [torch.from_dlpack(array) for array in arrays]
        for dtype in ("float32", *HALVES):
            cast = [tensor.to(getattr(torch, dtype)) for tensor in tensors]
            for name, word in SDPA.items():

                def theirs(cast: Any = cast, word: str = word) -> Any:
                    with sdpa_kernel(getattr(SDPBackend, word)):
                        return attend(*cast, is_causal=causal)

                yield Subject(f"torch {name}", dtype, theirs)
            if dtype in HALVES and _fits(arrays):
                yield Subject("torch standard", dtype, partial(_standard, torch, cast, causal))


def _standard(torch: Any, operands: list[Any], causal: bool) -> Any:
    """Return standard attention by torch's operations, in the format of the operands."""
    query, key, value = operands
    S = query @ key.mT * query.shape[-1] ** -0.5
    if causal:
        ahead = torch.ones(S.shape[-2:], dtype=torch.bool, device=S.device).triu(1)
        S.masked_fill_(ahead, -math.inf)
    return torch.softmax(S, -1) @ value


def _products(arrays: list[Any], flops: float) -> Iterator[Subject]:
    """Yield a product of square matrices in each format of tensor cores, of about as many FLOP."""
    with contextlib.suppress(ImportError):
        import torch

        n = max(1, round((flops / 2) ** (1 / 3) / 256)) * 256 if flops > 2 * 256**3 else 16
        for dtype in HALVES:
            device = torch.from_dlpack(arrays[0]).device
            A, B = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
            yield Subject("torch product", dtype, partial(torch.matmul, A, B), 2.0 * n**3)
