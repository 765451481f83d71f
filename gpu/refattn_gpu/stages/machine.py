"""The device, the driver, the versions of what ran, and the clocks while it ran."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

from refattn_gpu.stages.ground import Ground

PACKAGES = (
    "refattn",
    "numpy",
    "scipy",
    "numba",
    "numba-cuda",
    "cuda-bindings",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "nvidia-cuda-nvrtc",
    "nvidia-nvjitlink",
    "nvidia-nvvm",
    "nvidia-cudnn-cu13",
    "torch",
)
"""Whose versions are noted, where they are installed."""

CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
"""What nvidia-smi is asked beside each shape."""


def machine(on: Ground) -> dict[str, Any]:
    """Return what ran where."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device = {"name": "none: the CUDA simulator"} if on.simulated else _device(on.xp)
    return {"device": device, "versions": versions, "system": platform.platform()}


def _device(cupy: Any) -> dict[str, Any]:
    runtime = cupy.cuda.runtime
    facts = runtime.getDeviceProperties(cupy.cuda.Device().id)
    return {
        "name": facts["name"].decode(),
        "capability": f"{facts['major']}.{facts['minor']}",
        "multiprocessors": facts["multiProcessorCount"],
        "memory": facts["totalGlobalMem"],
        "driver": asked("driver_version").get("driver_version", ""),
        "driver_cuda": runtime.driverGetVersion(),
        "runtime_cuda": runtime.runtimeGetVersion(),
    }


def clocks() -> dict[str, str]:
    """Return clocks, power and temperature of this moment, as nvidia-smi tells them."""
    return asked(*CLOCKS)


def asked(*fields: str) -> dict[str, str]:
    """Return what nvidia-smi answers about the first device; nothing where it is absent."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    first = done.stdout.splitlines()[:1]
    return dict(
        zip(fields, (word.strip() for line in first for word in line.split(",")), strict=False)
    )
