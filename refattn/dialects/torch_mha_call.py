"""The arguments of torch's multi_head_attention_forward, their contract, and their masks as one."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

from refattn.arrays import FLOATS, Array, dtype_name
from refattn.checks import (
    DtypeError,
    OptionError,
    ShapeError,
    check_arrays,
    check_counts,
    check_finite,
    check_flag,
    check_floats,
    check_shapes,
    describe,
    given,
)

FUNCTION = "multi_head_attention_forward"
"""The name in error sentences."""


class Call(NamedTuple):
    """Every argument by torch's name, in torch's order, and the keep mask of dropout."""

    query: Array
    key: Array
    value: Array
    embed_dim_to_check: int
    num_heads: int
    in_proj_weight: Array | None
    in_proj_bias: Array | None
    bias_k: Array | None
    bias_v: Array | None
    add_zero_attn: bool
    dropout_p: float
    out_proj_weight: Array
    out_proj_bias: Array | None
    training: bool = True
    key_padding_mask: Array | None = None
    need_weights: bool = True
    attn_mask: Array | None = None
    use_separate_proj_weight: bool = False
    q_proj_weight: Array | None = None
    k_proj_weight: Array | None = None
    v_proj_weight: Array | None = None
    static_k: Array | None = None
    static_v: Array | None = None
    average_attn_weights: bool = True
    is_causal: bool = False
    keep: Array | None = None


ARRAYS = tuple(name for name, kind in Call.__annotations__.items() if "Array" in str(kind))
"""The arguments that are arrays."""

MASKS = ("key_padding_mask", "attn_mask", "keep")
"""The arrays that have no dtype in common with the others."""


def batched(call: Call) -> tuple[Call, bool]:
    """Return the call with a batch axis, and whether it came with one.

    Raises:
        ShapeError, DtypeError: query has neither 2 nor 3 axes, or the others not as many.
    """
    arrays = _given(call)
    check_arrays(FUNCTION, **arrays)
    axes = call.query.ndim
    if axes not in (2, 3):
        raise ShapeError(
            f"query has {axes} axes, but it must have 3, or 2 without a batch "
            f"{describe(FUNCTION, {'query': call.query})}"
        )
    wanted = {"key": axes, "value": axes, "key_padding_mask": axes - 1}
    for name, n in wanted.items():
        if name in arrays and arrays[name].ndim != n:
            raise ShapeError(
                f"{name} has {arrays[name].ndim} axes, but beside a query of {axes} it must have "
                f"{n} {describe(FUNCTION, {'query': call.query, name: arrays[name]})}"
            )
    if axes == 3:
        return call, True
    changed = {n: arrays[n][:, None] for n in ("query", "key", "value")}
    first = {n: arrays[n][None] for n in ("key_padding_mask", "keep") if n in arrays}
    return call._replace(**changed, **first), False


def check_call(call: Call, had_batch: bool) -> None:
    """Check every argument of a call that has its batch axis.

    Raises:
        ShapeError, DtypeError, OptionError: an argument is refused.
    """
    heads, embed = check_counts(
        FUNCTION, num_heads=call.num_heads, embed_dim_to_check=call.embed_dim_to_check
    )
    flags = {n: getattr(call, n) for n, kind in Call.__annotations__.items() if str(kind) == "bool"}
    check_flag(FUNCTION, **flags)
    check_finite(FUNCTION, dropout_p=call.dropout_p)
    arrays = _given(call)
    check_floats(FUNCTION, **{name: a for name, a in arrays.items() if name not in MASKS})
    if embed % heads:
        raise ShapeError(
            f"embed_dim_to_check is {embed}, but num_heads is {heads}; the first must be a "
            f"multiple of the second [{FUNCTION}]"
        )
    b = call.query.shape[1]
    contracts: dict[str, tuple[Array | None, str]] = {
        "query": (call.query, f"n_q b {embed}"),
        "key": (call.key, "n_k b e_k"),
        "value": (call.value, "n_k b e_v"),
        "in_proj_bias": (call.in_proj_bias, f"{3 * embed} or None"),
        "out_proj_weight": (call.out_proj_weight, f"e_o {embed}"),
        "out_proj_bias": (call.out_proj_bias, "e_o or None"),
        "static_k": (call.static_k, f"{b * heads} n_static {embed // heads} or None"),
        "static_v": (call.static_v, f"{b * heads} m_static {embed // heads} or None"),
    }
    check_shapes(FUNCTION, **(contracts | _projection_contracts(call, embed)))
    _check_appended(call, embed)
    _check_masks(call, had_batch)


def merged_mask(call: Call) -> tuple[Array | None, bool]:
    """Return both masks as one that is added, over the appended keys too, and whether causal.

    Spec: OWN-MASK1, OWN-BIAS1.

        mask = attn_mask + key_padding_mask, where True is -∞ and an appended key has 0
    """
    mask, padding = call.attn_mask, call.key_padding_mask
    b, h = call.query.shape[1], call.num_heads
    parts = []
    if mask is not None and not hinted(call):
        parts.append(
            _as_floats(mask, call.query).reshape(
                *((b, h) if mask.ndim == 3 else (1, 1)), *mask.shape[-2:]
            )
        )
    if padding is not None:
        parts.append(_as_floats(padding, call.query)[:, None, None, :])
    if not parts:
        return None, hinted(call)
    merged = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    if call.need_weights and merged.dtype != call.query.dtype:
        raise DtypeError(
            f"attn_mask has dtype {dtype_name(merged)}, but query has dtype "
            f"{dtype_name(call.query)}; they must be equal where weights are needed [{FUNCTION}]"
        )
    appended = int(call.bias_k is not None) + int(call.add_zero_attn)
    return np.pad(merged, [(0, 0)] * 3 + [(0, appended)]), hinted(call)


def check_cotangents(
    d_output: Array, d_weights: Array | None, call: Call, n_k: int
) -> tuple[Array, Array | None]:
    """Check that the cotangents have the shapes of what the call returns.

    Raises:
        ShapeError, DtypeError, OptionError: they do not, or no weights are returned.
    """
    lead = [*call.query.shape[:-1]]
    weights = [*lead[1:], *([] if call.average_attn_weights else [call.num_heads]), lead[0], n_k]
    if d_weights is not None and not call.need_weights:
        raise OptionError(f"d_weights is given, but need_weights is False [{FUNCTION}]")
    check_shapes(
        FUNCTION,
        d_output=(d_output, " ".join(map(str, [*lead, len(call.out_proj_weight)]))),
        d_weights=(d_weights, " ".join(map(str, weights)) + " or None"),
    )
    check_floats(FUNCTION, query=call.query, d_output=d_output, **given(d_weights=d_weights))
    return d_output, d_weights


def _given(call: Call) -> dict[str, Array]:
    return given(**{name: getattr(call, name) for name in ARRAYS})


def _projection_contracts(call: Call, embed: int) -> dict[str, tuple[Array | None, str]]:
    """Return the shapes of the weights that are used.

    Raises:
        OptionError: one of them is absent.
    """
    if call.use_separate_proj_weight:
        shapes = {
            "q_proj_weight": f"{embed} {embed}",
            "k_proj_weight": f"{embed} e_k",
            "v_proj_weight": f"{embed} e_v",
        }
    else:
        shapes = {"in_proj_weight": f"{3 * embed} {embed}"}
    for name in shapes:
        if getattr(call, name) is None:
            raise OptionError(
                f"{name} is absent, but use_separate_proj_weight is "
                f"{call.use_separate_proj_weight} [{FUNCTION}]"
            )
    contracts: dict[str, tuple[Array | None, str]] = {
        name: (getattr(call, name), shape) for name, shape in shapes.items()
    }
    if not call.use_separate_proj_weight and call.key.shape[-1] != embed:
        contracts["key"] = (call.key, f"n_k b {embed}")
    return contracts


def _check_appended(call: Call, embed: int) -> None:
    """Check the learned rows.

    Raises:
        OptionError: one comes without the other, or beside static keys or values.
        ShapeError: their features are not e.
    """
    rows = given(bias_k=call.bias_k, bias_v=call.bias_v)
    if len(rows) == 1:
        (name,) = rows
        raise OptionError(f"{name} is given, but the other one is absent [{FUNCTION}]")
    if rows and (call.static_k is not None or call.static_v is not None):
        raise OptionError(
            f"bias_k and bias_v are given, but static keys and values take no row [{FUNCTION}]"
        )
    for name, row in rows.items():
        if not 1 <= row.ndim <= 3 or row.shape[-1] != embed or row.shape[-2:-1] not in ((), (1,)):
            raise ShapeError(
                f"{name} has shape {tuple(row.shape)}, but it must be {(1, 1, embed)} [{FUNCTION}]"
            )


def hinted(call: Call) -> bool:
    """Tell whether the causal mask takes the place of attn_mask, which is then not read."""
    return call.is_causal and call.key_padding_mask is None and not call.need_weights


def _check_masks(call: Call, had_batch: bool) -> None:
    """Check shapes and dtypes of the masks, and that the causal hint has one.

    Raises:
        OptionError: is_causal without attn_mask.
        DtypeError: a mask is neither bool nor float.
        ShapeError: a mask has another shape.
    """
    mask, padding = call.attn_mask, call.key_padding_mask
    if call.is_causal and mask is None:
        raise OptionError(
            f"is_causal is True, but it is a hint on attn_mask, which is absent [{FUNCTION}]"
        )
    if mask is not None and padding is not None and mask.dtype != padding.dtype:
        warnings.warn(
            f"key_padding_mask has dtype {dtype_name(padding)}, but attn_mask has dtype "
            f"{dtype_name(mask)}; torch deprecates masks of two types",
            stacklevel=5,
        )
    (n_q, b), n_k, h = call.query.shape[:2], call.key.shape[0], call.num_heads
    stacked = (b * h, n_q, n_k)
    if hinted(call):
        # torch does not look at a mask whose place is taken, but for its number of axes
        shape = tuple(mask.shape) if mask is not None else ()
        if len(shape) not in (2, 3) or (len(shape) == 3 and not had_batch and shape != stacked):
            raise ShapeError(f"attn_mask has shape {shape}, but it must be {stacked} [{FUNCTION}]")
        return
    expected = {"attn_mask": [(n_q, n_k), stacked], "key_padding_mask": [(b, n_k)]}
    for name, array in given(attn_mask=mask, key_padding_mask=padding).items():
        check_mask_dtype(name, array)
        if tuple(array.shape) not in expected[name]:
            raise ShapeError(
                f"{name} has shape {tuple(array.shape)}, but it must be "
                f"{' or '.join(map(str, expected[name]))} [{FUNCTION}]"
            )


def check_mask_dtype(name: str, mask: Array) -> None:
    """Check that a mask is bool or float.

    Raises:
        DtypeError: it is not.
    """
    if dtype_name(mask) not in ("bool", "bool_", *FLOATS):
        raise DtypeError(
            f"{name} has dtype {dtype_name(mask)}, but it must be bool or float [{FUNCTION}]"
        )


def _as_floats(mask: Array, query: Array) -> Array:
    """Return a mask that is added: -∞ for True, 0 for False, floats as they are."""
    if mask.dtype != bool:
        return mask
    return np.where(mask, -np.inf, 0.0).astype(query.dtype)
