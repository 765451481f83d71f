"""The kernels on the host's processor: the same bodies compiled by g++, a fiber a CUDA thread.

What PTX instructions do, `sources/emulated/primitives.h` does in C++. The machine under it finds
what a device would do silently: races, copies that nobody waited for, banks in each other's way.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from refattn.errors import RefattnError
from refattn_gpu.cuda.build import SHARED_HEADERS, BuildError, sources_of
from refattn_gpu.cuda.catalogue import Variant
from refattn_gpu.cuda.records import Job
from refattn_gpu.cuda.store import digest_of, kept, place

HEADERS = (
    *SHARED_HEADERS,
    "emulated/primitives.h",
    "emulated/chunks.h",
    "emulated/hopper.h",
    "emulated/warp_groups.h",
    "emulated/boxes.h",
    "emulated/order.h",
    "emulated/machine.h",
    "emulated/launch.cpp",
)
"""What is compiled beside the kernel."""

FLAGS = ("-O1", "-std=c++17", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE")
"""Of g++. A checked longjmp would take a leap to another fiber's stack for an error."""


class EmulationError(RefattnError):
    """What the machine found wrong while a kernel ran."""


class _Range(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("bytes", ctypes.c_uint64))


_RUNNING = threading.Lock()
"""Held while a kernel runs: a library has one machine."""


def no_gxx() -> str:
    """Return why no kernel can be emulated here; an empty string if one can."""
    return "" if shutil.which("g++") else "g++ was not found: install a C++ compiler"


def compiled(variant: Variant, texts: Mapping[str, str] | None = None) -> bytes:
    """Return a variant as a shared library, from disk where it was compiled before.

    Args:
        variant: to compile.
        texts: other contents of some sources, by name; those of other kernels are left aside.

    Raises:
        BuildError: there is no compiler, or it refuses the source.
    """
    if why := no_gxx():
        raise BuildError(why)
    sources = sources_of(variant, HEADERS)
    sources |= {name: text for name, text in (texts or {}).items() if name in sources}
    defines = [f"-D{name}={value}" for name, value in variant.defines().items()]
    options = [*FLAGS, *defines, f'-DKERNEL_FILE="{variant.source}"', f"-DENTRY={variant.entry}"]
    name = digest_of([_release(), *options, *(x for item in sources.items() for x in item)])
    return kept(f"{name}.so", lambda: _compile(variant, sources, options))


@cache
def _release() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


def _compile(variant: Variant, sources: dict[str, str], options: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in sources.items():
            (Path(folder) / Path(name).name).write_text(text, "utf-8")
        out = Path(folder) / "kernel.so"
        command = ["g++", *options, "-I", folder, str(Path(folder) / "launch.cpp"), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            words = " ".join(done.stderr.split())[:400]
            raise BuildError(f"g++ refuses {variant.name}: {words}")
        return out.read_bytes()


@cache
def library(code: bytes) -> Any:
    """Return the function `run` of a shared library."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{digest_of([code])}.so"
        place(path, code)
        run = ctypes.CDLL(str(path)).run  # it stays in memory when its file is gone
    run.restype = ctypes.c_char_p
    return run


def launch(
    code: bytes,
    job: Job,
    blocks: int,
    arrays: Iterable[np.ndarray[Any, Any]],
    *,
    maps: ctypes.Structure | None = None,
    backwards: bool = False,
) -> None:
    """Run a kernel.

    Args:
        code: of `compiled`.
        job: what it is told.
        blocks: of the grid.
        arrays: all that it may read.
        maps: of tensors, to a kernel that takes them.
        backwards: the order of warps and lanes; results do not depend on it.

    Raises:
        EmulationError: the machine found one.
    """
    spans = [np.lib.array_utils.byte_bounds(array) for array in arrays if array.size]
    ranges = (_Range * len(spans))(*(_Range(low, high - low) for low, high in spans))
    with _RUNNING:
        said = library(code)(
            ctypes.byref(job),
            ctypes.byref(maps) if maps else None,
            ranges,
            len(spans),
            ctypes.c_uint(blocks),
            ctypes.c_bool(backwards),
        )
    if said:
        raise EmulationError(f"the emulation found {said.decode()}")
