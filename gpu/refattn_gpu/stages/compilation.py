"""Every kernel in CUDA C++, compiled for this device by the compiler that is here.

What the later stages run is then on disk; and another release of the compiler than that of the
budgets may spill where that one did not.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from refattn_gpu.cuda import build, machine
from refattn_gpu.cuda.catalogue import TARGETS, Variant, variants
from refattn_gpu.stages.ground import Ground, Put

FEW = 2
"""Variants that the simulation compiles."""


def run(on: Ground, put: Put) -> None:
    """Report what each variant costs here."""
    if why := build.no_nvrtc() or ("" if on.simulated else machine.absent_device()):
        put("skipped", why)
        return
    target = TARGETS[-1] if on.simulated else machine.target()
    todo = variants()[:FEW] if on.simulated else variants()
    put("compiler", {"release": build.release(), "target": target})
    # a process each: what a compilation locks, it locks in its own
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        waits = {pool.submit(cost_of, variant, target): variant.name for variant in todo}
        for done in as_completed(waits):
            put(waits[done], done.result())


def cost_of(variant: Variant, target: str) -> dict[str, Any]:
    """Return registers and memory of a variant, and whether nothing spills."""
    try:
        usage = build.build(variant, target).usage
    except build.BuildError as error:
        return {"error": str(error)}
    spilled = f"{usage.spill} bytes spilled, {usage.local} bytes of local memory"
    return {**usage._asdict(), "ok": not usage.spill and not usage.local, "summary": spilled}
