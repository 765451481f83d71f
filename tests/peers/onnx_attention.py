"""ONNX Attention and RotaryEmbedding nodes, told in the words of refattn.

A node says less than it means: what it leaves unsaid is fixed here by naming each convention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refattn.attention import attention, attention_weights, linear_bias, scaled_logits, soften
from refattn.options import resolve
from refattn.projections import merge_heads, split_heads
from refattn.rope import rotate

Arrays = dict[str, np.ndarray]

CONVENTIONS = {
    "softcap_order": "before_bias",
    "head_map": "interleave",
    "empty_row": "zero",
    "masked": "add",
}
"""What opset 23 to 25 means since onnx 1.23, beyond its attributes."""


INPUTS = {
    "Attention": "query key value attn_mask past_key past_value nonpad_kv_seqlen".split(),
    "RotaryEmbedding": "input cos_cache sin_cache position_ids".split(),
}
"""Names of a node's inputs, in the order of its schema."""

OUTPUTS = {
    "Attention": "Y present_key present_value qk_matmul_output".split(),
    "RotaryEmbedding": ["output"],
}
"""Names of a node's outputs, likewise."""


ATTRIBUTES = {
    "is_causal",
    "kv_num_heads",
    "left_window_size",
    "q_num_heads",
    "qk_matmul_output_mode",
    "right_window_size",
    "scale",
    "softcap",
    "softmax_precision",
}
"""Attributes of Attention that are understood; any other is refused.

softmax_precision asks for a dtype at least as wide as the inputs': the reference computes 16-bit
inputs in float32 (OWN-ROUND1) and rounds once, so it has nothing left to do.
"""


def node_inputs(node: Any, values: list[np.ndarray]) -> Arrays:
    """Return the inputs of a node by the names of its schema; omitted ones are absent."""
    present = [n for n, given in zip(INPUTS[node.op_type], node.input, strict=False) if given]
    return dict(zip(present, values, strict=True))


def run_attention(inputs: Arrays, attributes: Mapping[str, Any], **conventions: Any) -> Arrays:
    """Run an Attention node: Y, present_key, present_value and qk_matmul_output."""
    assert set(attributes) <= ATTRIBUTES, f"an unknown attribute: {set(attributes) - ATTRIBUTES}"
    query, key, value, flat = _heads(inputs, attributes)
    if "past_key" in inputs:
        key = np.concat([inputs["past_key"], key], axis=-2)
        value = np.concat([inputs["past_value"], value], axis=-2)
    options = translate(inputs, attributes, query.shape[-2], key.shape[-2], query.dtype)
    options |= CONVENTIONS | conventions
    output = attention(query, key, value, **options).output
    return {
        "Y": merge_heads(output) if flat else output,
        "present_key": key,
        "present_value": value,
        "qk_matmul_output": _stage(
            attributes.get("qk_matmul_output_mode", 0), query, key, value, options
        ),
    }


def translate(
    inputs: Arrays, attributes: Mapping[str, Any], n_q: int, n_k: int, dtype: np.dtype
) -> dict[str, Any]:
    """Return the options of refattn's attention that a node's inputs and attributes mean."""
    options: dict[str, Any] = {"causal": bool(attributes.get("is_causal", 0))}
    if "scale" in attributes:
        options["scale"] = float(attributes["scale"])
    if attributes.get("softcap", 0) > 0:  # 0 means none
        options["softcap"] = float(attributes["softcap"])
    window = [attributes.get(f"{side}_window_size", -1) for side in ("left", "right")]
    if window != [-1, -1]:  # -1 means unbounded
        options["window"] = [None if end == -1 else end for end in window]
    if "past_key" in inputs:
        options["alignment"] = inputs["past_key"].shape[-2]
    if "nonpad_kv_seqlen" in inputs:
        lengths = inputs["nonpad_kv_seqlen"]
        options |= {"key_lengths": lengths, "alignment": [int(n) - n_q for n in lengths]}
    if "attn_mask" in inputs:
        options |= _mask(inputs["attn_mask"], n_k, dtype)
    return options


def run_rotary(inputs: Arrays, attributes: Mapping[str, Any]) -> np.ndarray:
    """Run a RotaryEmbedding node."""
    x = inputs["input"]
    flat = x.ndim == 3
    if flat:
        x = split_heads(x, attributes["num_heads"])
    cosine, sine = inputs["cos_cache"], inputs["sin_cache"]
    if "position_ids" in inputs:
        cosine, sine = cosine[inputs["position_ids"]], sine[inputs["position_ids"]]
    pairing = "interleaved" if attributes.get("interleaved", 0) else "half_split"
    rotated = rotate(x, cosine[:, None], sine[:, None], pairing=pairing)
    return merge_heads(rotated) if flat else rotated


def _heads(
    inputs: Arrays, attributes: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Return query, key and value as (b, h, n, d), and whether they came as (b, n, h*d)."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    if query.ndim == 4:
        return query, key, value, False
    heads, key_heads = attributes["q_num_heads"], attributes["kv_num_heads"]
    return (
        split_heads(query, heads),
        split_heads(key, key_heads),
        split_heads(value, key_heads),
        True,
    )


def _mask(attn_mask: np.ndarray, n_k: int, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Return a mask that is bool as such, a number as a bias; missing keys are forbidden."""
    forbidden = False if attn_mask.dtype == np.bool_ else -np.inf
    missing = n_k - attn_mask.shape[-1]
    padded = np.pad(
        attn_mask, [(0, 0)] * (attn_mask.ndim - 1) + [(0, missing)], constant_values=forbidden
    )
    return {"mask": padded} if padded.dtype == np.bool_ else {"bias": padded.astype(dtype)}


def _stage(
    mode: int, query: np.ndarray, key: np.ndarray, value: np.ndarray, options: dict[str, Any]
) -> np.ndarray:
    """Return the logits scaled (0), softcapped (1), with bias and masks (2), or weights (3)."""
    if mode == 3:
        return attention_weights(query, key, value, **options)
    problem = resolve("attention", query, key, value, options)
    logits = scaled_logits(problem)
    if mode >= 1:
        logits = soften(problem, logits)
    if mode == 2:
        added = linear_bias(problem)
        logits = logits if added is None else logits + added
        logits = np.where(problem.allowed, logits, -np.inf)
    return logits.astype(query.dtype)
