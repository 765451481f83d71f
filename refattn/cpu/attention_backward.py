"""Gradients of attention on the CPU: the arguments of the reference, and sums in a fixed order."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np

from refattn.attention import AttentionResult
from refattn.attention_backward import AttentionGradients, check_cotangents
from refattn.cpu import pool
from refattn.cpu.attention import plan_job, run, run_forward, run_tiles
from refattn.cpu.backward import backward, scratch_size
from refattn.cpu.elementary import EXTREME, LOG2_E
from refattn.cpu.empty import add_gradients
from refattn.cpu.forms import Job
from refattn.cpu.gradients import Gradients
from refattn.cpu.host import lanes
from refattn.cpu.plan import NDArray, Plan, Tensor, flatten, four_axes, tensor
from refattn.cpu.products import ROW_STEP
from refattn.options import AttentionOptions

PIECES = 8
"""Pieces of work below which the keys of a head are split, whatever the number of threads."""


def attention_backward(
    d_output: NDArray,
    query: NDArray,
    key: NDArray,
    value: NDArray,
    *,
    d_logsumexp: NDArray | None = None,
    forward: AttentionResult | None = None,
    threads: int | None = None,
    **options: Unpack[AttentionOptions],
) -> AttentionGradients:
    """Return the gradients of a loss that reads the output and the logsumexp.

    Spec: OWN-BACKWARD1, FA1-ALG4, OWN-GQA1, OWN-SINK1, OWN-EMPTY1, OWN-POISON1,
        OWN-DROPOUT1.

        dV = P_droppedᵀ dO,  dP = (dO Vᵀ) ∘ keep / keep_probability
        dS = P ∘ (dP - D + dL),  D_i = Σ_x dO_ix O_ix
        dQ = scale · dX K,  dK = scale · dXᵀ Q,  dX = dS ∘ softcap′

    The weights are computed again from the logsumexp, tile by tile. Where it is so far from 0 that
    it says nothing of a weight, a forward pass finds m and ℓ.

    Args:
        d_output: dO, (..., h, n_q, d_v).
        query: Q, (..., h, n_q, d_k).
        key: K, (..., h_k, n_k, d_k).
        value: V, (..., h_k, n_k, d_v).
        d_logsumexp: dL, (..., h, n_q); None = the loss does not read the logsumexp.
        forward: what `attention` returned for the same arguments in float32 or float64; it is
            computed again if None, and in 16-bit formats always, where it was rounded.
        threads: how many; NUMBA_NUM_THREADS if None.
        **options: as in the forward call.

    Returns:
        d_query, d_key, d_value: shapes and dtypes of query, key and value.
        d_bias: shape of bias, summed over its broadcast axes, in memory of that shape or, if it
            has fewer than n_q x n_k numbers a head, of n_q or n_k a head.
        d_slopes, d_sinks: (h,).

    Raises:
        ShapeError, DtypeError, OptionError: as the reference.
        Unsupported: what these kernels do not claim.
    """
    name = "cpu.attention_backward"
    count = pool.thread_count(name, threads)
    job = plan_job(name, query, key, value, options)
    check_cotangents(d_output, query, value, d_logsumexp)
    if forward is None or job.dtype != query.dtype:
        run_forward(job, count)
    else:
        job.output[...] = forward.output.reshape(job.output.shape)
        job.logsumexp[...] = forward.logsumexp.reshape(job.logsumexp.shape)
    arrays = _run(job, d_output, d_logsumexp, options.get("bias"), count, _far(job, count))
    add_gradients(job, arrays, four_axes(np.asarray(d_output)), options)
    return _finish(job, arrays, query, key, value, options)


def _far(job: Job, threads: int) -> NDArray | None:
    """Return what `panel.leave_far` writes, (2, rows), if the logsumexp of some row is extreme."""
    size, limit = np.abs(job.logsumexp), EXTREME[job.dtype.itemsize] / LOG2_E
    if size.max(initial=0) <= limit or not ((size > limit) & (size < np.inf)).any():
        return None
    far = np.zeros((2, size.size), job.dtype)
    run_tiles(job, threads, far)
    return far


def _run(
    job: Job,
    d_output: NDArray,
    d_logsumexp: NDArray | None,
    bias: NDArray | None,
    threads: int,
    far: NDArray | None,
) -> dict[str, NDArray]:
    """Run the kernel and return its arrays by name."""
    plan, dtype = job.plan, job.dtype
    shape = _bias_shape(plan, bias)
    # heads that add to one gradient are one piece of work
    items, key_heads = min(plan.batch, shape[0]), plan.key_heads if shape[1] > 1 else 1
    pieces, step = max(1, items * key_heads), max(ROW_STEP, lanes(dtype.itemsize))
    splits = min(max(1, PIECES // pieces), max(1, plan.n_k // plan.key_tile))
    keys = _up(-(-plan.n_k // splits), ROW_STEP)
    leading, n_k = (plan.batch, plan.key_heads), _up(plan.n_k, ROW_STEP)
    arrays = {
        "d_query": np.zeros((splits, plan.batch, plan.heads, plan.n_q, plan.d_k), dtype),
        "d_key": np.zeros((*leading, n_k, _up(plan.d_k, step)), dtype),
        "d_value": np.zeros((*leading, n_k, _up(plan.d_v, step)), dtype),
        "d_slopes": np.zeros((splits, plan.batch, plan.heads), dtype),
        "dots": np.zeros((plan.batch, plan.heads, plan.n_q), dtype),
    }
    d_bias, d_bias_split = Tensor(0, 0, 0, 0, 0), 0
    if plan.bias.address:
        summed = shape[3] == 1
        arrays["d_bias"] = np.zeros((splits if summed else 1, *shape), dtype)
        d_bias = tensor(arrays["d_bias"][0])._replace(column=0 if summed else 1)
        d_bias_split = arrays["d_bias"][0].size if summed else 0
    cotangent = four_axes(np.asarray(d_output))
    if d_logsumexp is not None:
        arrays["d_logsumexp"] = np.ascontiguousarray(d_logsumexp, dtype)
        arrays["dots"] -= arrays["d_logsumexp"].reshape(arrays["dots"].shape)
    addresses: dict[str, Any] = {name: array.ctypes.data for name, array in arrays.items()}
    grads = Gradients(
        **{"d_logsumexp": 0} | addresses | {"d_bias": d_bias},
        d_output=tensor(cotangent),
        d_bias_split=d_bias_split,
        splits=splits,
        keys=keys,
        items=items,
        key_heads=key_heads,
        far=0 if far is None else far.ctypes.data,
    )
    size = scratch_size(plan, lanes(dtype.itemsize))
    run(backward, size, job, np.array(flatten(grads)), threads)
    return arrays


@np.errstate(all="ignore")
def _finish(
    job: Job,
    arrays: dict[str, NDArray],
    query: NDArray,
    key: NDArray,
    value: NDArray,
    options: AttentionOptions,
) -> AttentionGradients:
    """Add the summands of a gradient in order, and bring all into the shapes of the inputs."""
    plan, rules = job.plan, job.rules
    d_bias = d_slopes = d_sinks = None
    if plan.bias.address:
        d_bias = arrays["d_bias"].sum(axis=0)
        d_bias = _sum_to(d_bias, options["bias"].shape).astype(query.dtype)  # type: ignore[union-attr]
    if options.get("slopes") is not None:
        d_slopes = arrays["d_slopes"].sum(axis=(0, 1)).astype(query.dtype)
    if plan.sinks:
        logsumexp = job.logsumexp.reshape(arrays["dots"].shape)
        weight = np.exp(rules.sinks[:, None] - logsumexp)
        d_sinks = -(weight * arrays["dots"]).sum(axis=(0, 2)).astype(query.dtype)
    d_key = arrays["d_key"][:, :, : plan.n_k, : plan.d_k]
    d_value = arrays["d_value"][:, :, : plan.n_k, : plan.d_v]
    summands = arrays["d_query"]
    d_query = summands[0] if len(summands) == 1 else summands.sum(axis=0)
    return AttentionGradients(
        d_query.reshape(query.shape).astype(query.dtype, copy=False),
        np.ascontiguousarray(d_key.astype(key.dtype, copy=False)).reshape(key.shape),
        np.ascontiguousarray(d_value.astype(value.dtype, copy=False)).reshape(value.shape),
        d_bias,
        d_slopes,
        d_sinks,
    )


def _bias_shape(plan: Plan, bias: NDArray | None) -> tuple[int, int, int, int]:
    """Return the four axes of the sums that the kernel makes of the gradient of a bias.

    A bias of n_q x n_k numbers has a gradient of its own shape, and of a smaller one each head has
    its own: heads that add to one gradient cannot be worked on by several threads.
    """
    shape = (1,) * 4 if bias is None else (1,) * (4 - bias.ndim) + bias.shape
    items, heads, rows, columns = shape
    if bias is not None and rows > 1 and columns > 1:
        return items, heads, rows, columns
    return plan.batch, plan.heads, rows, columns


def _sum_to(array: NDArray, shape: tuple[int, ...]) -> NDArray:
    """Return an array summed over the axes along which one of that shape was broadcast."""
    full = (1,) * (array.ndim - len(shape)) + tuple(shape)
    axes = tuple(a for a, n in enumerate(full) if n == 1)
    summed: Any = array.sum(axis=axes, keepdims=True)
    return np.asarray(summed).reshape(shape)


def _up(n: int, step: int) -> int:
    """Return n rounded up to a multiple of a step."""
    return -(-n // step) * step
