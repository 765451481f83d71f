"""Where the kernels run: a device, by CuPy, or the emulation on the host's processor."""

from __future__ import annotations

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
from refattn_gpu.cuda.catalogue import Variant
from refattn_gpu.cuda.problem import Problem
from refattn_gpu.cuda.records import BYTES

OLDEST = (8, 0)
"""The first compute capability with cp.async and mma.m16n8k16."""


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


def require(query: Array) -> None:
    """Refuse a query where nothing runs the kernels on its library's arrays.

    Raises:
        BackendAbsent: nothing does.
    """
    why = absent_device() if on_device(query) else emulate.no_gxx()
    if why:
        raise BackendAbsent(f"no kernel runs here on arrays of {type(query).__module__}: {why}")


def on_device(array: Array) -> bool:
    """Return whether an array lies in a device's memory."""
    return hasattr(array, "__cuda_array_interface__")


def capability() -> tuple[int, int]:
    """Return the compute capability of the current device."""
    digits = str(_cupy().cuda.Device().compute_capability)
    return int(digits[:-1]), int(digits[-1])


def target() -> str:
    """Return what to compile for: the architecture with all its features where it has a variant."""
    major, minor = capability()
    return f"sm_{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"


def launch(variant: Variant, problem: Problem, blocks: int) -> None:
    """Run a kernel on the current device and stream."""
    if blocks:
        run = _function(variant, _cupy().cuda.Device().id)
        record = np.frombuffer(bytes(problem.job), np.dtype(f"V{BYTES}")).reshape(())
        run((blocks,), (variant.threads,), (record,), shared_mem=variant.shared_bytes)


@cache
def _function(variant: Variant, device: int) -> Any:
    """Return a kernel that is loaded on a device."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(build.build(variant, target()).code)
        found = _cupy().RawModule(path=str(path)).get_function("attention_forward")
        found.max_dynamic_shared_size_bytes = variant.shared_bytes  # which loads it
    return found


def _cupy() -> Any:
    return importlib.import_module("cupy")
