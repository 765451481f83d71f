"""Adapter of torch's MultiheadAttention as a dialect: with identities for its projections."""

from __future__ import annotations

from typing import Any

import numpy as np

from refattn.audit.capabilities import Capabilities
from refattn.audit.subject import Arrays, Subject
from refattn.dialects.conventions import Dialect
from refattn.dialects.torch_mha_module import MultiheadAttention
from refattn.projections import merge_heads, split_heads

CAPABILITIES = Capabilities(
    features=frozenset({"mask", "bias", "causal", "cross_lengths", "backward"}),
    exclusive=(frozenset({"mask", "bias"}),),  # attn_mask is the one or the other
)
"""What its signature takes: no scale, one width of features, as many key-value heads as heads."""


def dialect(told: Dialect) -> Subject:
    """Return the dialect's text, its weights asked for, as torch does by default."""
    return Subject(told.name, told.version, CAPABILITIES, run)


def run(inputs: Arrays, options: dict[str, Any]) -> Arrays:
    """Run the module on a case, and its gradients if the case has a d_output."""
    batch, heads, n_q, d = inputs["query"].shape
    module = MultiheadAttention(heads * d, heads, bias=False, batch_first=True)
    one = np.eye(heads * d)
    weights = {"in_proj_weight": np.tile(one, (3, 1)), "out_proj.weight": one}
    module = module.load_state_dict(weights)
    query, key, value = (merge_heads(inputs[name]) for name in ("query", "key", "value"))
    mask = _mask(inputs, bool(options.get("causal")), (batch, heads, n_q, inputs["key"].shape[2]))
    output, _ = module(query, key, value, attn_mask=mask)
    outputs = {"output": split_heads(output, heads)}
    if "d_output" in inputs:
        d_output = merge_heads(inputs["d_output"])
        found = module.backward(d_output, query, key, value, attn_mask=mask)
        for name in ("d_query", "d_key", "d_value"):
            outputs[name] = split_heads(getattr(found, name), heads)
    return outputs


def _mask(inputs: Arrays, causal: bool, logits: tuple[int, ...]) -> np.ndarray[Any, Any] | None:
    """Return attn_mask, True = ignore, with its causal part, which the module takes from there."""
    forbidden = (np.tri(logits[2], logits[3]) == 0) & causal
    mask: np.ndarray[Any, Any]
    if "bias" in inputs:
        mask = np.where(forbidden, -np.inf, inputs["bias"])
    elif "mask" in inputs:
        mask = forbidden | ~inputs["mask"]
    elif causal:
        mask = forbidden
    else:
        return None
    return np.broadcast_to(mask, logits).reshape(-1, *logits[2:])
