"""Tile states of Algorithm 1 and the merging of partial results, in ball arithmetic.

After outer step j the stored (m, l, O) are those of the softmax over the first j tiles; that is
what Theorem 1 proves, and what is computed here directly.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flint import arb, fmpq

from refattn.certify.errors import CertifyError
from refattn.certify.exact import (
    ZERO,
    Array,
    Cells,
    Value,
    add,
    enclosed,
    grid,
    integers,
    multiply,
    power,
    product,
    rational,
    times,
    transposed,
)
from refattn.certify.exact import mixed as mixed_matrix
from refattn.certify.setting import expect
from refattn.certify.softmax_rows import Row, exact_mean, row_of, weigh

MINUS_INFINITY = float("-inf")
"""The logsumexp of an empty part."""


def _sum_above_max(row: Row, S: list[fmpq]) -> Value:
    """L = Σ_j exp(S_j - m): an integer where all logits are equal."""
    m = max(S[group[0]] for group in row.groups)
    total: Value = ZERO
    for group in row.groups:
        difference = S[group[0]] - m
        term = fmpq(1) if difference == 0 else arb(difference).exp()
        total = add(total, multiply(term, fmpq(len(group))))
    return total


def prepare_tiles(
    inputs: Mapping[str, Array], parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> Callable[[], dict[str, Cells]]:
    """Write the states exactly; return what evaluates them at the present precision."""
    expect(inputs, frozenset({"query", "key", "value"}), "input")
    expect(parameters, frozenset({"block_rows", "block_cols", "scale"}), "parameter")
    expect(conventions, frozenset(), "convention")
    if not all(np.isfinite(x).all() for x in inputs.values()):
        raise CertifyError("tiles has a non-finite input; certification defines finite ones")
    raw = product(grid(inputs["query"]), transposed(grid(inputs["key"])))
    V = grid(inputs["value"])
    unit = rational(parameters.get("scale", 1.0)) * power(raw.e)
    S = [[fmpq(x) * unit for x in row] for row in raw.rows()]
    n_q, n_k, d_v = len(S), V.n.nrows(), V.n.ncols()
    B_c = int(parameters["block_cols"])
    ends = [min(start + B_c, n_k) for start in range(0, n_k, B_c)]
    steps = [[row_of(range(end), lambda k, i=i: S[i][k]) for i in range(n_q)] for end in ends]  # type: ignore[misc]
    m = [max(S[i][:end]) for end in ends for i in range(n_q)]

    def state(rows: list[Row]) -> list[Value]:
        weights = [weigh(row, lambda k, i=i: arb(S[i][k])) for i, row in enumerate(rows)]  # type: ignore[misc]
        P = mixed_matrix([[w.by_key.get(k, ZERO) for k in range(n_k)] for w in weights])
        values = V.rows()
        O = times(P, V)
        for i, row in enumerate(rows):
            for c in range(d_v):
                mean = exact_mean(row, lambda k, c=c: values[k][c])  # type: ignore[misc]
                if mean is not None:
                    O[i][c] = mean * power(V.e)
        return [x for line in O for x in line]

    def evaluate() -> dict[str, Cells]:
        sums = [_sum_above_max(row, S[i]) for rows in steps for i, row in enumerate(rows)]
        return {
            "row_max": Cells((len(ends), n_q), list(m)),
            "row_sum": Cells((len(ends), n_q), sums),
            "states": Cells((len(ends), n_q, d_v), [x for rows in steps for x in state(rows)]),
        }

    return evaluate


def prepare_merge(
    inputs: Mapping[str, Array], parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> Callable[[], dict[str, Cells]]:
    """Write a merge exactly: O = Σ_p w_p O_p, w the softmax of the parts' logsumexps."""
    expect(inputs, frozenset({"outputs", "logsumexps"}), "input")
    expect(parameters, frozenset(), "parameter")
    expect(conventions, frozenset(), "convention")
    O_p, L_p = inputs["outputs"], inputs["logsumexps"]
    live = ~np.isneginf(L_p)
    if not (np.isfinite(L_p[live]).all() and np.isfinite(O_p[live]).all()):
        raise CertifyError("a part that is not empty is not finite; certification defines no merge")
    n, d = O_p.shape[1:]
    filled = np.where(live[..., None], O_p, 0.0)
    numbers, e = integers(filled.reshape(-1).tolist())
    L = [[rational(x) if np.isfinite(x) else None for x in line] for line in L_p.tolist()]
    rows = [
        row_of(np.flatnonzero(live[:, i]).tolist(), lambda p, i=i: L[p][i])  # type: ignore[misc]
        for i in range(n)
    ]

    def evaluate() -> dict[str, Cells]:
        output: list[Value] = []
        logsumexp: list[Value] = []
        for i, row in enumerate(rows):
            if not row.groups:
                output += [ZERO] * d
                logsumexp.append(MINUS_INFINITY)
                continue
            weights = weigh(row, lambda p, i=i: arb(L[p][i]))  # type: ignore[misc]
            logsumexp.append(add(L[weights.reference][i], weights.log_sum))
            for c in range(d):

                def x(p: int, i: int = i, c: int = c) -> int:
                    return int(numbers[(p * n + i) * d + c])

                mean = exact_mean(row, x)
                if mean is not None:
                    output.append(mean * power(e))
                    continue
                total = sum((enclosed(w) * x(p) for p, w in weights.by_key.items()), arb(0))
                output.append(total * arb((1, e)))
        return {"output": Cells((n, d), output), "logsumexp": Cells((n,), logsumexp)}

    return evaluate
