"""How far underflow can move the results of gated cross-attention, stage by stage."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.certify.lost import Core, Kind, Loss, core, crossed, given, joined, summed
from refattn.certify.majorant import Known
from refattn.certify.norm_units import Normal


class Block(NamedTuple):
    """The stages of the forward pass that the backward pass reads again."""

    t: dict[str, Known]
    text: Normal
    media: Normal | None
    tokens: Known
    QKV: tuple[Known, Known, Known]
    head: Known
    attended: Known
    middle: Known
    second: Normal
    hidden: Known
    acted: Known
    slope: Known
    fed: Known
    output: Known
    closed: NDArray[np.bool_]
    """Rows (b, n, 1) whose feed-forward is closed."""


class Normed(NamedTuple):
    """Losses of a layer normalisation."""

    rows: Loss
    x_hat: Loss
    inverse: Loss


class Ahead(NamedTuple):
    """Losses of the forward pass that the backward pass reads again."""

    text: Normed
    media: Normed | None
    tokens: Loss
    attended: Loss
    second: Normed
    acted: Loss
    slope: Loss
    fed: Loss
    output: Loss


def gated_floors(
    kind: Kind,
    s: Block,
    dO: Known | None,
    back: Mapping[str, Known],
    track: Mapping[str, float],
    names: list[str],
) -> dict[str, float]:
    """Return how far one kind of underflow moves every output."""
    p = {name: given(k.value) for name, k in s.t.items()}
    zero = Loss(0.0, 0.0)
    d = {name: given(k.value) for name, k in back.items()}
    loose = _heads(kind, s, track, p, zero, back)
    ahead = _forward(kind, s, p, loose.output)
    table = {"output": ahead.output}
    if dO is not None:
        table |= _backward(kind, s, given(dO.value), d, track, p, ahead, back)
    return {f"{name}.{kind.suffix}": table[name].lost for name in names}


def _norm(kind: Kind, x: Loss, n: Normal, weight: Loss) -> Normed:
    """Carry losses through a layer normalisation."""
    e = n.rows.value.shape[-1]
    inverse, x_hat = given(n.inverse.value).peak, given(n.x_hat.value).peak
    centred = 2 * x.lost + kind.event * (e + 2)
    variance = 4 * x.peak * centred + 2 * kind.event * (e + 1)
    turned = inverse**3 * variance
    hat = Loss(x_hat, inverse * centred + x_hat * inverse**2 * variance + 2 * kind.event)
    rows = weight.peak * hat.lost + 2 * kind.event + kind.store
    return Normed(Loss(given(n.rows.value).peak, rows), hat, Loss(inverse, turned))


def _norm_backward(
    kind: Kind, dy: Loss, n: Normed, weight: Loss, rows: float
) -> tuple[Loss, Loss, Loss]:
    """Carry losses to dx, dγ and dβ."""
    g = Loss(weight.peak * dy.peak, weight.peak * dy.lost + kind.event)
    mean_gx = Loss(g.peak * n.x_hat.peak, crossed(g, n.x_hat) + 2 * kind.event)
    inner = Loss(
        2 * g.peak + mean_gx.peak * n.x_hat.peak,
        2 * g.lost + crossed(mean_gx, n.x_hat) + 4 * kind.event,
    )
    dx = crossed(inner, n.inverse) + kind.event + kind.store
    weight_lost = rows * (crossed(dy, n.x_hat) + kind.event) + kind.store
    return (
        Loss(inner.peak * n.inverse.peak, dx),
        Loss(0.0, weight_lost),
        Loss(0.0, rows * (dy.lost + kind.event) + kind.store),
    )


def _heads(
    kind: Kind,
    s: Block,
    track: Mapping[str, float],
    p: Mapping[str, Loss],
    d_head: Loss,
    back: Mapping[str, Known],
) -> Core:
    """Carry losses through the projections in and the attention."""
    text = _norm(kind, p["query_input"], s.text, p["norm_weight"]).rows
    tokens = _tokens(kind, s, p)[0]
    e, e_m = s.text.rows.value.shape[-1], s.tokens.value.shape[-1]
    operands = (
        summed(kind, s.QKV[0].value, e, (text, p["w_query"])),
        summed(kind, s.QKV[1].value, e_m, (tokens, p["w_key"])),
        summed(kind, s.QKV[2].value, e_m, (tokens, p["w_value"])),
        d_head,
    )
    nothing = np.zeros(1)
    found = (back[n].value if n in back else nothing for n in ("dQ", "dK", "dV"))
    d = (s.QKV[0].value.shape[-1], s.QKV[2].value.shape[-1])
    return core(kind, track, operands, (s.head.value, *found), d)


def _tokens(kind: Kind, s: Block, p: Mapping[str, Loss]) -> tuple[Loss, Normed | None]:
    if s.media is None:
        return p["media"], None
    media = _norm(kind, p["media"], s.media, p["media_norm_weight"])
    return media.rows, media


def _forward(kind: Kind, s: Block, p: Mapping[str, Loss], head: Loss) -> Ahead:
    heads, d_v, _ = s.t["w_output"].value.shape
    e, f = s.t["w_up"].value.shape
    text = _norm(kind, p["query_input"], s.text, p["norm_weight"])
    tokens, media = _tokens(kind, s, p)
    A = summed(kind, s.attended.value, heads * d_v, (head, p["w_output"]))
    gated = Loss(A.peak, A.lost + kind.event + 2 * kind.store)
    middle = joined(kind, s.middle.value, gated)
    second = _norm(kind, middle, s.second, p["feed_forward_norm_weight"])
    hidden = summed(kind, s.hidden.value, e, (second.rows, p["w_up"]))
    steep = 2.0 * (hidden.peak + 1.0)  # above the slope of either activation
    acted = Loss(given(s.acted.value).peak, steep * hidden.lost + 3 * kind.event + kind.store)
    slope = Loss(given(s.slope.value).peak, 2.0 * hidden.lost + 3 * kind.event + kind.store)
    fed = summed(kind, s.fed.value, f, (acted, p["w_down"]))
    output = joined(kind, s.output.value, middle, Loss(fed.peak, fed.lost + 2 * kind.store))
    return Ahead(text, media, tokens, A, second, acted, slope, fed, output)


def _backward(
    kind: Kind,
    s: Block,
    dO: Loss,
    d: Mapping[str, Loss],
    track: Mapping[str, float],
    p: Mapping[str, Loss],
    a: Ahead,
    back: Mapping[str, Known],
) -> dict[str, Loss]:
    """Return the losses of every gradient."""
    b, n, e = s.middle.value.shape
    f, rows = s.t["w_up"].value.shape[1], float(b * n)
    keys = float(np.prod(s.tokens.value.shape[:2]))
    dF = Loss(d["dF"].peak, kind.event + 2 * kind.store)
    d_acted = summed(kind, back["d_acted"].value, e, (dF, p["w_down"]))
    d_hidden = summed(kind, back["d_hidden"].value, 1, (d_acted, a.slope))
    d_rows = summed(kind, back["d_rows"].value, f, (d_hidden, p["w_up"]))
    weight = p["feed_forward_norm_weight"]
    d_middle, d_second, d_second_bias = _norm_backward(kind, d_rows, a.second, weight, rows)
    dY = joined(kind, back["dY"].value, d_middle)
    dA = Loss(d["dA"].peak, dY.lost + kind.event + 2 * kind.store)
    d_head = summed(kind, back["d_head"].value, e, (dA, p["w_output"]))
    parts = _heads(kind, s, track, p, d_head, back)
    h, _, d_k = s.t["w_query"].value.shape
    d_v = s.t["w_value"].value.shape[2]
    d_text = summed(kind, back["d_text"].value, h * d_k, (parts.d_query, p["w_query"]))
    dx, d_norm, d_bias = _norm_backward(kind, d_text, a.text, p["norm_weight"], rows)
    pairs = ((parts.d_key, p["w_key"]), (parts.d_value, p["w_value"]))
    d_tokens = summed(kind, back["d_tokens"].value, h * max(d_k, d_v), *pairs)
    nothing = np.zeros(1)
    table = {
        "d_query_input": joined(kind, nothing, dY, dx),
        "d_media": d_tokens,
        "d_norm_weight": d_norm,
        "d_norm_bias": d_bias,
        "d_w_query": summed(kind, nothing, rows, (a.text.rows, parts.d_query)),
        "d_w_key": summed(kind, nothing, keys, (a.tokens, parts.d_key)),
        "d_w_value": summed(kind, nothing, keys, (a.tokens, parts.d_value)),
        "d_w_output": summed(kind, nothing, rows, (parts.output, dA)),
        "d_attention_gate": summed(kind, nothing, rows * e, (dY, a.attended)),
        "d_feed_forward_norm_weight": d_second,
        "d_feed_forward_norm_bias": d_second_bias,
        "d_w_up": summed(kind, nothing, rows, (a.second.rows, d_hidden)),
        "d_w_down": summed(kind, nothing, rows, (a.acted, dF)),
        "d_feed_forward_gate": summed(kind, nothing, rows * e, (dO, a.fed)),
    }
    if a.media is not None:
        found = _norm_backward(kind, d_tokens, a.media, p["media_norm_weight"], keys)
        table |= dict(
            zip(("d_media", "d_media_norm_weight", "d_media_norm_bias"), found, strict=True)
        )
    return table
