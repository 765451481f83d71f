"""Two instructions that only AVX-512 has, and that make a quarter of an exponential."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from refattn.cpu.simd import I32


def _emit(builder: Any, name: str, args: tuple[Any, ...], control: tuple[int, ...]) -> Any:
    """Emit an AVX-512 instruction in its masked form, all lanes on, in the current rounding."""
    kind = args[0].type
    suffix = "ps" if isinstance(kind.element, ir.FloatType) else "pd"
    all_on = ir.Constant(ir.IntType(kind.count), -1)
    numbers = [ir.Constant(I32, n) for n in control]
    operands = [*args, *numbers, args[0], all_on, ir.Constant(I32, 4)]
    signature = ir.FunctionType(kind, [operand.type for operand in operands])
    function = cgutils.get_or_insert_function(
        builder.module, signature, f"llvm.x86.avx512.mask.{name}.{suffix}.512"
    )
    return builder.call(function, operands)


@intrinsic
def fraction(typing: Any, x: Any) -> Any:
    """Return x - n, n the integer nearest to x; 0 for an infinity."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _emit(builder, "reduce", tuple(args), (0,))

    return x(x), emit


@intrinsic
def scale_by_power(typing: Any, x: Any, n: Any) -> Any:
    """Return x · 2ⁿ, n whole: rounded once, ±∞ beyond the format."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _emit(builder, "scalef", tuple(args), ())

    return x(x, n), emit
