"""Gated cross-attention: a text that looks at media through gates that start closed.

The block stands between layers of a language model. With both gates at 0 it is the identity, so
that the model is at first what it was without any media.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refattn.activations import ACTIVATIONS, activate
from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.attention import attention
from refattn.checks import (
    OptionError,
    ShapeError,
    check_arrays,
    check_computable,
    check_floats,
    check_option,
    check_positive,
    check_shapes,
    describe,
    given,
)
from refattn.layer_norm import EPSILON, layer_norm
from refattn.media import MediaMask, media_mask
from refattn.multihead import Projected, project
from refattn.options import AttentionOptions
from refattn.projections import merge_heads, pack_output


class GatedParameters(NamedTuple):
    """Parameters of the block: e features of the text, e_m of a medium, h heads, f hidden ones."""

    norm_weight: Array
    """γ of the text before the attention (e,)."""
    norm_bias: Array
    """β of the same (e,)."""
    w_query: Array
    """W^Q (h, e, d_k)."""
    w_key: Array
    """W^K (h, e_m, d_k)."""
    w_value: Array
    """W^V (h, e_m, d_v)."""
    w_output: Array
    """W^O by heads (h, d_v, e)."""
    attention_gate: Array
    """α_xattn, before its tanh: (1,), or one a feature (e,)."""
    feed_forward_norm_weight: Array
    """γ before the feed-forward (e,)."""
    feed_forward_norm_bias: Array
    """β of the same (e,)."""
    w_up: Array
    """(e, f)."""
    w_down: Array
    """(f, e)."""
    feed_forward_gate: Array
    """α_dense, before its tanh: (1,), or one a feature (e,)."""
    media_norm_weight: Array | None = None
    """γ of the media (e_m,); the media are taken as they are if None."""
    media_norm_bias: Array | None = None
    """β of the same (e_m,)."""


class GatedOptions(NamedTuple):
    """What the block may be told beside its arrays; see `gated_cross_attention`."""

    attend: str
    before_media: str
    cached_media: bool
    activation: str
    norm_epsilon: float
    scale: float | None


class GatedStates(NamedTuple):
    """What the forward pass computes and the backward pass reads again, in the computing dtype."""

    seen: MediaMask
    text: Array
    """LN(Y), (b, n, e)."""
    media: Array
    """The media in one row of tokens, normalised if asked for, (b, m·n_m, e_m)."""
    heads: Projected
    head: Array
    """(b, h, n, d_v)."""
    attended: Array
    """A, (b, n, e)."""
    middle: Array
    """Y after the gated attention, (b, n, e)."""
    hidden: Array
    """LN(Y) W_up, (b, n, f)."""
    fed: Array
    """F, (b, n, e)."""
    output: Array


@np.errstate(all="ignore")  # IEEE values travel silently, whatever the array library
def gated_cross_attention(
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
) -> Array:
    """Return the text after gated cross-attention to media and a gated feed-forward layer.

    Spec: FLA-S22, FLA-S23, OWN-MEDIA1, OWN-MEDIA2, OWN-NORM1, OWN-ACTIVATION1, OWN-SCALE1,
        OWN-POISON1, OWN-ROUND1, OWN-MEMORY1.

        Y ← Y + tanh(α_xattn) ∘ MultiHead(LN(Y), X, X)
        Y ← Y + tanh(α_dense) ∘ act(LN(Y) W_up) W_down

    Args:
        query_input: Y (b, n, e), the text.
        media: X (b, m, n_m, e_m): m media of n_m tokens.
        parameters: see `GatedParameters`.
        media_locations: (b, n) bool, True where a medium stands in the text; None lets every
            token see every medium.
        attend: `immediate`, the last medium before a token, or `preceding`, all before it.
        before_media: `zero`, `uniform` or `everything`: what a token before any medium reads.
        cached_media: media_locations (b, any) describes an earlier part of the text.
        activation: `squared_relu` or `gelu`.
        norm_epsilon: ε of the layer normalisations.
        scale: factor of the logits; None is 1/√d_k.

    Returns:
        (b, n, e), dtype of query_input.

    Raises:
        ShapeError: two shapes do not fit, or an item marks more media than it has.
        DtypeError: a dtype is not floating, or two differ, or media_locations is not bool.
        OptionError: an option is refused.
        MemoryLimitError: the n x m·n_m matrices do not fit into the free memory.
    """
    function = "gated_cross_attention"
    asked = GatedOptions(attend, before_media, cached_media, activation, norm_epsilon, scale)
    check_gated(function, query_input, media, parameters, asked)
    states = gated_states(function, query_input, media, parameters, media_locations, asked)
    return narrow(states.output, query_input)


def gated_states(
    function: str,
    query_input: Array,
    media: Array,
    parameters: GatedParameters,
    media_locations: Array | None,
    asked: GatedOptions,
) -> GatedStates:
    """Return every stage of the block.

    Spec: FLA-S22, FLA-S23, OWN-MEDIA1.
    """
    seen = media_mask(
        function,
        query_input,
        media,
        media_locations,
        attend=asked.attend,
        before_media=asked.before_media,
        cached_media=asked.cached_media,
    )
    xp = array_namespace(query_input)
    p = GatedParameters(*(None if w is None else widen(w) for w in parameters))
    Y, b = widen(query_input), query_input.shape[0]
    text = layer_norm(Y, p.norm_weight, p.norm_bias, epsilon=asked.norm_epsilon)
    X = xp.reshape(widen(media), (b, media.shape[1] * media.shape[2], media.shape[3]))
    if p.media_norm_weight is not None:
        X = layer_norm(X, p.media_norm_weight, p.media_norm_bias, epsilon=asked.norm_epsilon)
    heads = project(text, X, p.w_query, p.w_key, p.w_value)
    head = attention(*heads, **attention_options(seen, asked)).output
    A = merge_heads(head) @ pack_output(p.w_output)
    middle = Y + xp.tanh(p.attention_gate) * A
    rows = layer_norm(
        middle, p.feed_forward_norm_weight, p.feed_forward_norm_bias, epsilon=asked.norm_epsilon
    )
    hidden = rows @ p.w_up
    F = fed_rows(activate(hidden, asked.activation) @ p.w_down, seen, asked)
    output = middle + xp.tanh(p.feed_forward_gate) * F
    return GatedStates(seen, text, X, heads, head, A, middle, hidden, F, output)


def attention_options(seen: MediaMask, asked: GatedOptions) -> AttentionOptions:
    """Return what the attention of the block is told.

    Spec: OWN-MEDIA1.
    """
    empty_row = "uniform" if asked.before_media == "uniform" else "zero"
    return {"scale": asked.scale, "mask": seen.allowed, "empty_row": empty_row}


def fed_rows(rows: Array, seen: MediaMask, asked: GatedOptions) -> Array:
    """Return rows of the feed-forward branch, 0 where `everything` closes it.

    Spec: OWN-MEDIA1.
    """
    if asked.before_media != "everything":
        return rows
    xp = array_namespace(rows)
    return xp.where(seen.before[..., None], xp.zeros_like(rows), rows)


def check_gated(
    function: str,
    query_input: Array,
    media: Array,
    parameters: Any,
    asked: GatedOptions,
    d_output: Array | None = None,
) -> None:
    """Check every shape, dtype and number; positions of media are checked where they are read.

    Raises:
        ShapeError, DtypeError, OptionError: an argument is refused.
    """
    if not isinstance(parameters, GatedParameters):
        kind = type(parameters).__name__
        raise OptionError(
            f"parameters is of type {kind}, but it must be GatedParameters [{function}]"
        )
    check_option(function, "activation", asked.activation, ACTIVATIONS)
    check_positive(function, norm_epsilon=asked.norm_epsilon)
    shapes = (
        "e", "e", "h e d_k", "h e_m d_k", "h e_m d_v", "h d_v e", "g", "e", "e", "e f", "f e",
        "g_f", "e_m or None", "e_m or None",
    )  # fmt: skip
    named = parameters._asdict()
    sizes = check_shapes(
        function,
        query_input=(query_input, "b n e"),
        media=(media, "b m n_m e_m"),
        **{name: (named[name], shape) for name, shape in zip(named, shapes, strict=True)},
        d_output=(d_output, "b n e or None"),
    )
    for name, letter in (("attention_gate", "g"), ("feed_forward_gate", "g_f")):
        if sizes[letter] not in (1, sizes["e"]):
            raise ShapeError(
                f"{name} has {sizes[letter]} entries, but it must have 1 or e={sizes['e']} "
                f"{describe(function, {'query_input': query_input, name: named[name]})}"
            )
    if (parameters.media_norm_weight is None) != (parameters.media_norm_bias is None):
        raise OptionError(
            f"one of media_norm_weight and media_norm_bias is None, but they must be given both "
            f"or neither [{function}]"
        )
    arrays = {"query_input": query_input, "media": media}
    if media.shape[1] * media.shape[2] == 0:
        raise ShapeError(
            f"media has m={sizes['m']} media of n_m={sizes['n_m']} tokens, but both must be at "
            f"least 1 {describe(function, arrays)}"
        )
    check_floats(function, **arrays, **given(**named, d_output=d_output))
    check_arrays(function, **arrays)
    check_computable(function, query_input, norm_epsilon=asked.norm_epsilon)
