"""What passes by tiles share: cutting, which cells of a tile are allowed, and sums over them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from refattn.arrays import Array, array_namespace
from refattn.checks import (
    DtypeError,
    OptionError,
    ShapeError,
    check_arrays,
    check_computable,
    check_finite,
    check_flag,
    check_floats,
    check_shapes,
    describe,
    given,
    is_finite,
    shown,
)
from refattn.masks import position_offset


class Masking(NamedTuple):
    """Rules of the allowed cells and kept weights of a whole problem, to be cut into tiles."""

    mask: Array | None
    """(..., n_q, n_k), bool, True = attend."""
    offset: int | None
    """Position of query row 0, tokens; None where the pass is not causal."""
    keep: Array | None
    """(..., n_q, n_k), bool, True = the weight is kept."""


def spans(length: int, size: int) -> list[slice]:
    """Return the ranges of ⌈length / size⌉ tiles; the last one may be shorter."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def divide(array: Array, ranges: list[slice]) -> list[Array]:
    """Return the blocks of the rows (axis -2) of an array."""
    return [array[..., r, :] for r in ranges]


def join(blocks: list[Array], like: Array) -> Array:
    """Return the array whose rows were divided; `like` is what no blocks make."""
    return array_namespace(like).concat(blocks, axis=-2) if blocks else like


def check_operands(
    function: str, query: Array, key: Array, value: Array, *, scale: float = 1.0
) -> dict[str, int]:
    """Check operands whose leading axes are equal, and return n_q, n_k, d_k and d_v.

    Raises:
        ShapeError: shapes do not fit, or there is no feature or no key.
        DtypeError: an operand is no array, or dtypes are not floating or differ.
        OptionError: the scale is not finite, or overflows in the computing dtype.
    """
    arrays = {"query": query, "key": key, "value": value}
    sizes = check_shapes(
        function,
        query=(query, "... n_q d_k"),
        key=(key, "... n_k d_k"),
        value=(value, "... n_k d_v"),
    )
    for name in ("key", "value"):
        check_lead(function, arrays, name, "query")
    for letter in ("n_k", "d_k"):
        if sizes[letter] == 0:
            raise ShapeError(
                f"key has {letter}=0, but it must be at least 1 {describe(function, arrays)}"
            )
    check_floats(function, **arrays)
    check_finite(function, scale=scale)
    check_computable(function, query, scale=scale)
    return sizes


def check_lead(
    function: str, arrays: dict[str, Array], name: str, owner: str, *, rank: int = 2
) -> None:
    """Check that the leading axes of two arrays are equal; `rank` axes of `name` trail.

    Raises:
        ShapeError: they differ.
    """
    lead = tuple(arrays[name].shape[: arrays[name].ndim - rank])
    expected = tuple(arrays[owner].shape[:-2])
    if lead != expected:
        raise ShapeError(
            f"{name} has leading axes {lead}, but {owner} has leading axes {expected}; "
            f"they must be equal {describe(function, arrays)}"
        )


def masking(
    function: str,
    query: Array,
    key: Array,
    *,
    mask: Array | None,
    causal: bool,
    alignment: str | int,
    keep: Array | None,
    keep_probability: float | None,
) -> Masking:
    """Check the rules of a problem and broadcast them to its scores.

    Raises:
        ShapeError: mask or keep does not broadcast to (..., n_q, n_k).
        DtypeError: mask or keep is no array, or not bool.
        OptionError: alignment is unknown, causal is no flag, or keep comes without its probability.
    """
    check_arrays(function, query=query, **given(mask=mask, keep=keep))
    check_flag(function, causal=causal)
    shape = (*query.shape[:-1], key.shape[-2])
    offset = position_offset(
        function, shape[-2], shape[-1], alignment=alignment, xp=array_namespace(query)
    )
    if not isinstance(offset, int):
        raise OptionError(
            f"alignment is {shown(alignment)}, but a pass by tiles takes one offset [{function}]"
        )
    if (keep is None) != (keep_probability is None):
        raise OptionError(
            f"keep is {'absent' if keep is None else 'given'}, but keep_probability is "
            f"{shown(keep_probability)}; they come together [{function}]"
        )
    if keep_probability is not None:
        if not (is_finite(keep_probability) and 0 < keep_probability <= 1):
            raise OptionError(
                f"keep_probability is {shown(keep_probability)}, but it must be above 0 and at "
                f"most 1 [{function}]"
            )
        check_computable(function, query, keep_probability=keep_probability)
    return Masking(
        mask=_broadcast(function, "mask", mask, shape),
        offset=offset if causal else None,
        keep=_broadcast(function, "keep", keep, shape),
    )


def _broadcast(
    function: str, name: str, rule: Array | None, shape: tuple[int, ...]
) -> Array | None:
    """Return a boolean array broadcast to the shape of the scores."""
    if rule is None:
        return None
    xp = array_namespace(rule)
    if rule.dtype != xp.bool:
        raise DtypeError(f"{name} has dtype {rule.dtype}, but it must be bool [{function}]")
    try:
        fits = np.broadcast_shapes(tuple(rule.shape), shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ShapeError(
            f"{name} has shape {tuple(rule.shape)}, but the scores have shape {shape}; "
            f"the first must broadcast to the second [{function}]"
        )
    return xp.broadcast_to(rule, shape)


def allowed_cells(rules: Masking, rows: slice, cols: slice, xp: Any) -> Array:
    """Return which cells of a tile may be attended, broadcastable to (..., B_r, B_c).

    Spec: OWN-MASK1, OWN-CAUSAL1.

        allowed_ij = mask_ij ∧ (j ≤ i + offset)
    """
    allowed = xp.ones((rows.stop - rows.start, cols.stop - cols.start), dtype=xp.bool)
    if rules.offset is not None:
        i = xp.arange(rows.start, rows.stop, dtype=xp.int64)[:, None]
        j = xp.arange(cols.start, cols.stop, dtype=xp.int64)[None, :]
        allowed = allowed & (j <= i + rules.offset)
    return allowed if rules.mask is None else allowed & rules.mask[..., rows, cols]


def kept_cells(rules: Masking, rows: slice, cols: slice) -> Array | None:
    """Return the keep mask of a tile, or None where every weight is kept."""
    return None if rules.keep is None else rules.keep[..., rows, cols]


def product_over_allowed(weights: Array, block: Array, allowed: Array) -> Array:
    """Return a matrix product whose sums run over the allowed cells only.

    0 · NaN is NaN, so a weight of 0 does not hide a forbidden cell: the entries of the block that
    are not finite are left out of the product, and added feature by feature where allowed.

    Spec: OWN-POISON1.

        Y_id = Σ_{j allowed for i} W_ij X_jd

    Args:
        weights: W, (..., r, c); 0 where not allowed.
        block: X, (..., c, d); may hold anything where no sum reads it.
        allowed: (..., r, c), bool.

    Returns:
        product: Y, (..., r, d).
    """
    xp = array_namespace(weights)
    finite = xp.isfinite(block)
    if bool(xp.all(finite)):
        return weights @ block
    nothing, rest = xp.zeros_like(weights), []
    for d in range(block.shape[-1]):
        read = allowed & ~finite[..., None, :, d]
        terms = xp.where(read, weights * block[..., None, :, d], nothing)
        rest.append(xp.sum(terms, axis=-1))
    return weights @ xp.where(finite, block, xp.zeros_like(block)) + xp.stack(rest, axis=-1)


def shift(row_max: Array) -> Array:
    """Return what a row's scores are shifted by: its maximum, 0 where it has none.

    Spec: OWN-EMPTY1.

    A row without an allowed key so far has the maximum -∞, and -∞ - (-∞) is no number.
    """
    xp = array_namespace(row_max)
    return xp.where(row_max == -float("inf"), xp.zeros_like(row_max), row_max)


def divisor(row_sum: Array) -> Array:
    """Return what a row's sum of products is divided by: l, 1 where the row has no key.

    Spec: OWN-EMPTY1.
    """
    xp = array_namespace(row_sum)
    return xp.where(row_sum == 0, xp.ones_like(row_sum), row_sum)


def default_scale(scale: float | None, d_k: int) -> float:
    """Return the scale, 1/√d_k where none is given.

    Spec: OWN-SCALE1, VAS-EQ1.
    """
    return 1.0 / math.sqrt(d_k) if scale is None else float(scale)
