"""PyTorch's scaled_dot_product_attention on the CPU, stated over the reference's attention.

torch chooses between two kernels by the shapes of a call, and the two refuse different calls:
`check_kernel` is that choice. Their results are one and the same rule.
"""

from __future__ import annotations

import numpy as np

from refattn.arrays import Array
from refattn.checks import (
    OptionError,
    ShapeError,
    check_finite,
    check_floats,
    check_shapes,
    describe,
    shown,
)
from refattn.dialects.conventions import Dialect
from refattn.dialects.lowering import (
    FUNCTION,
    Lowered,
    LoweredGradients,
    attend,
    attend_backward,
    check_mask_dtype,
    lower,
)

DIALECT = Dialect(
    name="torch_sdpa_2_13",
    alias="torch_sdpa",
    system="PyTorch",
    version="2.13 (CPU)",
    sentence="torch.nn.functional.scaled_dot_product_attention.",
    functions=(
        "refattn.dialects.torch_sdpa.scaled_dot_product_attention",
        "refattn.dialects.torch_sdpa.scaled_dot_product_attention_backward",
    ),
    conventions={
        "argument_order": "query key value",
        "layout": "heads length features",
        "batch_axes": "broadcast",
        "projections": "none",
        "default_scale": "1/sqrt(d_k)",
        "causal_alignment": "top_left",
        "mask_polarity": "True attends",
        "float_mask": "added",
        "integer_mask": "refused",
        "mask_with_causal": {"kernel by tiles": "and", "kernel in matrix form": "refused"},
        "masked_cell": "add",
        "empty_row": "zero",
        "no_keys": "zero",
        "head_map": "interleave",
        "window": "none",
        "softcap": "none",
        "sinks": "none",
        "dropout": "on the weights, kept ones scaled up",
        "returned_weights": "none",
        "weights_over_heads": "none",
        "softmax_dtype": "computing dtype",
    },
    exceptions=(
        "is_causal with scale ≤ 0: torch's kernel by tiles gives NaN, since it scales the -∞ of "
        "masked logits; here such a scale means what it says.",
        "value shorter than key: torch's kernel by tiles reads beyond the value; refused here.",
        "no key-value head under enable_gqa: torch divides by zero and gives zeros; refused here.",
        "scale or dropout_p not finite: torch gives NaN or zeros by the kernel; refused here.",
        "NaN in a key that causal attention forbids: torch's kernel by tiles does not read it; "
        "here every masked cell is read and sunk, as in the matrix form.",
        "NaN beside a row whose keys are all masked: torch calls a row empty by its logits, so one "
        "that reads NaN in query or key is NaN, and its gradients beside NaN in value too; here "
        "its weights and the gradients of its logits are 0.",
        "strides: torch's kernel by tiles needs rows without gaps, so that their layout in memory "
        "decides whether a mask beside is_causal is refused; here arrays count as gapless.",
        "attn_mask that requires a gradient: torch then takes the matrix form and refuses "
        "is_causal beside it; an array of NumPy does not say whether it requires one.",
    ),
)
"""What torch 2.13 does on a CPU."""


def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    keep: Array | None = None,
) -> Array:
    """Return what torch's function of this name returns.

    Spec: VAS-EQ1, OWN-SCALE1, OWN-MASK1, OWN-BIAS1, OWN-CAUSAL1, OWN-EMPTY1, OWN-GQA1,
        OWN-DROPOUT1, OWN-POISON1, OWN-BATCH1.

        O = attention(Q, K, V; mask or bias, causal from the top left, empty rows 0, masked added)

    Args:
        query: (..., n_q, d_k); leading axes broadcast.
        key: (..., n_k, d_k).
        value: (..., n_k, d_v).
        attn_mask: bool, True = attend, or float, added to the logits; (..., n_q, n_k).
        dropout_p: chance that a weight is dropped.
        is_causal: whether a query sees keys up to its own row only.
        scale: factor of the logits; 1/√d_k if None.
        enable_gqa: whether heads of key and value are shared by groups of query heads.
        keep: bool, (..., n_q, n_k): the weights that dropout keeps, which torch draws itself.

    Returns:
        output: (..., n_q, d_v), in query's dtype.

    Raises:
        ShapeError, DtypeError, OptionError: where torch errs, and for the named exceptions.
    """
    return attend(
        lower_call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, keep)
    )


def scaled_dot_product_attention_backward(
    d_output: Array,
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    keep: Array | None = None,
) -> LoweredGradients:
    """Return the gradients that torch's autograd gives for `scaled_dot_product_attention`.

    Spec: OWN-BACKWARD1, OWN-BATCH1, OWN-GQA1, OWN-EMPTY1, OWN-DROPOUT1.

    Args:
        d_output: dO, (..., n_q, d_v).
        query: as in the forward call, and so on.
        key: as in the forward call.
        value: as in the forward call.
        attn_mask: as in the forward call.
        dropout_p: as in the forward call.
        is_causal: as in the forward call.
        scale: as in the forward call.
        enable_gqa: as in the forward call.
        keep: as in the forward call.

    Returns:
        The gradients, each with the shape and dtype of what it belongs to.

    Raises:
        ShapeError, DtypeError, OptionError: as the forward call, or d_output does not fit.
    """
    problem = lower_call(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, keep
    )
    return attend_backward(problem, d_output)


def lower_call(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    keep: Array | None = None,
) -> Lowered:
    """Return a call in the reference's terms, after what torch refuses on the way.

    Where there is nothing to attend to or nothing to return, torch gives zeros of query's leading
    axes and looks at dtypes only.

    Raises:
        ShapeError, DtypeError, OptionError: an argument is refused.
    """
    operands = {"query": query, "key": key, "value": value}
    check_shapes(FUNCTION, **{n: (a, f"... n_{n[0]} d_{n[0]}") for n, a in operands.items()})
    check_floats(FUNCTION, **operands)
    check_mask_dtype(query, attn_mask)
    if query.shape[-2] == 0 or value.size == 0:
        nothing = (key[..., :0, :], np.zeros((0, value.shape[-1]), dtype=value.dtype))
        is_float = attn_mask is not None and attn_mask.dtype != bool
        given = (query, key, value)
        return Lowered(query, *nothing, {}, given, (1, 1), attn_mask if is_float else None)
    _check_kernel(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    return lower(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, keep)


def _check_kernel(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    """Refuse what the kernel that torch would choose refuses.

    Raises:
        DtypeError, ShapeError, OptionError: it does.
    """
    arrays = {"query": query, "key": key, "value": value}
    check_finite(FUNCTION, dropout_p=dropout_p)
    tiles = not dropout_p > 0 and query.ndim == key.ndim == value.ndim == 4
    tiles = tiles and query.shape[0] == key.shape[0] == value.shape[0]
    heads = [a.shape[-3] for a in arrays.values()] if tiles else []
    if tiles and enable_gqa:
        tiles = heads[1] == heads[2] and heads[1] > 0 and heads[0] % heads[1] == 0
    elif tiles:
        tiles = heads[0] == heads[1] == heads[2]
    if tiles and mask is not None:
        if mask.ndim < 2:
            raise ShapeError(
                f"attn_mask has {mask.ndim} axes, but beside operands of 4 it must have at least 2 "
                f"{describe(FUNCTION, arrays | {'attn_mask': mask})}"
            )
        tiles = _suits_tiles(mask, (*query.shape[:-1], key.shape[-2]))
    tiles = tiles and query.shape[-1] == key.shape[-1] == value.shape[-1]
    tiles = tiles and query.shape[-2] > 0 and key.shape[-2] > 0
    if tiles and dropout_p != 0:
        raise OptionError(
            f"dropout_p is {shown(dropout_p)}, but it must be from 0 to 1 [{FUNCTION}]"
        )
    if not tiles and is_causal and mask is not None:
        raise OptionError(
            "attn_mask is given beside is_causal, but the kernel in matrix form takes one of them "
            f"{describe(FUNCTION, arrays | {'attn_mask': mask})}"
        )


def _suits_tiles(mask: Array, logits: tuple[int, ...]) -> bool:
    """Tell whether torch's kernel by tiles takes a mask of this shape."""
    if mask.ndim not in (2, 4):
        return False
    return all(a in (1, b) for a, b in zip(reversed(mask.shape), reversed(logits), strict=False))
