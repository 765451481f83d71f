"""GPT's causal module in ball arithmetic: its projections of exact inputs are exact.

Each head is the same exact problem as in `head`; the fused projection is cut into the heads before
anything is rounded, and the gradients are put together again behind them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flint import fmpq

from refattn.certify.errors import CertifyError
from refattn.certify.exact import (
    ZERO,
    Array,
    Cells,
    Grid,
    Value,
    add,
    grid,
    mixed,
    multiply,
    product,
    rational,
    times,
    total_of,
    transposed,
    transposed_mixed,
)
from refattn.certify.head import Forward, Head, backward, forward
from refattn.certify.logits import Logits, identity, scale_of
from refattn.certify.setting import expect
from refattn.certify.softmax_rows import row_of

INPUTS = frozenset("x w_qkv b_qkv w_output b_output keep output_keep d_output".split())
"""Names of the input tensors."""

PARAMETERS = frozenset("heads block_size keep_probability output_keep_probability".split())
"""Names of the parameters."""

Rows = list[list[Value]]
"""A matrix of values."""


class Problem(NamedTuple):
    """The exact heads of every item, and what stands around them."""

    inputs: Mapping[str, Array]
    parts: dict[tuple[int, int], Head]
    d: int
    keep_output: list[list[list[bool]]] | None
    factor: fmpq
    """1 / output_keep_probability."""


def _with_bias(inputs: Mapping[str, Array]) -> tuple[list[Array], Array]:
    """Return x with a feature 1 behind the others, and W with the bias as its last row."""
    x, weight = inputs["x"], inputs["w_qkv"]
    if "b_qkv" not in inputs:
        return list(x), weight
    ones = np.ones((*x.shape[:2], 1))
    return list(np.concatenate([x, ones], axis=2)), np.vstack([weight, inputs["b_qkv"]])


def _head(x: Grid, weight: Array, keep: Array | None, at: tuple[int, int], factor: fmpq) -> Head:
    """Write head h as an exact problem; it owns d columns of each third of the weight."""
    h, d = at
    third = weight.shape[1] // 3
    Q, K, V = (
        product(x, grid(weight[:, start + h * d : start + (h + 1) * d]))
        for start in (0, third, 2 * third)
    )
    raw = product(Q, transposed(K))
    logits = Logits(raw.rows(), raw.e, None, 0, scale_of({}, d), None, False, None)
    rows = [
        row_of(range(i + 1), lambda j, i=i: identity(logits, i, j))  # type: ignore[misc]
        for i in range(raw.n.nrows())
    ]
    kept = None if keep is None else np.asarray(keep, dtype=bool).tolist()
    return Head(list(rows), logits, Q, K, V, kept, factor)


def _dropped(problem: Problem, item: int, rows: Rows) -> Rows:
    """Drop features of the output, or of its gradient."""
    if problem.keep_output is None:
        return rows
    keep = problem.keep_output[item]
    return [
        [multiply(v, problem.factor) if k else ZERO for v, k in zip(row, kept, strict=True)]
        for row, kept in zip(rows, keep, strict=True)
    ]


def _exact_rows(a: Grid) -> Rows:
    unit = fmpq(1 << a.e) if a.e >= 0 else fmpq(1, 1 << -a.e)
    return [[fmpq(v) * unit for v in row] for row in a.rows()]


def _sum(a: Rows | None, b: Rows) -> Rows:
    if a is None:
        return b
    return [[add(u, v) for u, v in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)]


def _left(a: Grid, b: Rows) -> Rows:
    """Return aᵀ b for an exact a and a matrix of values b."""
    return [list(c) for c in zip(*times(transposed_mixed(mixed(b)), a), strict=True)]


def _joined(blocks: list[Rows]) -> Rows:
    """Put matrices of the same rows side by side."""
    return [[v for block in blocks for v in block[i]] for i in range(len(blocks[0]))]


def _column_sums(rows: Rows) -> list[Value]:
    return [total_of(column) for column in zip(*rows, strict=True)]


def _output(problem: Problem, item: int, states: list[Forward]) -> Rows:
    """Return merged heads, through the projection out where there is one, and its dropout."""
    merged = _joined([state.output for state in states])
    inputs = problem.inputs
    if "w_output" in inputs:
        merged = times(mixed(merged), grid(inputs["w_output"]))
        if "b_output" in inputs:
            bias = [rational(v) for v in inputs["b_output"].tolist()]
            merged = [[add(v, b) for v, b in zip(row, bias, strict=True)] for row in merged]
    return _dropped(problem, item, merged)


def _d_heads(problem: Problem, dZ: Grid) -> list[Grid]:
    """Return the gradient of every head's output."""
    inputs, d = problem.inputs, problem.d
    dY = product(dZ, transposed(grid(inputs["w_output"]))) if "w_output" in inputs else dZ
    rows = dY.rows()
    size = len(rows[0]) // d
    return [Grid(type(dY.n)([row[h * d : (h + 1) * d] for row in rows]), dY.e) for h in range(size)]


def _evaluate(problem: Problem) -> dict[str, Cells]:
    inputs = problem.inputs
    b, n, e = inputs["x"].shape
    xs, _ = _with_bias(inputs)
    heads = e // problem.d
    output: list[Value] = []
    sums: dict[str, Rows] = {}
    d_x: list[Value] = []
    for item in range(b):
        states = [forward(problem.parts[item, h]) for h in range(heads)]
        output += [v for row in _output(problem, item, states) for v in row]
        if "d_output" not in inputs:
            continue
        scaled, factor = _d_output(problem, item)
        thirds: list[list[Rows]] = [[], [], []]
        for h, dO in enumerate(_d_heads(problem, scaled)):
            back = backward(problem.parts[item, h], states[h], dO, [ZERO] * n)
            for third, rows in zip(thirds, (back.d_query, back.d_key, back.d_value), strict=True):
                third.append([[multiply(v, factor) for v in row] for row in rows])
        d_qkv = _joined([_joined(third) for third in thirds])
        back_rows = times(mixed(d_qkv), transposed(grid(inputs["w_qkv"])))
        d_x += [v for row in back_rows for v in row]
        found = {"w_qkv": _left(grid(xs[item]), d_qkv)}
        if "b_qkv" in inputs:
            d_bias = _bias_row(problem, found["w_qkv"].pop(), scaled, factor)
            found["b_qkv"] = [d_bias]
        if "w_output" in inputs:
            merged = mixed(_joined([state.output for state in states]))
            outer = times(transposed_mixed(merged), scaled)
            found["w_output"] = [[multiply(v, factor) for v in row] for row in outer]
        if "b_output" in inputs:
            dZ = [[multiply(v, factor) for v in row] for row in _exact_rows(scaled)]
            found["b_output"] = [_column_sums(dZ)]
        for name, rows in found.items():
            sums[name] = _sum(sums.get(name), rows)
    cells = {"output": Cells((b, n, e), output)}
    if "d_output" not in inputs:
        return cells
    cells["d_x"] = Cells((b, n, e), d_x)
    for name, rows in sums.items():
        cells[f"d_{name}"] = Cells(inputs[name].shape, [v for row in rows for v in row])
    return cells


def _bias_row(problem: Problem, row: list[Value], dZ: Grid, factor: fmpq) -> list[Value]:
    """Return the gradient of the bias, of which two thirds are exact by identities.

    `row` is that of the weight's last row, whose feature is 1. One number added to all keys moves
    the logits of a row alike, so Σ_j dS_ij = 0; added to all values it moves the output by as
    much, for Σ_j P_ij = 1 where no weight is dropped.
    """
    third = len(row) // 3
    row = [*row[:third], *[ZERO] * third, *row[2 * third :]]
    if "keep" in problem.inputs:
        return row
    dY = dZ
    if "w_output" in problem.inputs:
        dY = product(dZ, transposed(grid(problem.inputs["w_output"])))
    return [*row[: 2 * third], *(multiply(v, factor) for v in _column_sums(_exact_rows(dY)))]


def _d_output(problem: Problem, item: int) -> tuple[Grid, fmpq]:
    """Return the gradient of what the output's dropout is given, exactly: a matrix and a factor."""
    d = problem.inputs["d_output"][item]
    if problem.keep_output is None:
        return grid(d), fmpq(1)
    return grid(np.where(np.asarray(problem.keep_output[item]), d, 0.0)), problem.factor


def prepare(
    inputs: Mapping[str, Array], parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> Callable[[], dict[str, Cells]]:
    """Write the module exactly; return what evaluates it at the present precision."""
    expect(inputs, INPUTS, "input")
    expect(parameters, PARAMETERS, "parameter")
    expect(conventions, frozenset(), "convention")
    if not all(np.isfinite(v).all() for v in inputs.values()):
        raise CertifyError("causal_module has a non-finite input; certification defines finite")
    b, n, e = inputs["x"].shape
    heads = int(parameters["heads"])
    if e % heads or n > int(parameters["block_size"]):
        raise CertifyError(f"{e} features, {heads} heads, {n} tokens do not fit the module")
    xs, weight = _with_bias(inputs)
    keep = inputs.get("keep")
    factor = 1 / rational(parameters.get("keep_probability") or 1.0)
    parts = {}
    for item in range(b):
        for h in range(heads):
            kept = None if keep is None else keep[item, h]
            parts[item, h] = _head(grid(xs[item]), weight, kept, (h, e // heads), factor)
    output_keep = inputs.get("output_keep")
    keep_output = None if output_keep is None else np.asarray(output_keep, dtype=bool).tolist()
    chance = 1 / rational(parameters.get("output_keep_probability") or 1.0)
    problem = Problem(inputs, parts, e // heads, keep_output, chance)
    return lambda: _evaluate(problem)
