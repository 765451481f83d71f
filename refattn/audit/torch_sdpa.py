"""Adapter of `torch.nn.functional.scaled_dot_product_attention`, forward and backward."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from refattn.audit.capabilities import Capabilities
from refattn.audit.subject import Arrays, Subject

CAPABILITIES = Capabilities(
    features=frozenset(
        {
            "scale",
            "mask",
            "bias",
            "causal",
            "grouped_heads",
            "value_size",
            "cross_lengths",
            "backward",
        }
    ),
    dtypes=("float64", "float32", "float16", "bfloat16"),
    conventions={
        "alignment": "top_left",
        "head_map": "interleave",
        "empty_row": "zero",
        "masked": "add",
    },
    exclusive=(
        frozenset({"mask", "bias"}),  # attn_mask is the one or the other
        frozenset({"mask", "causal"}),  # its documentation refuses attn_mask with is_causal
        frozenset({"bias", "causal"}),
    ),
)
"""What the function's documentation promises, and the conventions that its results show."""

LEAVES = ("query", "key", "value", "bias")
"""Tensors whose gradient autograd returns."""


def subject() -> Subject:
    """Return the subject; torch is imported here."""
    import torch

    return Subject("torch-sdpa", f"torch {torch.__version__}", CAPABILITIES, run)


def run(inputs: Arrays, options: dict[str, Any]) -> Arrays:
    """Run the function on a case, and autograd if it has a d_output."""
    import torch

    tensors = {name: to_torch(array) for name, array in inputs.items()}
    backward = "d_output" in tensors
    leaves = {name: tensors[name].requires_grad_(backward) for name in LEAVES if name in tensors}
    output = torch.nn.functional.scaled_dot_product_attention(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        attn_mask=tensors.get("mask", tensors.get("bias")),
        is_causal=bool(options.get("causal", False)),
        scale=options.get("scale"),
        enable_gqa=tensors["query"].shape[1] != tensors["key"].shape[1],
    )
    outputs = {"output": to_numpy(output)}
    if backward:
        gradients = torch.autograd.grad(output, list(leaves.values()), tensors["d_output"])
        outputs |= {f"d_{n}": to_numpy(g) for n, g in zip(leaves, gradients, strict=True)}
    return outputs


def to_torch(array: np.ndarray[Any, Any]) -> Any:
    """Return a tensor of the same bits; NumPy's bfloat16 is unknown to torch."""
    import torch

    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: Any) -> np.ndarray[Any, Any]:
    """Return an array of the same bits."""
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        bits: np.ndarray[Any, Any] = tensor.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    return np.asarray(tensor.numpy())
