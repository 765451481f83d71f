"""Drawing of inputs by integer arithmetic alone, so that every machine draws the same bits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.errors import RefattnError

Words = NDArray[np.uint64]
Tensor = NDArray[Any]

HUGE = 2.0**100
"""The finite poison: about 1.27e30, exact in float64, float32 and bfloat16."""

POISONS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": HUGE}
"""What a cell that must not be read may hold."""


class DrawError(RefattnError):
    """A draw that the drawing rules do not know."""


def words(stream: str, count: int) -> Words:
    """Return the first `count` 64-bit words of a stream.

    Spec: OWN-DRAW1

        w_{4c}, …, w_{4c+3} = SHA-256("stream/c"), little-endian

    Args:
        stream: the name of the stream, `case-id/tensor`.
        count: how many words.

    Returns:
        uint64 (count,).
    """
    digests = (hashlib.sha256(f"{stream}/{c}".encode()).digest() for c in range(-(-count // 4)))
    return np.frombuffer(b"".join(digests), dtype="<u8")[:count].astype(np.uint64)


def bits(w: Words, low: int, count: int) -> NDArray[np.int64]:
    """Return bits low … low+count-1 of each word as an integer."""
    field = np.right_shift(w, np.uint64(low)) & np.uint64((1 << count) - 1)
    return field.astype(np.int64)


def scaled(numerator: NDArray[np.int64], exponent: int | NDArray[np.int64]) -> Tensor:
    """Return numerator · 2^exponent as float32, which holds it exactly."""
    return np.ldexp(numerator.astype(np.float64), exponent).astype(np.float32)


def unit(w: Words) -> Tensor:
    """Return k/256 with k of eight bits: in [0, 1)."""
    return scaled(bits(w, 56, 8), -8)


def positive(w: Words) -> Tensor:
    """Return 1 + k/128 with k of seven bits: in [1, 2)."""
    return scaled(128 + bits(w, 57, 7), -7)


def normal_numerator(w: Words) -> NDArray[np.int64]:
    """Return the sum of twelve five-bit numbers less its mean 186: |x| <= 186."""
    groups = np.stack([bits(w, 4 + 5 * g, 5) for g in range(12)])
    total: NDArray[np.int64] = groups.sum(axis=0) - 186
    return total


def normal(w: Words) -> Tensor:
    """Return an Irwin-Hall sum of twelve over 32: mean 0, deviation 1 (to 0.1 %), |x| < 6."""
    return scaled(normal_numerator(w), -5)


def spread(w: Words, low: int, high: int) -> Tensor:
    """Return ±(1 + k/128)·2^e with e uniform in low … high: wide magnitudes."""
    exponent = low + bits(w, 16, 16) % (high - low + 1)
    return scaled((1 - 2 * bits(w, 0, 1)) * (128 + bits(w, 57, 7)), exponent - 7)


def tiny(w: Words, exponent: int) -> Tensor:
    """Return ±k·2^exponent with k in 1 … 255: subnormal where exponent is the smallest."""
    return scaled((1 - 2 * bits(w, 0, 1)) * (1 + bits(w, 32, 24) % 255), exponent)


def outliers(w: Words) -> Tensor:
    """Return normal numbers of which one in 32 is sixteen times as large."""
    return scaled(normal_numerator(w), np.where(bits(w, 0, 4) + bits(w, 63, 1) == 0, -1, -5))


def bernoulli(w: Words, eighths: int) -> Tensor:
    """Return True with a probability of eighths/8."""
    below: Tensor = bits(w, 40, 3) < eighths
    return below


ELEMENTWISE: Mapping[str, Callable[..., Tensor]] = {
    "unit": unit,
    "positive": positive,
    "normal": normal,
    "spread": spread,
    "tiny": tiny,
    "outliers": outliers,
    "bernoulli": bernoulli,
}
"""Kinds in which each element depends on its own word only."""


def to_eight_bits(x: Tensor, quantum: int = -16) -> Tensor:
    """Cut numbers towards zero to eight significant bits and to multiples of 2^quantum.

    What is left is exact in float64, float32, float16 and bfloat16 (|x| < 65536).
    """
    fraction, exponent = np.frexp(x.astype(np.float64))
    step = np.maximum(exponent - 8, quantum)
    cut: Tensor = np.ldexp(np.trunc(np.ldexp(fraction, exponent - step)), step)
    return cut.astype(np.float32)


def poisoned(x: Tensor, rows: Sequence[Sequence[int]], values: Sequence[str]) -> Tensor:
    """Return (b, h, n, d) with rows `rows[item]` of each item filled with the named poisons."""
    y = x.copy()
    cells = [POISONS[v] for v in values]
    for item, indices in enumerate(rows):
        for j in indices:
            cycle = np.resize(np.asarray(cells, np.float32), y[item, :, j].shape)
            y[item, :, j] = np.roll(cycle, j, axis=-1)
    return y


def exact_dtypes(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the floating dtypes in which every float tensor is exact, widest first."""
    import ml_dtypes

    kinds = {
        "float64": np.float64,
        "float32": np.float32,
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
    }
    floats = [t for t in tensors.values() if t.dtype.kind == "f"]
    with np.errstate(all="ignore"):
        return tuple(
            name
            for name, dtype in kinds.items()
            if all(
                np.array_equal(t.astype(dtype).astype(t.dtype), t, equal_nan=True) for t in floats
            )
        )
