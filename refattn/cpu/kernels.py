"""The kernels as they are called: one machine-code function a computing format.

Each is called with a number of the format and two addresses, of scratch memory and of a job: the
number of claimed pieces, and from `plan.TABLE` on the addresses of what the kernel reads.
"""

from __future__ import annotations

from numba import njit, types

from refattn.cpu import backward as _backward
from refattn.cpu import decode as _decode
from refattn.cpu import forward as _forward
from refattn.cpu.alibi import bias_rows as _bias_rows
from refattn.cpu.compiling import kernel
from refattn.cpu.plan import entry
from refattn.cpu.rotation import rotate_rows as _rotate_rows

forward_blocks = njit(error_model="numpy", inline="always")(_forward.forward)
backward_ranges = njit(error_model="numpy", inline="always")(_backward.backward)
decode_parts = njit(error_model="numpy", inline="always")(_decode.decode)
turn_rows = njit(error_model="numpy", inline="always")(_rotate_rows)
write_biases = njit(error_model="numpy", inline="always")(_bias_rows)


@kernel
def forward(zero, scratch, job):
    """See `refattn.cpu.forward.forward`."""
    n = types.int64(0)
    forward_blocks(
        zero, scratch, job, entry(job, 0, n), entry(job, 1, zero), entry(job, 2, n),
        entry(job, 3, n), entry(job, 4, n), entry(job, 5, zero), entry(job, 6, zero),
    )  # fmt: skip
    return 0


@kernel
def backward(zero, scratch, job):
    """See `refattn.cpu.backward.backward`."""
    n = types.int64(0)
    backward_ranges(
        zero, scratch, job, entry(job, 0, n), entry(job, 1, zero), entry(job, 2, n),
        entry(job, 3, n), entry(job, 4, n), entry(job, 5, zero), entry(job, 6, zero),
        entry(job, 7, n),
    )  # fmt: skip
    return 0


@kernel
def decode(zero, scratch, job):
    """See `refattn.cpu.decode.decode`."""
    n = types.int64(0)
    decode_parts(
        zero, scratch, job, entry(job, 0, n), entry(job, 1, zero), entry(job, 2, n),
        entry(job, 3, n), entry(job, 4, n), entry(job, 5, zero), entry(job, 6, zero),
        entry(job, 7, n),
    )  # fmt: skip
    return 0


@kernel
def rotate_rows(zero, scratch, job):
    """See `refattn.cpu.rotation.rotate_rows`."""
    turn_rows(zero, scratch, job, entry(job, 0, types.int64(0)))
    return 0


@kernel
def bias_rows(zero, scratch, job):
    """See `refattn.cpu.alibi.bias_rows`."""
    write_biases(zero, scratch, job, entry(job, 0, types.int64(0)))
    return 0
