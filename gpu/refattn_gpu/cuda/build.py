"""From the sources to a cubin, by NVRTC: the same on a machine with and without a device.

CuPy's own compilation flushes numbers below the normal range to zero, whatever it is told; this one
leaves NVRTC's defaults, which keep them, and reads from the assembler's report what a kernel costs.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from refattn.errors import RefattnError
from refattn_gpu.cuda.catalogue import Variant
from refattn_gpu.cuda.store import SOURCES, digest_of, kept
from refattn_gpu.ptx import Usage, usage_of

REMEDY = 'pip install "cuda-bindings>=13" nvidia-cuda-nvrtc (or "refattn[cuda13]")'
"""What brings the compiler."""

SHARED_HEADERS = (
    "job.h",
    "cells.h",
    "again.h",
    "parts.h",
    "tiles.h",
    "products16.h",
    "products32.h",
    "rows.h",
    "gradients.h",
    "products_hopper.h",
)
"""What a kernel includes, on a device and in the emulation alike."""

HEADERS = (
    *SHARED_HEADERS,
    "device/primitives.h",
    "device/chunks.h",
    "device/hopper.h",
)
"""What a kernel includes; a header is included by its bare name."""

SERIAL = re.compile(r"C75(?:08|10|14)")
"""Warnings of the assembler: asynchronous products wait, or a count of registers is ignored."""


class BuildError(RefattnError):
    """A kernel that could not be compiled here."""


class Cubin(NamedTuple):
    """One kernel for one kind of device."""

    code: bytes
    report: str
    """What the assembler said."""
    usage: Usage


def no_nvrtc() -> str:
    """Return why nothing here compiles, in one sentence; an empty string if something does."""
    if importlib.util.find_spec("cuda") is None or not importlib.util.find_spec("cuda.bindings"):
        return f"cuda-bindings is not installed: {REMEDY}"
    try:
        return "" if release() else "unknown"
    except Exception as error:  # the bindings load the library by its name at the first call
        return f"NVRTC was not found, {' '.join(str(error).split())[:200]}: {REMEDY}"


def _nvrtc() -> Any:
    return importlib.import_module("cuda.bindings.nvrtc")


def release() -> str:
    """Return NVRTC's release, as "13.5"."""
    error, major, minor = _nvrtc().nvrtcVersion()
    _accept(error, "nvrtcVersion")
    return f"{major}.{minor}"


def build(variant: Variant, target: str, texts: Mapping[str, str] | None = None) -> Cubin:
    """Return a kernel compiled for a target, from disk where it was compiled before.

    Args:
        variant: to compile.
        target: as "sm_90a".
        texts: other contents of some sources, by name.

    Raises:
        BuildError: there is no compiler, or it refuses the source.
    """
    if why := no_nvrtc():
        raise BuildError(why)
    sources = sources_of(variant, HEADERS) | dict(texts or {})
    options = [f"-arch={target}", "-std=c++17", "--ptxas-options=-v"]
    options += [f"-D{name}={value}" for name, value in variant.defines().items()]
    name = digest_of([release(), *options, *(x for item in sources.items() for x in item)])
    data = kept(f"{name}.cubin", lambda: _compile(variant, sources, options))
    size = int.from_bytes(data[:8], "little")
    report = json.loads(data[8 : 8 + size])["report"]
    usage = usage_of(report)
    return Cubin(
        data[8 + size :], report, usage._replace(shared=usage.shared + variant.shared_bytes)
    )


def sources_of(variant: Variant, headers: tuple[str, ...]) -> dict[str, str]:
    """Return the texts of a variant by name, the kernel's own first."""
    names = (variant.source, *headers)
    return {name: (SOURCES / name).read_text("utf-8") for name in names}


def _compile(variant: Variant, sources: dict[str, str], options: list[str]) -> bytes:
    """Return the assembler's report and the cubin as one."""
    nvrtc = _nvrtc()
    (name, text), *headers = sources.items()
    program = _accept(
        nvrtc.nvrtcCreateProgram(
            text.encode(),
            name.encode(),
            len(headers),
            [body.encode() for _, body in headers],
            [header.rsplit("/", 1)[-1].encode() for header, _ in headers],
        ),
        "nvrtcCreateProgram",
    )
    status = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])[0]
    report = _bytes(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
    words = report.decode("utf-8", "replace").strip("\0")
    if int(status):
        nvrtc.nvrtcDestroyProgram(program)
        raise BuildError(f"NVRTC refuses {variant.name}: {' '.join(words.split())[:400]}")
    code = _bytes(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    nvrtc.nvrtcDestroyProgram(program)
    head = json.dumps({"report": words}).encode()
    return len(head).to_bytes(8, "little") + head + code


def _bytes(size_of: Any, get: Any, program: Any) -> bytes:
    data: bytes = b" " * _accept(size_of(program), "a size")
    _accept(get(program, data), "a result")
    return data


def _accept(answer: Any, call: str) -> Any:
    """Return what a call returned beside its status."""
    status, *rest = answer if isinstance(answer, tuple) else (answer,)
    if int(status):
        raise BuildError(f"NVRTC answers {call} with {status}")
    return rest[0] if rest else None
