"""The backend `numba-cuda`: vectors put to these kernels, on a device or in the simulator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refattn.backends import (
    Arrays,
    Op,
    Options,
    Unsupported,
    alibi_of,
    attention_of,
    merge_of,
    rope_of,
    run_one,
)
from refattn_gpu import device

HERE = "refattn_gpu.numba_cuda"
"""Where the functions stand."""

ROWS, FEATURES, NUMBERS = 128, 32, 2**14
"""The largest case that is put to the simulator: rows and features of an attention, and numbers of
a result that takes a thread a number."""

OPS: dict[str, Op] = {
    "attention": attention_of(HERE),
    "rope": rope_of(HERE),
    "alibi": alibi_of(HERE),
    "merge": merge_of(HERE),
}
"""How each operation is called."""


def absent() -> str:
    """Return why no kernel can run here; an empty string if one can."""
    return device.STATE.reason if device.STATE.kind == "absent" else ""


def simulator() -> str:
    """Return the name of the simulator that stands in for a device; an empty string on one."""
    return device.STATE.reason if device.SIMULATED else ""


def run(
    op: str, inputs: Mapping[str, Any], parameters: Options, conventions: Options, dtype: str
) -> Arrays:
    """Run an operation by kernels.

    Args:
        op: one of `OPS`.
        inputs: NumPy arrays by name.
        parameters: of the case.
        conventions: of the case.
        dtype: one of `refattn.arrays.FLOATS`.

    Returns:
        NumPy arrays by name.

    Raises:
        Unsupported: the operation, the dtype or an option is not claimed, or the case is too large
            for the simulator.
    """
    options = {**parameters, **conventions}
    if device.SIMULATED:
        refuse_large(inputs, options)
    return run_one("numba-cuda", OPS, op, inputs, options, dtype)


def refuse_large(inputs: Mapping[str, Any], options: Options) -> None:
    """Refuse a case that would take the simulator long.

    Raises:
        Unsupported: it is.
    """
    if "key" in inputs:
        n = max(inputs[name].shape[-2] for name in ("query", "key"))
        d = max(inputs[name].shape[-1] for name in ("query", "value"))
        found, beyond = f"{n} rows of {d} features", n > ROWS or d > FEATURES
    else:
        largest = max((array.size for array in inputs.values()), default=0)
        heads, n_q, n_k = (options.get(name, 0) for name in ("heads", "n_q", "n_k"))
        size = max(largest, heads * n_q * n_k)
        found, beyond = f"{size} numbers", size > NUMBERS
    if beyond:
        raise Unsupported(
            f"the case has {found}, but the CUDA simulator is given at most {ROWS} rows of "
            f"{FEATURES} features, or {NUMBERS} numbers"
        )
