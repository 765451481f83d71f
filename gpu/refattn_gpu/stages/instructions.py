"""Single instructions, the device against the emulation: what proves kernels is itself proven."""

from __future__ import annotations

from typing import Any

from refattn_gpu.cuda import emulate, instructions, instructions_hopper, machine
from refattn_gpu.stages.ground import Ground, Put, attempt


def run(on: Ground, put: Put) -> None:
    """Report by format the words in which the two differ; the simulation turns the lanes round."""
    if why := emulate.no_gxx() or ("" if on.simulated else machine.absent_device()):
        put("skipped", why)
        return
    _compare(on, put, "instructions", instructions)
    if on.simulated or machine.is_hopper():
        _compare(on, put, "instructions of a Hopper", instructions_hopper)


def _compare(on: Ground, put: Put, name: str, kernel: Any) -> None:
    for dtype in ("float16", "bfloat16"):

        def find(dtype: str = dtype) -> dict[str, Any]:
            expected = kernel.emulated(dtype)
            found = (
                kernel.emulated(dtype, backwards=True) if on.simulated else kernel.launched(dtype)
            )
            words = kernel.different(found, expected)
            summary = f"words {words} of {kernel.WORDS} differ from the emulation's"
            return {"ok": not words, "words": kernel.WORDS, "summary": summary}

        attempt(put, f"{name} {dtype}", find)
