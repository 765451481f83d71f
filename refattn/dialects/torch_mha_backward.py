"""Gradients of PyTorch's multi_head_attention_forward, stage by stage."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refattn.arrays import FLOATS, Array, dtype_name, narrow, widen
from refattn.attention_backward import sum_to
from refattn.checks import given
from refattn.dialects.lowering import attend, attend_backward
from refattn.dialects.torch_mha import Prepared, from_heads, prepare, to_heads
from refattn.dialects.torch_mha_call import Call, check_cotangents


class MhaGradients(NamedTuple):
    """Gradients by the names of torch's arguments; None where the argument was absent or bool."""

    d_query: Array
    d_key: Array
    d_value: Array
    d_in_proj_weight: Array | None
    d_in_proj_bias: Array | None
    d_bias_k: Array | None
    d_bias_v: Array | None
    d_out_proj_weight: Array
    d_out_proj_bias: Array | None
    d_q_proj_weight: Array | None
    d_k_proj_weight: Array | None
    d_v_proj_weight: Array | None
    d_static_k: Array | None
    d_static_v: Array | None
    d_attn_mask: Array | None
    d_key_padding_mask: Array | None


def multi_head_attention_backward(
    d_output: Array, call: Call, *, d_weights: Array | None = None
) -> MhaGradients:
    """Return the gradients that torch's autograd gives for `multi_head_attention_forward`.

    Spec: OWN-BACKWARD1, VAS-S322a, OWN-EMPTY1, OWN-DROPOUT1, OWN-APPEND1, OWN-WEIGHTS1.

        [dO_h dP̂] reaches P · [V_h I], and each projection Y = X Wᵀ + b hands back
        dX = dY W,  dW = Σ dYᵀ X,  db = Σ dY

    Args:
        d_output: dO, shape of the output.
        call: the arguments of the forward call, by torch's names.
        d_weights: gradient of the loss by the returned weights, their shape; None = not read.

    Returns:
        The gradients, each with the shape and dtype of what it belongs to.

    Raises:
        ShapeError, DtypeError, OptionError: as the forward call, or a cotangent does not fit.
    """
    ready, had_batch = prepare(call)
    d_output, d_weights = check_cotangents(d_output, d_weights, call, ready.n_k)
    call = ready.call
    O_h = attend(ready.attention)[..., : ready.d_v]
    dO = widen(d_output if had_batch else d_output[:, None])
    merged = from_heads(O_h)
    d_merged, d_W_O, d_b_O = _linear_backward(dO, merged, widen(call.out_proj_weight))
    d_stacked = to_heads(d_merged, call.num_heads)
    if call.need_weights:
        dP = np.zeros((*d_stacked.shape[:-1], ready.n_k), dtype=dO.dtype)
        if d_weights is not None:
            dP += _each_head(widen(d_weights), call, had_batch)
        d_stacked = np.concat([d_stacked, dP], axis=-1)
    dQ, dK, dV, d_mask = attend_backward(ready.attention, d_stacked)
    dV = dV[..., : ready.d_v]
    d_masks = _mask_gradients(d_mask, call, had_batch)
    projected = _projection_gradients(ready, dQ, dK, dV, had_batch)
    found = projected | d_masks | {"d_out_proj_weight": d_W_O, "d_out_proj_bias": d_b_O}
    originals = call._asdict()
    kept = {}
    for name in MhaGradients._fields:
        original = originals[name.removeprefix("d_")]
        gradient = None if original is None else found.get(name)
        kept[name] = None if gradient is None else narrow(gradient, original)
    return MhaGradients(**kept)


def _linear_backward(dY: Array, X: Array, W: Array) -> tuple[Array, Array, Array]:
    """Return the gradients of X Wᵀ + b by X, W and b; X is (n, b, features)."""
    dW = np.tensordot(dY, X, axes=([0, 1], [0, 1]))
    return dY @ W, dW, np.sum(dY, axis=(0, 1))


def _each_head(d_weights: Array, call: Call, had_batch: bool) -> Array:
    """Return the gradient by the weights of each head (b, h, n_q, n_k)."""
    d_weights = d_weights if had_batch else d_weights[None]
    return d_weights[:, None] / call.num_heads if call.average_attn_weights else d_weights


def _projection_gradients(
    ready: Prepared, dQ: Array, dK: Array, dV: Array, had_batch: bool
) -> dict[str, Array]:
    """Return the gradients through the projections, and of what was appended or static."""
    call = ready.call
    found: dict[str, Array] = {}
    by_weight, by_bias = [], []
    names = ("query", "key", "value")
    for name, W, d_rows in zip(names, ready.weights, (dQ, dK, dV), strict=True):
        x = getattr(call, name)
        if name != "query":
            letter = name[0]
            d_rows = _split_appended(found, letter, d_rows, call)
        dX, dW, db = _linear_backward(from_heads(d_rows), widen(x), W)
        found[f"d_{name}"] = dX if had_batch else dX[:, 0]
        by_weight.append(dW)
        by_bias.append(db)
    found["d_in_proj_weight"] = None if call.use_separate_proj_weight else np.concat(by_weight)
    found["d_in_proj_bias"] = np.concat(by_bias)
    if call.use_separate_proj_weight:
        found |= {f"d_{n[0]}_proj_weight": dW for n, dW in zip(names, by_weight, strict=True)}
    return found


def _split_appended(found: dict[str, Array], letter: str, d_rows: Array, call: Call) -> Array:
    """Return the gradient of the projected rows; those of the other rows go into `found`."""
    static, row = getattr(call, f"static_{letter}"), getattr(call, f"bias_{letter}")
    own = call.key.shape[0] if static is None else static.shape[1]
    if row is not None:
        end = d_rows.shape[-2] - int(call.add_zero_attn)
        below = from_heads(d_rows[..., own:end, :])
        found[f"d_bias_{letter}"] = np.reshape(np.sum(below, axis=1), row.shape)
    d_rows = d_rows[..., :own, :]
    if static is None:
        return d_rows
    found[f"d_static_{letter}"] = np.reshape(d_rows, static.shape)
    return np.zeros_like(d_rows, shape=(*d_rows.shape[:2], call.key.shape[0], d_rows.shape[-1]))


def _mask_gradients(d_mask: Array | None, call: Call, had_batch: bool) -> dict[str, Array]:
    """Return the gradients of the masks that are floats."""
    n_k, mask, padding = call.key.shape[0], call.attn_mask, call.key_padding_mask
    padding = padding if padding is None or had_batch else padding[0]
    found: dict[str, Array] = {}
    for name, array in given(d_attn_mask=mask, d_key_padding_mask=padding).items():
        if dtype_name(array) in FLOATS:
            found[name] = np.zeros_like(array)
    if d_mask is None:  # no mask was read: the hint took the place of attn_mask
        return found
    d_mask = d_mask[..., :n_k]
    b, h = call.query.shape[1], call.num_heads
    if "d_attn_mask" in found and mask is not None:
        shape = mask.shape if mask.ndim == 2 else (b, h, *mask.shape[1:])
        found["d_attn_mask"] = np.reshape(sum_to(d_mask, shape, np), mask.shape)
    if "d_key_padding_mask" in found and padding is not None:
        found["d_key_padding_mask"] = np.reshape(sum_to(d_mask, (b, 1, 1, n_k), np), padding.shape)
    return found
