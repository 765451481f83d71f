"""Error units of GPT's causal module: the fused projection, the heads, the projection out."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from refattn.certify.attention_units import exact_finite
from refattn.certify.cells import Tensors
from refattn.certify.floor_units import new_track
from refattn.certify.heads_units import Heads, heads_units
from refattn.certify.lost import KINDS, Kind, core, given, joined, summed
from refattn.certify.majorant import Array, Known, contract, exact, plus, stored, times, total


class Stages(NamedTuple):
    """Everything that a correct module may store on its way."""

    qkv: Known
    merged: Known
    output: Known
    d_projected: Known | None
    d_merged: Known | None
    d_qkv: Known | None
    factor: float
    """What the dropout of the output multiplies by at most."""


def causal_units(
    inputs: Tensors, parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> tuple[dict[str, Known], dict[str, float]]:
    """Return the majorants of every output of `causal_module`, and what the coefficients need."""
    track = new_track()
    t = {n: exact_finite(x) for n, x in inputs.items() if n not in ("keep", "output_keep")}
    heads, e = int(parameters["heads"]), t["x"].value.shape[2]
    s = _stages(inputs, t, heads, parameters, track)
    found = {"output": s.output}
    if s.d_projected is not None and s.d_qkv is not None:
        found |= _gradients(t, s)
    tokens = float(np.prod(t["x"].value.shape[:2]))
    track["shortest"] = min(track["shortest"], float(e))
    track["longest"] = max(track["longest"], tokens, 3.0 * e)
    track["peak"] = max(track["peak"], _peak(t, s))
    floors: dict[str, float] = {}
    for kind in KINDS:
        floors |= _floors(kind, t, s, heads, track, list(found))
    return {n: stored(k) for n, k in found.items()}, {**track, **floors}


def _stages(
    inputs: Tensors,
    t: dict[str, Known],
    heads: int,
    parameters: Mapping[str, Any],
    track: dict[str, float],
) -> Stages:
    _, n, e = t["x"].value.shape
    qkv = contract("bne,ef->bnf", t["x"], t["w_qkv"], e)
    qkv = stored(plus(qkv, t["b_qkv"]) if "b_qkv" in t else qkv)
    Q, K, V = (_split(_third(qkv, k), heads) for k in range(3))
    factor = _factor(inputs, parameters, "keep")
    A = np.tri(n, dtype=bool)
    x = Heads(Q, K, V, lambda b: A, factor, 1.0 / np.sqrt(e // heads), False)
    dZ = dY = None
    if "d_output" in t:
        dZ = _dropped(t["d_output"], _factor(inputs, parameters, "output_keep"))
        dY = dZ
        if "w_output" in t:
            dY = stored(contract("bnf,ef->bne", dZ, t["w_output"], e))
    output, gradients = heads_units(x, None if dY is None else _split(dY, heads), track)
    merged = stored(_merge(output))
    Z = merged
    if "w_output" in t:
        Z = contract("bne,ef->bnf", merged, t["w_output"], e)
        Z = stored(plus(Z, t["b_output"]) if "b_output" in t else Z)
    Z = _dropped(Z, _factor(inputs, parameters, "output_keep"))
    d_qkv = _joined([stored(_merge(g)) for g in gradients]) if gradients else None
    kept = _factor(inputs, parameters, "output_keep")
    return Stages(qkv, merged, Z, dZ, dY, d_qkv, 1.0 if kept is None else float(np.max(kept)))


def _gradients(t: dict[str, Known], s: Stages) -> dict[str, Known]:
    b, n, e = t["x"].value.shape
    assert s.d_projected is not None and s.d_qkv is not None
    found = {
        "d_x": contract("bnf,ef->bne", s.d_qkv, t["w_qkv"], 3 * e),
        "d_w_qkv": contract("bne,bnf->ef", t["x"], s.d_qkv, b * n),
    }
    if "b_qkv" in t:
        found["d_b_qkv"] = total(s.d_qkv, (0, 1), b * n)
    if "w_output" in t:
        found["d_w_output"] = contract("bne,bnf->ef", s.merged, s.d_projected, b * n)
    if "b_output" in t:
        found["d_b_output"] = total(s.d_projected, (0, 1), b * n)
    return found


def _factor(inputs: Tensors, parameters: Mapping[str, Any], name: str) -> Array | None:
    if name not in inputs:
        return None
    chance = float(parameters.get(f"{name}_probability") or 1.0)
    return np.asarray(inputs[name], dtype=bool) / chance


def _dropped(x: Known, factor: Array | None) -> Known:
    return x if factor is None else stored(times(x, exact(factor), 2.0))


def _third(x: Known, k: int) -> Known:
    e = x.value.shape[2] // 3
    return Known(*(part[:, :, k * e : (k + 1) * e] for part in x))


def _split(x: Known, heads: int) -> Known:
    """Return (b, n, h·d) as (b, h, n, d)."""
    return Known(*(p.reshape(*p.shape[:2], heads, -1).swapaxes(1, 2) for p in x))


def _merge(x: Known) -> Known:
    return Known(*(p.swapaxes(1, 2).reshape(p.shape[0], p.shape[2], -1) for p in x))


def _joined(parts: list[Known]) -> Known:
    return Known(*(np.concatenate(x, axis=2) for x in zip(*parts, strict=True)))


def _peak(t: dict[str, Known], s: Stages) -> float:
    """Return the largest sum of magnitudes of the projections and of their gradients."""
    size = {name: np.abs(k.value) for name, k in t.items()}
    sums = [size["x"] @ size["w_qkv"] + size.get("b_qkv", 0.0), np.abs(s.output.value)]
    if "w_output" in t:
        sums.append(np.abs(s.merged.value) @ size["w_output"] + size.get("b_output", 0.0))
    if s.d_qkv is not None:
        sums.append(np.abs(s.d_qkv.value) @ size["w_qkv"].T)
    return max(float(np.max(x, initial=0.0)) for x in sums)


def _floors(
    kind: Kind,
    t: dict[str, Known],
    s: Stages,
    heads: int,
    track: Mapping[str, float],
    names: list[str],
) -> dict[str, float]:
    """Return how far one kind of underflow moves every output."""
    b, n, e = t["x"].value.shape
    x, W, one = given(t["x"].value), given(t["w_qkv"].value), given(np.ones(1))
    W_o = given(t["w_output"].value) if "w_output" in t else one
    terms = float(e if "w_output" in t else 1)
    qkv = joined(kind, s.qkv.value, summed(kind, s.qkv.value, e, (x, W)))
    zero = np.zeros(1)
    dZ, dY, d_qkv = (zero if k is None else k.value for k in (s.d_projected, s.d_merged, s.d_qkv))
    raw = joined(kind, dZ, given(dZ))
    d_head = summed(kind, dY, terms, (raw, W_o))
    parts = core(
        kind,
        track,
        (qkv, qkv, qkv, d_head),
        (s.merged.value, d_qkv, d_qkv, d_qkv),
        (e // heads,) * 2,
    )
    back = max(parts[1:], key=lambda loss: loss.lost)
    Z = joined(kind, s.output.value, summed(kind, s.output.value, terms, (parts.output, W_o)))
    output = joined(kind, s.output.value, Z._replace(lost=s.factor * Z.lost))
    rows = float(b * n)
    table = {
        "output": output,
        "d_x": summed(kind, zero, 3.0 * e, (back, W)),
        "d_w_qkv": summed(kind, zero, rows, (x, back)),
        "d_b_qkv": summed(kind, zero, rows, (back, one)),
        "d_w_output": summed(kind, zero, rows, (parts.output, raw)),
        "d_b_output": summed(kind, zero, rows, (raw, one)),
    }
    return {f"{name}.{kind.suffix}": table[name].lost for name in names}
