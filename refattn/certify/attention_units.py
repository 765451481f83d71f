"""Error units of attention, forward and backward, head by head (NUM-LOGIT1 to NUM-BACKWARD1)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.certify.cells import (
    Tensors,
    allowed_cells,
    cell_of,
    distance_of,
    finite,
    key_head,
    offset_of,
)
from refattn.certify.floor_units import floors, new_track, observe
from refattn.certify.head_units import Forward, Head
from refattn.certify.majorant import (
    Array,
    Known,
    contract,
    exact,
    larger,
    plus,
    scaled,
    steepest,
    stored,
    tanh,
    times,
    total,
)
from refattn.certify.softmax_units import mean, probability, softmax, uniform

CONSTANT = 4.0
"""Rounding units granted to a slope times a distance, or to a bias in another base."""


class Gradients(NamedTuple):
    """The gradients of one head, before they are summed over groups and broadcast axes."""

    query: Known
    key: Known
    value: Known
    added: Known
    """(n_q, n_k): gradient of what was added to the logits."""
    sink: Known


def heads_of(inputs: Tensors, parameters: Mapping[str, Any], conventions: Mapping[str, Any]) -> Any:
    """Yield ((b, h, key head), Head) for every head of an attention problem."""
    Q, K, V = (exact_finite(inputs[name]) for name in ("query", "key", "value"))
    batch, heads = Q.value.shape[:2]
    for b in range(batch):
        for h in range(heads):
            g = key_head(h, heads, K.value.shape[1], conventions)
            picked = (_pick(Q, b, h), _pick(K, b, g), _pick(V, b, g))
            yield (b, h, g), _head(b, h, picked, inputs, parameters, conventions)


def exact_finite(x: NDArray[Any]) -> Known:
    """Return an input as an exact number, with 0 in place of what is not finite."""
    return exact(np.asarray(finite(x)))


def _pick(x: Known, *index: int) -> Known:
    return Known(*(part[index] for part in x))


def _head(
    b: int,
    h: int,
    QKV: tuple[Known, Known, Known],
    inputs: Tensors,
    parameters: Mapping[str, Any],
    conventions: Mapping[str, Any],
) -> Head:
    Q, K, V = QKV
    n_q, n_k = Q.value.shape[0], K.value.shape[0]
    keep = cell_of(inputs.get("keep"), b, h, n_q, n_k)
    factor = np.ones((n_q, n_k)) if keep is None else keep / parameters["keep_probability"]
    sinks = finite(inputs.get("sinks"))
    scale = parameters.get("scale")
    return Head(
        Q,
        K,
        V,
        allowed_cells(b, h, n_q, n_k, inputs, parameters, conventions),
        _added(b, h, n_q, n_k, inputs, conventions),
        factor,
        1.0 / np.sqrt(Q.value.shape[1]) if scale is None else float(scale),
        parameters.get("softcap"),
        conventions.get("softcap_order", "before_bias") == "after_bias",
        None if sinks is None else float(sinks[h]),
        conventions.get("empty_row", "zero") == "uniform",
        inputs["query"].shape[1] // inputs["key"].shape[1],
    )


def _added(
    b: int, h: int, n_q: int, n_k: int, inputs: Tensors, conventions: Mapping[str, Any]
) -> Known | None:
    terms = []
    slopes, bias = finite(inputs.get("slopes")), finite(inputs.get("bias"))
    if slopes is not None:
        terms.append(slopes[h] * distances(b, n_q, n_k, inputs, conventions))
    if bias is not None:
        terms.append(np.asarray(cell_of(bias, b, h, n_q, n_k)))
    if not terms:
        return None
    return plus(*(Known(t, CONSTANT * np.abs(t), np.zeros_like(t)) for t in terms))


def distances(
    b: int, n_q: int, n_k: int, inputs: Tensors, conventions: Mapping[str, Any]
) -> NDArray[np.float64]:
    """Return what the slopes multiply in batch item b."""
    offset = offset_of(b, n_q, n_k, inputs, conventions)
    return distance_of(offset, n_q, n_k, conventions.get("distance", "absolute"))


def _logits(head: Head) -> tuple[Known, Known]:
    """Return S and the derivative of the softcap."""
    d_k = head.Q.value.shape[1]
    X = scaled(contract("ic,jc->ij", head.Q, head.K, d_k), head.scale)
    added = head.added
    if added is not None and head.bias_first:
        X = plus(X, added)
    slope = exact(np.ones_like(X.value))
    if head.softcap is not None:
        x = scaled(X, 1.0 / head.softcap)
        x = x._replace(accumulated=x.accumulated + np.abs(x.value))
        T = tanh(x)
        slope = _slope(x, T)
        X = times(exact(np.full_like(X.value, head.softcap)), T, 2.0)
    if added is not None and not head.bias_first:
        X = plus(X, added)
    return X, slope


def _slope(x: Known, T: Known) -> Known:
    """Return 1 - tanh²(x), by that formula: its error is absolute where tanh is near 1."""
    T_abs, steep = np.abs(T.value), steepest(x)
    square = times(T, T)
    return Known(
        np.asarray(np.cosh(np.minimum(np.abs(x.value), 300.0)) ** -2),
        square.accumulated + steep,
        np.asarray(2 * T_abs * steep * x.operand),
    )


def forward(head: Head) -> Forward:
    """Return the output and the softmax of one head with their majorants."""
    S, slope = _logits(head)
    rows = softmax(S, head.allowed, head.sink)
    empty = np.asarray(~head.allowed.any(axis=1))
    if head.sink is None and head.fill:
        rows = uniform(rows, empty)
    return Forward(mean(rows, head.factor, head.V), rows, empty, slope)


def backward(head: Head, f: Forward, dO: Known, d_lse: Array) -> Gradients:
    """Return the gradients of one head with their majorants."""
    P_all = probability(f.rows)
    P = Known(*(x[:, :-1] for x in P_all))
    d_v = head.V.value.shape[1]
    A = times(exact(head.factor), contract("ic,jc->ij", dO, head.V, d_v), 2.0)
    D = _row_term(f, P, A, dO, head)
    g = exact(d_lse[:, None])
    dS = times(P, plus(A, scaled(D, -1.0), g), 2.0)
    frozen = f.empty[:, None] & (head.sink is None)
    dS = Known(*(np.where(frozen, 0.0, x) for x in dS))
    dS = dS._replace(operand=dS.operand + np.abs(dS.value))  # a kernel may keep P in 16 bits
    dX = stored(times(dS, f.slope, 2.0)) if head.softcap is not None else stored(dS)
    live = head.allowed | frozen
    by_row, by_key = live.sum(axis=1)[:, None], head.group * live.sum(axis=0)[:, None]
    P_dropped = stored(times(P, exact(head.factor), 2.0))
    P_sink = Known(*(x[:, -1:] for x in P_all))
    return Gradients(
        scaled(contract("ij,jc->ic", dX, head.K, by_row), head.scale),
        scaled(contract("ij,ic->jc", dX, head.Q, by_key), head.scale),
        contract("ij,ic->jc", P_dropped, dO, by_key),
        times(dS, f.slope, 2.0) if head.bias_first and head.softcap is not None else dS,
        times(P_sink, plus(g, scaled(D, -1.0)), 2.0),
    )


def _row_term(f: Forward, P: Known, A: Known, dO: Known, head: Head) -> Known:
    """Return D_i, (n_q, 1), computed as Σ_c dO O or as Σ_j P dP, whichever errs more."""
    d_v = head.V.value.shape[1]
    first = contract("ic,ic->i", dO, f.output, d_v)
    count = head.allowed.sum(axis=1)
    second = contract("ij,ij->i", stored(P), A, count)  # P may be the rounded one
    return Known(*(x[:, None] for x in larger(first, second)))


def attention_units(
    inputs: Tensors, parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> tuple[dict[str, Known], dict[str, float]]:
    """Return the majorants of every output of `attention`, and what the coefficients need."""
    found: dict[str, Known] = {}
    track = new_track()
    for (b, h, g), head in heads_of(inputs, parameters, conventions):
        f = forward(head)
        _put(found, "output", (b, h), f.output, _shape(inputs, "query", "value"))
        _put(found, "logsumexp", (b, h), f.rows.logsumexp, inputs["query"].shape[:3])
        dO = exact(np.zeros_like(f.output.value))
        d_lse = np.zeros(dO.value.shape[0])
        if "d_output" in inputs:
            dO = _pick(exact_finite(inputs["d_output"]), b, h)
            if "d_logsumexp" in inputs:
                d_lse = np.asarray(finite(inputs["d_logsumexp"]))[b, h]
            gradients = backward(head, f, dO, d_lse)
            if head.group > 1:  # a kernel may store each head's gradient before the group's sum
                k, v = stored(gradients.key), stored(gradients.value)
                gradients = gradients._replace(key=k, value=v)
            _place(found, (b, h, g), gradients, inputs, conventions)
        observe(track, f, head, dO, d_lse)
        if "slopes" in inputs:
            n_q, n_k = head.factor.shape
            steps = np.abs(distances(b, n_q, n_k, inputs, conventions))
            track["distance_max"] = max(track["distance_max"], float(np.max(steps, initial=0.0)))
    for name, x in found.items():
        if name not in ("output", "logsumexp"):  # stored already; kept in the computing dtype
            found[name] = stored(x)
    track["bias_terms"] = broadcast_terms(inputs) if "bias" in inputs else 0.0
    return found, {**track, **floors(track, list(found))}


def _shape(inputs: Tensors, first: str, last: str) -> tuple[int, ...]:
    return (*inputs[first].shape[:3], inputs[last].shape[3])


def broadcast_terms(inputs: Tensors) -> float:
    """Return how many cells share one element of the bias."""
    cells = np.prod(inputs["query"].shape[:3]) * inputs["key"].shape[2]
    return float(cells / max(1, inputs["bias"].size))


def _put(
    found: dict[str, Known], name: str, at: tuple[int, ...], x: Known, shape: tuple[int, ...]
) -> None:
    if name not in found:
        found[name] = Known(*(np.zeros(shape) for _ in range(3)))
    for whole, part in zip(found[name], x, strict=True):
        whole[at] += part


def _place(
    found: dict[str, Known],
    at: tuple[int, int, int],
    gradients: Gradients,
    inputs: Tensors,
    conventions: Mapping[str, Any],
) -> None:
    """Add the gradients of one head to those of the inputs it read."""
    b, h, g = at
    dX = gradients.added
    _put(found, "d_query", (b, h), gradients.query, inputs["query"].shape)
    _put(found, "d_key", (b, g), gradients.key, inputs["key"].shape)
    _put(found, "d_value", (b, g), gradients.value, inputs["value"].shape)
    if "bias" in inputs:
        shape = inputs["bias"].shape
        four = (1,) * (4 - len(shape)) + shape
        axes = tuple(a for a in (0, 1) if four[2 + a] == 1)
        summed = total(dX, axes, broadcast_terms(inputs), keepdims=True)
        index = (b if four[0] > 1 else 0, h if four[1] > 1 else 0)
        part = Known(*np.zeros((3, *four)))
        for whole, x in zip(part, summed, strict=True):
            whole[index] += x
        _put(found, "d_bias", (), Known(*(x.reshape(shape) for x in part)), shape)
    if "slopes" in inputs:
        steps = distances(b, dX.value.shape[0], dX.value.shape[1], inputs, conventions)
        length = dX.value.size * inputs["query"].shape[0]
        summed = total(times(dX, exact(steps)), (0, 1), length)
        _put(found, "d_slopes", (h,), summed, inputs["slopes"].shape)
    if "sinks" in inputs:
        length = dX.value.shape[0] * inputs["query"].shape[0]
        _put(found, "d_sinks", (h,), total(gradients.sink, (0, 1), length), inputs["sinks"].shape)
