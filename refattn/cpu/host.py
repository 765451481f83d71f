"""What the target of Numba's code generator can do: vector width, fused multiply-add, registers.

Read from the generator, not from the processor, so that NUMBA_CPU_NAME and NUMBA_CPU_FEATURES
restrict the kernels as they restrict every other Numba function.
"""

from __future__ import annotations

from typing import NamedTuple

from numba.core.registry import cpu_target


class Host(NamedTuple):
    """A target: bytes a vector register, number of vector registers, and fused multiply-add."""

    name: str
    vector_bytes: int
    registers: int
    fused: bool
    """Whether a·b + c is one instruction; where it is not, LLVM would call a libm function."""


def describe_host(triple: str, features: str) -> Host:
    """Return the widest vectors that a target has.

    Args:
        triple: of LLVM, as `x86_64-unknown-linux-gnu`.
        features: of LLVM, as `+avx2,-avx512f`.
    """
    present = {word[1:] for word in features.split(",") if word.startswith("+")}
    if triple.startswith(("aarch64", "arm64")):
        return Host("neon", 16, 32, True)
    if not triple.startswith(("x86_64", "i686", "amd64")):
        return Host("generic", 16, 16, False)
    if {"avx512f", "avx512dq", "avx512vl", "fma"} <= present:
        return Host("avx512", 64, 32, True)
    if {"avx2", "fma"} <= present:
        return Host("avx2", 32, 16, True)
    if "avx" in present:
        return Host("avx", 32, 16, "fma" in present)
    return Host("sse", 16, 16, False)


def _this_host() -> Host:
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return describe_host(triple, features)


HOST = _this_host()
"""The target of this process."""

VECTORS = 4 if HOST.registers >= 32 else 3
"""Vectors of queries in a panel: the width of the largest register tile."""


def lanes(itemsize: int) -> int:
    """Return how many numbers of so many bytes a vector holds."""
    return HOST.vector_bytes // itemsize
