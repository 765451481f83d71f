"""Explicit SIMD for Numba: a vector value type, and the operations that the kernels need.

A `Vector` lives in one register of the target and moves through ordinary Numba code; each function
here is one or a few instructions. Nothing is reordered or contracted: the order of the operations
is the order of the text, so results are the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from refattn.cpu.host import HOST, lanes

I32 = ir.IntType(32)
"""LLVM's index type of lanes."""


class Vector(types.Type):
    """One register of `lanes` numbers of type `dtype` (Numba's float32 or float64)."""

    def __init__(self, dtype: Any):
        self.dtype = dtype
        self.lanes = lanes(dtype.bitwidth // 8)
        super().__init__(name=f"Vector({dtype}, {self.lanes})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """A vector is LLVM's vector of the same numbers."""

    def __init__(self, manager: Any, vector: Vector):
        super().__init__(manager, vector, llvm_vector(vector))


def llvm_float(dtype: Any) -> ir.Type:
    """Return LLVM's type of a Numba float."""
    return ir.FloatType() if dtype == types.float32 else ir.DoubleType()


def llvm_vector(vector: Vector) -> ir.VectorType:
    """Return LLVM's type of a vector."""
    return ir.VectorType(llvm_float(vector.dtype), vector.lanes)


def integers(vector: Vector) -> ir.VectorType:
    """Return LLVM's type of as many integers of the same size."""
    return ir.VectorType(ir.IntType(vector.dtype.bitwidth), vector.lanes)


def constant(kind: ir.VectorType, number: float) -> ir.Constant:
    """Return a vector that holds one number in every lane."""
    return ir.Constant(kind, [number] * kind.count)


def splat_into(builder: Any, number: Any, kind: ir.VectorType) -> Any:
    """Emit a vector that holds a scalar in every lane."""
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, nothing, constant(ir.VectorType(I32, kind.count), 0))


def load_from(builder: Any, pointer: Any, index: Any, vector: Vector) -> Any:
    """Emit the load of a vector at an element's index; any alignment of whole elements."""
    place = builder.bitcast(builder.gep(pointer, [index]), llvm_vector(vector).as_pointer())
    loaded = builder.load(place)
    loaded.align = vector.dtype.bitwidth // 8
    return loaded


def store_to(builder: Any, value: Any, pointer: Any, index: Any, vector: Vector) -> None:
    """Emit the store of a vector at an element's index; any alignment of whole elements."""
    place = builder.bitcast(builder.gep(pointer, [index]), llvm_vector(vector).as_pointer())
    builder.store(value, place).align = vector.dtype.bitwidth // 8


def fuse(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Emit a·b + c: rounded once where the target can, else twice."""
    if not HOST.fused:
        return builder.fadd(builder.fmul(a, b), c)
    kind = a.type
    suffix = f"v{kind.count}f{32 if isinstance(kind.element, ir.FloatType) else 64}"
    signature = ir.FunctionType(kind, [kind] * 3)
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.fma.{suffix}")
    return builder.call(function, [a, b, c])


@intrinsic
def pointer(typing: Any, address: Any, like: Any) -> Any:
    """Return an address (an integer) as a pointer to numbers of the type of `like`."""
    kind = types.CPointer(like)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.intp, like), emit


@intrinsic
def advance(typing: Any, p: Any, index: Any) -> Any:
    """Return the pointer to the element at an index."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return p(p, types.intp), emit


@intrinsic
def load(typing: Any, p: Any, index: Any) -> Any:
    """Return the vector that starts at an element's index."""
    vector = Vector(p.dtype)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load_from(builder, args[0], args[1], vector)

    return vector(p, types.intp), emit


@intrinsic
def store(typing: Any, p: Any, index: Any, value: Any) -> Any:
    """Write a vector from an element's index on."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store_to(builder, args[2], args[0], args[1], value)
        return context.get_dummy_value()

    return types.void(p, types.intp, value), emit


@intrinsic
def prefetch(typing: Any, p: Any, index: Any) -> Any:
    """Ask for the cache line of an element, into the second level; it changes no value."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        place = builder.bitcast(builder.gep(args[0], [args[1]]), byte)
        builder.call(function, [place, *(ir.Constant(I32, n) for n in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(p, types.intp), emit


@intrinsic
def splat(typing: Any, number: Any) -> Any:
    """Return a scalar in every lane."""
    vector = Vector(number)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return splat_into(builder, args[0], llvm_vector(vector))

    return vector(number), emit


@intrinsic
def lane_numbers(typing: Any, like: Any) -> Any:
    """Return 0, 1, 2, ... as numbers of the type of the scalar `like`."""
    vector = Vector(like)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(llvm_vector(vector), [float(i) for i in range(vector.lanes)])

    return vector(like), emit


@intrinsic
def lane_count(typing: Any, like: Any) -> Any:
    """Return how many numbers of the type of the scalar `like` a vector holds, a constant."""
    n = Vector(like).lanes

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.intp, n)

    return types.intp(like), emit


@intrinsic
def convert(typing: Any, number: Any, like: Any) -> Any:
    """Return an integer as a number of the type of the scalar `like`."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sitofp(args[0], context.get_value_type(like))

    return like(types.intp, like), emit


@intrinsic
def from_bits(typing: Any, bits: Any) -> Any:
    """Return the float32 that 32 bits stand for."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), emit


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a·b + c in every lane."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return fuse(builder, *args)

    return a(a, a, a), emit


def _arithmetic(instruction: str, sentence: str) -> Callable[..., Any]:
    """Return the intrinsic of one instruction on two vectors."""

    def declare(typing: Any, a: Any, b: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, instruction)(*args)

        return a(a, a), emit

    declare.__doc__ = sentence
    function: Callable[..., Any] = intrinsic(declare)
    return function


add = _arithmetic("fadd", "Return a + b in every lane.")
sub = _arithmetic("fsub", "Return a - b in every lane.")
mul = _arithmetic("fmul", "Return a · b in every lane.")
div = _arithmetic("fdiv", "Return a / b in every lane.")


@intrinsic
def maximum(typing: Any, a: Any, b: Any) -> Any:
    """Return a where a > b, else b: a NaN in a is dropped, a NaN in b is kept."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return a(a, a), emit


@intrinsic
def where_less(typing: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
    """Return `yes` in the lanes where a < b, else `no`."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return a(a, a, a, a), emit


@intrinsic
def where_equal(typing: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
    """Return `yes` in the lanes where a = b, else `no`."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("==", args[0], args[1]), args[2], args[3])

    return a(a, a, a, a), emit


@intrinsic
def power_of_two(typing: Any, shifted: Any) -> Any:
    """Return 2ⁿ, where the lowest bits of each number hold n plus the exponent's bias."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = integers(shifted)
        mantissa = 23 if shifted.dtype == types.float32 else 52
        bits = builder.shl(builder.bitcast(args[0], kind), constant(kind, mantissa))
        return builder.bitcast(bits, llvm_vector(shifted))

    return shifted(shifted), emit


@intrinsic
def sum_lanes(typing: Any, a: Any) -> Any:
    """Return the sum of all lanes: the upper half is added to the lower until one is left."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        half = args[0]
        while half.type.count > 1:
            n = half.type.count // 2
            nothing = ir.Constant(half.type, ir.Undefined)
            low, high = (
                ir.Constant(ir.VectorType(I32, n), list(range(start, start + n)))
                for start in (0, n)
            )
            lower = builder.shuffle_vector(half, nothing, low)
            half = builder.fadd(lower, builder.shuffle_vector(half, nothing, high))
        return builder.extract_element(half, ir.Constant(I32, 0))

    return a.dtype(a), emit


@intrinsic
def transpose(typing: Any, source: Any, source_row: Any, target: Any, target_row: Any) -> Any:
    """Write target[c, r] = source[r, c] for a square of as many rows as a vector has lanes.

    The rows change their upper and lower halves, then quarters, ...: log₂(lanes) steps.
    """
    vector = Vector(source.dtype)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def index(row: int, stride: Any) -> Any:
            return builder.mul(stride, ir.Constant(stride.type, row))

        n = vector.lanes
        rows = [load_from(builder, args[0], index(r, args[1]), vector) for r in range(n)]
        step = n // 2
        while step:
            low, high = (ir.Constant(ir.VectorType(I32, n), s) for s in exchange(n, step))
            for r in range(n):
                if not r & step:
                    upper, lower = rows[r], rows[r | step]
                    rows[r] = builder.shuffle_vector(upper, lower, low)
                    rows[r | step] = builder.shuffle_vector(upper, lower, high)
            step //= 2
        for r in range(n):
            store_to(builder, rows[r], args[2], index(r, args[3]), vector)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), emit


def exchange(n: int, step: int) -> tuple[list[int], list[int]]:
    """Return the two shuffles of a pair of rows that exchange blocks of `step` lanes."""
    low = [n + (c ^ step) if c & step else c for c in range(n)]
    high = [n + c if c & step else c ^ step for c in range(n)]
    return low, high


def _shuffled(order: Callable[[int], list[int]], sentence: str) -> Callable[..., Any]:
    """Return the intrinsic of one order of the lanes of two vectors, those of b after those of a.

    Args:
        order: by the number of lanes n, the lane (0 to 2n - 1) that each of the result is.
        sentence: what it does.
    """

    def declare(typing: Any, a: Any, b: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            places = ir.Constant(ir.VectorType(I32, a.lanes), order(a.lanes))
            return builder.shuffle_vector(*args, places)

        return a(a, a), emit

    declare.__doc__ = sentence
    function: Callable[..., Any] = intrinsic(declare)
    return function


def _zipped(first: int, n: int) -> list[int]:
    """Return lanes first, first + 1, ... of a and of b in turn, n in all."""
    return [first + i // 2 + n * (i % 2) for i in range(n)]


even_lanes = _shuffled(
    lambda n: list(range(0, 2 * n, 2)), "Return lanes 0, 2, 4, ... of a, then those of b."
)
odd_lanes = _shuffled(
    lambda n: list(range(1, 2 * n, 2)), "Return lanes 1, 3, 5, ... of a, then those of b."
)
zip_low = _shuffled(lambda n: _zipped(0, n), "Return the lower halves of a and b, lanes in turn.")
zip_high = _shuffled(
    lambda n: _zipped(n // 2, n), "Return the upper halves of a and b, lanes in turn."
)


@intrinsic
def claim(typing: Any, counter: Any) -> Any:
    """Return the number behind a pointer and leave it one larger, in one step for all threads.

    What a thread wrote before its step is seen by whoever takes a later one.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        one = ir.Constant(args[0].type.pointee, 1)
        return builder.atomic_rmw("add", args[0], one, "acq_rel")

    return counter.dtype(counter), emit
