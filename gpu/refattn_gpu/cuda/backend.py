"""The backend `cuda-cpp`: vectors put to these kernels, on a device or in their emulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refattn.backends import Arrays, Op, Options, Unsupported, attention_of, run_one
from refattn_gpu.cuda import machine
from refattn_gpu.cuda.catalogue import FORMATS

DTYPES = FORMATS
"""Formats that the kernels take."""

OPS: dict[str, Op] = {"attention": attention_of("refattn_gpu.cuda")}
"""How each operation is called."""


def absent() -> str:
    """Return why no kernel can run here; an empty string if one can."""
    return machine.absent()


def simulator() -> str:
    """Return the name of what stands in for a device; an empty string on one."""
    return "the emulation by g++" if machine.absent_device() else ""


def run(
    op: str, inputs: Mapping[str, Any], parameters: Options, conventions: Options, dtype: str
) -> Arrays:
    """Run an operation by kernels.

    Args:
        op: one of `OPS`.
        inputs: NumPy arrays by name.
        parameters: of the case.
        conventions: of the case.
        dtype: one of `DTYPES`.

    Returns:
        NumPy arrays by name.

    Raises:
        Unsupported: the operation, the dtype or an option is not claimed.
    """
    if dtype not in DTYPES:
        raise Unsupported(f"dtype is {dtype}, but backend cuda-cpp claims {', '.join(DTYPES)}")
    return run_one("cuda-cpp", OPS, op, inputs, {**parameters, **conventions}, dtype)
