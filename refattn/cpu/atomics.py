"""What threads need that meet in machine code: steps that are one for all, a pause, a call.

Beside `simd.claim`, which hands out the pieces of work.
"""

from __future__ import annotations

import os
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from refattn.cpu.host import HOST

I64 = ir.IntType(64)
"""LLVM's type of addresses and states."""

ORDER = "seq_cst"
"""What one thread wrote before such a step, another reads after it."""


@intrinsic
def read(typing: Any, p: Any) -> Any:
    """Return the number behind a pointer as it is now, whichever thread wrote it."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(args[0], ORDER, 8)

    return types.int64(p), emit


@intrinsic
def write(typing: Any, p: Any, number: Any) -> Any:
    """Write a number behind a pointer, for every thread."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], args[0], ORDER, 8)
        return context.get_dummy_value()

    return types.void(p, types.int64), emit


@intrinsic
def exchange(typing: Any, p: Any, number: Any) -> Any:
    """Write a number behind a pointer and return the one that was there, in one step."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("xchg", args[0], args[1], ORDER)

    return types.int64(p, types.int64), emit


@intrinsic
def replace(typing: Any, p: Any, old: Any, new: Any) -> Any:
    """Write the new number behind a pointer if the old one is there, in one step; tell whether."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = builder.cmpxchg(*args, ORDER, ORDER)
        return builder.extract_value(found, 1)

    return types.boolean(p, types.int64, types.int64), emit


@intrinsic
def pause(typing: Any) -> Any:
    """Leave the core to its other thread for a moment, where the target has such an instruction."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if HOST.name in ("avx512", "avx2", "avx", "sse"):
            kind = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def call(typing: Any, function: Any, zero: Any, scratch: Any, job: Any) -> Any:
    """Call a kernel by its address; `zero` is a number of its computing format."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(I64, [args[1].type, I64, I64])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int64(types.int64, zero, types.int64, types.int64), emit


# a thread that waits by turns is to be in nobody's way: it may share its core with the very thread
# that it waits for
step_aside = types.ExternalFunction("sched_yield", types.int32()) if os.name == "posix" else pause
"""Let another thread have this core, if one wants it."""
