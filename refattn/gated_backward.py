"""Gradients of gated cross-attention: through the feed-forward, the gates and the attention."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refattn.activations import activate, activation_slope
from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.attention_backward import attention_backward
from refattn.checks import check_arrays
from refattn.gated import (
    GatedOptions,
    GatedParameters,
    GatedStates,
    attention_options,
    check_gated,
    fed_rows,
    gated_states,
)
from refattn.layer_norm import EPSILON, layer_norm, layer_norm_backward
from refattn.multihead_backward import from_heads, to_output_weight, to_weight
from refattn.projections import pack_output, split_heads, sum_outer


class GatedGradients(NamedTuple):
    """Gradients in the order of the inputs; those of the media's norm are None without it."""

    d_query_input: Array
    d_media: Array
    d_norm_weight: Array
    d_norm_bias: Array
    d_w_query: Array
    d_w_key: Array
    d_w_value: Array
    d_w_output: Array
    d_attention_gate: Array
    d_feed_forward_norm_weight: Array
    d_feed_forward_norm_bias: Array
    d_w_up: Array
    d_w_down: Array
    d_feed_forward_gate: Array
    d_media_norm_weight: Array | None
    d_media_norm_bias: Array | None


@np.errstate(all="ignore")
def gated_cross_attention_backward(
    d_output: Array,
    query_input: Array,
    media: Array,
    parameters: GatedParameters,
    *,
    media_locations: Array | None = None,
    attend: str = "immediate",
    before_media: str = "zero",
    cached_media: bool = False,
    activation: str = "squared_relu",
    norm_epsilon: float = EPSILON,
    scale: float | None = None,
) -> GatedGradients:
    """Return the gradients of gated cross-attention, those of all parameters included.

    Spec: FLA-S22, FLA-S23, OWN-MEDIA1, OWN-NORM1, OWN-ACTIVATION1, OWN-BACKWARD1, OWN-ROUND1.

        dF = tanh(α_dense) ∘ dO,   dα_dense = (1 - tanh²(α_dense)) ∘ Σ dO ∘ F
        dY = dO + LN'(act'(LN(Y) W_up) ∘ dF W_downᵀ · W_upᵀ)
        dA = tanh(α_xattn) ∘ dY,   dα_xattn = (1 - tanh²(α_xattn)) ∘ Σ dY ∘ A

    Args:
        d_output: dO (b, n, e).
        query_input: as for `gated_cross_attention`, and so on.
        media: as for `gated_cross_attention`.
        parameters: as for `gated_cross_attention`.
        media_locations: as for `gated_cross_attention`.
        attend: as for `gated_cross_attention`.
        before_media: as for `gated_cross_attention`.
        cached_media: as for `gated_cross_attention`.
        activation: as for `gated_cross_attention`.
        norm_epsilon: as for `gated_cross_attention`.
        scale: as for `gated_cross_attention`.

    Returns:
        The gradients, each with the shape and dtype of what it belongs to.

    Raises:
        ShapeError, DtypeError, OptionError, MemoryLimitError: as `gated_cross_attention`.
    """
    function = "gated_cross_attention_backward"
    asked = GatedOptions(attend, before_media, cached_media, activation, norm_epsilon, scale)
    check_arrays(function, d_output=d_output)
    check_gated(function, query_input, media, parameters, asked, d_output)
    states = gated_states(function, query_input, media, parameters, media_locations, asked)
    p = GatedParameters(*(None if w is None else widen(w) for w in parameters))
    dY, dense = _feed_forward_backward(widen(d_output), states, p, asked)
    dX, d_media, attended = _attention_backward(dY, query_input, media, states, p, asked)
    found = {"d_query_input": dX, "d_media": d_media, **attended, **dense}
    rounded = {name: None if g is None else narrow(g, query_input) for name, g in found.items()}
    return GatedGradients(**rounded)


def _feed_forward_backward(
    dO: Array, states: GatedStates, p: GatedParameters, asked: GatedOptions
) -> tuple[Array, dict[str, Array]]:
    """Return the gradient between the two branches, and those of the feed-forward."""
    xp = array_namespace(dO)
    norm = (states.middle, p.feed_forward_norm_weight, p.feed_forward_norm_bias)
    rows = layer_norm(*norm, epsilon=asked.norm_epsilon)
    dF = fed_rows(xp.tanh(p.feed_forward_gate) * dO, states.seen, asked)
    d_hidden = dF @ xp.matrix_transpose(p.w_down)
    d_hidden = d_hidden * activation_slope(states.hidden, asked.activation)
    d_rows = d_hidden @ xp.matrix_transpose(p.w_up)
    d_middle, d_weight, d_bias = layer_norm_backward(d_rows, *norm, epsilon=asked.norm_epsilon)
    return dO + d_middle, {
        "d_feed_forward_norm_weight": d_weight,
        "d_feed_forward_norm_bias": d_bias,
        "d_w_up": sum_outer(rows, d_hidden),
        "d_w_down": sum_outer(activate(states.hidden, asked.activation), dF),
        "d_feed_forward_gate": _gate_backward(p.feed_forward_gate, dO, states.fed),
    }


def _attention_backward(
    dY: Array,
    query_input: Array,
    media: Array,
    states: GatedStates,
    p: GatedParameters,
    asked: GatedOptions,
) -> tuple[Array, Array, dict[str, Array | None]]:
    """Return the gradients of text and media, and those of the attention's parameters."""
    xp = array_namespace(dY)
    dA = xp.tanh(p.attention_gate) * dY
    d_head = split_heads(dA @ xp.matrix_transpose(pack_output(p.w_output)), p.w_output.shape[0])
    options = attention_options(states.seen, asked)
    dQ, dK, dV, *_ = attention_backward(d_head, *states.heads, **options)
    d_text, d_weight, d_bias = layer_norm_backward(
        from_heads(dQ, p.w_query),
        widen(query_input),
        p.norm_weight,
        p.norm_bias,
        epsilon=asked.norm_epsilon,
    )
    d_tokens = from_heads(dK, p.w_key) + from_heads(dV, p.w_value)
    d_tokens, d_media_weight, d_media_bias = _media_norm_backward(d_tokens, media, p, asked)
    found = {
        "d_norm_weight": d_weight,
        "d_norm_bias": d_bias,
        "d_w_query": to_weight(states.text, dQ),
        "d_w_key": to_weight(states.media, dK),
        "d_w_value": to_weight(states.media, dV),
        "d_w_output": to_output_weight(states.head, dA),
        "d_attention_gate": _gate_backward(p.attention_gate, dY, states.attended),
        "d_media_norm_weight": d_media_weight,
        "d_media_norm_bias": d_media_bias,
    }
    return dY + d_text, xp.reshape(d_tokens, media.shape), found


def _media_norm_backward(
    d_tokens: Array, media: Array, p: GatedParameters, asked: GatedOptions
) -> tuple[Array, Array | None, Array | None]:
    """Return the gradients of the media and of their norm, where there is one."""
    if p.media_norm_weight is None:
        return d_tokens, None, None
    tokens = array_namespace(media).reshape(widen(media), d_tokens.shape)
    norm = (tokens, p.media_norm_weight, p.media_norm_bias)
    gradients = layer_norm_backward(d_tokens, *norm, epsilon=asked.norm_epsilon)
    return gradients.d_x, gradients.d_weight, gradients.d_bias


def _gate_backward(gate: Array, d_rows: Array, rows: Array) -> Array:
    """Return the gradient of a gate from that of its branch, summed where one serves all."""
    xp = array_namespace(gate)
    by_feature = xp.sum(d_rows * rows, axis=(0, 1))
    if gate.shape[0] == 1:
        by_feature = xp.sum(by_feature, keepdims=True)
    return (1.0 - xp.tanh(gate) ** 2) * by_feature
