"""A node of ONNX's Attention, checked and turned into one attention of ours."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refattn.arrays import FLOATS, Array, dtype_name, narrow
from refattn.attention import attention, attention_weights, linear_bias, scaled_logits, soften
from refattn.checks import (
    DtypeError,
    OptionError,
    ShapeError,
    check_arrays,
    check_counts,
    check_finite,
    check_floats,
    check_shapes,
    describe,
    given,
    is_integer,
    shown,
)
from refattn.options import AttentionOptions, resolve
from refattn.projections import merge_heads, split_heads

FUNCTION = "Attention"
"""The name in error sentences."""

STAGES = ("logits", "capped", "sum", "weights")
"""What qk_matmul_output holds in modes 0 to 3."""

PRECISIONS = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}
"""Dtypes of softmax_precision by ONNX's numbers."""

PADDED_SINCE = 24
"""The operator set since which a mask of fewer keys is filled up with forbidden ones."""

UNBOUNDED = -1
"""The window size of a side without an end."""

CONVENTIONS: AttentionOptions = {
    "softcap_order": "before_bias",
    "head_map": "interleave",
    "empty_row": "zero",
    "masked": "add",
}
"""What the operator means since onnx 1.23, beyond its attributes."""


class AttentionOutputs(NamedTuple):
    """The outputs of a node, in the order of its schema; every one is given."""

    Y: Array
    present_key: Array
    present_value: Array
    qk_matmul_output: Array


class Node(NamedTuple):
    """Inputs and attributes of a node, by the operator's names and with its defaults."""

    Q: Array
    K: Array
    V: Array
    attn_mask: Array | None = None
    past_key: Array | None = None
    past_value: Array | None = None
    nonpad_kv_seqlen: Array | None = None
    is_causal: int = 0
    kv_num_heads: int | None = None
    left_window_size: int = UNBOUNDED
    q_num_heads: int | None = None
    qk_matmul_output_mode: int = 0
    right_window_size: int = UNBOUNDED
    scale: float | None = None
    softcap: float = 0.0
    softmax_precision: int | None = None


def run(node: Node, opset: int, **conventions: Any) -> AttentionOutputs:
    """Return the outputs of a node.

    Spec: VAS-EQ1, OWN-CACHE1, OWN-LENGTH1, OWN-WEIGHTS1.

    Args:
        node: inputs and attributes.
        opset: 23, 24 or 25.
        conventions: choices in place of `CONVENTIONS`.

    Raises:
        ShapeError, DtypeError, OptionError: an argument is refused.
    """
    check_attributes(node)
    Q, K, V = operands(node)
    chosen = CONVENTIONS | options(node, opset, (*Q.shape[:-1], K.shape[-2]))
    chosen |= conventions  # type: ignore[typeddict-item]
    output = attention(Q, K, V, **chosen).output
    shown_stage = stage(STAGES[node.qk_matmul_output_mode], Q, K, V, chosen)
    return AttentionOutputs(merge_heads(output) if node.Q.ndim == 3 else output, K, V, shown_stage)


def check_attributes(node: Node) -> None:
    """Check the numbers among the attributes.

    Raises:
        OptionError: one is none that the operator names.
    """
    check_finite(FUNCTION, softcap=node.softcap, **given(scale=node.scale))
    if node.scale is not None and node.scale < 0:
        raise OptionError(
            f"scale is {shown(node.scale)}, but its root is taken, so that it must be at least 0 "
            f"[{FUNCTION}]"
        )
    for name, allowed in (
        ("is_causal", (0, 1)),
        ("qk_matmul_output_mode", range(len(STAGES))),
        ("softmax_precision", (None, *PRECISIONS)),
    ):
        if getattr(node, name) not in allowed:
            raise OptionError(
                f"{name} is {shown(getattr(node, name))}, but it must be one of "
                f"{', '.join(map(str, allowed))} [{FUNCTION}]"
            )
    for name in ("left_window_size", "right_window_size"):
        size = getattr(node, name)
        if not is_integer(size) or size < UNBOUNDED:
            raise OptionError(f"{name} is {shown(size)}, but it must be -1 or a count [{FUNCTION}]")


def operands(node: Node) -> tuple[Array, Array, Array]:
    """Return Q, and K and V after those of the past, as (b, h, n, d), all checked.

    Raises:
        ShapeError, DtypeError, OptionError: an argument is refused.
    """
    arrays = {"Q": node.Q, "K": node.K, "V": node.V}
    check_arrays(FUNCTION, **arrays)
    counts = given(q_num_heads=node.q_num_heads, kv_num_heads=node.kv_num_heads)
    if {array.ndim for array in arrays.values()} == {3} and len(counts) == 2:
        check_counts(FUNCTION, **counts)
        heads = (counts["q_num_heads"], *[counts["kv_num_heads"]] * 2)
        Q, K, V = (split_heads(a, h) for a, h in zip(arrays.values(), heads, strict=True))
    elif {array.ndim for array in arrays.values()} == {4} and not counts:
        Q, K, V = arrays.values()
    else:
        raise ShapeError(
            f"Q has {node.Q.ndim} axes and {len(counts)} of q_num_heads and kv_num_heads, but "
            f"operands have all 4 axes and none of them, or all 3 and both "
            f"{describe(FUNCTION, arrays)}"
        )
    if (node.past_key is None) != (node.past_value is None):
        raise OptionError(
            f"past_key is {_presence(node.past_key)}, but past_value is "
            f"{_presence(node.past_value)}; they go together [{FUNCTION}]"
        )
    if node.nonpad_kv_seqlen is not None and node.past_key is not None:
        raise OptionError(
            f"nonpad_kv_seqlen is given beside past_key, but a cache is one of them [{FUNCTION}]"
        )
    sizes = check_shapes(
        FUNCTION,
        Q=(Q, "b h n_q d_k"),
        K=(K, "b h_k n_k d_k"),
        V=(V, "b h_k n_k d_v"),
        past_key=(node.past_key, "b h_k n_c d_k or None"),
        past_value=(node.past_value, "b h_k n_c d_v or None"),
        nonpad_kv_seqlen=(node.nonpad_kv_seqlen, "b or None"),
    )
    past = given(past_key=node.past_key, past_value=node.past_value)
    check_floats(FUNCTION, Q=Q, K=K, V=V, **past)
    _check_mask(node, (sizes["b"], sizes["h"], sizes["n_q"]))
    K, V = (
        new if past is None else np.concat([past, new], axis=-2)
        for new, past in ((K, node.past_key), (V, node.past_value))
    )
    return Q, K, V


def _presence(array: Array | None) -> str:
    return "absent" if array is None else "given"


def _check_mask(node: Node, rows: tuple[int, int, int]) -> None:
    """Check a mask but for its last axis, and lengths.

    Raises:
        DtypeError, ShapeError: they do not fit.
    """
    lengths, mask = node.nonpad_kv_seqlen, node.attn_mask
    if lengths is not None and lengths.dtype != np.int64:
        raise DtypeError(
            f"nonpad_kv_seqlen has dtype {lengths.dtype}, but it must be int64 [{FUNCTION}]"
        )
    if mask is None:
        return
    check_arrays(FUNCTION, Q=node.Q, attn_mask=mask)
    if mask.dtype.kind not in "biu" and dtype_name(mask) not in FLOATS:
        raise DtypeError(
            f"attn_mask has dtype {mask.dtype}, but it must be bool or a number [{FUNCTION}]"
        )
    pairs = zip(reversed(mask.shape[:-1]), reversed(rows), strict=False)
    if mask.ndim not in (1, 2, 3, 4) or any(a not in (1, b) for a, b in pairs):
        raise ShapeError(
            f"attn_mask has shape {mask.shape}, but the logits have {rows} before their keys; the "
            f"first must broadcast to the second [{FUNCTION}]"
        )


def options(node: Node, opset: int, logits: tuple[int, ...]) -> AttentionOptions:
    """Return the options of the reference that inputs and attributes mean."""
    n_q, n_k = logits[2:]
    options: AttentionOptions = {"causal": bool(node.is_causal), "scale": node.scale}
    if node.softcap > 0:  # 0 means none, and so does what is less
        options["softcap"] = node.softcap
    window = (node.left_window_size, node.right_window_size)
    if window != (UNBOUNDED, UNBOUNDED):
        options["window"] = [None if end == UNBOUNDED else end for end in window]
    if node.past_key is not None:
        options["alignment"] = node.past_key.shape[-2]
    if node.nonpad_kv_seqlen is not None:
        lengths = node.nonpad_kv_seqlen
        options["key_lengths"] = np.clip(lengths, 0, n_k)
        options["alignment"] = lengths - n_q
    if node.attn_mask is not None:
        mask = _filled(node.attn_mask, n_k) if opset >= PADDED_SINCE else node.attn_mask
        name = "mask" if mask.dtype == bool else "bias"
        _check_keys(mask, n_k)
        options[name] = mask if name == "mask" else mask.astype(node.Q.dtype)  # type: ignore[literal-required]
    return options


def _filled(mask: Array, n_k: int) -> Array:
    """Return a mask whose missing keys are forbidden; also where it has one key for all."""
    missing = n_k - mask.shape[-1]
    if missing <= 0:
        return mask
    forbidden = False if mask.dtype == bool else -np.inf
    mask = mask.astype(np.float64) if mask.dtype.kind in "iu" else mask
    return np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, missing)], constant_values=forbidden)


def _check_keys(mask: Array, n_k: int) -> None:
    """Check the last axis of a mask.

    Raises:
        ShapeError: it has neither one key nor all.
    """
    if mask.shape[-1] not in (1, n_k):
        raise ShapeError(
            f"attn_mask has {mask.shape[-1]} keys, but there are {n_k}; they must be equal "
            f"[{FUNCTION}]"
        )


def stage(name: str, Q: Array, K: Array, V: Array, options: AttentionOptions) -> Array:
    """Return one of `STAGES`: scaled logits, capped, with bias and masks, or the weights."""
    if name == "weights":
        return attention_weights(Q, K, V, **options)
    problem = resolve(FUNCTION, Q, K, V, options)
    logits = scaled_logits(problem)
    if name != "logits":
        logits = soften(problem, logits)
    if name == "sum":
        added = linear_bias(problem)
        logits = logits if added is None else logits + added
        logits = np.where(problem.allowed, logits, -np.inf)
    return narrow(logits, Q)
