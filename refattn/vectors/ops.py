"""The operations as a table: which tensors each takes and gives, and the axes of each.

An axis is a name; one name is one length in a case. Every pack that is read is held against this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

FLOAT, INTEGER, BOOL = "f", "i", "b"
"""Kinds of tensors, by NumPy's letters."""


class Axes(NamedTuple):
    """The form of a tensor, and the inputs without which it is not there."""

    names: str
    """Axes in order; after "~" they are broadcast to; "=bias" is the shape of bias; "*" is any."""
    kind: str = FLOAT
    beside: tuple[str, ...] = ()


class Op(NamedTuple):
    """An operation: inputs that it must have, inputs that it may have, and outputs."""

    required: Mapping[str, Axes]
    optional: Mapping[str, Axes]
    outputs: Mapping[str, Axes]


def _gradients(**axes: str) -> dict[str, Axes]:
    """Return the gradient of each input, which is there when d_output and the input are."""
    return {f"d_{name}": Axes(form, FLOAT, ("d_output", name)) for name, form in axes.items()}


def _forms(**axes: str) -> dict[str, Axes]:
    return {name: Axes(form) for name, form in axes.items()}


_QKV = {"query": "b h n_q d_k", "key": "b h_k n_k d_k", "value": "b h_k n_k d_v"}
_WEIGHTS = {
    "query_input": "b n_q e_q",
    "source_input": "b n_k e_s",
    "w_query": "h e_q d_k",
    "w_key": "h e_s d_k",
    "w_value": "h e_s d_v",
    "w_output": "h d_v e_o",
}
_FUSED = {"x": "b n e", "w_qkv": "e e_qkv", "b_qkv": "e_qkv", "w_output": "e e", "b_output": "e"}
_BLOCK = {
    "query_input": "b n e",
    "media": "b m n_m e_m",
    "norm_weight": "e",
    "norm_bias": "e",
    "w_query": "h e d_k",
    "w_key": "h e_m d_k",
    "w_value": "h e_m d_v",
    "w_output": "h d_v e",
    "attention_gate": "g",
    "feed_forward_norm_weight": "e",
    "feed_forward_norm_bias": "e",
    "w_up": "e f",
    "w_down": "f e",
    "feed_forward_gate": "g_f",
}
_MEDIA_NORM = {"media_norm_weight": "e_m", "media_norm_bias": "e_m"}


def _only(forms: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: form for name, form in forms.items() if name in names}


def _score(**weights: str) -> Op:
    required = _forms(query="n_q d_q", key="n_k d_s", **weights)
    return Op(required, {}, _forms(scores="n_q n_k"))


OPS: Mapping[str, Op] = {
    "attention": Op(
        _forms(**_QKV),
        {
            "mask": Axes("~b h n_q n_k", BOOL),
            "keep": Axes("b h n_q n_k", BOOL),
            "key_lengths": Axes("b", INTEGER),
            "query_lengths": Axes("b", INTEGER),
            **_forms(bias="~b h n_q n_k", slopes="h", sinks="h"),
            **_forms(d_output="b h n_q d_v", d_logsumexp="b h n_q"),
        },
        _forms(output="b h n_q d_v", logsumexp="b h n_q")
        | _gradients(**_QKV, bias="=bias", slopes="h", sinks="h"),
    ),
    "multihead": Op(
        _forms(**_WEIGHTS),
        _forms(head_gates="h", d_output="b n_q e_o"),
        _forms(output="b n_q e_o") | _gradients(**_WEIGHTS, head_gates="h"),
    ),
    "causal_module": Op(
        _forms(**_only(_FUSED, "x", "w_qkv")),
        {
            **_forms(**_only(_FUSED, "b_qkv", "w_output", "b_output"), d_output="b n e"),
            "keep": Axes("b heads n n", BOOL),
            "output_keep": Axes("b n e", BOOL),
        },
        _forms(output="b n e") | _gradients(**_FUSED),
    ),
    "gated_cross_attention": Op(
        _forms(**_BLOCK),
        {
            **_forms(**_MEDIA_NORM, d_output="b n e"),
            "media_locations": Axes("b n_marks", BOOL),
        },
        _forms(output="b n e") | _gradients(**_BLOCK, **_MEDIA_NORM),
    ),
    "head_importance": Op(
        _forms(head_outputs="layers x h n d", d_head_outputs="layers x h n d"),
        {},
        _forms(importance="layers h", normalized="layers h") | {"order": Axes("all", INTEGER)},
    ),
    "rope": Op(
        {"x": Axes("b h n d"), "positions": Axes("n", INTEGER)},
        _forms(d_output="b h n d"),
        _forms(frequencies="r", attention_factor="", cosine="n r", sine="n r", output="b h n d")
        | _gradients(x="b h n d"),
    ),
    "alibi": Op({}, {}, _forms(slopes="heads", bias="heads n_q n_k")),
    "tiles": Op(
        _forms(query="n_q d", key="n_k d", value="n_k d_v"),
        {},
        _forms(row_max="T_c n_q", row_sum="T_c n_q", states="T_c n_q d_v"),
    ),
    "merge": Op(_forms(outputs="p n d", logsumexps="p n"), {}, _forms(output="n d", logsumexp="n")),
    "score dot": _score(),
    "score scaled_dot": _score(),
    "score cosine": _score(strength=""),
    "score general": _score(weight="d_q d_s"),
    "score location": _score(weight="d_q n_k"),
    "score additive": _score(w_query="d_q d_a", w_key="d_s d_a", v="d_a"),
    "rope_decay": Op({"distances": Axes("k", INTEGER)}, {}, _forms(decay="k")),
    "traffic": Op({}, {}, {n: Axes("", INTEGER) for n in ("reads", "writes")}),
    "keep_mask": Op({}, {}, {"keep": Axes("*", BOOL)}),
}
"""Every operation; that of the alignment scores stands once a kind."""


def misfit(
    op: str,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, NDArray[Any]],
    outputs: Mapping[str, NDArray[Any]],
) -> str:
    """Return what does not fit between tensors and their operation; an empty string if all does.

    Args:
        op: an operation.
        parameters: of the case; those that name an axis give its length.
        inputs: tensors by name.
        outputs: tensors by name.
    """
    table = OPS[f"{op} {parameters['kind']}" if op == "score" else op]
    owed = {n: axes for n, axes in table.outputs.items() if set(axes.beside) <= set(inputs)}
    lengths = {n: v for n, v in parameters.items() if type(v) is int}
    return (
        _names(f"input of {op}", inputs, table.required, {**table.required, **table.optional})
        or _names(f"output of {op}", outputs, owed, owed)
        or _shapes({**table.required, **table.optional}, inputs, lengths, inputs)
        or _shapes(owed, outputs, lengths, inputs)
    )


def _names(
    what: str, found: Mapping[str, Any], needed: Mapping[str, Any], known: Mapping[str, Any]
) -> str:
    """Return which name is missing or unknown."""
    for name in needed:
        if name not in found:
            return f"the {what} {name} is missing"
    extra = next((name for name in found if name not in known), "")
    return f"{extra} is no {what} here" if extra else ""


def _shapes(
    table: Mapping[str, Axes],
    tensors: Mapping[str, NDArray[Any]],
    lengths: dict[str, int],
    inputs: Mapping[str, NDArray[Any]],
) -> str:
    """Return which kind or axis does not fit; axes met first fix the lengths of their names."""
    for name in (n for n in table if n in tensors):
        axes, x = table[name], tensors[name]
        if x.dtype.kind != axes.kind:
            return f"{name} has dtype {x.dtype}, which is of another kind than its operation takes"
        form = axes.names
        if form == "*" or (form.startswith("=") and x.shape == inputs[form[1:]].shape):
            continue
        if not _fits(form, x.shape, lengths):
            known = (f"{axis}={lengths.get(axis, 'any')}" for axis in form.strip("~=").split())
            return f"{name} has shape {x.shape}, but its axes are {', '.join(known) or 'none'}"
    return ""


def _fits(form: str, shape: tuple[int, ...], lengths: dict[str, int]) -> bool:
    """Return whether a shape has these axes; a name met for the first time gets its length."""
    names = form.strip("~=").split()
    if form.startswith("~"):  # broadcast: leading axes may be absent, any axis may be 1
        names = names[len(names) - len(shape) :] if len(shape) <= len(names) else [""]
        shared = zip(shape, names, strict=False)
        return names != [""] and all(n in (1, lengths.get(axis, n)) for n, axis in shared)
    if form.startswith("=") or len(shape) != len(names):
        return False
    return all(lengths.setdefault(axis, n) == n for n, axis in zip(shape, names, strict=True))


def misbound(
    outputs: Mapping[str, NDArray[Any]],
    units: Mapping[str, NDArray[Any]],
    bounds: Mapping[str, Mapping[str, tuple[float, float, float]]],
) -> str:
    """Return what is wrong with the bounds of a case; an empty string if nothing is.

    Every float output has a unit of its shape and, in each profile, a bound; both are finite and
    not negative.

    Args:
        outputs: tensors by name.
        units: tensors by name.
        bounds: by profile and output, (a, b, floor).
    """
    floats = {name: x for name, x in outputs.items() if x.dtype.kind == FLOAT}
    if floats and not bounds:
        return "it has float outputs, but bounds of no profile"
    for name, unit in units.items():
        output = outputs.get(name.partition(".")[0])
        if output is None or unit.shape != output.shape:
            return f"{name} has shape {unit.shape}, but there is no output of that name and shape"
        if not np.isfinite(unit).all() or (unit < 0).any():
            return f"{name} holds a number that is not finite, or negative"
    for name in floats:
        if f"{name}.unit" not in units:
            return f"the unit {name}.unit is missing"
    for profile, by_output in bounds.items():
        if by_output.keys() != floats.keys():
            return (
                f"bounds of {profile} are for {', '.join(by_output) or 'no output'}, but the float "
                f"outputs are {', '.join(floats) or 'none'}"
            )
        for name, (a, b, floor) in by_output.items():
            largest = [float(units.get(f"{name}.{u}", _NONE).max(initial=0)) for u in _UNITS]
            if not np.isfinite(a * largest[0] + b * largest[1] + floor):
                return f"the bound of {profile} on {name} is not finite"
    return ""


_UNITS = ("unit", "unit_logit")
_NONE = np.zeros(0)
