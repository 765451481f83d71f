"""Gradients of GPT's causal self-attention module, each line of the forward pass read back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.attention import attention
from refattn.attention_backward import attention_backward
from refattn.causal_module import check_module, fused_heads
from refattn.checks import check_arrays
from refattn.dropout import drop_weights
from refattn.options import AttentionOptions
from refattn.projections import merge_heads, split_heads, sum_outer


class CausalModuleGradients(NamedTuple):
    """Gradients in the order of the inputs; None where an input was absent."""

    d_x: Array
    d_w_qkv: Array
    d_b_qkv: Array | None
    d_w_output: Array | None
    d_b_output: Array | None


@np.errstate(all="ignore")
def causal_self_attention_backward(
    d_output: Array,
    x: Array,
    w_qkv: Array,
    b_qkv: Array | None = None,
    w_output: Array | None = None,
    b_output: Array | None = None,
    *,
    heads: int,
    block_size: int,
    keep: Array | None = None,
    keep_probability: float = 1.0,
    output_keep: Array | None = None,
    output_keep_probability: float = 1.0,
) -> CausalModuleGradients:
    """Return the gradients of a GPT's causal self-attention module.

    Spec: GPT-MODULE1, GPT-DROPOUT1, OWN-BACKWARD1, OWN-POISON1, OWN-ROUND1.

        dZ = dO ∘ output_keep / p_o,   db_o = Σ_bt dZ,   dW_o = Σ_b Yᵀ dZ,   dY = dZ W_oᵀ
        [dQ dK dV] of attention at split(dY),   dx = [dQ dK dV] W_qkvᵀ
        dW_qkv = Σ_b xᵀ [dQ dK dV],   db_qkv = Σ_bt [dQ dK dV]

    Args:
        d_output: dO (B, T, C).
        x: as for `causal_self_attention`, and so on.
        w_qkv: as for `causal_self_attention`.
        b_qkv: as for `causal_self_attention`.
        w_output: as for `causal_self_attention`.
        b_output: as for `causal_self_attention`.
        heads: as for `causal_self_attention`.
        block_size: as for `causal_self_attention`.
        keep: as for `causal_self_attention`.
        keep_probability: as for `causal_self_attention`.
        output_keep: as for `causal_self_attention`.
        output_keep_probability: as for `causal_self_attention`.

    Returns:
        The gradients, each with the shape and dtype of what it belongs to.

    Raises:
        ShapeError, DtypeError, OptionError, MemoryLimitError: as `causal_self_attention`.
    """
    function = "causal_self_attention_backward"
    weights = {"w_qkv": w_qkv, "b_qkv": b_qkv, "w_output": w_output, "b_output": b_output}
    chances = {"keep": keep_probability, "output_keep": output_keep_probability}
    masks = {"keep": keep, "output_keep": output_keep}
    check_arrays(function, d_output=d_output)
    check_module(function, x, weights, heads, block_size, masks, chances, d_output)
    xp = array_namespace(x)
    q, k, v = fused_heads(x, w_qkv, b_qkv, heads)
    options: AttentionOptions = {
        "causal": True, "keep": keep, "keep_probability": float(keep_probability)
    }  # fmt: skip
    dZ = drop_weights(widen(d_output), output_keep, float(output_keep_probability))
    dY, d_w_output = dZ, None
    if w_output is not None:
        Y = merge_heads(attention(q, k, v, **options).output)
        d_w_output = narrow(sum_outer(Y, dZ), x)
        dY = dZ @ xp.matrix_transpose(widen(w_output))
    d_heads = attention_backward(split_heads(dY, heads), q, k, v, **options)
    d_qkv = xp.concat([merge_heads(d) for d in d_heads[:3]], axis=-1)  # (B, T, 3C)
    return CausalModuleGradients(
        d_x=narrow(d_qkv @ xp.matrix_transpose(widen(w_qkv)), x),
        d_w_qkv=narrow(sum_outer(widen(x), d_qkv), x),
        d_b_qkv=None if b_qkv is None else narrow(xp.sum(d_qkv, axis=(0, 1)), x),
        d_w_output=d_w_output,
        d_b_output=None if b_output is None else narrow(xp.sum(dZ, axis=(0, 1)), x),
    )
