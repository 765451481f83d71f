"""Error units of multi-head attention: projections in, heads, projection out."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from refattn.certify.attention_units import exact_finite
from refattn.certify.cells import Tensors, allowed_cells
from refattn.certify.floor_units import new_track
from refattn.certify.heads_units import Heads, heads_units
from refattn.certify.majorant import Known, contract, exact, stored, times
from refattn.certify.multihead_floors import Sizes, multihead_floors


class Problem(NamedTuple):
    """The tensors of a multi-head problem, and the gates of its heads."""

    X: Known
    Y: Known
    W_q: Known
    W_k: Known
    W_v: Known
    W_o: Known
    gates: Known


def multihead_units(
    inputs: Tensors, parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> tuple[dict[str, Known], dict[str, float]]:
    """Return the majorants of every output of `multihead`, and what the coefficients need."""
    names = ("query_input", "source_input", "w_query", "w_key", "w_value", "w_output")
    h = inputs["w_query"].shape[0]
    gates = exact_finite(inputs["head_gates"]) if "head_gates" in inputs else exact(np.ones(h))
    X, Y, W_q, W_k, W_v, W_o = (exact_finite(inputs[name]) for name in names)
    x = Problem(X, Y, W_q, W_k, W_v, W_o, gates)
    Q, K, V = (
        stored(contract("bne,hed->bhnd", source, W, W.value.shape[1]))
        for source, W in ((x.X, x.W_q), (x.Y, x.W_k), (x.Y, x.W_v))
    )
    dZ = exact_finite(inputs["d_output"]) if "d_output" in inputs else None
    dO = None if dZ is None else contract("bno,hdo->bhnd", dZ, x.W_o, x.W_o.value.shape[2])
    track = new_track()
    n_q, n_k = Q.value.shape[2], K.value.shape[2]
    scale = parameters.get("scale")
    heads = Heads(
        Q,
        K,
        V,
        lambda b: allowed_cells(b, 0, n_q, n_k, {}, parameters, conventions),
        None,
        1.0 / np.sqrt(Q.value.shape[3]) if scale is None else float(scale),
        conventions.get("empty_row", "zero") == "uniform",
    )
    by_head = exact(x.gates.value[:, None, None])
    outputs, gradients = heads_units(
        heads, None if dO is None else stored(times(dO, by_head)), track
    )
    gated = times(outputs, by_head)
    length = h * x.W_o.value.shape[1]
    found = {"output": contract("bhnd,hdo->bno", stored(gated), x.W_o, length)}
    if dZ is not None and dO is not None:
        found.update(_input_gradients(x, gradients))
        tokens = dZ.value.shape[0] * dZ.value.shape[1]
        found["d_w_output"] = contract("bhnd,bno->hdo", stored(gated), dZ, tokens)
        if "head_gates" in inputs:
            length = tokens * x.W_o.value.shape[1]
            found["d_head_gates"] = contract("bhnd,bhnd->h", outputs, stored(dO), length)
    widths = (w.value.shape[a] for w, a in ((x.W_q, 1), (x.W_k, 1), (x.W_o, 2), (x.W_o, 1)))
    track["shortest"] = min(track["shortest"], *map(float, widths))
    track["cotangent_max"] = 0.0 if dZ is None else float(np.max(np.abs(dZ.value), initial=0.0))
    track["peak"] = max(track["peak"], _peak(x, gated))
    sizes = _sizes(x)
    track["longest"] = max(track["longest"], *sizes[:3], sizes.heads * sizes.d_v)
    return {n: stored(k) for n, k in found.items()}, {
        **track,
        **multihead_floors(sizes, track, list(found)),
    }


def _input_gradients(x: Problem, gradients: list[Known]) -> dict[str, Known]:
    """Return the gradients of inputs and of the projections in."""
    dQ, dK, dV = (stored(g) for g in gradients)
    heads, _, d_k = x.W_q.value.shape
    d_v = x.W_v.value.shape[2]
    queries, keys = (t.value.shape[0] * t.value.shape[1] for t in (x.X, x.Y))
    from_key = contract("bhnd,hed->bne", dK, x.W_k, heads * (d_k + d_v))
    from_value = contract("bhnd,hed->bne", dV, x.W_v, heads * (d_k + d_v))
    both = zip(from_key, from_value, strict=True)
    return {
        "d_query_input": contract("bhnd,hed->bne", dQ, x.W_q, heads * d_k),
        "d_source_input": Known(*(a + b for a, b in both)),
        "d_w_query": contract("bne,bhnd->hed", x.X, dQ, queries),
        "d_w_key": contract("bne,bhnd->hed", x.Y, dK, keys),
        "d_w_value": contract("bne,bhnd->hed", x.Y, dV, keys),
    }


def _peak(x: Problem, gated: Known) -> float:
    """Return the largest sum of magnitudes of the projections."""
    pairs = (
        ("bne,hed->bhnd", x.X, x.W_q),
        ("bne,hed->bhnd", x.Y, x.W_k),
        ("bne,hed->bhnd", x.Y, x.W_v),
        ("bhnd,hdo->bno", gated, x.W_o),
    )
    sums = (np.einsum(s, np.abs(a.value), np.abs(b.value), optimize=True) for s, a, b in pairs)
    return max(float(np.max(t, initial=0.0)) for t in sums)


def _sizes(x: Problem) -> Sizes:
    """Return the lengths of the contractions, and the largest numbers that enter them."""
    heads, e_q, d_k = x.W_q.value.shape
    d_v, e_o = x.W_o.value.shape[1:]
    batch, n_q, _ = x.X.value.shape
    n_k, e_s = x.Y.value.shape[1:]
    largest = [
        max(float(np.max(np.abs(k.value), initial=0.0)) for k in group)
        for group in ((x.X, x.Y), (x.W_q, x.W_k, x.W_v, x.W_o), (x.gates,))
    ]
    return Sizes(e_q, e_s, e_o, heads, d_k, d_v, batch * n_q, batch * n_k, *largest)
