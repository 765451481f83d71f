"""Whether the processor keeps results below the smallest normal number, or writes zero.

A product with a tiny weight costs an x86 processor a hundred cycles more than any other, and steep
linear biases make many. The model of rounding permits zeros there (NUM-MODEL1).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from refattn.cpu.host import HOST

FLUSH = 0x8000
"""The bit of x86's control word (MXCSR) that makes results zero; operands are read as they are."""


@intrinsic
def control_word(typing: Any) -> Any:
    """Return this thread's control word of vector arithmetic; 0 where the target has none."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = cgutils.alloca_once_value(builder, ir.Constant(ir.IntType(32), 0))
        _call(builder, "llvm.x86.sse.stmxcsr", place)
        return builder.load(place)

    return types.uint32(), emit


@intrinsic
def set_control_word(typing: Any, word: Any) -> Any:
    """Set this thread's control word."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = cgutils.alloca_once(builder, ir.IntType(32))
        builder.store(args[0], place)
        _call(builder, "llvm.x86.sse.ldmxcsr", place)
        return context.get_dummy_value()

    return types.void(types.uint32), emit


def _call(builder: Any, name: str, place: Any) -> None:
    """Emit an instruction on the control word, where the target is an x86."""
    if HOST.name in ("avx512", "avx2", "avx", "sse"):
        byte = ir.IntType(8).as_pointer()
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte]), name
        )
        builder.call(function, [builder.bitcast(place, byte)])
