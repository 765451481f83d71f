"""Error units of gated cross-attention: every tensor of the block may be stored once."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.certify.attention_units import exact_finite
from refattn.certify.cells import Tensors
from refattn.certify.floor_units import new_track
from refattn.certify.gated_floors import Block, gated_floors
from refattn.certify.heads_units import Heads, heads_units
from refattn.certify.lost import KINDS
from refattn.certify.majorant import Known, contract, plus, stored, times, total
from refattn.certify.norm_units import (
    Normal,
    activation_units,
    gate_units,
    norm_backward_units,
    norm_units,
)


def gated_units(
    inputs: Tensors, parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> tuple[dict[str, Known], dict[str, float]]:
    """Return the majorants of every output, and what the coefficients need."""
    track = new_track()
    t = {n: exact_finite(x) for n, x in inputs.items() if n != "media_locations"}
    dO = t.pop("d_output", None)
    allowed, before = cells(inputs, conventions)
    epsilon = float(parameters.get("norm_epsilon", 1e-5))
    leak = conventions.get("before_media", "zero")
    closed = before[..., None] & (leak == "everything")
    x = _before_heads(t, epsilon)
    scale = parameters.get("scale")
    d_k = t["w_query"].value.shape[2]
    heads = Heads(
        *x[3],
        lambda b: allowed[b],
        None,
        1.0 / np.sqrt(d_k) if scale is None else float(scale),
        leak == "uniform",
    )
    head, _ = heads_units(heads, None, track)
    block = _after_heads(t, x, head, closed, epsilon, conventions.get("activation", "squared_relu"))
    found = {"output": block.output}
    back: dict[str, Known] = {}
    if dO is not None:
        dense, back = _feed_forward_backward(block, dO)
        back["dA"] = stored(times(gate_units(t["attention_gate"])[0], back["dY"], 2.0))
        cotangent = contract("bno,hdo->bhnd", back["dA"], t["w_output"], dO.value.shape[2])
        back["d_head"] = stored(cotangent)
        _, gradients = heads_units(heads, back["d_head"], track)
        back |= {f"d{n}": stored(g) for n, g in zip("QKV", gradients, strict=True)}
        found |= _gradients(block, back) | dense
    widths = [
        *t["w_query"].value.shape[1:],
        *t["w_value"].value.shape[1:],
        t["w_up"].value.shape[1],
    ]
    track["shortest"] = min(track["shortest"], *map(float, widths))
    norms = [n for n in (block.text, block.media, block.second) if n is not None]
    for name, at in (("relative", 0), ("relative_operand", 1)):
        track[name] = max(n.relative[at] for n in norms)
        exponent = name.replace("relative", "exponent")
        track[exponent] = max(track[exponent], 1.5 * track[name])
    rows = float(np.prod(t["query_input"].value.shape[:2]))
    tokens = float(np.prod(t["media"].value.shape[:3]))
    inner = float(t["w_output"].value.shape[0] * max(widths))
    track["longest"] = max(track["longest"], rows, tokens, inner)
    track["peak"] = max(track["peak"], _peak(block, found))
    floors: dict[str, float] = {}
    for kind in KINDS:
        floors |= gated_floors(kind, block, dO, back, track, list(found))
    return {n: stored(k) for n, k in found.items()}, {**track, **floors}


def cells(
    inputs: Tensors, conventions: Mapping[str, Any]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the allowed cells (b, n, m·n_m), and the rows (b, n) that no medium precedes."""
    b, n, _ = inputs["query_input"].shape
    m, n_m = inputs["media"].shape[1:3]
    if "media_locations" not in inputs:
        return np.ones((b, n, m * n_m), dtype=bool), np.zeros((b, n), dtype=bool)
    marks = np.asarray(inputs["media_locations"], dtype=np.int64)
    phi = np.cumsum(marks, axis=1)
    if conventions.get("cached_media", False):
        phi = np.repeat(phi[:, -1:], n, axis=1)
    order = np.arange(1, m + 1)
    immediate = conventions.get("attend", "immediate") == "immediate"
    seen = phi[..., None] == order if immediate else phi[..., None] >= order
    before = np.asarray(phi == 0)
    if conventions.get("before_media", "zero") == "everything":
        seen = seen | before[..., None]
    return np.repeat(seen, n_m, axis=2), before


def _before_heads(
    t: dict[str, Known], epsilon: float
) -> tuple[Normal, Normal | None, Known, tuple[Known, Known, Known]]:
    text = norm_units(t["query_input"], t["norm_weight"], t["norm_bias"], epsilon)
    text = text._replace(rows=stored(text.rows))
    b, _, _, e_m = t["media"].value.shape
    tokens, media = Known(*(p.reshape(b, -1, e_m) for p in t["media"])), None
    if "media_norm_weight" in t:
        media = norm_units(tokens, t["media_norm_weight"], t["media_norm_bias"], epsilon)
        media = media._replace(rows=stored(media.rows))
        tokens = media.rows
    Q, K, V = (
        stored(contract("bne,hed->bhnd", rows, t[w], t[w].value.shape[1]))
        for rows, w in ((text.rows, "w_query"), (tokens, "w_key"), (tokens, "w_value"))
    )
    return text, media, tokens, (Q, K, V)


def _after_heads(
    t: dict[str, Known],
    x: tuple[Normal, Normal | None, Known, tuple[Known, Known, Known]],
    head: Known,
    closed: NDArray[np.bool_],
    epsilon: float,
    kind: str,
) -> Block:
    head = stored(head)
    heads, d_v, _ = t["w_output"].value.shape
    A = stored(contract("bhnd,hdo->bno", head, t["w_output"], heads * d_v))
    gate = gate_units(t["attention_gate"])[0]
    middle = stored(plus(t["query_input"], stored(times(gate, A, 2.0))))
    weight, bias = t["feed_forward_norm_weight"], t["feed_forward_norm_bias"]
    second = norm_units(middle, weight, bias, epsilon)
    second = second._replace(rows=stored(second.rows))
    e, f = t["w_up"].value.shape
    hidden = stored(contract("bne,ef->bnf", second.rows, t["w_up"], e))
    acted, slope = (stored(k) for k in activation_units(hidden, kind))
    F = stored(contract("bnf,fe->bne", acted, t["w_down"], f))
    F = Known(*(np.where(closed, 0.0, part) for part in F))
    output = plus(middle, stored(times(gate_units(t["feed_forward_gate"])[0], F, 2.0)))
    text, media, tokens, QKV = x
    return Block(
        t,
        text,
        media,
        tokens,
        QKV,
        head,
        A,
        middle,
        second,
        hidden,
        acted,
        slope,
        F,
        output,
        closed,
    )


def _feed_forward_backward(s: Block, dO: Known) -> tuple[dict[str, Known], dict[str, Known]]:
    """Return the gradients of the feed-forward, and the stages behind them."""
    t, gate = s.t, gate_units(s.t["feed_forward_gate"])[0]
    dF = stored(times(gate, dO, 2.0))
    dF = Known(*(np.where(s.closed, 0.0, part) for part in dF))
    b, n, e = dO.value.shape
    f = t["w_up"].value.shape[1]
    d_acted = stored(contract("bne,fe->bnf", dF, t["w_down"], e))
    d_hidden = stored(times(d_acted, s.slope, 2.0))
    d_rows = stored(contract("bnf,ef->bne", d_hidden, t["w_up"], f))
    d_middle, d_weight, d_bias = norm_backward_units(
        s.second, t["feed_forward_norm_weight"], d_rows
    )
    dY = stored(plus(dO, stored(d_middle)))
    stages = {"dF": dF, "d_acted": d_acted, "d_hidden": d_hidden, "d_rows": d_rows, "dY": dY}
    gradients = {
        "d_feed_forward_norm_weight": d_weight,
        "d_feed_forward_norm_bias": d_bias,
        "d_w_up": contract("bne,bnf->ef", s.second.rows, d_hidden, b * n),
        "d_w_down": contract("bnf,bne->fe", s.acted, dF, b * n),
        "d_feed_forward_gate": _d_gate(t["feed_forward_gate"], dO, s.fed),
    }
    return gradients, stages


def _gradients(s: Block, back: dict[str, Known]) -> dict[str, Known]:
    """Return the gradients of text, media and the attention's parameters; note the stages."""
    t, dY, dA = s.t, back["dY"], back["dA"]
    dQ, dK, dV = (back[name] for name in ("dQ", "dK", "dV"))
    b, n, _ = dY.value.shape
    h, _, d_k = t["w_query"].value.shape
    d_v = t["w_value"].value.shape[2]
    keys = float(np.prod(s.tokens.value.shape[:2]))
    d_text = stored(contract("bhnd,hed->bne", dQ, t["w_query"], h * d_k))
    dx, d_weight, d_bias = norm_backward_units(s.text, t["norm_weight"], d_text)
    from_key = contract("bhnd,hed->bne", dK, t["w_key"], h * (d_k + d_v))
    from_value = contract("bhnd,hed->bne", dV, t["w_value"], h * (d_k + d_v))
    d_tokens = stored(Known(*(p + q for p, q in zip(from_key, from_value, strict=True))))
    back |= {"d_text": d_text, "d_tokens": d_tokens, "dx": dx}
    found = {
        "d_norm_weight": d_weight,
        "d_norm_bias": d_bias,
        "d_w_query": contract("bne,bhnd->hed", s.text.rows, dQ, b * n),
        "d_w_key": contract("bne,bhnd->hed", s.tokens, dK, keys),
        "d_w_value": contract("bne,bhnd->hed", s.tokens, dV, keys),
        "d_w_output": contract("bhnd,bno->hdo", s.head, dA, b * n),
        "d_attention_gate": _d_gate(t["attention_gate"], dY, s.attended),
    }
    if s.media is not None:
        d_tokens, found["d_media_norm_weight"], found["d_media_norm_bias"] = norm_backward_units(
            s.media, t["media_norm_weight"], d_tokens
        )
    d_media = Known(*(p.reshape(t["media"].value.shape) for p in d_tokens))
    return {"d_query_input": plus(dY, stored(dx)), "d_media": d_media, **found}


def _d_gate(alpha: Known, d_rows: Known, rows: Known) -> Known:
    axes = (0, 1) if alpha.value.shape[0] > 1 else (0, 1, 2)
    count = float(np.prod([rows.value.shape[a] for a in axes]))
    sums = total(times(d_rows, rows), axes, count)
    slope = gate_units(alpha)[1]
    return times(Known(*(np.reshape(p, slope.value.shape) for p in sums)), slope, 2.0)


def _peak(s: Block, found: dict[str, Known]) -> float:
    """Return the largest sum of magnitudes of the projections, the norms and the feed-forward."""
    t, size = s.t, {name: np.abs(k.value) for name, k in s.t.items()}
    pairs = (
        ("bne,hed->bhnd", s.text.rows, "w_query"),
        ("bne,hed->bhnd", s.tokens, "w_key"),
        ("bne,hed->bhnd", s.tokens, "w_value"),
        ("bhnd,hdo->bno", s.head, "w_output"),
        ("bne,ef->bnf", s.second.rows, "w_up"),
        ("bnf,fe->bne", s.acted, "w_down"),
    )
    sums = [np.einsum(spec, np.abs(x.value), size[w]) for spec, x, w in pairs]
    sums += [np.sum(x.value**2, axis=-1) for x in (t["query_input"], s.tokens, s.middle)]
    sums += [np.abs(k.value) for k in found.values()]
    return max(float(np.max(x, initial=0.0)) for x in sums)
