"""Maps of Q, K and V: what a Hopper's copy engine is told of a tensor, before a kernel is launched.

A device is given the driver's record, which only the driver can write; the emulation is given the
description that it is written from, in as many bytes. What a map may hold is taken from the CUDA
driver API, "Tensor Map Object Management": a base and strides at multiples of 16 bytes, strides
below 2^40 bytes, boxes of at most 256 along an axis and, permuted, 128 bytes wide.
"""

from __future__ import annotations

import ctypes
import math
import os
from functools import cache
from typing import Any

import numpy as np

from refattn.arrays import array_namespace
from refattn.errors import RefattnError
from refattn_gpu.cuda.catalogue import Variant
from refattn_gpu.cuda.problem import Problem, address
from refattn_gpu.cuda.records import Job, Rows

PANEL = 64
"""Features that a row of a box has: 128 bytes, which the copy permutes."""

FARTHEST = 2**40
"""Bytes between neighbours of an axis are fewer."""

SIXTEEN_BITS, NO_INTERLEAVING, PERMUTED_128, PROMOTED_256, ZEROS = 1, 0, 3, 3, 0
"""CU_TENSOR_MAP_DATA_TYPE_UINT16, _INTERLEAVE_NONE, _SWIZZLE_128B, _L2_PROMOTION_L2_256B and
_FLOAT_OOB_FILL_NONE of cuda.h: numbers are copied as bits."""


class Map(ctypes.Structure):
    """A tensor of four axes, features first, and the box of it that is copied at once."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("sizes", ctypes.c_uint64 * 4),
        ("strides", ctypes.c_uint64 * 3),
        ("box", ctypes.c_uint32 * 2),
        ("unused", ctypes.c_uint32 * 14),
    ]


class Maps(ctypes.Structure):
    """As a kernel takes them."""

    _fields_ = [("query", Map), ("key", Map), ("value", Map)]


def maps_of(variant: Variant, job: Job) -> Maps:
    """Return the descriptions of Q, K and V, whose rows are as `mapped` leaves them."""
    rows, cols = variant.tile.rows, variant.tile.cols
    query = (job.d_k, job.n_q, job.heads, job.batch)
    key = (job.d_k, job.n_k, job.key_heads, job.batch)
    value = (job.d_v, job.n_k, job.key_heads, job.batch)
    return Maps(
        _map_of(job.query, query, rows),
        _map_of(job.key, key, cols),
        # of a value without features nothing is written: another tensor stands for it
        _map_of(job.value, value, cols) if job.d_v else _map_of(job.key, key, cols),
    )


def _map_of(rows: Rows, sizes: tuple[int, ...], box_rows: int) -> Map:
    """Return a description; an axis along which nothing changes has one place."""
    found = Map(data=rows.data, box=(PANEL, box_rows))
    strides = (rows.row, rows.head, rows.batch)
    room = 2 * sizes[0]
    for axis, (size, stride) in enumerate(zip(sizes[1:], strides, strict=True)):
        found.sizes[axis + 1] = size if stride else 1
        found.strides[axis] = 2 * stride or -(-room // 16) * 16
        room = max(room, size * found.strides[axis])
    found.sizes[0] = sizes[0]
    return found


def mapped(problem: Problem) -> Problem:
    """Return a problem of tensors that a map can describe: those that it cannot are copied."""
    job, arrays = Job.from_buffer_copy(problem.job), list(problem.arrays)
    for which, name in enumerate(("query", "key", "value")):
        rows, array = getattr(job, name), arrays[which]
        if not _mappable(rows, array.shape):
            arrays[which] = copy = _contiguous(array)
            _, h, n, d = array.shape
            setattr(job, name, Rows(address(copy), h * n * d, n * d, d))
    return problem._replace(job=job, arrays=arrays)


def _mappable(rows: Rows, shape: tuple[int, ...]) -> bool:
    """Return whether rows follow each other without overlapping, in any order of the axes."""
    if shape[2] > 1 and not rows.row:
        return False
    axes = zip((rows.row, rows.head, rows.batch), (shape[2], shape[1], shape[0]), strict=True)
    room = shape[3]
    for stride, size in sorted(axis for axis in axes if axis[0]):
        if not room <= stride < FARTHEST // 2:
            return False
        room = size * stride
    return True


def _contiguous(array: Any) -> Any:
    """Return a copy that begins at a multiple of 16 bytes, as it is: rows are whole chunks."""
    xp = array_namespace(array)
    room = xp.empty((math.prod(array.shape) + 8,), dtype=array.dtype)
    first = -address(room) % 16 // 2
    copy = xp.reshape(room[first : first + math.prod(array.shape)], array.shape)
    copy[...] = array
    return copy


def encoded(maps: Maps) -> np.ndarray[Any, Any]:
    """Return the driver's records of descriptions, as one number of no axes, passed by value.

    Raises:
        RefattnError: the driver refuses one.
    """
    records = b"".join(_encode(map_) for map_ in (maps.query, maps.key, maps.value))
    return np.frombuffer(records, np.dtype(f"V{len(records)}")).reshape(())


@cache
def _encoder() -> Any:
    """Return cuTensorMapEncodeTiled.

    Python's bindings have it write where an object of theirs lies, which may be no multiple of the
    64 bytes that it asks for (NVIDIA/cuda-python, pull request 1692).
    """
    library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    return library.cuTensorMapEncodeTiled


def _encode(map_: Map) -> bytes:
    room = (ctypes.c_uint8 * 192)()
    record = -ctypes.addressof(room) % 64
    box = (ctypes.c_uint32 * 4)(*map_.box, 1, 1)
    status = _encoder()(
        ctypes.c_void_p(ctypes.addressof(room) + record),
        ctypes.c_int(SIXTEEN_BITS),
        ctypes.c_uint32(4),
        ctypes.c_void_p(map_.data),
        map_.sizes,
        map_.strides,
        box,
        (ctypes.c_uint32 * 4)(1, 1, 1, 1),
        ctypes.c_int(NO_INTERLEAVING),
        ctypes.c_int(PERMUTED_128),
        ctypes.c_int(PROMOTED_256),
        ctypes.c_int(ZEROS),
    )
    if status:
        raise RefattnError(
            f"the driver answers {status} to a tensor map of {list(map_.sizes)} numbers with "
            f"strides of {list(map_.strides)} bytes, but it must take every map that is made"
        )
    return bytes(room[record : record + 128])
