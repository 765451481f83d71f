"""The register tile: a block of a matrix product that stays in vector registers.

A `Tile` of r rows and v vectors is the sum of outer products of r numbers with v vectors; it is
the one inner loop of every product in these kernels.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from refattn.cpu.simd import Vector, constant, fuse, llvm_vector, load_from, splat_into, store_to


class Tile(types.Type):
    """A block of `rows` rows, each of `vectors` vectors."""

    def __init__(self, vector: Vector, rows: int, vectors: int):
        self.vector, self.rows, self.vectors = vector, rows, vectors
        super().__init__(name=f"Tile({vector}, {rows}, {vectors})")


@register_model(Tile)
class TileModel(models.PrimitiveModel):
    """A tile is an array of vectors, which LLVM takes apart into registers."""

    def __init__(self, manager: Any, tile: Tile):
        kind = ir.ArrayType(llvm_vector(tile.vector), tile.rows * tile.vectors)
        super().__init__(manager, tile, kind)


@intrinsic(prefer_literal=True)
def zero_tile(typing: Any, like: Any, rows: Any, vectors: Any) -> Any:
    """Return a tile of zeros of the type of the scalar `like`; its size must be constant."""
    tile = Tile(Vector(like), rows.literal_value, vectors.literal_value)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zero = constant(llvm_vector(tile.vector), 0.0)
        return ir.Constant.literal_array([zero] * (tile.rows * tile.vectors))

    return tile(like, rows, vectors), emit


@intrinsic
def add_outer(typing: Any, tile: Any, a: Any, i: Any, a_row: Any, b: Any, j: Any) -> Any:
    """Return tile + a bᵀ, a the numbers at a[i], a[i + a_row], ..., b the vectors from b[j] on."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        block, a, i, a_row, b, j = args
        vector, lanes = tile.vector, tile.vector.lanes
        columns = [
            load_from(builder, b, _plus(builder, j, v * lanes), vector) for v in range(tile.vectors)
        ]
        for r in range(tile.rows):
            place = builder.add(i, builder.mul(a_row, ir.Constant(a_row.type, r)))
            number = builder.load(builder.gep(a, [place]))
            row = splat_into(builder, number, llvm_vector(vector))
            for v, column in enumerate(columns):
                at = r * tile.vectors + v
                total = fuse(builder, row, column, builder.extract_value(block, at))
                block = builder.insert_value(block, total, at)
        return block

    index = types.intp
    return tile(tile, a, index, index, b, index), emit


def _plus(builder: Any, index: Any, constant_: int) -> Any:
    return builder.add(index, ir.Constant(index.type, constant_))


def _places(builder: Any, tile: Tile, j: Any, row: Any) -> Any:
    """Yield the number of each vector of a tile, its column and its index in memory."""
    for r in range(tile.rows):
        start = builder.add(j, builder.mul(row, ir.Constant(row.type, r)))
        for v in range(tile.vectors):
            yield r * tile.vectors + v, v, _plus(builder, start, v * tile.vector.lanes)


@intrinsic
def store_tile(typing: Any, tile: Any, c: Any, j: Any, c_row: Any) -> Any:
    """Write C = tile, the rows `c_row` elements apart."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for at, _, place in _places(builder, tile, args[2], args[3]):
            store_to(builder, builder.extract_value(args[0], at), args[1], place, tile.vector)
        return context.get_dummy_value()

    return types.void(tile, c, types.intp, types.intp), emit


@intrinsic
def add_tile(typing: Any, tile: Any, c: Any, j: Any, c_row: Any) -> Any:
    """Write C = C + tile."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for at, _, place in _places(builder, tile, args[2], args[3]):
            old = load_from(builder, args[1], place, tile.vector)
            total = builder.fadd(old, builder.extract_value(args[0], at))
            store_to(builder, total, args[1], place, tile.vector)
        return context.get_dummy_value()

    return types.void(tile, c, types.intp, types.intp), emit


@intrinsic
def scale_add_tile(typing: Any, tile: Any, c: Any, j: Any, c_row: Any, scales: Any) -> Any:
    """Write C = C ∘ scales + tile, scales one number a column."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = tile.vector
        zero = ir.Constant(args[2].type, 0)
        factors = [
            load_from(builder, args[4], _plus(builder, zero, v * vector.lanes), vector)
            for v in range(tile.vectors)
        ]
        for at, v, place in _places(builder, tile, args[2], args[3]):
            old = load_from(builder, args[1], place, vector)
            total = fuse(builder, old, factors[v], builder.extract_value(args[0], at))
            store_to(builder, total, args[1], place, vector)
        return context.get_dummy_value()

    return types.void(tile, c, types.intp, types.intp, scales), emit
