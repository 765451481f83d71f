"""Attention of one head of one item, forward and backward, by the direct formulas.

No tiles, no running maximum: P is the softmax of the whole row. The sink, where there is one,
is one more key behind the last, whose key and value vectors are zero.
"""

from typing import Any, NamedTuple

from flint import arb, fmpq

from refattn.certify.exact import (
    ZERO,
    Grid,
    Mixed,
    Value,
    add,
    mixed,
    multiply,
    power,
    product,
    times,
    transposed,
    transposed_mixed,
)
from refattn.certify.logits import Logits, Scale, cap_slope, exact_logit, logit
from refattn.certify.softmax_rows import Row, Weights, exact_mean, weigh

MINUS_INFINITY = float("-inf")
"""The logsumexp of a row without a key."""


class Head(NamedTuple):
    """The exact problem of one head; a row of None has no key and no weight."""

    rows: list[Row | None]
    logits: Logits
    query: Grid
    key: Grid
    value: Grid
    keep: list[list[bool]] | None
    keep_factor: fmpq


class Forward(NamedTuple):
    """Weights by row, the weights after dropout, the output and the logsumexp."""

    weights: list[Weights | None]
    kept: Mixed
    output: list[list[Value]]
    logsumexp: list[Value]


class Backward(NamedTuple):
    """Gradients of one head: dS by row and key, the same through the cap, and the matrices."""

    d_logits: list[list[Value]]
    d_scores: list[list[Value]]
    d_query: list[list[Value]]
    d_key: list[list[Value]]
    d_value: list[list[Value]]


def _kept(head: Head, i: int, j: int) -> bool:
    return head.keep is None or head.keep[i][j]


def _logsumexp(head: Head, i: int, weights: Weights, scale: arb) -> Value:
    """L_i = S_ir + log Σ_j exp(S_ij - S_ir)."""
    exact = exact_logit(head.logits, i, weights.reference)
    S_ir = exact if exact is not None else logit(head.logits, i, weights.reference, scale)
    return add(S_ir, weights.log_sum)


def forward(head: Head) -> Forward:
    """Compute P, O = (P·keep/p) V and the logsumexp of every row at the present precision."""
    scale = head.logits.scale.ball()
    n_keys, values = head.key.n.nrows(), head.value.rows()
    weights: list[Weights | None] = []
    logsumexp: list[Value] = []
    kept: list[list[Value]] = []
    for i, row in enumerate(head.rows):
        line: list[Value] = [ZERO] * n_keys
        if row is None:
            weights.append(None)
            logsumexp.append(MINUS_INFINITY)
        else:
            P_i = weigh(row, lambda j, i=i: logit(head.logits, i, j, scale))  # type: ignore[misc]
            weights.append(P_i)
            logsumexp.append(MINUS_INFINITY if row.frozen else _logsumexp(head, i, P_i, scale))
            for j, P_ij in P_i.by_key.items():
                if _kept(head, i, j):
                    line[j] = multiply(P_ij, head.keep_factor) if head.keep else P_ij
        kept.append(line)
    P = mixed(kept)
    O = times(P, head.value)
    unit = power(head.value.e) * head.keep_factor
    for i, row in enumerate(head.rows):
        if row is None or row.weight() is not None:
            continue
        for c in range(head.value.n.ncols()):
            mean = exact_mean(
                row,
                lambda j, i=i, c=c: values[j][c] if _kept(head, i, j) else 0,  # type: ignore[misc]
            )
            if mean is not None:
                O[i][c] = mean * unit
    return Forward(weights, P, O, logsumexp)


def _dS_row(
    row: Row, P_i: Weights, dP: list[Any], unit: fmpq, dL: fmpq, n_keys: int
) -> list[Value]:
    """dS_ij = P_ij (dP_ij - D_i + dL_i), in differences to the reference key r.

    dP_ij - D_i = (dP_ij - dP_ir) - Σ_k P_ik (dP_ik - dP_ir): an exact zero stays one.
    """
    line: list[Value] = [ZERO] * n_keys
    D = exact_mean(row, lambda j: dP[j])
    if D is not None:
        for j, P_ij in P_i.by_key.items():
            line[j] = multiply(P_ij, (dP[j] - D) * unit + dL)
        return line
    dP_r = dP[P_i.reference]
    D_r = arb(0)
    for j, P_ij in P_i.by_key.items():
        if dP[j] != dP_r:
            D_r += P_ij * (dP[j] - dP_r)
    D_r -= arb(dL / unit)
    scale = arb(unit)
    for j, P_ij in P_i.by_key.items():
        line[j] = P_ij * scale * ((dP[j] - dP_r) - D_r)
    return line


def _through_cap(head: Head, dS: list[list[Value]]) -> list[list[Value]]:
    """DX_ij = dS_ij (1 - tanh²(x_ij/cap)); the sink is not capped."""
    if head.logits.softcap is None:
        return dS
    scale = head.logits.scale.ball()
    return [
        [
            x
            if (isinstance(x, fmpq) and x == 0) or j == len(head.logits.raw[i])
            else multiply(x, cap_slope(head.logits, i, j, scale))
            for j, x in enumerate(line)
        ]
        for i, line in enumerate(dS)
    ]


def _scaled(rows: list[list[Value]], scale: Scale) -> list[list[Value]]:
    """Multiply by the scale; times an irrational one, only an exact zero stays exact."""
    if scale.exact is not None:
        return [[multiply(x, scale.exact) for x in row] for row in rows]
    ball = scale.ball()
    return [[multiply(x, ball) for x in row] for row in rows]


def backward(head: Head, state: Forward, d_output: Grid, d_logsumexp: list[fmpq]) -> Backward:
    """Compute the gradients of one head at the present precision.

    dV = P_keptᵀ dO;  dP = (dO Vᵀ)·keep/p;  dQ = scale·dX K;  dK = scale·dXᵀ Q.
    """
    dP = product(d_output, transposed(head.value))
    unit = power(dP.e) * head.keep_factor
    n_keys = head.key.n.nrows()
    dS: list[list[Value]] = []
    totals: list[fmpq | None] = []
    for i, dP_i in enumerate(dP.rows()):
        row, P_i = head.rows[i], state.weights[i]
        if row is None or P_i is None or row.frozen:
            dS.append([ZERO] * n_keys)
            totals.append(ZERO)
            continue
        kept = [x if _kept(head, i, j) else 0 for j, x in enumerate(dP_i)]
        dS.append(_dS_row(row, P_i, kept, unit, d_logsumexp[i], n_keys))
        totals.append(d_logsumexp[i] if head.logits.softcap is None else None)
    dX = _through_cap(head, dS)
    dX_mixed = mixed(dX, totals)
    scale = head.logits.scale
    return Backward(
        dS,
        dX,
        _scaled(times(dX_mixed, head.key), scale),
        _scaled(times(transposed_mixed(dX_mixed), head.query), scale),
        times(transposed_mixed(state.kept), d_output),
    )
