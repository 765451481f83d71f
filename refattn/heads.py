"""How much each head matters.

The paper takes the loss's expected sensitivity to a head's mask variable as its importance, which
one forward and one backward pass give for all heads at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.checks import ShapeError, check_floats, check_option, check_shapes, describe

GRANULARITIES = ("token", "example", "batch")
"""Over what a head's sensitivity is summed before its absolute value is taken."""


class HeadImportance(NamedTuple):
    """Importance of every head, the same normalised by layer, and the heads from the least."""

    importance: Array
    normalized: Array
    order: Array


@np.errstate(all="ignore")  # IEEE values travel silently, whatever the array library
def head_importance(
    head_outputs: Array, d_head_outputs: Array, *, granularity: str = "example"
) -> HeadImportance:
    """Return the importance of every head: the loss's expected sensitivity to its gate.

    Spec: HEADS-EQ2, HEADS-S4a, HEADS-S4b, OWN-IMPORTANCE1, OWN-ROUND1.

        I_h = E_x |∂L(x)/∂ξ_h| = E_x |Att_h(x)ᵀ ∂L(x)/∂Att_h(x)|
        token: mean over x and n of |Σ_d|   example: mean over x of |Σ_nd|   batch: |Σ_xnd| / x

    Args:
        head_outputs: Att (layers, x, h, n, d): layers, examples, heads, rows, features.
        d_head_outputs: ∂L/∂Att, the same shape.
        granularity: one of `GRANULARITIES`; the paper's is `example`.

    Returns:
        importance (layers, h), normalized (layers, h), both in the dtype of head_outputs, and
        order (layers·h,) int64: flat indices, the least important first.

    Raises:
        ShapeError: the two shapes differ, or a size is zero.
        DtypeError: a dtype is not floating, or the two differ.
        OptionError: granularity has no such name.
    """
    check_option("head_importance", "granularity", granularity, GRANULARITIES)
    shape = "layers x h n d"
    arrays = {"head_outputs": head_outputs, "d_head_outputs": d_head_outputs}
    sizes = check_shapes("head_importance", **{name: (a, shape) for name, a in arrays.items()})
    for letter, size in sizes.items():
        if size == 0:
            raise ShapeError(
                f"{letter} is 0, but every size must be at least 1 "
                f"{describe('head_importance', arrays)}"
            )
    check_floats("head_importance", **arrays)
    xp = array_namespace(head_outputs)
    d_xi = xp.sum(widen(head_outputs) * widen(d_head_outputs), axis=-1)  # (layers, x, h, n)
    if granularity == "token":
        I_h = xp.mean(xp.abs(d_xi), axis=(1, 3))
    elif granularity == "example":
        I_h = xp.mean(xp.abs(xp.sum(d_xi, axis=3)), axis=1)
    else:
        I_h = xp.abs(xp.sum(d_xi, axis=(1, 3))) / d_xi.shape[1]
    normalized = normalize_by_layer(I_h)
    order = importance_order(normalized)
    return HeadImportance(narrow(I_h, head_outputs), narrow(normalized, head_outputs), order)


@np.errstate(all="ignore")
def gate_importance(d_head_gates: Array) -> Array:
    """Return the importance of every head from the gradients of its gate, one an example.

    Spec: HEADS-EQ2, OWN-ROUND1.

        I_h = E_x |∂L(x)/∂ξ_h|

    Args:
        d_head_gates: ∂L(x)/∂ξ (layers, x, h), a row of `multihead_attention_backward` an example.

    Returns:
        I (layers, h), dtype of d_head_gates.

    Raises:
        ShapeError: d_head_gates does not have three axes.
        DtypeError: d_head_gates is not floating.
    """
    check_shapes("gate_importance", d_head_gates=(d_head_gates, "layers x h"))
    check_floats("gate_importance", d_head_gates=d_head_gates)
    xp = array_namespace(d_head_gates)
    return narrow(xp.mean(xp.abs(widen(d_head_gates)), axis=1), d_head_gates)


@np.errstate(all="ignore")
def normalize_by_layer(importance: Array) -> Array:
    """Return importances divided by the Euclidean norm of their layer.

    Spec: HEADS-S4a, OWN-IMPORTANCE1.

        Î_lh = I_lh / √(Σ_h' I_lh'²),  a layer of zeros stays zero

    A layer is divided by its largest entry first, so that no square leaves the range.

    Args:
        importance: I (layers, h).

    Returns:
        Î (layers, h), dtype of importance.

    Raises:
        ShapeError: importance does not have two axes.
        DtypeError: importance is not floating.
    """
    check_shapes("normalize_by_layer", importance=(importance, "layers h"))
    check_floats("normalize_by_layer", importance=importance)
    xp = array_namespace(importance)
    I_h = widen(importance)
    peak = xp.max(xp.abs(I_h), axis=1, keepdims=True)
    scaled = I_h / xp.where(peak == 0, xp.ones_like(peak), peak)
    norm = xp.sqrt(xp.sum(scaled * scaled, axis=1, keepdims=True))
    return narrow(scaled / xp.where(norm == 0, xp.ones_like(norm), norm), importance)


def importance_order(normalized: Array) -> Array:
    """Return all heads of all layers, the least important first.

    Spec: HEADS-S4b, OWN-IMPORTANCE1.

        flat index = layer · h + head;  equal importances in the order of their indices

    Args:
        normalized: Î (layers, h).

    Returns:
        order (layers·h,), int64.

    Raises:
        ShapeError: normalized does not have two axes.
        DtypeError: normalized is not floating.
    """
    check_shapes("importance_order", normalized=(normalized, "layers h"))
    check_floats("importance_order", normalized=normalized)
    xp = array_namespace(normalized)
    flat = xp.reshape(widen(normalized), (-1,))
    return xp.astype(xp.argsort(flat, stable=True), xp.int64)
