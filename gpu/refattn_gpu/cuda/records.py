"""The record that a launch hands to a kernel: `sources/job.h`, field by field."""

from __future__ import annotations

import ctypes

_i64, _int, _float, _pointer = ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_void_p


class Rows(ctypes.Structure):
    """Rows of numbers by (batch, head, row); strides in numbers."""

    _fields_ = [("data", _pointer), ("batch", _i64), ("head", _i64), ("row", _i64)]


class Cells(ctypes.Structure):
    """What is told by cell; the stride of an axis of size 1 is 0, and data may be null."""

    _fields_ = [*Rows._fields_, ("col", _i64)]


class Job(ctypes.Structure):
    """One attention; the header tells what each field holds."""

    _fields_ = [
        *((name, Rows) for name in ("query", "key", "value")),
        *((name, _pointer) for name in ("output", "logsumexp")),
        *((name, _pointer) for name in ("offsets", "query_lengths", "key_lengths")),
        *((name, Cells) for name in ("mask", "bias", "keep")),
        *((name, _pointer) for name in ("slopes", "sinks")),
        *((name, _i64) for name in ("left", "right")),
        *((name, _int) for name in ("batch", "heads", "key_heads", "n_q", "n_k", "d_k", "d_v")),
        *((name, _int) for name in ("tiled_heads", "distance", "softcap_order")),
        *((name, _float) for name in ("scale", "softcap", "kept")),
        ("padding", _int),
        *((name, Rows) for name in ("d_output", "result")),
        *((name, _pointer) for name in ("d_logsumexp", "dots")),
        *((name, _pointer) for name in ("d_query", "d_key", "d_value", "d_bias", "d_slopes")),
        *((name, _pointer) for name in ("part_outputs", "part_states")),
    ]


BYTES = ctypes.sizeof(Job)
"""Every compilation asserts that the kernel's record has as many."""
