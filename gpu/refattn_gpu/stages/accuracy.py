"""Errors against standard attention in float64, on inputs with outliers, beside torch's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from refattn.arrays import numpy_dtype
from refattn_gpu.stages.ground import Ground, Put, attempt
from refattn_gpu.stages.standard import standard_attention
from refattn_gpu.stages.timing import HALVES, Subject, able, subjects_of, words_of

SHAPES = ((1, 2, 4096, 64), (1, 2, 4096, 128))
"""(b, h, N, d)."""

SIMULATED = ((1, 2, 16, 8),)
"""The same of the simulation."""

RARE, FAR = 0.001, 10.0
"""Probability of an outlier and its standard deviation: N(0, 1) + N(0, 100) · Bernoulli(0.001),
the inputs of FlashAttention-3's section 4.3."""

OURS, THEIRS = "refattn cuda-cpp", "torch flash"
"""Whose error must not be larger, and than whose, in 16 bits."""


def run(on: Ground, put: Put) -> None:
    """Report each shape: largest and root mean square error of every subject."""
    for shape in SIMULATED if on.simulated else SHAPES:
        for causal in (False, True):
            attempt(put, words_of(shape, causal), partial(_errors, on, shape, causal))


def outliers(shape: tuple[int, ...], count: int) -> list[np.ndarray[Any, Any]]:
    """Return arrays of normal numbers of which a few are far out, float32."""
    rng = np.random.default_rng(1)
    return [
        (
            rng.standard_normal(shape)
            + FAR * rng.standard_normal(shape) * (rng.random(shape) < RARE)
        ).astype(np.float32)
        for _ in range(count)
    ]


def _errors(on: Ground, shape: tuple[int, ...], causal: bool) -> dict[str, Any]:
    """Return the error of every subject that takes a shape."""
    arrays = [on.xp.asarray(array) for array in outliers(shape, 3)]
    subjects, refused = able(subjects_of(on, arrays, causal))
    golden = {dtype: _golden(on, arrays, dtype, causal) for dtype in (*HALVES, "float32")}
    rows = {f"{s.name} {s.dtype}": _error(on, s, golden[s.dtype]) for s in subjects}
    told = {"shape": shape, "causal": causal, "subjects": rows, "refused": refused}
    return told if on.simulated else told | judged(rows)  # a host's flash attention is no device's


def judged(rows: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return whether our root mean square errors in 16 bits are no larger than flash's."""
    larger = []
    for dtype in HALVES:
        ours, theirs = (rows.get(f"{name} {dtype}") for name in (OURS, THEIRS))
        if ours and theirs and not ours["rms_error"] <= theirs["rms_error"]:
            larger.append(f"{dtype} {ours['rms_error']:.3g}, {THEIRS} {theirs['rms_error']:.3g}")
    return {"ok": not larger, "summary": f"root mean square errors: {'; '.join(larger)}"}


def _golden(on: Ground, arrays: list[Any], dtype: str, causal: bool) -> np.ndarray[Any, Any]:
    """Return the output in float64, of inputs that were rounded to a format."""
    query, key, value = (array.astype(numpy_dtype(dtype)).astype("float64") for array in arrays)
    return on.asnumpy(standard_attention(on.xp, query, key, value, causal))


def _error(on: Ground, subject: Subject, golden: np.ndarray[Any, Any]) -> dict[str, float]:
    found = subject.call()
    plain = found.float().cpu().numpy() if hasattr(found, "cpu") else on.asnumpy(found)
    difference = np.abs(plain.astype(np.float64) - golden)
    return {
        "max_error": float(difference.max()),
        "rms_error": float(np.sqrt((difference**2).mean())),
    }
