"""What Keras's attention layers share: kernels by head, axes that are attended jointly, gradients.

A layer is its projections around one attention of the reference; the weights that a call returns
are a second one, at the identity as value and without dropout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit

from refattn.arrays import FLOATS, Array, dtype_name, narrow, widen
from refattn.attention_backward import sum_to
from refattn.checks import (
    DtypeError,
    OptionError,
    ShapeError,
    check_arrays,
    check_floats,
    check_shapes,
    describe,
    given,
)
from refattn.dialects.keras_masks import spread
from refattn.dialects.keras_weights import Form
from refattn.dialects.lowering import Lowered, attend, attend_backward, lower

SUNK = -0.7 * 3.38953e38
"""What Keras 3 adds to a masked logit before the fused attention; it swallows the logit."""


class Call(NamedTuple):
    """A call of a layer, its mask in the shape it came in."""

    form: Form
    weights: Mapping[str, Array]
    query: Array
    value: Array
    key: Array | None
    axes: tuple[int, ...]
    """The axes of query, and of value, that are attended over."""
    mask: Array | None
    """Bool, True = attend, or float, added."""
    empty_row: str
    dropout: float
    """The chance that a weight is dropped in this call; 0 outside of training."""
    keep: Array | None
    return_scores: bool
    fused: bool
    """Whether Keras 3 leaves it to its backend's fused attention: see `prepare`."""


class LayerGradients(NamedTuple):
    """Gradients of the inputs, in the order of a call, and of the weights, in Keras's order."""

    d_query: Array
    d_value: Array
    d_key: Array | None
    d_weights: list[Array]


class Prepared(NamedTuple):
    """A call after its projections."""

    inputs: dict[str, Array]
    """query, key and value in the computing dtype."""
    attention: Lowered
    scores: Lowered | None
    """The attention whose output is the weights before dropout."""
    lengths: tuple[tuple[int, ...], tuple[int, ...]]
    """Sizes of the axes that are attended over, of query and of value."""


@np.errstate(all="ignore")  # IEEE values travel silently
def forward(call: Call) -> tuple[Array, Array | None]:
    """Return the output, and the weights before dropout where they are asked for.

    Spec: VAS-S322a, OWN-GATE1, OWN-AXES1, OWN-WEIGHTS1, OWN-DROPOUT1.

        Q, K, V = x W + b by head;  O = Concat(P V ∘ gate) W^O + b^O
    """
    ready = prepare(call)
    merged = _from_heads(_attend(ready.attention), call.axes, ready.lengths[0])
    if call.form.use_gate:
        merged = merged * _gate(call, ready)
    like = call.weights["query/kernel"]
    output = narrow(_linear(merged, call.weights, "attention_output", bound=2), like)
    if ready.scores is None:
        return output, None
    P = attend(ready.scores)
    queries, keys = ready.lengths
    return output, narrow(np.reshape(P, (*P.shape[:-2], *queries, *keys)), like)


@np.errstate(all="ignore")
def backward(call: Call, d_output: Array, d_scores: Array | None) -> LayerGradients:
    """Return the gradients of the inputs and of every weight.

    Spec: OWN-BACKWARD1, OWN-GATE1, OWN-WEIGHTS1, OWN-BATCH1, VAS-S322a.

    Raises:
        ShapeError, DtypeError, OptionError: as the forward call, or a cotangent does not fit.
    """
    ready = prepare(call)
    heads = _from_heads(_attend(ready.attention), call.axes, ready.lengths[0])
    G = _gate(call, ready) if call.form.use_gate else None
    merged = heads if G is None else heads * G
    _check_cotangents(call, ready, d_output, d_scores, merged.shape[:-2])
    found: dict[str, Array] = {}
    into: dict[str, Any] = dict.fromkeys(ready.inputs, 0.0)
    dO = widen(d_output)
    d_merged = _linear_backward(found, dO, merged, call.weights, "attention_output", bound=2)
    if G is not None:
        d_gate = sum_to(d_merged * heads, G.shape, np) * G * (1 - G)
        query = ready.inputs["query"]
        into["query"] += _linear_backward(found, d_gate, query, call.weights, "gate")
        d_merged = d_merged * G
    d_rows = _attention_backward(call, ready, d_merged, d_scores)
    for (name, x), rows in zip(ready.inputs.items(), d_rows, strict=True):
        sizes = ready.lengths[0 if name == "query" else 1]
        d_projected = _from_heads(rows, call.axes, sizes)
        into[name] = into[name] + _linear_backward(found, d_projected, x, call.weights, name)
    if call.key is None:
        into["value"] = into["value"] + into["key"]
    return LayerGradients(
        narrow(into["query"], call.query),
        narrow(into["value"], call.value),
        None if call.key is None else narrow(into["key"], call.key),
        [narrow(found[name], weight) for name, weight in call.weights.items()],
    )


def prepare(call: Call) -> Prepared:
    """Return a checked call as one attention, and as a second one for its weights.

    Keras 3 casts to float32 what its backend's fused attention takes, of float64 too, and hands it
    a mask as a number that is added: finite, so that a row without a key is the mean of all.

    Spec: VAS-S322a, OWN-BATCH1, OWN-GQA1, OWN-MASK1, OWN-BIAS1, OWN-EMPTY1, OWN-DROPOUT1.

    Raises:
        ShapeError, DtypeError, OptionError: an argument is refused.
    """
    form, axes = call.form, call.axes
    inputs = _inputs(call)
    Q, K, V = (_to_heads(_linear(x, call.weights, name), axes) for name, x in inputs.items())
    lengths = (
        tuple(inputs["query"].shape[a] for a in axes),
        tuple(call.value.shape[a] for a in axes),
    )
    try:
        batch = np.broadcast_shapes(Q.shape[:-3], K.shape[:-3])
    except ValueError:
        raise ShapeError(
            f"value has batch axes {K.shape[:-3]}, but query has {Q.shape[:-3]}; they must "
            f"broadcast {describe(form.function, inputs)}"
        ) from None
    logits = (*batch, form.heads)
    mask = spread(form.function, "attention_mask", call.mask, logits, *lengths)
    if call.fused:
        Q, K, V = (x.astype(np.float32) for x in (Q, K, V))
        mask = None if mask is None else np.where(mask, 0.0, SUNK).astype(np.float32)
    keep = spread(form.function, "keep", call.keep, logits, *lengths)
    grouped = form.heads != form.key_heads
    problem = lower(
        Q, K, V, mask, call.dropout, keep=keep, enable_gqa=grouped, empty_row=call.empty_row
    )
    if not call.return_scores:
        return Prepared(inputs, _selecting(problem), None, lengths)
    identity = np.broadcast_to(np.eye(K.shape[-2], dtype=K.dtype), (*K.shape[:-1], K.shape[-2]))
    scores = lower(Q, K, identity, mask, enable_gqa=grouped, empty_row=call.empty_row)
    return Prepared(inputs, _selecting(problem), _selecting(scores), lengths)


def _selecting(problem: Lowered) -> Lowered:
    """Return a problem whose forbidden logits are not read, for Keras puts a number into them."""
    return problem._replace(options=problem.options | {"masked": "select"})


def _attend(problem: Lowered) -> Array:
    """Return attention's output, where a value that is not finite reaches rows that forbid it.

    Spec: OWN-POISON1.

        0 · v_j = NaN for a forbidden key j, but in a row that attends to all keys for want of one
    """
    output, mask = attend(problem), problem.options.get("mask")
    wild = ~np.isfinite(problem.V)
    if mask is None or not wild.any():
        return output
    forbidden = ~np.broadcast_to(mask, (*problem.Q.shape[:-1], problem.K.shape[-2]))
    if problem.options.get("empty_row") == "uniform":
        forbidden = forbidden & np.any(~forbidden, axis=-1, keepdims=True)
    return np.where(np.matmul(forbidden, wild), np.nan, output)


def _inputs(call: Call) -> dict[str, Array]:
    """Return query, key and value in the weights' computing dtype.

    Raises:
        ShapeError, DtypeError: one is no array of floats, or has other axes or features.
    """
    function, weights = call.form.function, call.weights
    key = call.value if call.key is None else call.key
    arrays = {"query": call.query, "key": key, "value": call.value}
    check_arrays(function, **arrays)
    for name, array in arrays.items():
        if dtype_name(array) not in FLOATS:
            raise DtypeError(
                f"{name} has dtype {dtype_name(array)}, but it must be one of {', '.join(FLOATS)} "
                f"{describe(function, arrays)}"
            )
        if array.ndim < 3 or array.ndim != call.value.ndim:
            raise ShapeError(
                f"{name} has {array.ndim} axes, but value has {call.value.ndim}; they must be as "
                f"many, and at least 3 {describe(function, arrays)}"
            )
    if key.shape[1:-1] != call.value.shape[1:-1]:
        raise ShapeError(
            f"key has lengths {key.shape[1:-1]}, but value has {call.value.shape[1:-1]}; they must "
            f"be equal {describe(function, arrays)}"
        )
    features = {n: str(weights[f"{n}/kernel"].shape[0]) for n in arrays}
    check_shapes(function, **{n: (a, f"... {features[n]}") for n, a in arrays.items()})
    like = weights["query/kernel"]
    return {name: widen(narrow(array, like)) for name, array in arrays.items()}


def _linear(x: Array, weights: Mapping[str, Array], part: str, *, bound: int = 1) -> Array:
    """Return x W + b, where W has `bound` axes for the last ones of x."""
    y = np.tensordot(x, widen(weights[f"{part}/kernel"]), axes=bound)
    bias = weights.get(f"{part}/bias")
    return y if bias is None else y + widen(bias)


def _linear_backward(
    found: dict[str, Array],
    dY: Array,
    x: Array,
    weights: Mapping[str, Array],
    part: str,
    *,
    bound: int = 1,
) -> Array:
    """Return the gradient of x in x W + b; those of W and b go into `found`."""
    W = widen(weights[f"{part}/kernel"])
    lead = tuple(range(x.ndim - bound))
    found[f"{part}/kernel"] = np.tensordot(x, dY, axes=(lead, lead))
    if f"{part}/bias" in weights:
        found[f"{part}/bias"] = np.sum(dY, axis=lead)
    out = tuple(range(len(lead), dY.ndim))
    return np.tensordot(dY, W, axes=(out, tuple(range(bound, W.ndim))))


def _gate(call: Call, ready: Prepared) -> Array:
    """Return what multiplies the heads' outputs.

    Spec: OWN-GATE1.

        G = σ(x W + b)
    """
    return np.asarray(expit(_linear(ready.inputs["query"], call.weights, "gate")))


def _order(rank: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes of (b, ..., h, d) as batch axes, heads, attended axes, features."""
    batch = (a for a in range(rank - 2) if a not in axes)
    return (*batch, rank - 2, *axes, rank - 1)


def _to_heads(x: Array, axes: tuple[int, ...]) -> Array:
    """Return (..., h, n, d) of (b, ..., h, d): the attended axes as one of length n.

    Spec: OWN-AXES1.
    """
    x = np.transpose(x, _order(x.ndim, axes))
    k = len(axes)
    return np.reshape(x, (*x.shape[: -1 - k], math.prod(x.shape[-1 - k : -1]), x.shape[-1]))


def _from_heads(x: Array, axes: tuple[int, ...], sizes: tuple[int, ...]) -> Array:
    """Return (b, ..., h, d) of (..., h, n, d), where the attended axes have those sizes."""
    x = np.reshape(x, (*x.shape[:-2], *sizes, x.shape[-1]))
    return np.transpose(x, np.argsort(_order(x.ndim, axes)))


def _attention_backward(
    call: Call, ready: Prepared, d_merged: Array, d_scores: Array | None
) -> list[Array]:
    """Return the gradients of the projected query, key and value."""
    d_heads = _to_heads(d_merged, call.axes).astype(ready.attention.Q.dtype)
    rows = list(attend_backward(ready.attention, d_heads)[:3])
    if d_scores is not None and ready.scores is not None:
        k, P = len(call.axes), widen(d_scores)
        sizes = (math.prod(size) for size in ready.lengths)
        more = attend_backward(ready.scores, np.reshape(P, (*P.shape[: -2 * k], *sizes)))
        rows[0], rows[1] = rows[0] + more.d_query, rows[1] + more.d_key
    return rows


def _check_cotangents(
    call: Call, ready: Prepared, d_output: Array, d_scores: Array | None, lead: tuple[int, ...]
) -> None:
    """Check that the cotangents have the shapes and the dtype of what the call returns.

    Raises:
        ShapeError, DtypeError, OptionError: they do not, or no weights are returned.
    """
    function = call.form.function
    kernel = call.weights["attention_output/kernel"]
    if d_scores is not None and ready.scores is None:
        raise OptionError(f"d_scores is given, but return_attention_scores is False [{function}]")
    scores = [] if ready.scores is None else [*ready.scores.Q.shape[:-2], *sum(ready.lengths, ())]
    check_shapes(
        function,
        d_output=(d_output, " ".join(map(str, (*lead, *kernel.shape[2:])))),
        d_scores=(d_scores, " ".join(map(str, scores)) + " or None"),
    )
    check_floats(function, kernel=kernel, d_output=d_output, **given(d_scores=d_scores))
