"""Vectors of numbers that are stored in 16 bits, widened exactly to float32."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from refattn.cpu.simd import Vector, constant, integers, llvm_vector


@intrinsic
def load_bfloat16(typing: Any, p: Any, index: Any, like: Any) -> Any:
    """Return as many bfloat16 numbers as a vector has lanes, widened (exactly) to float32."""
    vector = Vector(like)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = _load_halves(builder, args, vector)
        wide = builder.shl(wide, constant(wide.type, 16))
        return builder.bitcast(wide, llvm_vector(vector))

    return vector(p, types.intp, like), emit


@intrinsic
def load_float16(typing: Any, p: Any, index: Any, like: Any) -> Any:
    """Return as many float16 numbers as a vector has lanes, widened (exactly) to float32.

    By integers, since not every target converts: the exponent's bias differs by 112, and the
    multiplication by 2¹¹² also makes the subnormal numbers right.
    """
    vector = Vector(like)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, floats = integers(vector), llvm_vector(vector)
        half = _load_halves(builder, args, vector)
        sign = builder.shl(builder.and_(half, constant(kind, 0x8000)), constant(kind, 16))
        rest = builder.shl(builder.and_(half, constant(kind, 0x7FFF)), constant(kind, 13))
        scaled = builder.fmul(builder.bitcast(rest, floats), constant(floats, 2.0**112))
        special = builder.icmp_unsigned(">=", rest, constant(kind, 0x7C00 << 13))
        beyond = builder.or_(rest, constant(kind, 0x7F800000))
        bits = builder.select(special, beyond, builder.bitcast(scaled, kind))
        return builder.bitcast(builder.or_(bits, sign), floats)

    return vector(p, types.intp, like), emit


def _load_halves(builder: Any, args: Any, vector: Vector) -> Any:
    """Emit the load of 16-bit integers, widened with zeros to 32 bits."""
    kind = ir.VectorType(ir.IntType(16), vector.lanes)
    loaded = builder.load(builder.bitcast(builder.gep(args[0], [args[1]]), kind.as_pointer()))
    loaded.align = 2
    return builder.zext(loaded, integers(vector))
