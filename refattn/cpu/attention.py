"""Attention on the CPU: the arguments of the reference, brought into a plan for the kernels."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np

from refattn.arrays import dtype_name
from refattn.attention import AttentionResult
from refattn.claims import check_claimed
from refattn.cpu import decode, forward, pool, tiling
from refattn.cpu.copying import STORAGES
from refattn.cpu.empty import fill_rows
from refattn.cpu.forms import LOGITS, Form, Job, form_of, keep, key_of, known, place
from refattn.cpu.host import lanes
from refattn.cpu.plan import (
    COUNTER,
    MORE,
    OPEN,
    TABLE,
    NDArray,
    Plan,
    Rules,
    four_axes,
    is_odd,
    numbers,
    strided,
)
from refattn.grouped import group_size
from refattn.options import AttentionOptions, check_arguments
from refattn.rules import (
    DISTANCE_CODES,
    NO_DISTANCE,
    NO_SOFTCAP,
    SOFTCAP_CODES,
)
from refattn.tiles import default_scale

Arrays = tuple[NDArray | None, ...]
"""Query, key, value, mask, bias and keep."""

CLAIMED = {"round_weights": False}
"""The one value that the kernels support of an option which the reference takes more of."""

SMALL = 2**19
"""Multiplications that one thread more has to bring, if it is awake."""

WAKING = 2**22
"""Multiplications that are worth waking one."""

READING = 8
"""Multiplications that take as long as one whose key is read for it alone."""


def attention(
    query: NDArray,
    key: NDArray,
    value: NDArray,
    *,
    threads: int | None = None,
    **options: Unpack[AttentionOptions],
) -> AttentionResult:
    """Return attention, computed by tiles in memory linear in the lengths.

    Spec: VAS-EQ1, FA1-ALG1, VAS-S323b, ALIBI-S3a, OWN-SOFTCAP1, OWN-SINK1, OWN-EMPTY1, OWN-LSE1,
        OWN-ROUND1, OWN-POISON1, OWN-GQA1, OWN-LENGTH1, OWN-DROPOUT1.

        S = softcap(scale · Q Kᵀ) + alibi + bias;  P = softmax over allowed keys
        O = (P ∘ keep / keep_probability) V

    The same bits for every number of threads and in every run on one machine.

    Args:
        query: Q, (..., h, n_q, d_k), at most four axes, any strides.
        key: K, (..., h_k, n_k, d_k); h is a multiple of h_k.
        value: V, (..., h_k, n_k, d_v).
        threads: how many; NUMBA_NUM_THREADS if None.
        **options: see `refattn.options.AttentionOptions`.

    Returns:
        output: O, (..., h, n_q, d_v), in query's dtype.
        logsumexp: (..., h, n_q), nats, in the computing dtype; -∞ for an empty row.

    Raises:
        ShapeError, DtypeError, OptionError: as the reference.
        Unsupported: what these kernels do not claim.
    """
    count = pool.thread_count("cpu.attention", threads)
    job = plan_job("cpu.attention", query, key, value, options)
    run_forward(job, count)
    fill_rows(job, value, options)
    return AttentionResult(job.output.astype(query.dtype, copy=False), job.logsumexp)


def run_forward(job: Job, threads: int) -> None:
    """Compute the output and the logsumexp of a job, by the kernel that suits its sizes."""
    if decode.suits(job.plan):
        run_decode(job, threads)
        return
    run_tiles(job, threads, None)


def run_tiles(job: Job, threads: int, far: NDArray | None) -> None:
    """Compute them by tiles, and what `panel.leave_far` says if there is room for it."""
    size = forward.scratch_size(job.plan, lanes(job.dtype.itemsize))
    run(forward.forward, size, job, far, threads)


def run_decode(job: Job, threads: int) -> None:
    """Compute a job of few queries: parts of the keys, then their merge."""
    plan, wide = job.plan, lanes(job.dtype.itemsize)
    results = np.empty(decode.results_size(plan, wide), job.dtype)
    parts = np.zeros(3 + plan.batch * plan.key_heads, np.int64)
    parts[:3] = results.ctypes.data, decode.parts_of(plan), parts.ctypes.data + 24
    cost = max(1, READING * plan.key_heads // (plan.heads * max(1, plan.n_q)))
    run(decode.decode, decode.scratch_size(plan, wide), job, parts, threads, cost)


def run(
    kernel: Any, size: int, job: Job, more: NDArray | None, threads: int, cost: int = 1
) -> None:
    """Run a kernel, with so much scratch a thread, over all work of a job.

    Args:
        kernel: of an attention.
        size: numbers of scratch a thread.
        job: of the attention.
        more: what this kernel is told beside the plan, or writes beside its results.
        threads: at most.
        cost: of a multiplication, in those of a long attention.
    """
    plan = job.plan
    job.record[COUNTER] = 0
    if more is not None:
        job.record[TABLE + MORE] = more.ctypes.data
    products = plan.batch * plan.heads * plan.n_q * plan.n_k * (plan.d_k + plan.d_v)
    threads = min(threads, products * cost // SMALL)
    pool.run(kernel, size, job.dtype, job.address, threads, products * cost // WAKING)


def plan_job(
    function: str, query: NDArray, key: NDArray, value: NDArray, given: AttentionOptions
) -> Job:
    """Check the arguments and describe them to the kernels; no tensor is copied as a whole.

    Raises:
        ShapeError, DtypeError, OptionError: as the reference.
        Unsupported: what these kernels do not claim.
    """
    asked = key_of(query, key, value, given)
    form = known(asked)
    arrays: Arrays = (query, key, value, *map(given.get, LOGITS))  # type: ignore[arg-type]
    if form is None:
        form, read = describe(function, query, key, value, given)
        if asked is not None and not any(a is not None and is_odd(a) for a in arrays):
            keep(asked, form)
        arrays = read
    return place(form, arrays)


def describe(
    function: str, query: NDArray, key: NDArray, value: NDArray, given: AttentionOptions
) -> tuple[Form, Arrays]:
    """Return the form of a call, and its arrays as the kernels read them.

    Raises:
        ShapeError, DtypeError, OptionError: as the reference.
        Unsupported: what these kernels do not claim.
    """
    options, sizes, offset = check_arguments(function, query, key, value, given)
    check_claimed(function, "the CPU kernels", query, options, CLAIMED)
    q, k, v = (four_axes(array) for array in (query, key, value))
    b, h, n_q, d_k = q.shape
    n_k, d_v = sizes["n_k"], sizes["d_v"]
    dtype = np.dtype("float64" if dtype_name(query) == "float64" else "float32")
    scale = default_scale(options.get("scale"), d_k)
    softcap = options.get("softcap")
    mask, bias, kept = (_logits(options.get(name), (b, h, n_q, n_k)) for name in LOGITS)
    slopes, sinks = (_heads(options.get(name), h, dtype) for name in ("slopes", "sinks"))
    output = np.empty((b, h, n_q, d_v), dtype)
    left, right = _window(options)
    empty = 1.0 / n_k if options["empty_row"] == "uniform" else 0.0
    reals = numbers(dtype, scale, softcap, options["keep_probability"], empty)
    more, reads = (bias, slopes, softcap), options["masked"] == "add"
    plan = Plan(
        query=strided(q),
        key=strided(k),
        value=strided(v),
        mask=strided(mask),
        bias=strided(bias),
        output=strided(output),
        logsumexp=1,
        storage=STORAGES[dtype_name(query)],
        batch=b,
        heads=h,
        key_heads=max(1, h // group_size(function, q, k)),
        tiled_heads=int(options["head_map"] == "tile"),
        n_q=n_q,
        n_k=n_k,
        d_k=d_k,
        d_v=d_v,
        left=left,
        right=right,
        distance=NO_DISTANCE if slopes is None else DISTANCE_CODES[options["distance"]],
        softcap=NO_SOFTCAP if softcap is None else SOFTCAP_CODES[options["softcap_order"]],
        sinks=int(sinks is not None),
        negative=int(scale < 0),
        terms=int(any(x is not None for x in more) or reals.scale_log2_e == 0 or reads),
        key_tile=tiling.key_tile(d_k, d_v),
        panels=tiling.panels(b * h, n_q, d_k, d_v, lanes(dtype.itemsize)),
        keep=strided(kept),
        reads=int(reads),
    )
    rules = Rules(
        np.broadcast_to(np.asarray(offset, np.int64).reshape(-1), (b,)).copy(),
        _lengths(options.get("query_lengths"), b, n_q),
        _lengths(options.get("key_lengths"), b, n_k),
        np.zeros(h, dtype) if slopes is None else slopes,
        np.zeros(h, dtype) if sinks is None else sinks,
    )
    shape = (*query.shape[:-1], d_v)
    return form_of(plan, reals, rules, dtype, shape), (q, k, v, mask, bias, kept)


def _logits(array: NDArray | None, shape: tuple[int, ...]) -> NDArray | None:
    """Return a mask or a bias as a view of the shape of the logits."""
    if array is None:
        return None
    array = four_axes(np.asarray(array)) if array.ndim else np.asarray(array).reshape(1, 1, 1, 1)
    return np.broadcast_to(array, shape)


def _heads(array: NDArray | None, heads: int, dtype: np.dtype[Any]) -> NDArray | None:
    """Return numbers by head in the computing format."""
    return None if array is None else np.array(array, dtype, order="C").reshape(heads)


def _lengths(lengths: NDArray | None, batch: int, n: int) -> NDArray:
    """Return one length an item, always writable: a kernel has one signature."""
    return np.full(batch, n, np.int64) if lengths is None else np.array(lengths, np.int64)


def _window(options: dict[str, Any]) -> tuple[int, int]:
    """Return how many keys behind and ahead of its position a query sees."""
    left, right = options.get("window") or (None, None)
    left = OPEN if left is None else min(int(left), OPEN)
    right = OPEN if right is None else min(int(right), OPEN)
    return left, min(right, 0) if options["causal"] else right
