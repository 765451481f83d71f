"""How fast, beside the libraries installed here: one process, turn by turn, error beside time."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np

from refattn.bench_subjects import SUBJECTS, Array, Call, Problem, Unable, installed, limit_threads
from refattn.checks import OptionError

OURS = "numba"
"""The subject that the others are compared with."""

DEFAULT_SHAPES = (
    "1,16,1024,64",
    "4,12,512,64",
    "1,8,4096,64",
    "1,8,4096,128",
    "1,4,16384,64",
    "1,32,1:4096,128",
    "1,8,8:4096,128",
    "1,8,16:4096,128",
    "1,8,32:4096,128",
    "1,12,128,64",
)
"""Shapes that are timed unless others are asked for."""

SAMPLED_ROWS = 16
"""Query rows a head whose error is measured against float64."""

SLICE = 0.05
"""Seconds of repeated calls that make one sample."""


class Shape(NamedTuple):
    """Sizes of one attention."""

    batch: int
    heads: int
    n_q: int
    n_k: int
    d: int

    def __str__(self) -> str:
        n = str(self.n_q) if self.n_q == self.n_k else f"{self.n_q}:{self.n_k}"
        return f"{self.batch},{self.heads},{n},{self.d}"


class Row(NamedTuple):
    """One subject on one shape."""

    shape: str
    mask: str
    subject: str
    seconds: float
    """Median of the samples."""
    gflops: float
    ratio: float
    """Its time over ours, the median over the turns."""
    spread: tuple[float, float]
    """Quartiles of that ratio over the turns."""
    peak_share: float
    rms_error: float
    max_error: float
    note: str = ""


def read_shape(text: str) -> Shape:
    """Return the shape that `batch,heads,length,features` says; the length may be `n_q:n_k`.

    Raises:
        OptionError: it is not of that form.
    """
    try:
        batch, heads, length, d = text.split(",")
        n_q, _, n_k = length.partition(":")
        shape = Shape(int(batch), int(heads), int(n_q), int(n_k or n_q), int(d))
    except ValueError:
        shape = Shape(0, 0, 0, 0, 0)
    if min(shape) < 1:
        raise OptionError(
            f"shape is {text!r}, but it must be batch,heads,length,features with a length of "
            "n or n_q:n_k, all at least 1 [bench]"
        )
    return shape


def operations(shape: Shape, causal: bool, backward: bool) -> float:
    """Return the multiplications and additions that an exact attention needs; causal exactly."""
    b, h, n_q, n_k, d = shape
    pairs = n_q * n_k
    if causal:
        pairs = sum(min(n_k, max(0, n_k - n_q + i + 1)) for i in range(n_q))
    return 4.0 * b * h * d * pairs * (3.5 if backward else 1.0)


def draw(shape: Shape, dtype: str, causal: bool, backward: bool, threads: int) -> Problem:
    """Return a problem of standard normal numbers."""
    drawn = np.random.default_rng(0)
    b, h, n_q, n_k, d = shape
    query, key, value, d_output = (
        drawn.standard_normal((b, h, n, d), np.float32).astype(dtype) for n in (n_q, n_k, n_k, n_q)
    )
    return Problem(query, key, value, d_output if backward else None, causal, threads)


def errors(problem: Problem, output: Array) -> tuple[float, float]:
    """Return the root mean square and the largest error on sampled rows, against float64."""
    query, key, value = problem.query, problem.key, problem.value
    n_q, n_k = query.shape[-2], key.shape[-2]
    rows = np.unique(np.linspace(0, n_q - 1, min(n_q, SAMPLED_ROWS)).astype(int))
    differences = []
    for b, h in np.ndindex(query.shape[:2]):
        S = query[b, h, rows].astype(np.float64) @ key[b, h].T.astype(np.float64)
        S /= math.sqrt(query.shape[-1])
        if problem.causal:
            S[np.arange(n_k)[None, :] > rows[:, None] + n_k - n_q] = -np.inf
        P = np.exp(S - S.max(-1, keepdims=True))
        exact = P @ value[b, h].astype(np.float64) / P.sum(-1, keepdims=True)
        differences.append(output[b, h, rows].astype(np.float64) - exact)
    off = np.abs(np.stack(differences))
    return float(np.sqrt((off**2).mean())), float(off.max())


def sample(call: Call, repeats: int) -> float:
    """Return the seconds a call, over several calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def turns(calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """Return samples of every subject, taken in turn so that all meet the same machine."""
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, math.ceil(SLICE / max(sample(call, 1), 1e-9)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(found.values()))) < 3:
        for name, call in calls.items():
            found[name].append(sample(call, repeats[name]))
    return found


def time_shape(
    shape: Shape,
    names: Sequence[str],
    *,
    causal: bool,
    backward: bool,
    dtype: str,
    threads: int,
    seconds: float,
    peak: float,
) -> list[Row]:
    """Return a row a subject on one shape; one that cannot take it says why."""
    problem = draw(shape, dtype, causal, backward, threads)
    about = (str(shape), ("causal" if causal else "full") + (" fwd+bwd" if backward else ""))
    calls: dict[str, Call] = {}
    rows = []
    for name in names:
        try:
            if backward and not SUBJECTS[name].backward:
                raise Unable("its gradients are not timed")
            calls[name] = SUBJECTS[name].prepare(problem)
        except Unable as reason:
            nothing = (math.nan,) * 3
            rows.append(Row(*about, name, *nothing, (math.nan,) * 2, *nothing, note=str(reason)))
    found = turns(calls, seconds)
    work = operations(shape, causal, backward)
    for name, call in calls.items():
        middle = statistics.median(found[name])
        ratios = [t / ours for t, ours in zip(found[name], found[OURS], strict=True)]
        low, ratio, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        rms, largest = errors(problem, SUBJECTS[name].array(call()))
        spread = (float(low), float(high))
        speed = work / middle
        row = Row(
            *about, name, middle, speed / 1e9, float(ratio), spread, speed / peak, rms, largest
        )
        rows.append(row)
    return rows


def versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of the subjects, of Python and of refattn."""
    found = {"python": platform.python_version()}
    for name in ("refattn", *names):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def processor() -> str:
    """Return the processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def bench(
    *,
    shapes: Sequence[str] = (),
    peers: Sequence[str] = (),
    masks: Sequence[str] = ("full", "causal"),
    backward: bool = False,
    dtype: str = "float32",
    threads: int | None = None,
    seconds: float = 2.0,
    watch: Callable[[Any, int, str], Any] = lambda items, total, what: items,
) -> dict[str, Any]:
    """Time attention side by side and return everything as plain data.

    Args:
        shapes: `batch,heads,length,features`; the default ones if empty.
        peers: subjects beside ours; every installed one if empty.
        masks: "full", "causal" or both.
        backward: time forward and backward together.
        dtype: float32 or float64.
        threads: of every subject; NUMBA_NUM_THREADS if None.
        seconds: a shape and mask.
        watch: wraps the shapes as they come: `watch(items, total, what)`.

    Raises:
        OptionError: a word is unknown, or a peer asked for is not installed.
    """
    unknown = [name for name in peers if name not in SUBJECTS or not installed(name)]
    if unknown:
        raise OptionError(
            f"peer is {unknown[0]!r}, but it must be one of those installed here: "
            f"{', '.join(name for name in SUBJECTS if installed(name))} [bench]"
        )
    from refattn.cpu.peak import peak_flops
    from refattn.cpu.pool import thread_count

    count = thread_count("bench", threads)
    limit_threads(count)
    chosen = [name for name in (peers or SUBJECTS) if installed(name)]
    names = [OURS, *(name for name in chosen if name != OURS)]
    todo = [(read_shape(text), mask) for text in shapes or DEFAULT_SHAPES for mask in masks]
    # one query sees every key either way
    todo = [(shape, mask) for shape, mask in todo if shape.n_q > 1 or mask == masks[0]]
    peak = peak_flops(count, dtype)
    rows: list[Row] = []
    for shape, mask in watch(todo, len(todo), "timing"):
        rows += time_shape(
            shape, names, causal=mask == "causal", backward=backward, dtype=dtype,
            threads=count, seconds=seconds, peak=peak,
        )  # fmt: skip
        peak = max(peak, peak_flops(count, dtype, 0.05))
    return {
        "processor": processor(),
        "threads": count,
        "dtype": dtype,
        "peak_gflops": peak / 1e9,
        "versions": versions(names),
        "rows": [row._asdict() for row in rows],
    }
