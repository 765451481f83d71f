"""What a kernel is told: addresses, strides, sizes and rules of one attention, as plain numbers.

A plan has one type whatever the shapes, strides and 16-bit formats of the arrays, so that each
kernel is compiled once a computing format.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types

from refattn import rules
from refattn.backends import Unsupported
from refattn.checks import is_array
from refattn.cpu.simd import pointer

NDArray = np.ndarray[Any, Any]
"""A NumPy array of any dtype."""

COUNTER, TABLE = 0, 8
"""Places in a job, an array of integers: how many pieces of work the threads have claimed; and, a
cache line on, the addresses of what the kernel reads."""

PLAN, REALS, RULES, MORE = 0, 1, 2, 7
"""Places in that table: the plan, its numbers, its rules in order, and what a kernel wants more."""

OPEN = 2**40
"""A side of the window without a bound, in tokens."""

_key_head = njit(error_model="numpy")(rules.key_head)
_query_head = njit(error_model="numpy")(rules.query_head)


class Tensor(NamedTuple):
    """A strided input of four axes (batch, head, row, column); strides in elements."""

    address: int
    batch: int
    head: int
    row: int
    column: int


class Plan(NamedTuple):
    """One attention, for the kernels."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor
    """Address 0 where there is none; likewise the bias."""
    bias: Tensor
    output: Tensor
    logsumexp: int
    storage: int
    """Of query, key, value and bias; see `copying.STORAGES`."""
    batch: int
    heads: int
    key_heads: int
    tiled_heads: int
    """1 if query head h reads key-value head h mod h_k, 0 if h // (h / h_k)."""
    n_q: int
    n_k: int
    d_k: int
    d_v: int
    left: int
    """Keys behind a query's position that it sees; `OPEN` for all."""
    right: int
    """Keys ahead, likewise; causal is 0."""
    distance: int
    softcap: int
    sinks: int
    negative: int
    """1 if the scale is negative: the queries change sign, and the kernels scale by its size."""
    terms: int
    """1 if the logits are more than the scaled product, or all of them are read."""
    key_tile: int
    """Keys a tile."""
    panels: int
    """Panels of queries that share each tile in the forward kernel."""
    keep: Tensor
    """Dropout's mask; address 0 where every weight is kept."""
    reads: int
    """1 if a forbidden cell is read, and -∞ added to its logit."""


ADDRESSES = (0, 5, 10, 15, 20, 49, 25, 30)
"""Places in a flat plan: the addresses of query, key, value, mask, bias, keep, output and
logsumexp."""


class Numbers(NamedTuple):
    """The real numbers of one attention, in the computing format."""

    scale: Any
    """|scale|, logits."""
    softcap: Any
    log2_e: Any
    scale_log2_e: Any
    """|scale| · log₂ e, from products to powers of two."""
    ln_2: Any
    infinity: Any
    one: Any
    kept: Any
    """1 / keep probability: what a weight that is not dropped is multiplied by."""
    empty: Any
    """The weight in an empty row that is read with all others: 0, or 1/n_k."""


class Rules(NamedTuple):
    """What differs by batch item, (b,) int64, or by query head, (h,) in the computing format."""

    offsets: Any
    """Position of query row 0, tokens."""
    query_lengths: Any
    key_lengths: Any
    slopes: Any
    """ALiBi's m; zeros where there is none."""
    sinks: Any
    """Logits that join the denominator; zeros where there is none."""


def check_numpy(function: str, **arrays: Any) -> None:
    """Refuse arrays of other libraries, whose memory the kernels cannot read.

    Raises:
        Unsupported: one is no NumPy array.
    """
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) and is_array(array):
            raise Unsupported(
                f"{name} is a {type(array).__name__}, but the CPU kernels support NumPy arrays "
                f"[{function}]"
            )


def whole_elements(array: NDArray) -> NDArray:
    """Return an array as the kernels read it, copied only if it is odd."""
    return array.astype(array.dtype.newbyteorder("="), order="C") if is_odd(array) else array


def four_axes(array: NDArray) -> NDArray:
    """Return an array of four axes, the leading ones of size 1; copied only if it is odd."""
    array = whole_elements(array)
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def is_odd(array: NDArray) -> bool:
    """Tell whether an array's elements lie at no multiple of their size, or in another order."""
    odd = any(s % array.itemsize for s in array.strides) or not array.flags.aligned
    return odd or not array.dtype.isnative


def tensor(array: NDArray) -> Tensor:
    """Return where an array of four axes lies."""
    return strided(array)._replace(address=array.ctypes.data)


def strided(array: NDArray | None) -> Tensor:
    """Return the strides of an array of four axes, at address 1, or zeros where there is none.

    An axis of size 1 has stride 0.
    """
    if array is None:
        return Tensor(0, 0, 0, 0, 0)
    size = array.itemsize
    strides = [0 if n == 1 else s // size for n, s in zip(array.shape, array.strides, strict=True)]
    if array.shape[-1] == 1:
        strides[-1] = 1  # one column is contiguous
    return Tensor(1, *strides)


def numbers(
    dtype: Any, scale: float, softcap: float | None, keep_probability: float, empty: float
) -> Numbers:
    """Return the real numbers of an attention, each rounded once."""
    size, ln_2 = abs(scale), math.log(2.0)
    log2_e = 1.0 / ln_2
    kept = 1.0 / keep_probability
    values = (size, softcap or 1.0, log2_e, size * log2_e, ln_2, math.inf, 1.0, kept, empty)
    return Numbers(*map(np.dtype(dtype).type, values))


def flatten(record: tuple[Any, ...]) -> list[int]:
    """Return the integers of a record and of the tensors in it, in order."""
    return [n for field in record for n in (field if isinstance(field, tuple) else (field,))]


@njit(error_model="numpy")
def tensor_at(integers, at):
    """Return the tensor whose five integers start at a place."""
    return Tensor(
        integers[at], integers[at + 1], integers[at + 2], integers[at + 3], integers[at + 4]
    )


@njit(error_model="numpy")
def read_plan(i):
    """Return the plan of `flatten(plan)`.

    A kernel takes flat arrays: Numba would look at each field of a record in every call.
    """
    return Plan(
        tensor_at(i, 0), tensor_at(i, 5), tensor_at(i, 10), tensor_at(i, 15), tensor_at(i, 20),
        tensor_at(i, 25), i[30], i[31], i[32], i[33], i[34], i[35], i[36], i[37], i[38], i[39],
        i[40], i[41], i[42], i[43], i[44], i[45], i[46], i[47], i[48],
        tensor_at(i, 49), i[54],
    )  # fmt: skip


@njit(error_model="numpy")
def read_numbers(x):
    """Return the numbers of an array of them."""
    return Numbers(x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8])


@njit(error_model="numpy")
def read_job(zero, job):
    """Return what every kernel of attention is told: the plan, its numbers and its rules."""
    n = types.int64(0)
    rules = Rules(
        entry(job, RULES, n), entry(job, RULES + 1, n), entry(job, RULES + 2, n),
        entry(job, RULES + 3, zero), entry(job, RULES + 4, zero),
    )  # fmt: skip
    return read_plan(entry(job, PLAN, n)), read_numbers(entry(job, REALS, zero)), rules


@njit(error_model="numpy")
def entry(job, place, like):
    """Return what a job's table has at a place, by pointer to numbers of the type of `like`."""
    return pointer(pointer(job, types.int64(0))[TABLE + place], like)


@njit(error_model="numpy")
def to_powers(plan, numbers):
    """Return what a logit of the tiles is multiplied by to become a power of two; positive.

    Where nothing is added to the logits, the scale waits for this product too.
    """
    return numbers.log2_e if plan.terms != 0 else numbers.scale_log2_e


@njit(error_model="numpy")
def head_read(plan, h):
    """Return the key-value head that a query head reads."""
    return _key_head(h, plan.heads, plan.key_heads, plan.tiled_heads)


@njit(error_model="numpy")
def head_reading(plan, g, member):
    """Return the query head that is one of those which read a key-value head."""
    return _query_head(member, g, plan.heads, plan.key_heads, plan.tiled_heads)
