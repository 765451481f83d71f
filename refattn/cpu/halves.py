"""Numbers of 16 bits: vectors of them are widened when read and rounded when written.

All by integers, since not every target converts.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
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

    The exponent's bias differs by 112, and the multiplication by 2¹¹² also makes the subnormal
    numbers right.
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


@intrinsic
def store_bfloat16(typing: Any, p: Any, index: Any, value: Any) -> Any:
    """Write float32 numbers from an element's index on, rounded to the nearest (even) bfloat16."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = integers(value)
        bits = builder.bitcast(args[2], kind)
        upper = builder.lshr(bits, constant(kind, 16))
        odd = builder.and_(upper, constant(kind, 1))
        carried = builder.add(builder.add(bits, odd), constant(kind, 0x7FFF))
        rounded = builder.lshr(carried, constant(kind, 16))
        quiet = builder.or_(upper, constant(kind, 0x40))  # a NaN stays one
        is_nan = builder.fcmp_unordered("uno", args[2], args[2])
        _store_halves(builder, builder.select(is_nan, quiet, rounded), args, value)
        return context.get_dummy_value()

    return types.void(p, types.intp, value), emit


@intrinsic
def store_float16(typing: Any, p: Any, index: Any, value: Any) -> Any:
    """Write float32 numbers from an element's index on, rounded to the nearest (even) float16.

    Below 2⁻¹⁴, 1/2 is added: its last bit is that of a subnormal float16, so the addition rounds.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, floats = integers(value), llvm_vector(value)

        def at_least(bound: int) -> Any:
            return builder.icmp_unsigned(">=", size, constant(kind, bound))

        bits = builder.bitcast(args[2], kind)
        size = builder.and_(bits, constant(kind, 0x7FFFFFFF))
        upper = builder.lshr(size, constant(kind, 13))
        odd = builder.and_(upper, constant(kind, 1))
        rebiased = builder.sub(builder.add(size, odd), constant(kind, (112 << 23) - 0xFFF))
        normal = builder.lshr(rebiased, constant(kind, 13))
        shifted = builder.fadd(builder.bitcast(size, floats), constant(floats, 0.5))
        subnormal = builder.sub(builder.bitcast(shifted, kind), constant(kind, 0x3F000000))
        half = builder.select(at_least(113 << 23), normal, subnormal)
        half = builder.select(at_least(0x477FF000), constant(kind, 0x7C00), half)  # 65520
        payload = builder.and_(upper, constant(kind, 0x3FF))
        quiet = builder.or_(payload, constant(kind, 0x7E00))
        half = builder.select(at_least(0x7F800001), quiet, half)
        sign = builder.and_(builder.lshr(bits, constant(kind, 16)), constant(kind, 0x8000))
        _store_halves(builder, builder.or_(half, sign), args, value)
        return context.get_dummy_value()

    return types.void(p, types.intp, value), emit


def _store_halves(builder: Any, halves: Any, args: Any, vector: Vector) -> None:
    """Emit the store of the lower 16 bits of each lane."""
    kind = ir.VectorType(ir.IntType(16), vector.lanes)
    place = builder.bitcast(builder.gep(args[0], [args[1]]), kind.as_pointer())
    builder.store(builder.trunc(halves, kind), place).align = 2
