"""Attention by the kernels of this folder, with the arguments and the results of the reference."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple, Unpack

import numpy as np

from refattn.arrays import Array, narrow
from refattn.attention import AttentionResult
from refattn.checks import check_option
from refattn.options import AttentionOptions
from refattn_gpu import device
from refattn_gpu.numba_cuda.problem import Problem, problem_of
from refattn_gpu.numba_cuda.records import Results
from refattn_gpu.numba_cuda.shapes import features_for, row_shape, tile_shape

FORMS = ("tiles", "rows")
"""Register tiles, the faster; or one thread a query row, the listing made visible."""


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    form: str = "tiles",
    **options: Unpack[AttentionOptions],
) -> AttentionResult:
    """Return attention, computed by tiles on the device or in its simulator.

    Spec: FA1-ALG1, VAS-EQ1, VAS-S323b, ALIBI-S3a, OWN-SOFTCAP1, OWN-SINK1, OWN-EMPTY1, OWN-LSE1,
        OWN-ROUND1, OWN-POISON1, OWN-GQA1, OWN-LENGTH1.

        S = softcap(scale · Q Kᵀ) + alibi + bias;  O = softmax(S) V

    The same bits in every run, and for an item or a head whatever stands beside it.

    Args:
        query: Q, (..., h, n_q, d_k), at most four axes, of NumPy or, on a device, of CuPy.
        key: K, (..., h_k, n_k, d_k); h is a multiple of h_k.
        value: V, (..., h_k, n_k, d_v).
        form: "tiles" or "rows".
        **options: see `refattn.options.AttentionOptions`.

    Returns:
        output: O, (..., h, n_q, d_v), in query's dtype.
        logsumexp: (..., h, n_q), nats, in the computing dtype; -∞ for an empty row.

    Raises:
        ShapeError, DtypeError, OptionError: as the reference.
        Unsupported: what these kernels do not claim.
        BackendAbsent: nothing here runs a kernel.
    """
    device.require()
    check_option("numba_cuda.attention", "form", form, FORMS)
    problem = problem_of("numba_cuda.attention", query, key, value, options)
    results = run_forward(problem, form)
    output = problem.xp.reshape(results.output, (*query.shape[:-1], value.shape[-1]))
    return AttentionResult(
        narrow(output, query), problem.xp.reshape(results.logsumexp, query.shape[:-1])
    )


def run_forward(problem: Problem, form: str) -> Results:
    """Run the forward kernel of a form."""
    xp, (Q, _, V) = problem.xp, problem.operands
    b, h, n_q, _ = Q.shape
    results = Results(
        xp.empty((b, h, n_q, V.shape[-1]), dtype=problem.dtype),
        xp.empty((b, h, n_q), dtype=problem.dtype),
    )
    kernel = forward_kernel(form, Q.dtype.name, problem.features)
    blocks = b * h * math.ceil(n_q / kernel.rows)
    device.launch(
        kernel.run, blocks, kernel.threads, results, problem.operands, problem.band, problem.terms
    )
    return results


class Kernel(NamedTuple):
    """A kernel that can be launched: rows of a block's tile, threads of a block."""

    run: Any
    rows: int
    threads: int


def forward_kernel(form: str, dtype: str, d: int) -> Kernel:
    """Return the kernel of a form and a format for heads of at most d features."""
    return _forward_kernel(form, dtype, d if device.SIMULATED else features_for(d))


@cache
def _forward_kernel(form: str, dtype: str, d: int) -> Kernel:
    from refattn_gpu.numba_cuda.rows import attention_rows
    from refattn_gpu.numba_cuda.tiles import attention_tiles

    real, simulated = np.dtype(dtype).type, device.SIMULATED
    tile = tile_shape(d, dtype, simulated) if form == "tiles" else None
    if tile is not None:
        return Kernel(device.kernel(attention_tiles(real, tile)), tile.rows, tile.threads)
    row = row_shape(d, real(0).itemsize, simulated)
    return Kernel(device.kernel(attention_rows(real, row)), row.rows, row.rows)
