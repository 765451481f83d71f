"""Keras 3's GroupQueryAttention, stated over the reference's attention.

It differs from Keras 3's MultiHeadAttention beyond its grouped heads: the query's mask is read,
and a mask of numbers has two readings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from refattn.arrays import Array
from refattn.checks import (
    ShapeError,
    check_arrays,
    check_counts,
    check_flag,
    describe,
    given,
)
from refattn.dialects.conventions import Dialect
from refattn.dialects.keras3_mha import CONVENTIONS, EXCEPTIONS
from refattn.dialects.keras_arguments import check_call, check_dropout
from refattn.dialects.keras_layer import (
    Call,
    LayerGradients,
    backward,
    forward,
)
from refattn.dialects.keras_masks import both, merged
from refattn.dialects.keras_weights import Form, Layer

FUNCTION = "keras3.GroupQueryAttention"
"""The name in error sentences."""

NUMBERS: dict[str, str] = {"alone, with scores or dropout": "above 1/2", "else": "as bool"}
"""The two readings of a mask that is not bool."""

DIALECT = Dialect(
    name="keras_gqa_3_15",
    alias="keras3_gqa",
    system="Keras",
    version="3.15 (torch backend, CPU)",
    sentence="keras.layers.GroupQueryAttention.",
    functions=("refattn.dialects.keras3_gqa.GroupQueryAttention",),
    conventions={
        **CONVENTIONS,
        "float_mask": NUMBERS,
        "integer_mask": NUMBERS,
        "empty_row": {"fused": "uniform", "scores or dropout": "zero"},
        "softmax_dtype": {"fused": "float32", "scores or dropout": "computing dtype"},
        "head_map": "interleave",
    },
    exceptions=(
        "lengths of key and value that differ: Keras does not look, and its backend may not; "
        "refused here.",
        *EXCEPTIONS,
    ),
)
"""What Keras 3.15 does."""


@dataclass(frozen=True)
class GroupQueryAttention(Layer):
    """keras.layers.GroupQueryAttention with Keras's constructor; see `set_weights`.

    Spec: VAS-S322a, VAS-S322b, OWN-GQA1, OWN-GATE1, OWN-WINDOW1, OWN-DROPOUT1.

    Args:
        head_dim: d, features of a head.
        num_query_heads: h, a multiple of the next.
        num_key_value_heads: h_k.
        dropout: chance that a weight is dropped while training.
        use_bias: whether the projections have one.
        sliding_window: how far a key must be away to be forbidden, tokens; None = no window.
        flash_attention: whether dropout and returned scores are refused.
        use_gate: whether σ(x W + b) of the query multiplies what the heads return.
        seed: of Keras's own dropout; not read, since the keep mask is given.
        weights: by name; see `set_weights`.

    Raises:
        OptionError, ShapeError: an argument is refused.
    """

    head_dim: int
    num_query_heads: int
    num_key_value_heads: int
    dropout: float = 0.0
    use_bias: bool = True
    sliding_window: int | None = None
    flash_attention: bool | None = None
    use_gate: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        h, h_k, _ = check_counts(
            FUNCTION,
            num_query_heads=self.num_query_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
        )
        check_counts(FUNCTION, **given(sliding_window=self.sliding_window))
        check_flag(FUNCTION, use_bias=self.use_bias, use_gate=self.use_gate)
        check_dropout(FUNCTION, self.dropout, self.flash_attention)
        if h % h_k:
            raise ShapeError(
                f"num_query_heads is {h}, but num_key_value_heads is {h_k}; the first must be a "
                f"multiple of the second [{FUNCTION}]"
            )

    @property
    def form(self) -> Form:
        """What fixes the shapes of the weights."""
        d, h, h_k = self.head_dim, self.num_query_heads, self.num_key_value_heads
        return Form(FUNCTION, h, h_k, d, d, None, self.use_bias, self.use_gate)

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
    ) -> Any:
        """Return the output, or output and scores if those are asked for.

        Spec: VAS-S322a, VAS-S323a, OWN-GQA1, OWN-MASK1, OWN-CAUSAL1, OWN-EMPTY1, OWN-BIAS1,
            OWN-DROPOUT1, OWN-WEIGHTS1, OWN-WINDOW1.

        Args:
            query: (b, n_q, e_q).
            value: (b, n_k, e_v).
            key: (b, n_k, e_k); value if None.
            query_mask: (b, n_q), what is not 0 attends; also a mask that hangs on the query.
            value_mask: (b, n_k), likewise.
            key_mask: (b, n_k), likewise.
            attention_mask: (b, n_q, n_k); heads, or heads and batch, may be missing. What is not
                0 attends; beside no other mask, with scores or dropout, what is above 1/2.
            return_attention_scores: whether the weights before dropout are returned, too.
            training: whether dropout acts; None is False.
            use_causal_mask: whether a query sees keys up to its own row only.
            keep: bool, shape of the scores: the weights that dropout keeps.

        Returns:
            output: (b, n_q, e_q), in the weights' dtype.
            scores: (b, h, n_q, n_k), in the weights' dtype.

        Raises:
            ShapeError, DtypeError, OptionError: where Keras errs, and for the named exceptions.
        """
        output, scores = forward(self._call(
            query, value, key, query_mask, value_mask, key_mask, attention_mask,
            return_attention_scores, training, use_causal_mask, keep,
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
        d_scores: Array | None = None,
    ) -> LayerGradients:
        """Return the gradients of the inputs and of every weight.

        Spec: OWN-BACKWARD1, OWN-GQA1, VAS-S322a, OWN-WEIGHTS1.

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
            d_scores: gradient of the loss by the returned scores; None = not read.

        Returns:
            The gradients, each with the shape and dtype of what it belongs to.

        Raises:
            ShapeError, DtypeError, OptionError: as the forward call, or a cotangent does not fit.
        """
        call = self._call(
            query, value, key, query_mask, value_mask, key_mask, attention_mask,
            return_attention_scores, training, use_causal_mask, keep,
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
    ) -> Call:
        """Return the arguments in the terms of all of Keras's layers."""
        check_call(FUNCTION, self.weights, return_scores, training, causal, self.flash_attention)
        check_arrays(FUNCTION, query=query, value=value)
        if query.ndim != 3:
            raise ShapeError(
                f"query has {query.ndim} axes, but it must have 3 "
                f"{describe(FUNCTION, {'query': query})}"
            )
        masks = {"query_mask": query_mask, "value_mask": value_mask, "key_mask": key_mask}
        mask = merged(FUNCTION, query, value, masks, causal=causal, window=self.sliding_window)
        fused = self.dropout == 0 and not return_scores
        if attention_mask is not None:
            check_arrays(FUNCTION, attention_mask=attention_mask)
            halved = mask is None and not fused and attention_mask.dtype != bool
            allowed = attention_mask > _half(attention_mask) if halved else attention_mask != 0
            mask = both(FUNCTION, "attention_mask", mask, allowed)
        rate = self.dropout if training else 0.0
        return Call(
            self.form, self.weights, query, value, key, (1,),
            mask, "zero", rate,
            keep if rate else None, return_scores, fused,
        )  # fmt: skip


def _half(mask: Array) -> Any:
    """Return 1/2 in a mask's dtype, where it is 0 among integers."""
    return np.asarray(0.5).astype(mask.dtype)
