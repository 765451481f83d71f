"""Explicit SIMD on bytes: what masks, whose cells are one byte each, are read with."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from refattn.cpu.simd import (
    I32,
    Vector,
    constant,
    llvm_vector,
    load_from,
    splat_into,
    store_to,
)


@intrinsic
def put_where_zero(
    typing: Any, flags: Any, flags_row: Any, target: Any, target_row: Any, number: Any
) -> Any:
    """Write a number into target[c, r] where the byte flags[r, c] is 0, in a square of lanes.

    The rows are turned by interleaving their upper half with the lower one, log₂(lanes) times.
    """
    vector = Vector(target.dtype)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def index(row: int, stride: Any) -> Any:
            return builder.mul(stride, ir.Constant(stride.type, row))

        n = vector.lanes
        rows = [_load_bytes(builder, args[0], index(r, args[1]), n) for r in range(n)]
        low = [lane for c in range(n // 2) for lane in (c, n + c)]
        ways = [ir.Constant(ir.VectorType(I32, n), [c + s for c in low]) for s in (0, n // 2)]
        for _ in range(n.bit_length() - 1):
            pairs = zip(rows[: n // 2], rows[n // 2 :], strict=True)
            rows = [builder.shuffle_vector(*pair, way) for pair in pairs for way in ways]
        new = splat_into(builder, args[4], llvm_vector(vector))
        for c in range(n):
            place = index(c, args[3])
            old = load_from(builder, args[2], place, vector)
            zero = builder.icmp_unsigned("==", rows[c], constant(rows[c].type, 0))
            store_to(builder, builder.select(zero, new, old), args[2], place, vector)
        return context.get_dummy_value()

    return types.void(flags, types.intp, target, types.intp, target.dtype), emit


@intrinsic
def where_byte(typing: Any, flags: Any, i: Any, yes: Any, no: Any) -> Any:
    """Return `no` in the lanes whose byte, from flags[i] on, is 0, else `yes`."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        loaded = _load_bytes(builder, args[0], args[1], yes.lanes)
        zero = builder.icmp_unsigned("==", loaded, constant(loaded.type, 0))
        return builder.select(zero, args[3], args[2])

    return yes(flags, types.intp, yes, yes), emit


def _load_bytes(builder: Any, pointer: Any, index: Any, n: int) -> Any:
    """Emit the load of n bytes as a vector."""
    kind = ir.VectorType(ir.IntType(8), n)
    loaded = builder.load(builder.bitcast(builder.gep(pointer, [index]), kind.as_pointer()))
    loaded.align = 1
    return loaded


@intrinsic
def load_word(typing: Any, p: Any, index: Any) -> Any:
    """Return the eight bytes from an index on as one integer; any alignment."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        loaded = builder.load(builder.bitcast(builder.gep(args[0], [args[1]]), word.as_pointer()))
        loaded.align = 1
        return loaded

    return types.uint64(p, types.intp), emit
