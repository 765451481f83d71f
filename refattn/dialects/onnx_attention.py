"""ONNX's operator Attention, operator sets 23 to 25, stated over the reference's attention.

The three operators are one rule: each later one takes an input or two attributes more. Where the
function that defines the operator and ONNX's evaluator contradict each other, the function rules.
"""

from __future__ import annotations

from collections.abc import Mapping

from refattn.arrays import Array
from refattn.dialects.conventions import Choice, Dialect
from refattn.dialects.onnx_attention_call import UNBOUNDED, AttentionOutputs, Node, run

CONVENTIONS: Mapping[str, Choice] = {
    "argument_order": "query key value",
    "layout": {"4 axes": "heads length features", "3 axes": "batch length features"},
    "batch_axes": "equal",
    "projections": "none",
    "default_scale": "1/sqrt(d_k)",
    "causal_alignment": {"past_key": "offset", "else": "top_left"},
    "mask_polarity": "True attends",
    "float_mask": "added",
    "integer_mask": "added",
    "mask_with_causal": "and",
    "masked_cell": "add",
    "empty_row": "zero",
    "no_keys": "refused",
    "head_map": "interleave",
    "window": "none",
    "softcap": "before bias",
    "sinks": "none",
    "dropout": "none",
    "returned_weights": {"qk_matmul_output_mode 3": "before dropout", "else": "none"},
    "weights_over_heads": {"qk_matmul_output_mode 3": "each by default", "else": "none"},
    "softmax_dtype": {"softmax_precision": "as asked", "else": "query dtype"},
}
"""What operator set 23 fixes."""

LENGTHS: Choice = {"past_key": "offset", "nonpad_kv_seqlen": "offset", "else": "top_left"}
"""Causal alignment since operator set 24: valid keys of an item less the queries, too."""

EXCEPTIONS = (
    "evaluator, qk_matmul_output_mode 0 beside a softcap: it gives the capped logits; here they "
    "are raw, as in the operator's function.",
    "evaluator, attn_mask of one row or one axis beside is_causal: it reads the causal rule of "
    "row 0 for all rows, or errs; here each row has its own, as in the operator's function.",
    "scale < 0: ONNX takes its root, which is NaN; refused here.",
    "numbers that the operator does not name (is_causal 2, qk_matmul_output_mode 4): ONNX reads "
    "them as 1 or 0; refused here.",
    "q_num_heads and kv_num_heads beside operands of 4 axes, operands of 3 and 4 axes in one call, "
    "batch axes and masks that are larger than the logits': ONNX's evaluator and the operator's "
    "function err, or let NumPy broadcast, and differ; refused here.",
    "value of another dtype than query, which the schema allows: the operator's function errs; "
    "refused here.",
    "softmax_precision narrower than the computing dtype, and 16-bit operands: ONNX rounds every "
    "stage to them; here all is computed in float32 or wider, and rounded once.",
)
"""What ONNX does and these functions do not, whatever the operator set."""

UNPADDED = (
    "evaluator, attn_mask of fewer keys: it forbids the missing ones, as later operator sets do; "
    "here one key is for all and any other number refused, as in the operator's function.",
)
"""What the evaluator does beyond operator set 23."""


def _dialect(opset: int, exceptions: tuple[str, ...], changed: Mapping[str, Choice]) -> Dialect:
    """Return the dialect of an operator set."""
    return Dialect(
        name=f"onnx_attention_{opset}",
        alias=f"onnx_{opset}",
        system="ONNX",
        version=f"1.23, operator set {opset}",
        sentence="The operator Attention.",
        functions=(f"refattn.dialects.onnx_attention.attention_{opset}",),
        conventions={**CONVENTIONS, **changed},
        exceptions=EXCEPTIONS + exceptions,
    )


DIALECTS = (
    _dialect(23, UNPADDED, {}),
    _dialect(24, (), {"causal_alignment": LENGTHS}),
    _dialect(25, (), {"causal_alignment": LENGTHS, "window": "inclusive"}),
)
"""One dialect an operator set."""


def attention_23(
    Q: Array,
    K: Array,
    V: Array,
    attn_mask: Array | None = None,
    past_key: Array | None = None,
    past_value: Array | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
) -> AttentionOutputs:
    """Return the outputs of a node of operator set 23.

    Spec: VAS-EQ1, OWN-SCALE1, OWN-MASK1, OWN-BIAS1, OWN-CAUSAL1, OWN-CACHE1, OWN-EMPTY1,
        OWN-GQA1, OWN-SOFTCAP1, OWN-POISON1, OWN-WEIGHTS1.

        Y = attention(Q, [past K], [past V]; mask or bias, softcap before it, empty rows 0)

    Args:
        Q: (b, h, n_q, d_k), or (b, n_q, h·d_k) with both numbers of heads.
        K: (b, h_k, n_k, d_k), or (b, n_k, h_k·d_k) likewise.
        V: (b, h_k, n_k, d_v), or (b, n_k, h_k·d_v) likewise.
        attn_mask: bool, True = attend, or numbers, added; broadcastable to the logits.
        past_key: (b, h_k, n_c, d_k), keys that stand before K.
        past_value: (b, h_k, n_c, d_v).
        is_causal: 1 = a query sees the past and the keys up to its own row.
        kv_num_heads: h_k, with operands of 3 axes only.
        q_num_heads: h, likewise.
        qk_matmul_output_mode: what the fourth output holds: the logits scaled (0), capped (1),
            with the mask (2), or the weights (3).
        scale: factor of the logits; 1/√d_k if None.
        softcap: c of c·tanh(S/c); none if it is not above 0.
        softmax_precision: ONNX's number of a float dtype; a hint here.

    Returns:
        Y: (b, h, n_q, d_v), or (b, n_q, h·d_v), in the dtype of Q.
        present_key: (b, h_k, n_c + n_k, d_k).
        present_value: (b, h_k, n_c + n_k, d_v).
        qk_matmul_output: (b, h, n_q, n_c + n_k).

    Raises:
        ShapeError, DtypeError, OptionError: where ONNX errs, and for the named exceptions.
    """
    node = Node(
        Q, K, V, attn_mask, past_key, past_value, None, is_causal, kv_num_heads, UNBOUNDED,
        q_num_heads, qk_matmul_output_mode, UNBOUNDED, scale, softcap, softmax_precision,
    )  # fmt: skip
    return run(node, 23)


def attention_24(
    Q: Array,
    K: Array,
    V: Array,
    attn_mask: Array | None = None,
    past_key: Array | None = None,
    past_value: Array | None = None,
    nonpad_kv_seqlen: Array | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
) -> AttentionOutputs:
    """Return the outputs of a node of operator set 24: a cache of its own, and shorter masks.

    Spec: VAS-EQ1, OWN-MASK1, OWN-CAUSAL1, OWN-CACHE1, OWN-LENGTH1.

    Args:
        Q: as in `attention_23`, and so on.
        K: as in `attention_23`.
        V: as in `attention_23`.
        attn_mask: as in `attention_23`; keys that it lacks are forbidden.
        past_key: as in `attention_23`.
        past_value: as in `attention_23`.
        nonpad_kv_seqlen: (b,), int64: rows of K and V beyond are forbidden, and a causal query
            row i stands at nonpad_kv_seqlen - n_q + i.
        is_causal: as in `attention_23`.
        kv_num_heads: as in `attention_23`.
        q_num_heads: as in `attention_23`.
        qk_matmul_output_mode: as in `attention_23`.
        scale: as in `attention_23`.
        softcap: as in `attention_23`.
        softmax_precision: as in `attention_23`.

    Returns:
        The outputs of `attention_23`.

    Raises:
        ShapeError, DtypeError, OptionError: where ONNX errs, and for the named exceptions.
    """
    node = Node(
        Q, K, V, attn_mask, past_key, past_value, nonpad_kv_seqlen, is_causal, kv_num_heads,
        UNBOUNDED, q_num_heads, qk_matmul_output_mode, UNBOUNDED, scale, softcap,
        softmax_precision,
    )  # fmt: skip
    return run(node, 24)


def attention_25(
    Q: Array,
    K: Array,
    V: Array,
    attn_mask: Array | None = None,
    past_key: Array | None = None,
    past_value: Array | None = None,
    nonpad_kv_seqlen: Array | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = UNBOUNDED,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = UNBOUNDED,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
) -> AttentionOutputs:
    """Return the outputs of a node of operator set 25: windows.

    Spec: VAS-EQ1, OWN-WINDOW1, OWN-CAUSAL1, OWN-CACHE1, OWN-LENGTH1.

    Args:
        Q: as in `attention_24`, and so on.
        K: as in `attention_24`.
        V: as in `attention_24`.
        attn_mask: as in `attention_24`.
        past_key: as in `attention_24`.
        past_value: as in `attention_24`.
        nonpad_kv_seqlen: as in `attention_24`.
        is_causal: as in `attention_24`.
        kv_num_heads: as in `attention_24`.
        left_window_size: tokens before a query's position that it sees; -1 = all.
        q_num_heads: as in `attention_24`.
        qk_matmul_output_mode: as in `attention_24`.
        right_window_size: tokens after it, likewise.
        scale: as in `attention_24`.
        softcap: as in `attention_24`.
        softmax_precision: as in `attention_24`.

    Returns:
        The outputs of `attention_23`.

    Raises:
        ShapeError, DtypeError, OptionError: where ONNX errs, and for the named exceptions.
    """
    node = Node(
        Q, K, V, attn_mask, past_key, past_value, nonpad_kv_seqlen, is_causal, kv_num_heads,
        left_window_size, q_num_heads, qk_matmul_output_mode, right_window_size, scale, softcap,
        softmax_precision,
    )  # fmt: skip
    return run(node, 25)
