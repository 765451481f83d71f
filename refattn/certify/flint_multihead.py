"""Multi-head attention with its projections, in ball arithmetic.

Projections of exact inputs are exact, so each head is the same exact problem as in `head`;
gradients go on through the projections by exact matrices.
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
    product,
    scaled_by,
    times,
    total_of,
    transposed,
    transposed_mixed,
)
from refattn.certify.head import Backward, Forward, Head, backward, forward
from refattn.certify.logits import Logits, identity, scale_of
from refattn.certify.setting import allowed_band, choose, expect, offsets_of
from refattn.certify.softmax_rows import Row, row_of, uniform_row

INPUTS = frozenset(
    "query_input source_input w_query w_key w_value w_output head_gates d_output".split()
)
"""Names of the input tensors."""

Rows = list[list[Value]]
"""A matrix of values."""


class Projected(NamedTuple):
    """One head of one item: its exact problem, inputs and output projection (gate included)."""

    head: Head
    query_input: Grid
    source_input: Grid
    w_output: Grid


def _head(
    inputs: Mapping[str, Array], parameters: Mapping[str, Any], band: Array, policy: str, at: Any
) -> Projected:
    item, h = at
    X, Y = grid(inputs["query_input"][item]), grid(inputs["source_input"][item])
    Q, K, V = (
        product(source, grid(inputs[name][h]))
        for source, name in ((X, "w_query"), (Y, "w_key"), (Y, "w_value"))
    )
    raw = product(Q, transposed(K))
    scale = scale_of(dict(parameters), inputs["w_query"].shape[-1])
    logits = Logits(raw.rows(), raw.e, None, 0, scale, None, False, None)
    rows: list[Row | None] = []
    for i in range(band.shape[0]):
        allowed = np.flatnonzero(band[i]).tolist()
        if not allowed and policy == "nan":
            raise CertifyError("multihead with empty_row nan has an empty row; undefined here")
        if allowed:
            rows.append(row_of(allowed, lambda j, i=i: identity(logits, i, j)))  # type: ignore[misc]
        else:
            rows.append(uniform_row(band.shape[1]) if policy == "uniform" else None)
    gate = float(inputs["head_gates"][h]) if "head_gates" in inputs else 1.0
    W_o = scaled_by(grid(inputs["w_output"][h]), gate)
    return Projected(Head(rows, logits, Q, K, V, None, fmpq(1)), X, Y, W_o)


def _sum(a: Rows, b: Rows) -> Rows:
    return [[add(x, y) for x, y in zip(u, v, strict=True)] for u, v in zip(a, b, strict=True)]


def _turned(rows: Rows) -> Rows:
    return [list(column) for column in zip(*rows, strict=True)]


def _left(a: Grid, b: Rows) -> Rows:
    """Return aᵀ b for an exact a and a matrix of values b."""
    return _turned(times(transposed_mixed(mixed(b)), a))


Sums = dict[tuple[str, int], Rows]
"""Outputs to which several heads or items add, by name and by item or head."""


def _add_to(sums: Sums, name: str, place: int, rows: Rows) -> None:
    """Add a matrix to the output `name` at an item or head."""
    before = sums.get((name, place))
    sums[name, place] = rows if before is None else _sum(before, rows)


def _cells(sums: Sums, name: str, shape: tuple[int, ...]) -> Cells:
    """Return a whole output."""
    values = [x for place in range(shape[0]) for row in sums[name, place] for x in row]
    return Cells(shape, values)


def _add_gradients(
    sums: Sums,
    inputs: Mapping[str, Array],
    part: Projected,
    state: Forward,
    back: Backward,
    at: tuple[int, int],
) -> None:
    """Carry the gradients of one head through the projections."""
    item, h = at
    dQ, dK, dV = back.d_query, back.d_key, back.d_value
    W_q, W_k, W_v = (transposed(grid(inputs[n][h])) for n in ("w_query", "w_key", "w_value"))
    _add_to(sums, "d_query_input", item, times(mixed(dQ), W_q))
    _add_to(sums, "d_source_input", item, times(mixed(dK), W_k))
    _add_to(sums, "d_source_input", item, times(mixed(dV), W_v))
    _add_to(sums, "d_w_query", h, _left(part.query_input, dQ))
    _add_to(sums, "d_w_key", h, _left(part.source_input, dK))
    _add_to(sums, "d_w_value", h, _left(part.source_input, dV))
    dY = grid(inputs["d_output"][item])
    gate = float(inputs["head_gates"][h]) if "head_gates" in inputs else 1.0
    # (dYᵀ O)ᵀ = Oᵀ dY
    _add_to(
        sums, "d_w_output", h, times(transposed_mixed(mixed(state.output)), scaled_by(dY, gate))
    )
    if "head_gates" in inputs:
        ungated = product(dY, transposed(grid(inputs["w_output"][h])))
        inner = times(mixed(state.output), transposed(ungated))
        _add_to(sums, "d_head_gates", h, [[total_of(row[i] for i, row in enumerate(inner))]])


def _evaluate(
    inputs: Mapping[str, Array], parts: Mapping[tuple[int, int], Projected]
) -> dict[str, Cells]:
    sums: Sums = {}
    b, n_q, _ = inputs["query_input"].shape
    for (item, h), part in parts.items():
        state = forward(part.head)
        _add_to(sums, "output", item, times(mixed(state.output), part.w_output))
        if "d_output" in inputs:
            dO = product(grid(inputs["d_output"][item]), transposed(part.w_output))
            back = backward(part.head, state, dO, [ZERO] * n_q)
            _add_gradients(sums, inputs, part, state, back, (item, h))
    shapes = {"output": (b, n_q, inputs["w_output"].shape[2])}
    if "d_output" in inputs:
        names = "query_input source_input w_query w_key w_value w_output".split()
        shapes |= {f"d_{name}": inputs[name].shape for name in names}
        if "head_gates" in inputs:
            shapes["d_head_gates"] = inputs["head_gates"].shape
    return {name: _cells(sums, name, shape) for name, shape in shapes.items()}


def prepare(
    inputs: Mapping[str, Array], parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> Callable[[], dict[str, Cells]]:
    """Write a multi-head problem exactly; return what evaluates it at the present precision."""
    expect(inputs, INPUTS, "input")
    expect(parameters, frozenset({"scale", "causal"}), "parameter")
    expect(conventions, frozenset({"alignment", "empty_row"}), "convention")
    policy = choose(conventions, {"empty_row": ("zero", "nan", "uniform")})["empty_row"]
    if not all(np.isfinite(x).all() for x in inputs.values()):
        raise CertifyError("multihead has a non-finite input; certification defines finite ones")
    b, n_q, _ = inputs["query_input"].shape
    n_k = inputs["source_input"].shape[1]
    alignment = conventions.get("alignment", "top_left")
    offsets = offsets_of(alignment, n_q, n_k, [n_q] * b, [n_k] * b)
    causal = bool(parameters.get("causal", False))
    parts = {}
    for item in range(b):
        band = allowed_band(n_q, n_k, offsets[item], causal, (None, None))
        for h in range(inputs["w_query"].shape[0]):
            parts[item, h] = _head(inputs, parameters, band, policy, (item, h))
    return lambda: _evaluate(inputs, parts)
