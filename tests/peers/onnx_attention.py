"""ONNX Attention nodes by the dialect, and RotaryEmbedding nodes in the words of refattn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refattn.dialects import onnx_attention
from refattn.dialects.onnx_attention_call import Node, run
from refattn.projections import merge_heads, split_heads
from refattn.rope import rotate

Arrays = dict[str, np.ndarray]

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

THEIRS = {"query": "Q", "key": "K", "value": "V"}
"""Names of the schema where another is used here."""


def node_inputs(node: Any, values: list[np.ndarray]) -> Arrays:
    """Return the inputs of a node by the names of its schema; omitted ones are absent."""
    present = [n for n, given in zip(INPUTS[node.op_type], node.input, strict=False) if given]
    return dict(zip(present, values, strict=True))


def run_attention(
    inputs: Arrays, attributes: Mapping[str, Any], opset: int = 25, **conventions: Any
) -> Arrays:
    """Run an Attention node: Y, present_key, present_value and qk_matmul_output."""
    call = {THEIRS.get(name, name): array for name, array in inputs.items()} | dict(attributes)
    if conventions:
        return run(Node(**call), opset, **conventions)._asdict()
    return getattr(onnx_attention, f"attention_{opset}")(**call)._asdict()


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
