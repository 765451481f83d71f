"""Kernels with one thread a number of the result: rotation, linear bias, merge of parts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from refattn_gpu.device import cuda
from refattn_gpu.numba_cuda.bound import rescale, steps

THREADS = 128
"""A block, in all of these kernels."""


class Rotated(NamedTuple):
    """What a rotation writes: (rows, n, d)."""

    rotated: Any


class Biased(NamedTuple):
    """What a linear bias writes: (items, h, n_q, n_k)."""

    bias: Any


class Rotation(NamedTuple):
    """Features and the tables that rotate them."""

    x: Any
    """(rows, n, d)."""
    cosine: Any
    """(items, n, r/2); rows / items neighbouring rows share one."""
    sine: Any
    split: Any
    """1 if features i and i + r/2 are a pair, 0 if 2i and 2i + 1; int64."""


class LinearBias(NamedTuple):
    """Slopes, and where the queries stand."""

    slopes: Any
    """m, (h,)."""
    offsets: Any
    """(items,) int64."""
    distance: Any
    """Form, int64."""


class Merged(NamedTuple):
    """What a merge writes."""

    merged: Any
    """(rows, d)."""
    merged_logsumexp: Any
    """(rows,)."""


class Parts(NamedTuple):
    """What it reads."""

    outputs: Any
    """(p, rows, d)."""
    logsumexps: Any
    """(p, rows)."""


def rotate_pairs(results, rotation):
    """Rotate one pair of features, or copy one feature that does not rotate.

    Spec: ROPE-EQ34, OWN-ROPE1, OWN-ROPE2.

        (u, v) → (u cos - v sin, u sin + v cos)
    """
    x, half = rotation.x, rotation.cosine.shape[2]
    rows, n, d = x.shape
    tasks = d - half  # of a row: pairs, then single features
    task = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if task >= rows * n * tasks:
        return
    row, i, pair = task // tasks // n, task // tasks % n, task % tasks
    if pair >= half:
        results.rotated[row, i, half + pair] = x[row, i, half + pair]
        return
    first = pair if rotation.split else 2 * pair
    second = pair + half if rotation.split else 2 * pair + 1
    item = row // (rows // rotation.cosine.shape[0])
    cos, sin = rotation.cosine[item, i, pair], rotation.sine[item, i, pair]
    u, v = x[row, i, first], x[row, i, second]
    results.rotated[row, i, first] = u * cos - v * sin
    results.rotated[row, i, second] = u * sin + v * cos


def linear_bias(real: Any) -> Any:
    """Return the kernel of ALiBi's bias in a format.

    Spec: ALIBI-S3a, OWN-ALIBI1.

        B_hij = m_h · D_ij
    """

    def alibi_cells(results, bias):
        items, heads, n_q, n_k = results.bias.shape
        cell = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if cell < items * heads * n_q * n_k:
            j, i = cell % n_k, cell // n_k % n_q
            h, item = cell // n_k // n_q % heads, cell // n_k // n_q // heads
            D_ij = real(steps(bias.distance, bias.offsets[item] + i, j))
            results.bias[item, h, i, j] = bias.slopes[h] * D_ij

    return alibi_cells


def merge_parts(real: Any) -> Any:
    """Return the kernel that merges partial results, a thread an element of the output.

    Spec: OWN-MERGE1, FA1-S31, OWN-EMPTY1, OWN-POISON1.

        L = ln Σ_p exp(L_p),  O = Σ_p exp(L_p - L) O_p
    """
    lowest, zero = real(-math.inf), real(0)

    def merge_rows(results, parts):
        count, rows, d = parts.outputs.shape
        place = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        row, x = place // d, place % d
        if row < rows:
            top, total, O = lowest, zero, zero
            for p in range(count):
                top = max(top, parts.logsumexps[p, row])
            for p in range(count):
                if parts.logsumexps[p, row] != lowest:  # an empty part is not read
                    weight = rescale(parts.logsumexps[p, row], top, zero)
                    total += weight
                    O += weight * parts.outputs[p, row, x]
            results.merged[row, x] = zero if total == zero else O / total
            if x == 0:
                results.merged_logsumexp[row] = lowest if total == zero else top + math.log(total)

    return merge_rows
