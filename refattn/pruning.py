"""Removing heads: in which order, how many, and out of which rows and columns of the weights.

A head whose gate is zero adds nothing, so its projections may be cut out of the matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from refattn.arrays import Array, array_namespace
from refattn.checks import (
    OptionError,
    check_counts,
    check_floats,
    check_option,
    check_shapes,
    describe,
    is_finite,
    is_integer,
    shown,
)
from refattn.heads import importance_order

COUNT_RULES = ("floor", "ceil")
"""How a share of heads that is no whole number is rounded."""


class PrunedProjections(NamedTuple):
    """The projections of the heads that remain, in their order."""

    w_query: Array
    w_key: Array
    w_value: Array
    w_output: Array


def pruning_order(normalized: Array, *, at_least: int = 0) -> Array:
    """Return the heads that may be pruned, in the order in which greed prunes them.

    Spec: HEADS-S4b, OWN-IMPORTANCE1.

        ascending Î over all layers, without the at_least most important heads of each layer

    Args:
        normalized: Î (layers, h).
        at_least: heads that every layer keeps.

    Returns:
        order (layers·(h - at_least),), int64: flat indices layer · h + head.

    Raises:
        ShapeError: normalized does not have two axes.
        DtypeError: normalized is not floating.
        OptionError: at_least is no integer between 0 and h.
    """
    sizes = check_shapes("pruning_order", normalized=(normalized, "layers h"))
    check_floats("pruning_order", normalized=normalized)
    heads = sizes["h"]
    if not (is_integer(at_least) and 0 <= at_least <= heads):
        raise OptionError(
            f"at_least is {shown(at_least)}, but a layer has {heads} heads; it must lie between 0 "
            f"and {heads} {describe('pruning_order', {'normalized': normalized})}"
        )
    xp = array_namespace(normalized)
    # the same order read layer by layer: what a layer has left when its last heads are protected
    left = [heads - int(at_least)] * sizes["layers"]
    order = []
    ascending = importance_order(normalized)
    for place in range(ascending.shape[0]):
        index = int(ascending[place])
        if left[index // heads] > 0:
            left[index // heads] -= 1
            order.append(index)
    return xp.asarray(order, dtype=xp.int64)


def prune_count(heads: int, fraction: float | Fraction, *, count_rule: str = "floor") -> int:
    """Return how many heads a share of all heads is.

    Spec: HEADS-S4b, OWN-IMPORTANCE1.

        ⌊heads · fraction⌋ or ⌈heads · fraction⌉, where a float is the shortest decimal it prints

    Args:
        heads: number of all heads, over all layers.
        fraction: share to prune, between 0 and 1.
        count_rule: `floor` or `ceil`.

    Returns:
        The number of heads.

    Raises:
        OptionError: fraction is not between 0 and 1, heads is no integer of at least 0, or there
            is no such rule.
    """
    check_option("prune_count", "count_rule", count_rule, COUNT_RULES)
    (heads,) = check_counts("prune_count", least=0, heads=heads)
    if not (is_finite(fraction) and 0 <= fraction <= 1):
        raise OptionError(
            f"fraction is {shown(fraction)}, but it must lie between 0 and 1 [prune_count]"
        )
    exact = fraction if isinstance(fraction, Fraction) else Fraction(repr(float(fraction)))
    share = heads * exact
    floor = share.numerator // share.denominator
    return floor if count_rule == "floor" or floor == share else floor + 1


def pruned_gates(
    normalized: Array,
    *,
    fraction: float | Fraction,
    at_least: int = 0,
    count_rule: str = "floor",
) -> Array:
    """Return the gates that mask a share of all heads, the least important first.

    Spec: HEADS-S23, HEADS-S4b, OWN-IMPORTANCE1.

        ξ_lh = 0 for the first heads of the pruning order, as many as the share is; 1 for the rest

    Args:
        normalized: Î (layers, h).
        fraction: share of all heads to prune; protected heads stay even if fewer go then.
        at_least: heads that every layer keeps.
        count_rule: `floor` or `ceil`.

    Returns:
        ξ (layers, h), dtype of normalized.

    Raises:
        ShapeError: normalized does not have two axes.
        DtypeError: normalized is not floating.
        OptionError: an option is refused.
    """
    order = pruning_order(normalized, at_least=at_least)
    layers, heads = normalized.shape
    count = prune_count(layers * heads, fraction, count_rule=count_rule)
    gone = {int(order[place]) for place in range(min(count, order.shape[0]))}
    xp = array_namespace(normalized)
    gates = [
        [float(layer * heads + h not in gone) for h in range(heads)] for layer in range(layers)
    ]
    return xp.astype(xp.asarray(gates, dtype=xp.float64), normalized.dtype)


def prune_heads(
    w_query: Array, w_key: Array, w_value: Array, w_output: Array, heads: Sequence[int]
) -> PrunedProjections:
    """Cut heads out of the projections; the result is as if their gates were zero.

    Spec: HEADS-S4c.

        Σ_h ξ_h Att_h with ξ_h = 0 for the pruned heads = Σ over the heads that remain

    In packed matrices this removes the rows (columns, in the paper's layout) of those heads from
    W^Q, W^K, W^V, and the columns (rows) from W^O.

    Args:
        w_query: W^Q (h, e_q, d_k).
        w_key: W^K (h, e_s, d_k).
        w_value: W^V (h, e_s, d_v).
        w_output: W^O by heads (h, d_v, e_o).
        heads: indices of the heads to remove.

    Returns:
        The projections with fewer heads, in the same order.

    Raises:
        ShapeError: the numbers of heads differ.
        OptionError: heads is no list of integers, an index is outside 0..h-1 or named twice, or
            no head would remain.
    """
    weights = {"w_query": w_query, "w_key": w_key, "w_value": w_value, "w_output": w_output}
    sizes = check_shapes(
        "prune_heads",
        w_query=(w_query, "h e_q d_k"),
        w_key=(w_key, "h e_s d_k"),
        w_value=(w_value, "h e_s d_v"),
        w_output=(w_output, "h d_v e_o"),
    )
    gone, h = _head_indices(heads), sizes["h"]
    if len(set(gone)) != len(gone) or any(not 0 <= head < h for head in gone):
        raise OptionError(
            f"heads is {gone}, but there are {h} heads; each index must lie between 0 and {h - 1} "
            f"and stand once {describe('prune_heads', weights)}"
        )
    if len(gone) == h:
        raise OptionError(
            f"heads names all {h} heads, but one must remain {describe('prune_heads', weights)}"
        )
    xp = array_namespace(*weights.values())
    remaining = xp.asarray([head for head in range(h) if head not in gone], dtype=xp.int64)
    return PrunedProjections(*(xp.take(w, remaining, axis=0) for w in weights.values()))


def _head_indices(heads: Any) -> list[int]:
    """Return the indices of heads as Python's integers.

    Raises:
        OptionError: they are no list of integers.
    """
    listed = heads.tolist() if isinstance(heads, np.ndarray) else heads
    if not (isinstance(listed, Sequence) and all(map(is_integer, listed))):
        raise OptionError(
            f"heads is {shown(heads)}, but it must be a list of integers [prune_heads]"
        )
    return [int(head) for head in listed]
