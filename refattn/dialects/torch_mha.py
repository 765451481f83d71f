"""PyTorch's multi_head_attention_forward, stated over the reference's attention.

Two forms, as in torch: the one that returns weights, where a row without a key is NaN, and the one
that does not, which is torch's scaled_dot_product_attention, where such a row is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refattn.arrays import Array, narrow, widen
from refattn.dialects.conventions import Dialect
from refattn.dialects.lowering import Lowered, attend, lower
from refattn.dialects.torch_mha_call import Call, batched, check_call, merged_mask
from refattn.dialects.torch_sdpa import lower_call
from refattn.projections import merge_heads, split_heads

DIALECT = Dialect(
    name="torch_mha_2_13",
    alias="torch_mha",
    system="PyTorch",
    version="2.13 (CPU)",
    sentence="torch.nn.MultiheadAttention and torch.nn.functional.multi_head_attention_forward.",
    functions=(
        "refattn.dialects.torch_mha.multi_head_attention_forward",
        "refattn.dialects.torch_mha_backward.multi_head_attention_backward",
        "refattn.dialects.torch_mha_module.MultiheadAttention",
    ),
    conventions={
        "argument_order": "query key value",
        "layout": {"else": "length batch features", "batch_first": "batch length features"},
        "batch_axes": "equal",
        "projections": "packed or separate",
        "default_scale": "1/sqrt(d_k)",
        "causal_alignment": {
            "is_causal, no weights, no padding mask": "top_left", "else": "given by the mask"
        },
        "mask_polarity": "True ignores",
        "float_mask": "added",
        "integer_mask": "refused",
        "mask_with_causal": {
            "no weights, no padding mask": "causal alone", "else": "mask alone"
        },
        "masked_cell": "add",
        "empty_row": {"need_weights": "nan", "no weights": "zero", "inference": "nan"},
        "no_keys": "zero",
        "head_map": "equal heads",
        "window": "none",
        "softcap": "none",
        "sinks": "none",
        "dropout": "on the weights, kept ones scaled up",
        "returned_weights": {"need_weights": "after dropout", "no weights": "none"},
        "weights_over_heads": {"need_weights": "mean by default", "no weights": "none"},
        "softmax_dtype": "computing dtype",
    },
    exceptions=(
        "masks of the right size and the wrong shape: torch's inference path lays them out anew; "
        "refused here.",
        "parameters of shapes that only broadcasting would fit: refused here.",
        "no keys or an empty batch, no weights, and a mask by item: torch cannot lay "
        "the mask out and errs; here the output is that of no key, or empty.",
        "float16 and bfloat16: torch rounds after every stage; here results are rounded once.",
        "non-finite keys, scales and dropout: as torch_sdpa.",
    ),
)  # fmt: skip
"""What torch 2.13 does on a CPU."""


class Prepared(NamedTuple):
    """A call after its projections: one attention, whose output holds the weights, too."""

    call: Call
    weights: list[Array]
    """W of query, key and value, (e, features)."""
    attention: Lowered
    """Where weights are returned, value has the identity beside it: P · [V I] = [O P]."""
    d_v: int
    """Features of a head's value."""
    n_k: int
    """Keys with those that are appended."""


def multi_head_attention_forward(
    query: Array,
    key: Array,
    value: Array,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Array | None,
    in_proj_bias: Array | None,
    bias_k: Array | None,
    bias_v: Array | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Array,
    out_proj_bias: Array | None,
    training: bool = True,
    key_padding_mask: Array | None = None,
    need_weights: bool = True,
    attn_mask: Array | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Array | None = None,
    k_proj_weight: Array | None = None,
    v_proj_weight: Array | None = None,
    static_k: Array | None = None,
    static_v: Array | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    keep: Array | None = None,
) -> tuple[Array, Array | None]:
    """Return what torch's function of this name returns.

    Spec: VAS-S322a, VAS-S322b, VAS-S323a, OWN-MASK1, OWN-BIAS1, OWN-EMPTY1, OWN-DROPOUT1,
        OWN-APPEND1, OWN-WEIGHTS1.

        Q_h, K_h, V_h = heads of X W^Qᵀ + b^Q, Y W^Kᵀ + b^K, Z W^Vᵀ + b^V, appended rows below
        P = softmax(Q_h K_hᵀ / √d + mask), dropped out;  O = Concat(P V_h) W^Oᵀ + b^O

    Args:
        query: X, (n_q, b, e), or (n_q, e) without a batch.
        key: Y, (n_k, b, e_k), or (n_k, e_k).
        value: Z, (n_k, b, e_v), or (n_k, e_v).
        embed_dim_to_check: e.
        num_heads: h, a divisor of e.
        in_proj_weight: (3e, e), W of query, key and value one below the other.
        in_proj_bias: (3e,), likewise.
        bias_k: (1, 1, e), a row appended to the projected keys.
        bias_v: (1, 1, e), a row appended to the projected values.
        add_zero_attn: whether a row of zeros is appended to keys and values.
        dropout_p: chance that a weight is dropped.
        out_proj_weight: W^O, (e_o, e).
        out_proj_bias: (e_o,).
        training: whether dropout acts.
        key_padding_mask: (b, n_k), bool, True = ignore, or float, added.
        need_weights: whether weights are returned; a row without a key is then NaN, else 0.
        attn_mask: (n_q, n_k) or (b·h, n_q, n_k), bool, True = ignore, or float, added.
        use_separate_proj_weight: whether the three weights that follow are used.
        q_proj_weight: (e, e).
        k_proj_weight: (e, e_k).
        v_proj_weight: (e, e_v).
        static_k: (b·h, n_k, e/h), keys of the heads in place of the projected ones.
        static_v: (b·h, n_k, e/h), likewise.
        average_attn_weights: whether weights are averaged over the heads.
        is_causal: a hint that attn_mask is causal; without weights and padding mask, the causal
            mask from the top left takes its place.
        keep: bool, (b, h, n_q, keys): the weights that dropout keeps, which torch draws itself.

    Returns:
        output: (n_q, b, e_o), or (n_q, e_o), in query's dtype.
        weights: those after dropout, (b, n_q, keys) or (b, h, n_q, keys), without b where there is
            no batch; None unless needed.

    Raises:
        ShapeError, DtypeError, OptionError: where torch errs, and for the named exceptions.
    """
    return forward(Call(
        query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k,
        bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training,
        key_padding_mask, need_weights, attn_mask, use_separate_proj_weight, q_proj_weight,
        k_proj_weight, v_proj_weight, static_k, static_v, average_attn_weights, is_causal, keep,
    ))  # fmt: skip


def forward(call: Call) -> tuple[Array, Array | None]:
    """Return output and weights of a call."""
    ready, had_batch = prepare(call)
    stacked = attend(ready.attention)
    d, call = ready.d_v, ready.call
    output = from_heads(stacked[..., :d]) @ widen(call.out_proj_weight).T
    if call.out_proj_bias is not None:
        output = output + widen(call.out_proj_bias)
    output = narrow(output if had_batch else output[:, 0], call.query)
    if not call.need_weights:
        return output, None
    weights = stacked[..., d:]
    if call.average_attn_weights:
        weights = np.mean(weights, axis=1)
    return output, narrow(weights if had_batch else weights[0], call.query)


def prepare(call: Call) -> tuple[Prepared, bool]:
    """Return a checked call as one attention, and whether it came with a batch."""
    call, had_batch = batched(call)
    check_call(call, had_batch)
    weights, biases = _projections(call)
    inputs = (call.query, call.key, call.value)
    Q, K, V = (
        to_heads(widen(x) @ W.T + b, call.num_heads)
        for x, W, b in zip(inputs, weights, biases, strict=True)
    )
    K = _appended(K, call.static_k, call.bias_k, call)
    V = _appended(V, call.static_v, call.bias_v, call)
    mask, causal = merged_mask(call)
    dropout_p = call.dropout_p if call.training else 0.0
    keep = call.keep if call.training else None
    if call.need_weights:
        identity = np.broadcast_to(
            np.eye(K.shape[-2], dtype=V.dtype), (*V.shape[:-2], *K.shape[-2:-1] * 2)
        )
        V = np.concat([V, identity], axis=-1)
        problem = lower(Q, K, V, mask, dropout_p, causal, keep=keep, empty_row="nan")
    else:
        problem = lower_call(Q, K, V, mask, dropout_p, causal, keep=keep)
    d_v = call.embed_dim_to_check // call.num_heads
    return Prepared(call, weights, problem, d_v, K.shape[-2]), had_batch


def _projections(call: Call) -> tuple[list[Array], list[Array]]:
    """Return W and b of query, key and value; b is 0 where there is none."""
    if call.use_separate_proj_weight:
        separate = (call.q_proj_weight, call.k_proj_weight, call.v_proj_weight)
        weights = [widen(W) for W in separate if W is not None]
    else:
        weights = np.split(widen(call.in_proj_weight), 3)
    if call.in_proj_bias is None:
        return weights, [np.zeros(len(W), dtype=W.dtype) for W in weights]
    return weights, np.split(widen(call.in_proj_bias), 3)


def to_heads(x: Array, heads: int) -> Array:
    """Return (b, h, n, d) of (n, b, h·d)."""
    return split_heads(np.moveaxis(x, 0, 1), heads)


def from_heads(x: Array) -> Array:
    """Return (n, b, h·d) of (b, h, n, d)."""
    return np.moveaxis(merge_heads(x), 1, 0)


def _appended(rows: Array, static: Array | None, row: Array | None, call: Call) -> Array:
    """Return keys or values of the heads with the learned row and the row of zeros below them.

    Spec: OWN-APPEND1.
    """
    if static is not None:
        rows = np.reshape(widen(static), (*rows.shape[:2], *static.shape[1:]))
    if row is not None:
        below = np.tile(widen(row), (1, call.query.shape[1], 1))
        rows = np.concat([rows, to_heads(below, call.num_heads)], axis=-2)
    if call.add_zero_attn:
        rows = np.concat(
            [rows, np.zeros_like(rows[..., :1, :], shape=(*rows.shape[:2], 1, rows.shape[-1]))],
            axis=-2,
        )
    return rows
