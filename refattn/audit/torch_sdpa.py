"""Adapter of `torch.nn.functional.scaled_dot_product_attention`, and of its dialect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from refattn.audit.capabilities import Capabilities
from refattn.audit.subject import Arrays, Subject
from refattn.dialects.conventions import Dialect
from refattn.dialects.torch_sdpa import (
    scaled_dot_product_attention,
    scaled_dot_product_attention_backward,
)
from refattn.errors import RefattnError

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
    output = torch.nn.functional.scaled_dot_product_attention(**_arguments(tensors, options))
    outputs = {"output": to_numpy(output)}
    if backward:
        gradients = torch.autograd.grad(output, list(leaves.values()), tensors["d_output"])
        outputs |= {f"d_{n}": to_numpy(g) for n, g in zip(leaves, gradients, strict=True)}
    return outputs


def dialect(told: Dialect) -> Subject:
    """Return the dialect's text; it takes masks beside causal attention where torch does."""
    offered = replace(
        CAPABILITIES,
        features=CAPABILITIES.features | {"dropout"},
        exclusive=(frozenset({"mask", "bias"}),),
    )
    return Subject(told.name, told.version, offered, _run_dialect)


def _run_dialect(inputs: Arrays, options: dict[str, Any]) -> Arrays:
    arguments = _arguments(inputs, options)
    if arguments["is_causal"] and not np.isfinite(inputs["key"]).all():
        raise RefattnError("NaN in a key under is_causal is one of its named exceptions")
    if "keep" in inputs:
        dropped = 1 - options["keep_probability"]
        arguments |= {"keep": inputs["keep"], "dropout_p": dropped}
    outputs = {"output": scaled_dot_product_attention(**arguments)}
    if "d_output" in inputs:
        found = scaled_dot_product_attention_backward(inputs["d_output"], **arguments)
        outputs |= {n: g for n, g in found._asdict().items() if g is not None}
        if "d_attn_mask" in outputs:
            outputs["d_bias"] = outputs.pop("d_attn_mask")
    return outputs


def _arguments(arrays: Mapping[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of torch's function, in arrays of either library."""
    return {
        **{name: arrays[name] for name in ("query", "key", "value")},
        "attn_mask": arrays.get("mask", arrays.get("bias")),
        "is_causal": bool(options.get("causal", False)),
        "scale": options.get("scale"),
        "enable_gqa": arrays["query"].shape[1] != arrays["key"].shape[1],
    }


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
