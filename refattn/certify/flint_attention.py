"""The operation `attention` in ball arithmetic, for every option of the specification.

One head of one item is one exact problem (`head`); this file builds those problems from the
tensors, adds up what heads and items share, and marks what a NaN reaches.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flint import fmpq

from refattn.certify.exact import (
    ZERO,
    Array,
    Cells,
    Grid,
    Value,
    add,
    grid,
    integers,
    multiply,
    product,
    rational,
    total_of,
    transposed,
    with_zero_row,
)
from refattn.certify.head import Backward, Forward, Head, backward, forward
from refattn.certify.logits import Logits, identity, scale_of
from refattn.certify.poison import Reach, clean, reach
from refattn.certify.setting import Setting, decode, distance
from refattn.certify.softmax_rows import Row, row_of, uniform_row

NAN = float("nan")
"""The value of an element that a NaN reaches."""


class Problem(NamedTuple):
    """Clean inputs, decoded options, and the exact problem of each item and head."""

    inputs: dict[str, Array]
    setting: Setting
    heads: dict[tuple[int, int], Head]
    nan: Reach | None


class Solved(NamedTuple):
    """One head solved at the present precision."""

    forward: Forward
    backward: Backward | None


def _bias_of(
    inputs: Mapping[str, Array], s: Setting, item: int, h: int
) -> tuple[list[list[int]] | None, int]:
    """Return the exact sum of bias and slope·distance of one head: integers and exponent."""
    n_q, n_k = s.allowed.shape[2:]
    if "bias" not in inputs and "slopes" not in inputs:
        return None, 0
    flat = [0.0] * (n_q * n_k)
    if "bias" in inputs:
        flat = np.broadcast_to(inputs["bias"], s.allowed.shape)[item, h].reshape(-1).tolist()
    if "slopes" not in inputs:
        n, e = integers(flat)
        return [n[i * n_k : (i + 1) * n_k] for i in range(n_q)], e
    n, e = integers([*flat, float(inputs["slopes"][h])])
    slope, offset = n.pop(), s.offsets[item]
    kind = s.choice["distance"]
    return [
        [n[i * n_k + j] + slope * distance(kind, i + offset, j) for j in range(n_k)]
        for i in range(n_q)
    ], e


def _row(s: Setting, logits: Logits, item: int, h: int, i: int) -> Row | None:
    """Return row i of a head: its allowed keys in groups, or what an empty row becomes."""
    allowed: list[int] = np.flatnonzero(s.allowed[item, h, i]).tolist()
    if logits.sink is not None:
        allowed.append(s.allowed.shape[3])
    if not allowed:
        return uniform_row(s.allowed.shape[3]) if s.choice["empty_row"] == "uniform" else None
    return row_of(allowed, lambda j: identity(logits, i, j))


def _keep_of(inputs: Mapping[str, Array], item: int, h: int, sink: bool) -> list[list[bool]] | None:
    if "keep" not in inputs:
        return None
    keep: list[list[bool]] = np.asarray(inputs["keep"], dtype=bool)[item, h].tolist()
    return [[*row, True] for row in keep] if sink else keep


def exact_head(
    inputs: Mapping[str, Array], s: Setting, parameters: Mapping[str, Any], item: int, h: int
) -> Head:
    """Write one head of one item as an exact problem."""
    Q, K = grid(inputs["query"][item, h]), grid(inputs["key"][item, s.kv_head[h]])
    V = grid(inputs["value"][item, s.kv_head[h]])
    sink = float(inputs["sinks"][h]) if "sinks" in inputs else None
    raw = product(Q, transposed(K))
    bias, bias_e = _bias_of(inputs, s, item, h)
    softcap = parameters.get("softcap")
    logits = Logits(
        raw.rows(),
        raw.e,
        bias,
        bias_e,
        scale_of(dict(parameters), inputs["query"].shape[-1]),
        None if softcap is None else float(softcap),
        s.choice["softcap_order"] == "after_bias",
        sink,
    )
    if sink is not None:
        K, V = with_zero_row(K), with_zero_row(V)
    rows = [_row(s, logits, item, h, i) for i in range(s.allowed.shape[2])]
    keep = _keep_of(inputs, item, h, sink is not None)
    factor = 1 / rational(parameters.get("keep_probability") or 1.0) if keep else fmpq(1)
    return Head(rows, logits, Q, K, V, keep, factor)


def _flat(blocks: list[list[list[Value]]]) -> list[Value]:
    return [x for block in blocks for row in block for x in row]


def _add_rows(a: list[list[Value]] | None, b: list[list[Value]]) -> list[list[Value]]:
    if a is None:
        return b
    return [[add(x, y) for x, y in zip(u, v, strict=True)] for u, v in zip(a, b, strict=True)]


def _row_sum(dX: list[Value], total: fmpq | None, sink: bool) -> Value:
    """Sum the gradients of a row over its keys, by its known total where there is one."""
    if total is None:
        return total_of(dX[:-1] if sink else dX)
    return add(total, multiply(dX[-1], fmpq(-1))) if sink else total


def _d_bias(problem: Problem, solved: dict[tuple[int, int], Solved], totals: Any) -> Cells:
    """Sum the gradients of the biased logits over the axes along which bias is broadcast."""
    shape = problem.inputs["bias"].shape
    n_q, n_k = problem.setting.allowed.shape[2:]
    wide = (1,) * (4 - len(shape)) + shape
    cells: dict[tuple[int, ...], list[Value]] = {}
    for (item, head), result in solved.items():
        dS = _biased(problem.heads[item, head], result)
        for i in range(n_q):
            place = (item if wide[0] > 1 else 0, head if wide[1] > 1 else 0)
            at = (*place, i if wide[2] > 1 else 0)
            if wide[3] == 1:
                sink = problem.heads[item, head].logits.sink is not None
                total = totals(item, head, i)
                cells.setdefault((*at, 0), []).append(_row_sum(dS[i], total, sink))
            else:
                for j in range(n_k):
                    cells.setdefault((*at, j), []).append(dS[i][j])
    return Cells(shape, [total_of(cells[index]) for index in np.ndindex(*wide)])


def _biased(head: Head, result: Solved) -> list[list[Value]]:
    """Return the gradient of the sum to which bias and slopes belong."""
    assert result.backward is not None
    through = head.logits.softcap is not None and head.logits.bias_first
    return result.backward.d_scores if through else result.backward.d_logits


def _d_slopes(problem: Problem, solved: dict[tuple[int, int], Solved]) -> Cells:
    """DM_h = Σ_b Σ_ij dS_ij·distance_ij."""
    s = problem.setting
    h, n_q, n_k = s.allowed.shape[1:]
    terms: list[list[Value]] = [[] for _ in range(h)]
    for (item, head), result in solved.items():
        dS = _biased(problem.heads[item, head], result)
        for i in range(n_q):
            p_i = i + s.offsets[item]
            terms[head] += [
                multiply(dS[i][j], fmpq(distance(s.choice["distance"], p_i, j))) for j in range(n_k)
            ]
    return Cells((h,), [total_of(x) for x in terms])


def _gradients(problem: Problem, solved: dict[tuple[int, int], Solved]) -> dict[str, Cells]:
    inputs, s = problem.inputs, problem.setting
    b, h = s.allowed.shape[:2]
    h_k, n_k = inputs["key"].shape[1:3]
    d_query: list[list[list[Value]]] = []
    d_key: dict[tuple[int, int], list[list[Value]]] = {}
    d_value: dict[tuple[int, int], list[list[Value]]] = {}
    sink_terms: list[list[Value]] = [[] for _ in range(h)]
    for (item, head), result in solved.items():
        back = result.backward
        assert back is not None
        d_query.append(back.d_query)
        shared = (item, s.kv_head[head])
        d_key[shared] = _add_rows(d_key.get(shared), back.d_key[:n_k])
        d_value[shared] = _add_rows(d_value.get(shared), back.d_value[:n_k])
        sink_terms[head] += [line[-1] for line in back.d_logits]
    kv = [(item, head) for item in range(b) for head in range(h_k)]
    cells = {
        "d_query": Cells(inputs["query"].shape, _flat(d_query)),
        "d_key": Cells(inputs["key"].shape, _flat([d_key[x] for x in kv])),
        "d_value": Cells(inputs["value"].shape, _flat([d_value[x] for x in kv])),
    }
    if "bias" in inputs:
        cells["d_bias"] = _d_bias(problem, solved, lambda *at: _total(problem, *at))
    if "slopes" in inputs:
        cells["d_slopes"] = _d_slopes(problem, solved)
    if "sinks" in inputs:
        cells["d_sinks"] = Cells((h,), [total_of(x) for x in sink_terms])
    return cells


def _total(problem: Problem, item: int, head: int, i: int) -> fmpq | None:
    """Return Σ_j dS_ij over the keys and the sink of row i: dL_i, unless the cap intervenes."""
    exact = problem.heads[item, head]
    row = exact.rows[i]
    if row is None or row.frozen:
        return ZERO
    if exact.logits.softcap is not None and exact.logits.bias_first:
        return None
    return _d_logsumexp(problem.inputs, item, head, exact)[i]


def _d_logsumexp(inputs: Mapping[str, Array], item: int, head: int, exact: Head) -> list[fmpq]:
    if "d_logsumexp" not in inputs:
        return [ZERO] * len(exact.rows)
    return [rational(x) for x in inputs["d_logsumexp"][item, head].tolist()]


def _d_output(inputs: Mapping[str, Array], item: int, head: int) -> Grid:
    if "d_output" in inputs:
        return grid(inputs["d_output"][item, head])
    n_q, d_v = inputs["query"].shape[2], inputs["value"].shape[3]
    return grid(np.zeros((n_q, d_v)))


def _solve(problem: Problem, item: int, head: int, wanted: bool) -> Solved:
    exact = problem.heads[item, head]
    state = forward(exact)
    if not wanted:
        return Solved(state, None)
    dL = _d_logsumexp(problem.inputs, item, head, exact)
    return Solved(state, backward(exact, state, _d_output(problem.inputs, item, head), dL))


def _mark_nan(problem: Problem, cells: dict[str, Cells]) -> dict[str, Cells]:
    """Put NaN where a NaN operand, or the policy for empty rows, reaches."""
    nan, s = problem.nan, problem.setting
    if nan is None:
        return cells
    kv = np.asarray(s.kv_head)
    h_k = problem.inputs["key"].shape[1]
    by_kv = [np.flatnonzero(kv == k) for k in range(h_k)]
    where: dict[str, Array] = {"output": nan.output, "logsumexp": nan.logsumexp}
    if "d_query" in cells:
        where["d_query"] = nan.d_query
        where["d_key"] = np.stack([nan.d_key[:, x].any(axis=1) for x in by_kv], axis=1)
        where["d_value"] = np.stack([nan.d_value[:, x].any(axis=1) for x in by_kv], axis=1)
        where["d_slopes"] = np.asarray(nan.d_logits[..., :-1].any(axis=(0, 2, 3)))
        where["d_sinks"] = np.asarray(nan.d_logits[..., -1].any(axis=(0, 2)))
        if "d_bias" in cells:
            shape = cells["d_bias"].shape
            wide = (1,) * (4 - len(shape)) + shape
            axes = tuple(a for a in range(4) if wide[a] == 1)
            where["d_bias"] = nan.d_logits[..., :-1].any(axis=axes, keepdims=True).reshape(shape)
    marked = {}
    for name, cell in cells.items():
        flags = np.broadcast_to(where[name], cell.shape).reshape(-1).tolist()
        values = [NAN if bad else x for bad, x in zip(flags, cell.values, strict=True)]
        marked[name] = Cells(cell.shape, values)
    return marked


def prepare(
    inputs: Mapping[str, Array], parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> Callable[[], dict[str, Cells]]:
    """Write an attention problem exactly; return what evaluates it at the present precision."""
    s = decode(inputs, parameters, conventions)
    b, h, n_q, _ = s.allowed.shape
    plain = all(np.isfinite(x).all() for x in inputs.values()) and s.choice["empty_row"] != "nan"
    neat = clean(inputs)
    heads = {
        (item, head): exact_head(neat, s, parameters, item, head)
        for item in range(b)
        for head in range(h)
    }
    problem = Problem(neat, s, heads, None if plain else reach(inputs, s))
    wanted = "d_output" in inputs or "d_logsumexp" in inputs

    def evaluate() -> dict[str, Cells]:
        solved = {at: _solve(problem, *at, wanted) for at in heads}
        d_v = inputs["value"].shape[3]
        cells = {
            "output": Cells((b, h, n_q, d_v), _flat([solved[at].forward.output for at in heads])),
            "logsumexp": Cells(
                (b, h, n_q), [x for at in heads for x in solved[at].forward.logsumexp]
            ),
        }
        if wanted:
            cells |= _gradients(problem, solved)
        return _mark_nan(problem, cells)

    return evaluate
