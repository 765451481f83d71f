"""Packages that a test may do without, unless `REFATTN_REQUIRE` names them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from types import ModuleType

import pytest


def _no_cuda() -> str:
    state = importlib.import_module("refattn_gpu.device").STATE
    return "" if state.kind == "device" else str(state.reason)


def _no_cupy() -> str:
    return str(importlib.import_module("refattn_gpu.cupy_text").absent())


def _no_ptxas() -> str:
    return str(importlib.import_module("refattn_gpu.ptx").no_ptxas())


def _no_nvrtc() -> str:
    return str(importlib.import_module("refattn_gpu.cuda.build").no_nvrtc())


def _no_nvdisasm() -> str:
    return str(importlib.import_module("refattn_gpu.cuda.costs").no_nvdisasm())


def _no_gxx() -> str:
    return str(importlib.import_module("refattn_gpu.cuda.emulate").no_gxx())


def _no_onnx_releases() -> str:
    return "" if ONNX_RELEASES else "REFATTN_ONNX_RELEASES names no folder"


ONNX_RELEASES = os.environ.get("REFATTN_ONNX_RELEASES", "")
"""A folder with one folder a release of ONNX that is earlier than the installed one."""


PRESENCE = {
    "cuda": _no_cuda,
    "cupy": _no_cupy,
    "ptxas": _no_ptxas,
    "nvrtc": _no_nvrtc,
    "nvdisasm": _no_nvdisasm,
    "gxx": _no_gxx,
    "onnx_releases": _no_onnx_releases,
}
"""Names that ask for more than a package: a device for Numba, one for CuPy; NVIDIA's assembler,
run-time compiler and disassembler; a C++ compiler; earlier releases of ONNX.

Each tells why it is absent; an empty string if it is there.
"""


def required() -> tuple[str, ...]:
    """Return the import names in the environment variable `REFATTN_REQUIRE`."""
    return tuple(n.strip() for n in os.environ.get("REFATTN_REQUIRE", "").split(",") if n.strip())


def require(name: str) -> ModuleType:
    """Import a package; where it is absent, skip, or fail if `REFATTN_REQUIRE` names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a package says while it loads is its own affair
            return importlib.import_module(name)
    except ImportError as absent:
        if name.partition(".")[0] in required():
            pytest.fail(f"{name} is required by REFATTN_REQUIRE, but: {absent}", pytrace=False)
        pytest.skip(f"{name} is absent: {absent}", allow_module_level=True)


def require_device(name: str, why: str) -> None:
    """Skip where what `name` stands for is absent, or fail if `REFATTN_REQUIRE` names it.

    Args:
        name: a name of `PRESENCE`.
        why: why it is absent; an empty string if it is there.
    """
    if why and name in required():
        pytest.fail(f"{name} is required by REFATTN_REQUIRE, but: {why}", pytrace=False)
    if why:
        pytest.skip(f"{name} is absent: {why}")


def lacking(name: str) -> str:
    """Return why a name of `REFATTN_REQUIRE` is absent; an empty string if it is there."""
    if name in PRESENCE:
        return PRESENCE[name]()
    return "" if importlib.util.find_spec(name) else "it is not installed here"
