"""Rotary positions, linear biases and the merge of partial results, with the reference's arguments.

Tables, slopes and offsets are those of the reference; the kernels multiply, add and round.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from refattn import rules
from refattn.alibi import Alignment, bias_shape, check_bias
from refattn.arrays import Array, array_namespace, dtype_name, narrow, widen
from refattn.checks import check_memory
from refattn.merge import MergeResult, check_parts
from refattn.rope import RopeResult, check_rotation, rope_tables_for
from refattn.rope_frequencies import Variant
from refattn_gpu import device


def rope(
    x: Array,
    positions: Any,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    variant: Variant | None = None,
    pairing: str = "interleaved",
) -> RopeResult:
    """Return features rotated by their positions, with the tables used.

    Spec: ROPE-EQ34, OWN-ROPE1, OWN-ROPE2, OWN-ROPE3, OWN-ROUND1.

        R_m x = x ⊗ cos(mθ) + (-x_2, x_1, -x_4, x_3, ...) ⊗ sin(mθ)

    Args:
        x: queries or keys, (..., n, d), of NumPy or, on a device, of CuPy.
        positions: m, (n,), or (b, n) for x of (b, ..., n, d); integers, tokens.
        base: base of the frequencies.
        rotary_dim: r, even: the first r features rotate, the others stay; d if None.
        variant: see `refattn.rope_frequencies.rope_frequencies`.
        pairing: "interleaved" or "half_split".

    Returns:
        output: (..., n, d), in x's dtype; frequencies, attention_factor, cosine, sine: as the
            reference.

    Raises:
        ShapeError, DtypeError, OptionError: as the reference.
        BackendAbsent: nothing here runs a kernel.
    """
    device.require()
    tables = rope_tables_for("numba_cuda.rope", x, positions, base, rotary_dim, variant)
    return RopeResult(_rotated("numba_cuda.rope", x, tables.cosine, tables.sine, pairing), *tables)


def rope_backward(
    d_output: Array,
    positions: Any,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    variant: Variant | None = None,
    pairing: str = "interleaved",
) -> Array:
    """Return the gradient of rope's input: the transpose of the rotation turns back.

    Spec: ROPE-EQ34, OWN-ROPE1, OWN-ROPE2, OWN-ROPE3, OWN-ROUND1.

        dx = R_mᵀ dO = R_{-m} dO, times the attention factor as in the forward pass

    Args:
        d_output: dO, (..., n, d).
        positions: as in `rope`, and so are all others.
        base: base of the frequencies.
        rotary_dim: r.
        variant: see `refattn.rope_frequencies.rope_frequencies`.
        pairing: "interleaved" or "half_split".

    Returns:
        d_x: (..., n, d), in d_output's dtype.

    Raises:
        RefattnError: as `rope`.
    """
    device.require()
    name = "numba_cuda.rope_backward"
    tables = rope_tables_for(name, d_output, positions, base, rotary_dim, variant)
    return _rotated(name, d_output, tables.cosine, -tables.sine, pairing)


def _rotated(function: str, x: Array, cosine: Array, sine: Array, pairing: str) -> Array:
    """Check the pairing, run the kernel and round once."""
    check_rotation(function, x[..., :1, :], cosine[..., :1, :], sine[..., :1, :], pairing)
    from refattn_gpu.numba_cuda import elements

    xp, wide = array_namespace(x), widen(x)
    n, d = x.shape[-2:]
    rows = xp.ascontiguousarray(xp.reshape(xp.astype(wide, wide.dtype, copy=False), (-1, n, d)))
    half = cosine.shape[-1]
    cos, sin = (xp.ascontiguousarray(xp.reshape(t, (-1, n, half))) for t in (cosine, sine))
    results = elements.Rotated(xp.empty(rows.shape, dtype=wide.dtype))
    rotation = elements.Rotation(rows, cos, sin, int(pairing == "half_split"))
    _launch("rotate_pairs", wide, rows.shape[0] * n * (d - half), results, rotation)
    return narrow(xp.reshape(results.rotated, x.shape), x)


def alibi_bias(
    slopes: Array,
    n_q: int,
    n_k: int,
    *,
    alignment: Alignment = "top_left",
    distance: str = "absolute",
) -> Array:
    """Return the bias that is added to the logits after they are scaled.

    Spec: ALIBI-S3a, ALIBI-FN10, OWN-ALIBI1, OWN-ROUND1, OWN-MEMORY1.

        B_hij = m_h · D_ij;   absolute: D_ij = -|p_i - j|,  p_i = i + offset

    Args:
        slopes: m (h,), logit units a token, of NumPy or, on a device, of CuPy.
        n_q: number of queries.
        n_k: number of keys.
        alignment: `top_left` (offset 0), `bottom_right` (offset n_k - n_q), the offset itself,
            or a list of offsets, one a batch item.
        distance: `absolute`, `signed` (m(j - p_i)) or `column` (m j).

    Returns:
        B (h, n_q, n_k), or (b, h, n_q, n_k) for a list of offsets; dtype of slopes.

    Raises:
        ShapeError, DtypeError, OptionError: as the reference.
        MemoryLimitError: the bias does not fit into the free memory.
        BackendAbsent: nothing here runs a kernel.
    """
    device.require()
    from refattn_gpu.numba_cuda import elements

    n_q, n_k, offset = check_bias("numba_cuda.alibi_bias", slopes, n_q, n_k, alignment, distance)
    shape = bias_shape(slopes, n_q, n_k, offset)
    m = widen(slopes)
    check_memory("numba_cuda.alibi_bias", shape, itemsize=m.dtype.itemsize, arrays=1)
    xp = array_namespace(slopes)
    offsets = xp.ascontiguousarray(xp.reshape(xp.asarray(offset, dtype=xp.int64), (-1,)))
    full = (offsets.shape[0], slopes.shape[0], n_q, n_k)
    results = elements.Biased(xp.empty(full, dtype=m.dtype))
    about = elements.LinearBias(xp.ascontiguousarray(m), offsets, rules.DISTANCE_CODES[distance])
    _launch("linear_bias", m, math.prod(full), results, about)
    return narrow(xp.reshape(results.bias, shape), slopes)


def merge(outputs: Array, logsumexps: Array) -> MergeResult:
    """Merge the results of attention over parts of the keys.

    Spec: OWN-MERGE1, FA1-S31, OWN-EMPTY1, OWN-POISON1, OWN-ROUND1.

        L = ln Σ_p exp(L_p),  O = Σ_p exp(L_p - L) O_p

    Args:
        outputs: O_p, (p, ..., n, d), any float dtype, of NumPy or, on a device, of CuPy; ignored
            in a row whose L_p is -∞.
        logsumexps: L_p, (p, ..., n), nats, dtype of the outputs or their computing dtype.

    Returns:
        output: O, (..., n, d), dtype of the outputs; 0 in a row that is empty in every part.
        logsumexp: L, (..., n), nats, computing dtype; -∞ in such a row.

    Raises:
        ShapeError, DtypeError: as the reference.
        BackendAbsent: nothing here runs a kernel.
    """
    device.require()
    from refattn_gpu.numba_cuda import elements

    check_parts("numba_cuda.merge", outputs, logsumexps)
    xp = array_namespace(outputs)
    O_p, L_p = widen(outputs), widen(logsumexps)
    count, *lead, d = outputs.shape
    rows = math.prod(lead)
    parts = elements.Parts(
        xp.ascontiguousarray(xp.reshape(O_p, (count, rows, d))),
        xp.ascontiguousarray(xp.reshape(L_p, (count, rows))),
    )
    results = elements.Merged(
        xp.empty((rows, d), dtype=O_p.dtype), xp.empty((rows,), dtype=O_p.dtype)
    )
    _launch("merge_parts", O_p, rows * d, results, parts)
    output = narrow(xp.reshape(results.merged, (*lead, d)), outputs)
    return MergeResult(output, xp.reshape(results.merged_logsumexp, tuple(lead)))


def _launch(name: str, like: Array, tasks: int, *about: Any) -> None:
    """Run a kernel of `elements`, a thread a task."""
    from refattn_gpu.numba_cuda import elements

    kernel = _kernel(name, dtype_name(like))
    device.launch(kernel, math.ceil(tasks / elements.THREADS), elements.THREADS, *about)


@cache
def _kernel(name: str, dtype: str) -> Any:
    from refattn_gpu.numba_cuda import elements

    if name == "rotate_pairs":
        return device.kernel(elements.rotate_pairs)
    return device.kernel(getattr(elements, name)(np.dtype(dtype).type))
