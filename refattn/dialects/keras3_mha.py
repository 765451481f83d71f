"""Keras 3's MultiHeadAttention, stated over the reference's attention.

Keras has two forms, as torch has: with dropout, with returned scores or with more than one axis
between batch and features, it masks by a choice, and a row without a key is 0; else it hands a
large finite number to its backend's fused attention, and such a row is the mean of all values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from refattn.arrays import Array
from refattn.checks import check_arrays, check_counts, check_flag, given
from refattn.dialects.conventions import Choice, Dialect
from refattn.dialects.keras_arguments import (
    attended_axes,
    check_call,
    check_dropout,
    output_axes,
)
from refattn.dialects.keras_layer import (
    Call,
    LayerGradients,
    backward,
    forward,
)
from refattn.dialects.keras_masks import both, merged
from refattn.dialects.keras_weights import Form, Layer

FUNCTION = "keras3.MultiHeadAttention"
"""The name in error sentences."""

SCORES: Choice = {"return_attention_scores": "before dropout", "else": "none"}
"""The weights that a call of any layer of Keras returns."""

CONVENTIONS: dict[str, Choice] = {
    "argument_order": "query value key",
    "layout": "batch length features",
    "batch_axes": "broadcast",
    "projections": "one kernel each, by head",
    "default_scale": "1/sqrt(d_k)",
    "causal_alignment": "top_left",
    "mask_polarity": "True attends",
    "float_mask": "as bool",
    "integer_mask": "as bool",
    "mask_with_causal": "and",
    "masked_cell": {"fused": "add a finite number", "else, key": "select", "else, value": "add"},
    "empty_row": {"fused": "uniform", "scores, dropout or more axes": "zero"},
    "no_keys": {"torch": "zero", "numpy": "refused"},
    "head_map": "equal heads",
    "window": "exclusive",
    "softcap": "none",
    "sinks": "none",
    "dropout": "on the weights, kept ones scaled up",
    "returned_weights": SCORES,
    "weights_over_heads": {"return_attention_scores": "each by default", "else": "none"},
    "softmax_dtype": {"fused": "float32", "scores, dropout or more axes": "computing dtype"},
}
"""The choices of Keras 3's layers; grouped queries differ in a few."""

EXCEPTIONS = (
    "NaN and ∞: where causal attention alone is fused, torch does not read what is forbidden, and "
    "here it is sunk; in gradients, where Keras multiplies values that are not finite by 0.",
    "allowed logits near -1e9: Keras puts that number into masked ones, and so they count.",
    "float16 and bfloat16: Keras rounds after every stage; here results are rounded once.",
    "inputs and weights of several dtypes: floats are cast to the weights' dtype, as there; "
    "integers, which Keras promotes, are refused.",
    "flash_attention: what it refuses is refused here, but Keras refuses it on a CPU altogether.",
    "numbers: NumPy's integers are taken here and True is refused as a count; Keras does the "
    "opposite. Flags must be bools.",
    "gradients of a row without a key, fused: torch's kernel by tiles loses the row's sum beside "
    "its finite logits, and gives n_k times the derivative of what it returned; here once.",
    "masks longer than an axis of one key or head, on the numpy backend: it repeats what is one; "
    "refused here.",
    "no batch items: the fused attention does not look at the mask then; here it must fit.",
    "a second call whose shapes the first would have refused: Keras checks them once.",
    "initializers, regularizers and constraints: they belong to training, not to the function.",
)
"""What no layer of Keras 3 has here."""

DIALECT = Dialect(
    name="keras_mha_3_15",
    alias="keras3_mha",
    system="Keras",
    version="3.15 (torch backend, CPU)",
    sentence="keras.layers.MultiHeadAttention.",
    functions=("refattn.dialects.keras3_mha.MultiHeadAttention",),
    conventions=CONVENTIONS,
    exceptions=(
        "attention_axes that name the batch, the heads or an axis twice, or none: Keras builds an "
        "equation without a meaning, or errs; refused here.",
        "query_mask: Keras overwrites the argument by the mask that hangs on the query, and so it "
        "is not looked at; attached_query_mask states the mask that hangs there.",
        *EXCEPTIONS,
    ),
)
"""What Keras 3.15 does."""


@dataclass(frozen=True)
class MultiHeadAttention(Layer):
    """keras.layers.MultiHeadAttention with Keras's constructor; weights come by `set_weights`.

    Spec: VAS-S322a, VAS-S322b, OWN-AXES1, OWN-GATE1, OWN-WINDOW1, OWN-DROPOUT1.

    Args:
        num_heads: h.
        key_dim: d_k, features of a head's query and key.
        value_dim: d_v, features of a head's value; d_k if None.
        dropout: chance that a weight is dropped while training.
        use_bias: whether the projections have one.
        output_shape: trailing axes of the output; the features of query if None.
        attention_axes: axes of query and value that are attended over jointly; all between batch
            and features if None.
        sliding_window: how far a key must be away to be forbidden, tokens; None = no window.
        flash_attention: whether dropout and returned scores are refused.
        use_gate: whether σ(x W + b) of the query multiplies what the heads return.
        seed: of Keras's own dropout; not read, since the keep mask is given.
        weights: by name; see `set_weights`.

    Raises:
        OptionError: an argument is refused.
    """

    num_heads: int
    key_dim: int
    value_dim: int | None = None
    dropout: float = 0.0
    use_bias: bool = True
    output_shape: int | Sequence[int] | None = None
    attention_axes: int | Sequence[int] | None = None
    sliding_window: int | None = None
    flash_attention: bool | None = None
    use_gate: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        check_counts(FUNCTION, num_heads=self.num_heads, key_dim=self.key_dim)
        optional = given(value_dim=self.value_dim, sliding_window=self.sliding_window)
        check_counts(FUNCTION, **optional)
        check_flag(FUNCTION, use_bias=self.use_bias, use_gate=self.use_gate)
        check_dropout(FUNCTION, self.dropout, self.flash_attention)
        output_axes(FUNCTION, self.output_shape)

    @property
    def form(self) -> Form:
        """What fixes the shapes of the weights."""
        d_v, out = self.value_dim or self.key_dim, output_axes(FUNCTION, self.output_shape)
        h, d_k = self.num_heads, self.key_dim
        return Form(FUNCTION, h, h, d_k, d_v, out, self.use_bias, self.use_gate)

    def call(
        self,
        query: Array,
        value: Array,
        key: Array | None = None,
        query_mask: Array | None = None,
        value_mask: Array | None = None,
        key_mask: Array | None = None,
        attention_mask: Array | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        *,
        keep: Array | None = None,
        attached_query_mask: Array | None = None,
    ) -> Any:
        """Return the output, or output and scores if those are asked for.

        Spec: VAS-S322a, VAS-S323a, OWN-MASK1, OWN-CAUSAL1, OWN-EMPTY1, OWN-BIAS1, OWN-DROPOUT1,
            OWN-WEIGHTS1, OWN-WINDOW1.

        Args:
            query: (b, ..., e_q), one axis or more between batch and features.
            value: (b, ..., e_v).
            key: (b, ..., e_k), lengths of value; value if None.
            query_mask: not looked at.
            value_mask: (b, n_k), what is not 0 attends; also a mask that hangs on the value.
            key_mask: (b, n_k), likewise.
            attention_mask: (b, n_q, n_k), what is not 0 attends; heads, or all that stands before
                queries and keys, may be missing.
            return_attention_scores: whether the weights before dropout are returned, too.
            training: whether dropout acts; None is False.
            use_causal_mask: whether a query sees keys up to its own row only.
            keep: bool, shape of the scores: the weights that dropout keeps.
            attached_query_mask: (b, n_q), the mask that a layer before hung on the query.

        Returns:
            output: (b, ..., e_o), in the weights' dtype.
            scores: (b, ..., h, n_q..., n_k...), in the weights' dtype.

        Raises:
            ShapeError, DtypeError, OptionError: where Keras errs, and for the named exceptions.
        """
        output, scores = forward(self._call(
            query, value, key, query_mask, value_mask, key_mask, attention_mask,
            return_attention_scores, training, use_causal_mask, keep, attached_query_mask,
        ))  # fmt: skip
        return output if scores is None else (output, scores)

    __call__ = call

    def backward(
        self,
        d_output: Array,
        query: Array,
        value: Array,
        key: Array | None = None,
        query_mask: Array | None = None,
        value_mask: Array | None = None,
        key_mask: Array | None = None,
        attention_mask: Array | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        *,
        keep: Array | None = None,
        attached_query_mask: Array | None = None,
        d_scores: Array | None = None,
    ) -> LayerGradients:
        """Return the gradients of the inputs and of every weight.

        Spec: OWN-BACKWARD1, VAS-S322a, OWN-WEIGHTS1.

        Args:
            d_output: dO, shape of the output.
            query: as in the forward call, and so on.
            value: as in the forward call.
            key: as in the forward call.
            query_mask: as in the forward call.
            value_mask: as in the forward call.
            key_mask: as in the forward call.
            attention_mask: as in the forward call.
            return_attention_scores: as in the forward call.
            training: as in the forward call.
            use_causal_mask: as in the forward call.
            keep: as in the forward call.
            attached_query_mask: as in the forward call.
            d_scores: gradient of the loss by the returned scores; None = not read.

        Returns:
            The gradients, each with the shape and dtype of what it belongs to.

        Raises:
            ShapeError, DtypeError, OptionError: as the forward call, or a cotangent does not fit.
        """
        call = self._call(
            query, value, key, query_mask, value_mask, key_mask, attention_mask,
            return_attention_scores, training, use_causal_mask, keep, attached_query_mask,
        )  # fmt: skip
        return backward(call, d_output, d_scores)

    def _call(
        self,
        query: Array,
        value: Array,
        key: Array | None,
        query_mask: Array | None,
        value_mask: Array | None,
        key_mask: Array | None,
        attention_mask: Array | None,
        return_scores: bool,
        training: bool | None,
        causal: bool,
        keep: Array | None,
        attached_query_mask: Array | None,
    ) -> Call:
        """Return the arguments in the terms of all of Keras's layers."""
        check_call(FUNCTION, self.weights, return_scores, training, causal, self.flash_attention)
        check_arrays(FUNCTION, query=query, value=value)
        axes = attended_axes(FUNCTION, self.attention_axes, value.ndim)
        masks = {"query_mask": attached_query_mask, "value_mask": value_mask, "key_mask": key_mask}
        mask = merged(FUNCTION, query, value, masks, causal=causal, window=self.sliding_window)
        if attention_mask is not None:
            check_arrays(FUNCTION, attention_mask=attention_mask)
            mask = both(FUNCTION, "attention_mask", mask, attention_mask != 0)
        fused = self.dropout == 0 and not return_scores and query.ndim == 3
        rate = self.dropout if training else 0.0
        return Call(
            self.form, self.weights, query, value, key, axes, mask, "zero", rate,
            keep if rate else None, return_scores, fused,
        )  # fmt: skip
