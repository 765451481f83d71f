"""Rows without an allowed key: the kernels weigh them by zeros, and a policy may ask for more.

They are found by their logsumexp, -∞, after the kernels; a call that asks for zeros, the default,
pays nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from refattn import rules
from refattn.cpu.forms import Job
from refattn.cpu.plan import NDArray, four_axes


class EmptyRows(NamedTuple):
    """The empty rows of a head."""

    item: int
    head: int
    key_head: int
    rows: NDArray
    """Their numbers."""
    kept: NDArray | None
    """Which keys dropout keeps in each, (rows, n_k); None for all."""


def empty_rows(job: Job, options: Any) -> Iterator[EmptyRows]:
    """Yield the heads that have empty rows; none has where there are sinks.

    Spec: OWN-EMPTY1, OWN-SINK1.
    """
    plan = job.plan
    if plan.sinks:
        return
    shape = (plan.batch, plan.heads, plan.n_q)
    logsumexp = job.logsumexp.reshape(shape)
    keep = options.get("keep")
    if keep is not None:
        keep = np.broadcast_to(keep, (*shape, plan.n_k))
    for b, h in np.ndindex(shape[:2]):
        rows = np.flatnonzero(np.isneginf(logsumexp[b, h]))
        if rows.size:
            key_head = rules.key_head(h, plan.heads, plan.key_heads, plan.tiled_heads)
            yield EmptyRows(b, h, key_head, rows, None if keep is None else keep[b, h, rows])


@np.errstate(all="ignore")
def fill_rows(job: Job, value: NDArray, options: Any) -> None:
    """Write the output of the empty rows by their policy.

    Spec: OWN-EMPTY1, OWN-DROPOUT1.

        o_i = NaN, or Σ_j keep_ij v_j / (keep_probability · n_k)
    """
    policy, plan = options.get("empty_row", "zero"), job.plan
    if policy == "zero":
        return
    output = job.output.reshape(plan.batch, plan.heads, plan.n_q, plan.d_v)
    for b, h, g, rows, kept in empty_rows(job, options):
        if policy == "nan":
            output[b, h, rows if kept is None else rows[kept.any(axis=1)]] = np.nan
            continue
        V = four_axes(value)[b, g].astype(job.dtype)
        if kept is None:
            output[b, h, rows] = V.sum(axis=0) / plan.n_k
            continue
        factor = job.numbers.kept / job.dtype.type(plan.n_k)
        for i, keys in zip(rows, kept, strict=True):
            output[b, h, i] = (keys[:, None] * V).sum(axis=0) * factor


@np.errstate(all="ignore")
def add_gradients(job: Job, arrays: dict[str, NDArray], d_output: NDArray, options: Any) -> None:
    """Add what the empty rows contribute to gradients: NaN everywhere, or means to d_value.

    Spec: OWN-EMPTY1, OWN-BACKWARD1, OWN-DROPOUT1.

    Args:
        job: of the attention.
        arrays: of the backward kernel, by name.
        d_output: dO, (b, h, n_q, d_v).
        options: of the attention.
    """
    policy, plan = options.get("empty_row", "zero"), job.plan
    if policy == "zero" or (policy == "uniform" and plan.reads):  # the kernel has added all
        return
    factor = job.numbers.kept / job.dtype.type(plan.n_k)
    for b, h, g, rows, kept in empty_rows(job, options):
        d_value = arrays["d_value"][b, g, : plan.n_k, : plan.d_v]
        if policy == "nan":
            d_value[slice(None) if kept is None else kept.any(axis=0)] = np.nan
            arrays["d_query"][0, b, h, rows] = np.nan
            arrays["d_key"][b, g] = np.nan
            arrays["d_slopes"][0, b, h] = np.nan
            if "d_bias" in arrays:
                _, items, heads, n_q, _ = arrays["d_bias"].shape
                i = rows if n_q > 1 else 0
                arrays["d_bias"][0, b if items > 1 else 0, h if heads > 1 else 0, i] = np.nan
            continue
        dO = d_output[b, h, rows].astype(job.dtype)
        if kept is None:
            d_value += dO.sum(axis=0) * factor
        else:
            for dO_i, keys in zip(dO, kept, strict=True):
                d_value += keys[:, None] * (dO_i * factor)
