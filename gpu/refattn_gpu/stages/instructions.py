"""Single instructions, the device against the emulation: what proves kernels is itself proven."""

from __future__ import annotations

from typing import Any

from refattn_gpu.cuda import emulate, instructions, machine
from refattn_gpu.stages.ground import Ground, Put, attempt


def run(on: Ground, put: Put) -> None:
    """Report by format the words in which the two differ; the simulation turns the lanes round."""
    if why := emulate.no_gxx() or ("" if on.simulated else machine.absent_device()):
        put("skipped", why)
        return
    for dtype in ("float16", "bfloat16"):

        def find(dtype: str = dtype) -> dict[str, Any]:
            expected = instructions.emulated(dtype)
            found = (
                instructions.emulated(dtype, backwards=True)
                if on.simulated
                else instructions.launched(dtype)
            )
            words = instructions.different(found, expected)
            summary = f"words {words} of {instructions.WORDS} differ from the emulation's"
            return {"ok": not words, "words": instructions.WORDS, "summary": summary}

        attempt(put, f"instructions {dtype}", find)
