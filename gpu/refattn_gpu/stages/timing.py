"""Beside torch's attention and standard attention: one process, turn by turn, medians and spread.

All subjects launch on the default stream and are timed there by events, several calls in a row, so
that the device never waits for Python. flash and cuDNN take no float32; they are timed in float16,
which is another problem, and their rows say so.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

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

TURN = 0.02
"""Seconds of calls in a row, at least."""

ROUNDS = (5, 21)
"""Fewest and most turns of a subject."""

BUDGET = 6.0
"""Seconds of turns a shape, if the fewest rounds allow it."""

STANDARD_BYTES = 2**36
"""Bytes of the matrices beyond which standard attention is not asked."""

GOLDEN = 4096
"""Longest problem whose error is taken, against standard attention in float64."""

SIMULATED = ((16,), (8,), 32, 2, (2, 2), 0.0)
"""Lengths, features, rows, heads, rounds and seconds of the simulation."""

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


class Plan(NamedTuple):
    """How much is timed."""

    lengths: tuple[int, ...]
    features: tuple[int, ...]
    rows: int
    heads: int
    rounds: tuple[int, int]
    budget: float


def run(on: Ground, put: Put) -> None:
    """Report each shape: medians, spread, error, and who refused it and why."""
    plan = (
        Plan(*SIMULATED) if on.simulated else Plan(LENGTHS, FEATURES, ROWS, HEADS, ROUNDS, BUDGET)
    )
    for n in plan.lengths:
        for d in plan.features:
            for causal in (False, True):
                shape = (max(1, plan.rows // plan.heads // n), plan.heads, n, d)
                words = f"{','.join(map(str, shape))} {'causal' if causal else 'full'}"
                attempt(put, words, partial(_timed, on, plan, shape, causal))


def _timed(on: Ground, plan: Plan, shape: tuple[int, ...], causal: bool) -> dict[str, Any]:
    """Time every subject that takes a shape."""
    arrays = drawn(on, "float32", *[shape] * 3)
    times, told = race(on, plan, _subjects(on, arrays, causal))
    flops = products(shape, causal)
    golden = _golden(on, arrays, causal)
    rows = {
        f"{s.name} {s.dtype}": row_of(seconds, flops) | _error(on, s, golden)
        for s, seconds in times.items()
    }
    return {"shape": shape, "causal": causal, **told, "subjects": rows}


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
    subjects, refused = _able(candidates)
    calls, rounds = _turns(on, plan, subjects)
    before = clocks()
    times: dict[Subject, list[float]] = {subject: [] for subject in subjects}
    for _ in range(rounds):
        for subject in subjects:
            times[subject].append(on.seconds(subject.call, calls[subject]))
    return times, {"rounds": rounds, "clocks": [before, clocks()], "refused": refused}


def row_of(times: list[float], flops: float) -> dict[str, float]:
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


def _able(subjects: Iterator[Subject]) -> tuple[list[Subject], dict[str, str]]:
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


def _subjects(on: Ground, arrays: list[Any], causal: bool) -> Iterator[Subject]:
    query, key, value = arrays
    if not machine.absent():
        halves = [array.astype("float16") for array in arrays]
        for dtype, operands in (("float16", halves), ("float32", arrays)):

            def fast(operands: list[Any] = operands) -> Any:
                return cuda.attention(*operands, causal=causal).output

            yield Subject("refattn cuda-cpp", dtype, fast)
    for form in FORMS:

        def ours(form: str = form) -> Any:
            return numba_cuda.attention(query, key, value, form=form, causal=causal).output

        yield Subject(f"refattn {form}", "float32", ours)
    matrices = 3 * math.prod(query.shape[:3]) * key.shape[2] * query.itemsize
    if matrices <= STANDARD_BYTES:
        yield Subject(
            f"{on.xp.__name__} standard",
            "float32",
            lambda: standard_attention(on.xp, query, key, value, causal),
        )
    yield from _torch(arrays, causal)


def _torch(arrays: list[Any], causal: bool) -> Iterator[Subject]:
    with contextlib.suppress(ImportError):
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        torch.backends.cuda.matmul.allow_tf32 = False
        attend = torch.nn.functional.scaled_dot_product_attention
        tensors = [torch.from_dlpack(array) for array in arrays]
        for dtype in ("float32", "float16"):
            cast = [tensor.to(getattr(torch, dtype)) for tensor in tensors]
            for name, word in SDPA.items():

                def theirs(cast: Any = cast, word: str = word) -> Any:
                    with sdpa_kernel(getattr(SDPBackend, word)):
                        return attend(*cast, is_causal=causal)

                yield Subject(f"torch {name}", dtype, theirs)


def _golden(on: Ground, arrays: list[Any], causal: bool) -> Any:
    """Return the first head's output in float64, or None where the problem is long."""
    if arrays[0].shape[2] > GOLDEN:
        return None
    query, key, value = (array[:1, :1].astype("float64") for array in arrays)
    return on.asnumpy(standard_attention(on.xp, query, key, value, causal))[0, 0]


def _error(on: Ground, subject: Subject, golden: Any) -> dict[str, float]:
    """Return the largest and the root mean square error of a subject's first head."""
    if golden is None:
        return {}
    head = subject.call()[0, 0]
    plain = head.float().cpu().numpy() if hasattr(head, "cpu") else on.asnumpy(head)
    difference = np.abs(plain.astype(np.float64) - golden)
    return {
        "max_error": float(difference.max()),
        "rms_error": float(np.sqrt((difference**2).mean())),
    }
