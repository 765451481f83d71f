"""Attention over parts of the keys, merged exactly: any order and any tree of parts.

FlashAttention states how the softmax of a concatenation follows from those of its parts; the
same rule splits the keys among workers, and makes one output of what they return.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.checks import (
    DtypeError,
    OptionError,
    ShapeError,
    check_floats,
    check_shapes,
    describe,
    shown,
)
from refattn.tiles import check_lead, divisor, shift


class MergeResult(NamedTuple):
    """Output and logsumexp of all parts together."""

    output: Array
    logsumexp: Array


class PartState(NamedTuple):
    """Statistics m, l and output O of attention over one part of the keys."""

    row_max: Array
    row_sum: Array
    output: Array


@np.errstate(all="ignore")
def merge(outputs: Array, logsumexps: Array) -> MergeResult:
    """Merge the results of attention over parts of the keys.

    Spec: OWN-MERGE1, FA1-S31, OWN-EMPTY1, OWN-POISON1, OWN-ROUND1.

        L = ln Σ_p exp(L_p),  O = Σ_p exp(L_p - L) O_p

    Args:
        outputs: O_p, (p, ..., n, d), any float dtype; ignored in a row whose L_p is -∞.
        logsumexps: L_p, (p, ..., n), nats, dtype of the outputs or their computing dtype.

    Returns:
        output: O, (..., n, d), dtype of the outputs; 0 in a row that is empty in every part.
        logsumexp: L, (..., n), nats, computing dtype; -∞ in such a row.

    Raises:
        ShapeError: shapes do not fit, or there is no part.
        DtypeError: dtypes are not floating or do not fit.
    """
    check_parts("merge", outputs, logsumexps)
    xp = array_namespace(outputs)
    O_p, L_p = widen(outputs), widen(logsumexps)[..., None]
    top = xp.max(L_p, axis=0)
    w_p = xp.exp(L_p - shift(top))
    total = divisor(xp.sum(w_p, axis=0))
    # an empty part may hold anything, and 0 · NaN is NaN: choose, then multiply
    chosen = xp.where(L_p == -float("inf"), xp.zeros_like(O_p), O_p)
    O = xp.sum(w_p * chosen, axis=0) / total
    return MergeResult(narrow(O, outputs), (top + xp.log(total))[..., 0])


@np.errstate(all="ignore")
def merge_states(first: PartState, second: PartState) -> PartState:
    """Merge the states of two parts of the keys; associative, and the order does not matter.

    Spec: OWN-MERGE1, FA1-S31, OWN-EMPTY1, OWN-POISON1.

        m = max(m₁, m₂),  l = e^(m₁-m) l₁ + e^(m₂-m) l₂
        O = (e^(m₁-m) l₁ O₁ + e^(m₂-m) l₂ O₂) / l

    Args:
        first: m₁ (..., n) and l₁ (..., n) of one part, computing dtype, and O₁ (..., n, d), any
            float dtype; O₁ is ignored in a row whose m₁ is -∞.
        second: the same of the other part.

    Returns:
        state: m, l and O of both parts together; -∞, 0 and 0 in a row that is empty in both.

    Raises:
        ShapeError: shapes do not fit.
        DtypeError: dtypes are not floating or differ.
        OptionError: a part is no `PartState`.
    """
    _check_states(first, second)
    xp = array_namespace(first.output)
    m = xp.maximum(first.row_max, second.row_max)
    l, O = xp.zeros_like(m), xp.zeros_like(widen(first.output))
    for m_p, l_p, O_p in (first, second):
        empty = m_p == -float("inf")
        w_p = xp.exp(m_p - shift(m)) * xp.where(empty, xp.zeros_like(l_p), l_p)
        l = l + w_p
        O = O + w_p[..., None] * xp.where(empty[..., None], xp.zeros_like(O), widen(O_p))
    return PartState(m, l, narrow(O / divisor(l)[..., None], first.output))


def check_parts(function: str, outputs: Array, logsumexps: Array) -> None:
    """Check the arguments of `merge`.

    Raises:
        ShapeError, DtypeError: as `merge`.
    """
    arrays = {"outputs": outputs, "logsumexps": logsumexps}
    check_shapes(function, outputs=(outputs, "... n d"), logsumexps=(logsumexps, "... n"))
    check_lead(function, arrays, "logsumexps", "outputs", rank=1)
    if outputs.ndim < 3 or outputs.shape[0] < 1:
        raise ShapeError(
            f"outputs has shape {tuple(outputs.shape)}, but it must be (p, ..., n, d) with at "
            f"least one part {describe(function, arrays)}"
        )
    check_floats(function, outputs=outputs)
    check_floats(function, logsumexps=logsumexps)
    if logsumexps.dtype not in (outputs.dtype, widen(outputs).dtype):
        raise DtypeError(
            f"logsumexps has dtype {logsumexps.dtype}, but outputs has dtype {outputs.dtype}; they "
            f"must be equal, or the first the computing dtype {describe(function, arrays)}"
        )


def _check_states(first: PartState, second: PartState) -> None:
    """Check the arguments of `merge_states`."""
    parts = {"first": first, "second": second}
    for name, part in parts.items():
        if not isinstance(part, PartState):
            raise OptionError(f"{name} is {shown(part)}, but it must be a PartState [merge_states]")
    arrays = {f"{n}.{field}": x for n, p in parts.items() for field, x in p._asdict().items()}
    forms = {"row_max": "... n", "row_sum": "... n", "output": "... n d"}
    check_shapes(
        "merge_states", **{name: (x, forms[name.split(".")[1]]) for name, x in arrays.items()}
    )
    for name in arrays:
        rank = 2 if name.endswith("output") else 1
        check_lead("merge_states", arrays, name, "first.output", rank=rank)
    check_floats("merge_states", **{n: x for n, x in arrays.items() if n.endswith("output")})
    check_floats("merge_states", **{name: widen(x) for name, x in arrays.items()})
