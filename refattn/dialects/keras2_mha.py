"""tf.keras 2's MultiHeadAttention, stated over the reference's attention.

A mask forbids nothing: -1e9 is added to a masked logit, so that a row without a key keeps its
relative weights as far as the dtype holds them beside 1e9. With `softmax_robust_masking` -1e9
takes the logit's place, and the mean of all values is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refattn.arrays import FLOATS, Array, dtype_name
from refattn.checks import (
    DtypeError,
    OptionError,
    ShapeError,
    check_arrays,
    check_counts,
    check_flag,
    describe,
    given,
    is_integer,
    shown,
)
from refattn.dialects.conventions import Dialect
from refattn.dialects.keras3_mha import CONVENTIONS
from refattn.dialects.keras_arguments import attended_axes, check_call, check_dropout, output_axes
from refattn.dialects.keras_layer import (
    Call,
    LayerGradients,
    backward,
    forward,
)
from refattn.dialects.keras_masks import both, merged
from refattn.dialects.keras_weights import Form, Layer

FUNCTION = "keras2.MultiHeadAttention"
"""The name in error sentences."""

SUNK = -1e9
"""What is added to a masked logit."""

NUMBERS: dict[str, str] = {
    "beside another mask": "as bool",
    "alone": "(1 - mask)·(-1e9) added",
    "alone, robust masking": "above 1/2",
}
"""The three readings of a mask that is not bool."""

DIALECT = Dialect(
    name="keras_mha_2_21",
    alias="keras2_mha",
    system="tf-keras",
    version="2.21 (CPU)",
    sentence="tf_keras.layers.MultiHeadAttention, which was tf.keras until TensorFlow 2.15.",
    functions=("refattn.dialects.keras2_mha.MultiHeadAttention",),
    conventions={
        **CONVENTIONS,
        "batch_axes": "equal",
        "float_mask": NUMBERS,
        "integer_mask": NUMBERS | {"alone, robust masking": "refused"},
        "masked_cell": {
            "softmax_robust_masking, key": "select",
            "softmax_robust_masking, value": "add",
            "else": "add a finite number",
        },
        "empty_row": {"softmax_robust_masking": "uniform", "else": "as unmasked, rounded"},
        "no_keys": "zero",
        "window": "none",
        "softmax_dtype": "computing dtype",
    },
    exceptions=(
        "attention_axes that are negative, or name the batch, the heads or an axis twice, or none: "
        "tf-keras builds an equation without a meaning, or errs; refused here.",
        "masks that hang on inputs of more than 3 axes: refused here.",
        "rows without a key over several axes: tf-keras divides by a sum that it loses beside 1e9, "
        "so that in float32 every weight of such a row is 1; here they sum to 1.",
        "masks longer than an axis of one query or key: tf-keras repeats it; refused here.",
        "NaN and ∞ in gradients with robust masking: tf-keras multiplies them by a weight of 0.",
        "float16 and bfloat16: tf-keras rounds after every stage; here results are rounded once.",
        "the gradient of a mask of floats: tf-keras has one; none here.",
        "inputs of integers and ragged tensors: refused here.",
        "counts of 0: refused here. Flags must be bools.",
        "initializers, regularizers and constraints: they belong to training, not to the function.",
    ),
)
"""What tf-keras 2.21 does."""


@dataclass(frozen=True)
class MultiHeadAttention(Layer):
    """tf_keras.layers.MultiHeadAttention with its constructor; weights come by `set_weights`.

    Spec: VAS-S322a, VAS-S322b, OWN-AXES1, OWN-DROPOUT1.

    Args:
        num_heads: h.
        key_dim: d_k, features of a head's query and key.
        value_dim: d_v, features of a head's value; d_k if None.
        dropout: chance that a weight is dropped while training.
        use_bias: whether the projections have one.
        output_shape: trailing axes of the output; the features of query if None.
        attention_axes: axes of query and value that are attended over jointly; all between batch
            and features if None.
        softmax_robust_masking: whether -1e9 takes the place of a masked logit.
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
    softmax_robust_masking: bool = False

    def __post_init__(self) -> None:
        check_counts(FUNCTION, num_heads=self.num_heads, key_dim=self.key_dim)
        if self.value_dim != 0:  # tf-keras takes 0 for None
            check_counts(FUNCTION, **given(value_dim=self.value_dim))
        check_flag(
            FUNCTION, use_bias=self.use_bias, softmax_robust_masking=self.softmax_robust_masking
        )
        check_dropout(FUNCTION, self.dropout, None)
        output_axes(FUNCTION, self.output_shape)

    @property
    def form(self) -> Form:
        """What fixes the shapes of the weights."""
        d_v, out = self.value_dim or self.key_dim, output_axes(FUNCTION, self.output_shape)
        h, d_k = self.num_heads, self.key_dim
        return Form(FUNCTION, h, h, d_k, d_v, out, self.use_bias, False)

    def call(
        self,
        query: Array,
        value: Array,
        key: Array | None = None,
        attention_mask: Array | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        *,
        keep: Array | None = None,
        query_mask: Array | None = None,
        value_mask: Array | None = None,
        key_mask: Array | None = None,
    ) -> Any:
        """Return the output, or output and scores if those are asked for.

        Spec: VAS-S322a, VAS-S323a, OWN-MASK1, OWN-CAUSAL1, OWN-EMPTY1, OWN-BIAS1, OWN-DROPOUT1,
            OWN-WEIGHTS1.

        Args:
            query: (b, ..., e_q), one axis or more between batch and features.
            value: (b, ..., e_v).
            key: (b, ..., e_k), lengths of value; value if None.
            attention_mask: (b, n_q, n_k), True = attend; heads, or all that stands before queries
                and keys, may be missing. For numbers see the dialect's conventions.
            return_attention_scores: whether the weights before dropout are returned, too.
            training: whether dropout acts; None is False.
            use_causal_mask: whether a query sees keys up to its own row only.
            keep: bool, shape of the scores: the weights that dropout keeps.
            query_mask: (b, n_q), the mask that a layer before hung on the query.
            value_mask: (b, n_k), likewise, on the value.
            key_mask: (b, n_k), likewise, on the key.

        Returns:
            output: (b, ..., e_o), in the weights' dtype.
            scores: (b, ..., h, n_q..., n_k...), in the weights' dtype.

        Raises:
            ShapeError, DtypeError, OptionError: where tf-keras errs, and for the named exceptions.
        """
        output, scores = forward(self._call(
            query, value, key, attention_mask, return_attention_scores, training,
            use_causal_mask, keep, query_mask, value_mask, key_mask,
        ))  # fmt: skip
        return output if scores is None else (output, scores)

    __call__ = call

    def backward(
        self,
        d_output: Array,
        query: Array,
        value: Array,
        key: Array | None = None,
        attention_mask: Array | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        *,
        keep: Array | None = None,
        query_mask: Array | None = None,
        value_mask: Array | None = None,
        key_mask: Array | None = None,
        d_scores: Array | None = None,
    ) -> LayerGradients:
        """Return the gradients of the inputs and of every weight.

        Spec: OWN-BACKWARD1, VAS-S322a, OWN-WEIGHTS1.

        Args:
            d_output: dO, shape of the output.
            query: as in the forward call, and so on.
            value: as in the forward call.
            key: as in the forward call.
            attention_mask: as in the forward call.
            return_attention_scores: as in the forward call.
            training: as in the forward call.
            use_causal_mask: as in the forward call.
            keep: as in the forward call.
            query_mask: as in the forward call.
            value_mask: as in the forward call.
            key_mask: as in the forward call.
            d_scores: gradient of the loss by the returned scores; None = not read.

        Returns:
            The gradients, each with the shape and dtype of what it belongs to.

        Raises:
            ShapeError, DtypeError, OptionError: as the forward call, or a cotangent does not fit.
        """
        call = self._call(
            query, value, key, attention_mask, return_attention_scores, training,
            use_causal_mask, keep, query_mask, value_mask, key_mask,
        )  # fmt: skip
        return backward(call, d_output, d_scores)

    def _call(
        self,
        query: Array,
        value: Array,
        key: Array | None,
        attention_mask: Array | None,
        return_scores: bool,
        training: bool | None,
        causal: bool,
        keep: Array | None,
        query_mask: Array | None,
        value_mask: Array | None,
        key_mask: Array | None,
    ) -> Call:
        """Return the arguments in the terms of all of Keras's layers."""
        check_call(FUNCTION, self.weights, return_scores, training, causal)
        check_arrays(FUNCTION, query=query, value=value)
        axes = self._axes(query, value, key)
        masks = {"query_mask": query_mask, "value_mask": value_mask, "key_mask": key_mask}
        for name, hung in given(**masks).items():
            check_arrays(FUNCTION, **{name: hung})
            if hung.ndim != 2:
                raise ShapeError(
                    f"{name} has {hung.ndim} axes, but it must have 2, (b, n) [{FUNCTION}]"
                )
        mask = merged(FUNCTION, query, value, masks, causal=causal)
        if attention_mask is not None:
            check_arrays(FUNCTION, attention_mask=attention_mask)
            if mask is None:
                mask = attention_mask
            else:
                mask = both(FUNCTION, "attention_mask", mask, attention_mask != 0)
        rate = self.dropout if training else 0.0
        if rate == 1:
            raise OptionError(f"dropout is 1, but in training it must be below 1 [{FUNCTION}]")
        return Call(
            self.form, self.weights, query, value, key, axes, self._sunk(mask), "uniform", rate,
            keep if rate else None, return_scores, False,
        )  # fmt: skip

    def _axes(self, query: Array, value: Array, key: Array | None) -> tuple[int, ...]:
        """Return the attended axes.

        Raises:
            OptionError: one is negative, or refused by `attended_axes`.
            ShapeError: batch axes of query and value, or of key and value, differ.
        """
        asked = self.attention_axes
        listed = asked if isinstance(asked, (tuple, list)) else (asked,)
        for axis in listed:
            if is_integer(axis) and axis < 0:
                raise OptionError(
                    f"attention_axes is {shown(asked)}, but it must count from 0 [{FUNCTION}]"
                )
        axes = attended_axes(FUNCTION, asked, value.ndim)
        arrays = {"query": query, "value": value} | given(key=key)
        batch = {
            name: tuple(n for a, n in enumerate(array.shape[:-1]) if a not in axes)
            for name, array in arrays.items()
        }
        for name, found in batch.items():
            if found != batch["value"]:
                raise ShapeError(
                    f"{name} has batch axes {found}, but value has {batch['value']}; they must be "
                    f"equal {describe(FUNCTION, arrays)}"
                )
        return axes

    def _sunk(self, mask: Array | None) -> Array | None:
        """Return a mask as what it does to the logits.

        Spec: OWN-MASK1, OWN-BIAS1.

        Raises:
            DtypeError: it is of integers, and softmax_robust_masking is True.
        """
        if mask is None:
            return None
        if not self.softmax_robust_masking:
            wide = self.weights["query/kernel"].dtype == np.float64
            dtype = np.float64 if wide else np.float32
            return np.asarray((1.0 - mask.astype(dtype)) * SUNK, dtype=dtype)
        if mask.dtype == bool:
            return mask
        if dtype_name(mask) not in FLOATS:
            raise DtypeError(
                f"attention_mask has dtype {dtype_name(mask)}, but beside no other mask robust "
                f"masking takes bool or floats [{FUNCTION}]"
            )
        return np.asarray(mask > 0.5)
