"""Gradients of attention by the kernels of this folder, deterministic, in two kernels."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple, Unpack

import numpy as np

from refattn.arrays import Array, narrow
from refattn.attention import AttentionResult
from refattn.attention_backward import AttentionGradients, check_cotangents
from refattn.checks import check_option
from refattn.options import AttentionOptions
from refattn_gpu import device
from refattn_gpu.numba_cuda.attention import FORMS, Kernel, run_forward
from refattn_gpu.numba_cuda.problem import Problem, four_axes, problem_of
from refattn_gpu.numba_cuda.records import (
    Dots,
    KeyGradients,
    QueryGradients,
    Results,
    Rows,
    Saved,
)
from refattn_gpu.numba_cuda.shapes import backward_shape, features_for, row_shape


def attention_backward(
    d_output: Array,
    query: Array,
    key: Array,
    value: Array,
    *,
    d_logsumexp: Array | None = None,
    forward: AttentionResult | None = None,
    form: str = "tiles",
    **options: Unpack[AttentionOptions],
) -> AttentionGradients:
    """Return the gradients of a loss that reads the output and the logsumexp.

    Spec: OWN-BACKWARD1, FA1-ALG4, OWN-GQA1, OWN-SINK1, OWN-EMPTY1, OWN-POISON1.

        dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ - D + dL),  D_i = Σ_x dO_ix O_ix
        dQ = scale · dX K,  dK = scale · dXᵀ Q,  dX = dS ∘ softcap′

    The weights are computed again from the logsumexp, tile by tile. The same bits in every run.

    Args:
        d_output: dO, (..., h, n_q, d_v).
        query: Q, (..., h, n_q, d_k).
        key: K, (..., h_k, n_k, d_k).
        value: V, (..., h_k, n_k, d_v).
        d_logsumexp: dL, (..., h, n_q); None = the loss does not read the logsumexp.
        forward: what `attention` returned for the same arguments in float32 or float64; it is
            computed again if None, and in 16-bit formats always, where it was rounded.
        form: "tiles" or "rows".
        **options: as in the forward call.

    Returns:
        d_query, d_key, d_value: shapes and dtypes of query, key and value.
        d_bias: shape of bias, summed over its broadcast axes; it takes n_q x n_k numbers a head.
        d_slopes, d_sinks: (h,).

    Raises:
        ShapeError, DtypeError, OptionError: as the reference.
        Unsupported: what these kernels do not claim.
        BackendAbsent: nothing here runs a kernel.
    """
    device.require()
    name = "numba_cuda.attention_backward"
    check_option(name, "form", form, FORMS)
    problem = problem_of(name, query, key, value, options)
    check_cotangents(d_output, query, value, d_logsumexp)
    saved = _saved(problem, form, d_output, d_logsumexp, _results(problem, form, forward))
    query_gradients, key_gradients = _run(problem, form, saved)
    return _finish(problem, saved, query_gradients, key_gradients, (query, key, value))


def _results(problem: Problem, form: str, forward: AttentionResult | None) -> Results:
    """Return the forward results in the computing format, computed again where they are not."""
    if forward is None or forward.output.dtype != problem.operands.query.dtype:
        return run_forward(problem, form)
    xp, (b, h, n_q, _) = problem.xp, problem.operands.query.shape
    return Results(
        four_axes(forward.output, problem.dtype, xp),
        xp.ascontiguousarray(xp.reshape(forward.logsumexp, (b, h, n_q))),
    )


def _saved(
    problem: Problem, form: str, d_output: Array, d_logsumexp: Array | None, results: Results
) -> Saved:
    """Return what the kernels read of the forward pass and of the cotangents."""
    xp, dO = problem.xp, four_axes(d_output, problem.dtype, problem.xp)
    b, h, n_q, _ = dO.shape
    dL = xp.zeros((b, h, n_q), dtype=problem.dtype)
    if d_logsumexp is not None:
        dL = xp.ascontiguousarray(
            xp.astype(xp.reshape(d_logsumexp, (b, h, n_q)), problem.dtype, copy=False)
        )
    dots = xp.empty((b, h, n_q), dtype=problem.dtype)
    kernel = backward_kernels(form, dO.dtype.name, problem.features).dots
    blocks = b * h * math.ceil(n_q / kernel.rows)
    rows = Rows(dO, results.output, dL)
    device.launch(kernel.run, blocks, kernel.threads, Dots(dots), rows)
    return Saved(dO, results.logsumexp, dots)


def _run(problem: Problem, form: str, saved: Saved) -> tuple[QueryGradients, KeyGradients]:
    """Run the two kernels."""
    xp, (Q, K, V), dtype = problem.xp, problem.operands, problem.dtype
    (b, h, n_q, _), (_, h_k, n_k, _) = Q.shape, K.shape
    bias, slopes = problem.terms.bias.size > 0, problem.terms.slopes.size > 0
    by_query = QueryGradients(
        xp.empty(Q.shape, dtype=dtype),
        xp.zeros((b, h, n_q, n_k) if bias else (0, 0, 0, 0), dtype=dtype),
        xp.empty((b, h, n_q) if slopes else (0, 0, 0), dtype=dtype),
    )
    by_key = KeyGradients(xp.empty(K.shape, dtype=dtype), xp.empty(V.shape, dtype=dtype))
    kernels = backward_kernels(form, Q.dtype.name, problem.features)
    about = (saved, problem.operands, problem.band, problem.terms)
    blocks = b * h * math.ceil(n_q / kernels.query.rows)
    device.launch(kernels.query.run, blocks, kernels.query.threads, by_query, *about)
    blocks = b * h_k * math.ceil(n_k / kernels.key.rows)
    device.launch(kernels.key.run, blocks, kernels.key.threads, by_key, *about)
    return by_query, by_key


def _finish(
    problem: Problem,
    saved: Saved,
    by_query: QueryGradients,
    by_key: KeyGradients,
    inputs: tuple[Array, Array, Array],
) -> AttentionGradients:
    """Bring the gradients into the shapes of the inputs, and round each once."""
    xp, options = problem.xp, problem.options
    query, key, value = inputs
    d_bias = d_slopes = d_sinks = None
    if options.get("bias") is not None:
        d_bias = narrow(_sum_to(by_query.d_bias, options["bias"].shape, xp), query)
    if options.get("slopes") is not None:
        d_slopes = narrow(xp.sum(by_query.d_slopes, axis=(0, 2)), query)
    if options.get("sinks") is not None:
        weights = xp.exp(problem.terms.sinks[:, None] - saved.logsumexp)
        d_sinks = narrow(-xp.sum(weights * saved.dots, axis=(0, 2)), query)
    return AttentionGradients(
        narrow(xp.reshape(by_query.d_query, query.shape), query),
        narrow(xp.reshape(by_key.d_key, key.shape), key),
        narrow(xp.reshape(by_key.d_value, value.shape), value),
        d_bias,
        d_slopes,
        d_sinks,
    )


def _sum_to(array: Array, shape: tuple[int, ...], xp: Any) -> Array:
    """Return an array summed over the axes along which one of that shape was broadcast."""
    full = (1,) * (array.ndim - len(shape)) + tuple(shape)
    axes = tuple(axis for axis, n in enumerate(full) if n == 1)
    return xp.reshape(xp.sum(array, axis=axes, keepdims=True), shape)


class BackwardKernels(NamedTuple):
    """The three kernels of a backward pass."""

    dots: Kernel
    query: Kernel
    key: Kernel


def backward_kernels(form: str, dtype: str, d: int) -> BackwardKernels:
    """Return the kernels of a form and a format for heads of at most d features."""
    return _backward_kernels(form, dtype, d if device.SIMULATED else features_for(d))


@cache
def _backward_kernels(form: str, dtype: str, d: int) -> BackwardKernels:
    from refattn_gpu.numba_cuda import backward_rows, backward_tiles

    real, simulated = np.dtype(dtype).type, device.SIMULATED
    row = row_shape(d, real(0).itemsize, simulated)
    dots = Kernel(device.kernel(backward_rows.backward_dots(real, row.rows)), row.rows, row.rows)
    tile = backward_shape(d, dtype, simulated) if form == "tiles" else None
    if tile is None:
        texts = backward_rows.backward_query_rows, backward_rows.backward_key_rows
        return BackwardKernels(
            dots, *(Kernel(device.kernel(text(real, row)), row.rows, row.rows) for text in texts)
        )
    tiled = backward_tiles.backward_query_tiles, backward_tiles.backward_key_tiles
    return BackwardKernels(
        dots, *(Kernel(device.kernel(text(real, tile)), tile.rows, tile.threads) for text in tiled)
    )
