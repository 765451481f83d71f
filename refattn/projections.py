"""Heads inside one matrix: how features are split into heads, and weights laid side by side.

Head h owns the features h·d to h·d + d - 1, because the paper concatenates heads in order.
"""

from __future__ import annotations

from refattn.arrays import Array, array_namespace
from refattn.checks import ShapeError, check_counts, check_shapes, describe


def split_heads(x: Array, heads: int) -> Array:
    """Split the features into heads.

    Spec: VAS-S322b.

        out[..., h, i, k] = x[..., i, h·d + k]

    Args:
        x: (..., n, h·d).
        heads: h.

    Returns:
        (..., h, n, d).

    Raises:
        ShapeError: the number of features is no multiple of heads.
        OptionError: heads is no integer of at least 1.
    """
    check_shapes("split_heads", x=(x, "... n features"))
    d = _features_of_a_head("split_heads", "x", x, heads, axis=-1)
    xp = array_namespace(x)
    return _swap(xp.reshape(x, (*x.shape[:-1], heads, d)))


def merge_heads(x: Array) -> Array:
    """Concatenate the features of the heads, the inverse of `split_heads`.

    Spec: VAS-S322a, VAS-S322b.

        Concat(head_1, ..., head_h)[..., i, h·d + k] = x[..., h, i, k]

    Args:
        x: (..., h, n, d).

    Returns:
        (..., n, h·d).

    Raises:
        ShapeError: x has fewer than three axes.
    """
    sizes = check_shapes("merge_heads", x=(x, "... h n d"))
    xp = array_namespace(x)
    return xp.reshape(_swap(x), (*x.shape[:-3], sizes["n"], sizes["h"] * sizes["d"]))


def pack_projection(weight: Array) -> Array:
    """Lay the projections of all heads side by side in one matrix.

    Spec: VAS-S322b.

        out[e, h·d + k] = W^h[e, k],  so that  split_heads(X out) = X W^h

    Args:
        weight: W^Q, W^K or W^V (h, e, d).

    Returns:
        (e, h·d).

    Raises:
        ShapeError: weight does not have three axes.
    """
    check_shapes("pack_projection", weight=(weight, "h e d"))
    return merge_heads(weight)


def unpack_projection(weight: Array, heads: int) -> Array:
    """Cut one matrix into the projections of the heads, the inverse of `pack_projection`.

    Spec: VAS-S322b.

    Args:
        weight: (e, h·d).
        heads: h.

    Returns:
        W^Q, W^K or W^V (h, e, d).

    Raises:
        ShapeError: the number of columns is no multiple of heads.
        OptionError: heads is no integer of at least 1.
    """
    check_shapes("unpack_projection", weight=(weight, "e features"))
    _features_of_a_head("unpack_projection", "weight", weight, heads, axis=-1)
    return split_heads(weight, heads)


def pack_output(weight: Array) -> Array:
    """Stack the output projections of all heads into one matrix.

    Spec: VAS-S322a, HEADS-EQ1.

        W^O[h·d + k, e] = W^h_o[k, e],  so that  Concat(head_h) W^O = Σ_h head_h W^h_o

    Args:
        weight: (h, d_v, e).

    Returns:
        W^O (h·d_v, e).

    Raises:
        ShapeError: weight does not have three axes.
    """
    sizes = check_shapes("pack_output", weight=(weight, "h d_v e"))
    xp = array_namespace(weight)
    return xp.reshape(weight, (sizes["h"] * sizes["d_v"], sizes["e"]))


def unpack_output(weight: Array, heads: int) -> Array:
    """Cut W^O into the output projections of the heads, the inverse of `pack_output`.

    Spec: VAS-S322a, HEADS-EQ1.

    Args:
        weight: W^O (h·d_v, e).
        heads: h.

    Returns:
        (h, d_v, e).

    Raises:
        ShapeError: the number of rows is no multiple of heads.
        OptionError: heads is no integer of at least 1.
    """
    sizes = check_shapes("unpack_output", weight=(weight, "features e"))
    d_v = _features_of_a_head("unpack_output", "weight", weight, heads, axis=-2)
    return array_namespace(weight).reshape(weight, (heads, d_v, sizes["e"]))


def sum_outer(x: Array, d_y: Array) -> Array:
    """Return the gradient of the weight of a projection y = x W, summed over the batch.

    Spec: VAS-S322a, OWN-BACKWARD1.

        dW = Σ_b xᵀ dy

    Args:
        x: (b, n, e).
        d_y: (b, n, f).

    Returns:
        (e, f).

    Raises:
        ShapeError: the rows do not fit, or there are not three axes.
    """
    check_shapes("sum_outer", x=(x, "b n e"), d_y=(d_y, "b n f"))
    xp = array_namespace(x)
    return xp.sum(xp.matrix_transpose(x) @ d_y, axis=0)


def _features_of_a_head(function: str, name: str, x: Array, heads: int, *, axis: int) -> int:
    """Return the number of features of a head, or refuse a number that does not divide."""
    (heads,) = check_counts(function, heads=heads)
    features = x.shape[axis]
    if features % heads:
        raise ShapeError(
            f"{name} has {features} features, but heads is {heads}; the first must be a multiple "
            f"of the second {describe(function, {name: x})}"
        )
    return int(features // heads)


def _swap(x: Array) -> Array:
    """Swap the axes of heads and of rows: (..., h, n, d) and (..., n, h, d)."""
    xp = array_namespace(x)
    return xp.moveaxis(x, -2, -3)
