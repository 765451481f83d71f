"""Where the kernels run: a device, by CuPy, or the emulation on the host's processor."""

from __future__ import annotations

import ctypes
import importlib
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from refattn.arrays import Array
from refattn.backends import BackendAbsent
from refattn_gpu import cupy_text
from refattn_gpu.cuda import build, emulate
from refattn_gpu.cuda.catalogue import HOPPER, Variant
from refattn_gpu.cuda.problem import address
from refattn_gpu.cuda.records import BYTES, Cells, Job, Rows
from refattn_gpu.cuda.tensor_maps import encoded, maps_of

OLDEST = (8, 0)
"""The first compute capability with cp.async and mma.m16n8k16."""

HOPPER_CAPABILITY = (9, 0)
"""The one with wgmma and, of what is used here, copies by tensor maps: no other runs sm_90a."""


@cache
def absent_device() -> str:
    """Return why no device runs the kernels, in one sentence; an empty string if one does."""
    if why := cupy_text.absent() or build.no_nvrtc():
        return why
    found = capability()
    if found < OLDEST:
        return f"the device has compute capability {found}, but the kernels need {OLDEST} or later"
    return ""


def absent() -> str:
    """Return why neither a device nor the emulation runs the kernels; "" if one does."""
    why, instead = absent_device(), emulate.no_gxx()
    return f"{why}; and to emulate one, {instead}" if why and instead else ""


def require() -> None:
    """Refuse to go on where nothing runs the kernels.

    Raises:
        BackendAbsent: nothing does.
    """
    if why := absent():
        raise BackendAbsent(f"no kernel in CUDA C++ runs here: {why}")


def on_device(array: Array) -> bool:
    """Return whether an array lies in a device's memory."""
    return hasattr(array, "__cuda_array_interface__")


def capability() -> tuple[int, int]:
    """Return the compute capability of the current device."""
    digits = str(_cupy().cuda.Device().compute_capability)
    return int(digits[:-1]), int(digits[-1])


def is_hopper() -> bool:
    """Return whether the kernels run on a device, and it is a Hopper."""
    return not absent_device() and capability() == HOPPER_CAPABILITY


def target() -> str:
    """Return what to compile for: the architecture with all its features where it has a variant."""
    major, minor = capability()
    return f"sm_{major}{minor}{'a' if (major, minor) == HOPPER_CAPABILITY else ''}"


def launch(
    variant: Variant, job: Job, blocks: int, reads: list[Array], writes: list[Array]
) -> None:
    """Run a kernel on the current device and stream; arrays of NumPy travel there and back.

    Args:
        variant: the kernel.
        job: which points into the arrays.
        blocks: of the grid.
        reads: arrays that it reads only.
        writes: arrays that it writes.
    """
    if not blocks:
        return
    if on_device(writes[0]):
        _start(variant, job, blocks)
        return
    cupy, hosts = _cupy(), [*reads, *writes]
    copies = [cupy.asarray(raw_bytes(host)) for host in hosts]
    _start(variant, relocated(job, hosts, [address(copy) for copy in copies]), blocks)
    for host, copy in zip(writes, copies[len(reads) :], strict=True):
        raw_bytes(host)[:] = cupy.asnumpy(copy)


def raw_bytes(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the memory that an array's numbers lie in, from the first to the last."""
    low, high = np.lib.array_utils.byte_bounds(array) if array.size else (0, 0)
    return np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))


def relocated(job: Job, hosts: list[np.ndarray[Any, Any]], there: list[int]) -> Job:
    """Return a job that points to copies of arrays.

    Args:
        job: which points into the arrays.
        hosts: the arrays.
        there: where the copy of each one's `raw_bytes` begins.
    """
    spans = [np.lib.array_utils.byte_bounds(host) if host.size else (0, 0) for host in hosts]

    def moved(pointer: int | None) -> int | None:
        for (low, high), begin in zip(spans, there, strict=True):
            if pointer is not None and low <= pointer < high:
                return begin + pointer - low
        return None  # of an array without numbers

    copy = Job.from_buffer_copy(job)
    for name, kind, *_ in Job._fields_:
        field = getattr(copy, name)
        if kind in (Rows, Cells):
            field.data = moved(field.data)
        elif kind is ctypes.c_void_p:
            setattr(copy, name, moved(field))
    return copy


def _start(variant: Variant, job: Job, blocks: int) -> None:
    run = _function(variant, _cupy().cuda.Device().id)
    record = np.frombuffer(bytes(job), np.dtype(f"V{BYTES}")).reshape(())
    records = (record, encoded(maps_of(variant, job))) if variant.kernel in HOPPER else (record,)
    run((blocks,), (variant.threads,), records, shared_mem=variant.shared_bytes)


@cache
def _function(variant: Variant, device: int) -> Any:
    """Return a kernel that is loaded on a device."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(build.build(variant, target()).code)
        found = _cupy().RawModule(path=str(path)).get_function(variant.entry)
        found.max_dynamic_shared_size_bytes = variant.shared_bytes  # which loads it
    return found


def _cupy() -> Any:
    return importlib.import_module("cupy")
