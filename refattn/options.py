"""The options of attention: one list of them, their defaults, and what they refuse.

Every function of `attention.py` takes the same options; `AttentionOptions` is their only list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from refattn.alibi import DISTANCES
from refattn.arrays import Array, array_namespace, dtype_name, widen
from refattn.checks import (
    DtypeError,
    OptionError,
    ShapeError,
    check_arrays,
    check_computable,
    check_finite,
    check_flag,
    check_floats,
    check_memory,
    check_option,
    check_positive,
    check_shapes,
    describe,
    given,
    is_array,
)
from refattn.grouped import HEAD_MAPS, expand_heads, group_size
from refattn.masks import allowed_pairs, check_lengths, check_window, position_offset
from refattn.softmax import EMPTY_ROWS
from refattn.tiles import default_scale

SOFTCAP_ORDERS = ("before_bias", "after_bias")
"""Whether the softcap acts on the scaled product or on the sum with bias and ALiBi."""

MASKED = ("select", "add")
"""Whether a forbidden cell is never read, or read and sunk by -∞ (OWN-POISON1)."""

MATRICES = 11
"""How many n_q x n_k matrices of the computing dtype the reference has alive at its peak.

Measured by `tracemalloc`: 6.0 for a bare forward or backward pass, 8.4 for a forward and 10.4 for a
backward pass of float16 under every option, with or without a NaN in key and value.
"""


class AttentionOptions(TypedDict, total=False):
    """What attention may be told beside query, key and value; every entry is optional.

    Spec: OWN-SCALE1, OWN-MASK1, OWN-BIAS1, OWN-CAUSAL1, OWN-WINDOW1, OWN-SOFTCAP1, OWN-ALIBI1,
        OWN-SINK1, OWN-LENGTH1, OWN-GQA1, OWN-EMPTY1, OWN-POISON1, OWN-DROPOUT1, OWN-ROUND2.
    """

    scale: float | None
    """Factor on Q Kᵀ; 1/√d_k if None."""
    mask: Array | None
    """Bool, broadcastable to (..., h, n_q, n_k); True = attend."""
    bias: Array | None
    """Logits, likewise, added before the softmax; a cell of -∞ is forbidden."""
    causal: bool
    """Forbid keys ahead of the query's position. Default False."""
    alignment: str | int | Sequence[int] | Array
    """Position of query row 0: "top_left" (default), "bottom_right", tokens, or one an item."""
    window: Sequence[int | None] | None
    """(left, right), tokens, both ends inclusive, None = unbounded."""
    softcap: float | None
    """c in c·tanh(S/c), logits."""
    softcap_order: str
    """"before_bias" (default) or "after_bias"."""
    slopes: Array | None
    """m, (h,), logits a token: ALiBi."""
    distance: str
    """"absolute" (default), "signed" or "column"."""
    sinks: Array | None
    """(h,), logits that join the denominator only."""
    query_lengths: Array | None
    """(b,), integers: query rows beyond are empty."""
    key_lengths: Array | None
    """(b,), integers: key rows beyond are forbidden."""
    head_map: str
    """"interleave" (default) or "tile": which key-value head a query head reads."""
    empty_row: str
    """"zero" (default), "nan" or "uniform": a row without an allowed key."""
    masked: str
    """"select" (default) or "add": whether a forbidden cell is read."""
    keep: Array | None
    """Bool, (..., h, n_q, n_k): dropout's keep mask."""
    keep_probability: float
    """The weights kept are divided by it. Default 1."""
    round_weights: bool
    """Round P to the dtype of query before it meets V. Default False."""


DEFAULTS: dict[str, Any] = {
    "causal": False,
    "alignment": "top_left",
    "softcap_order": "before_bias",
    "distance": "absolute",
    "head_map": "interleave",
    "empty_row": "zero",
    "masked": "select",
    "keep_probability": 1.0,
    "round_weights": False,
}
"""Defaults of the options that have one; every other option is off."""


ARRAYS = ("mask", "bias", "slopes", "sinks", "query_lengths", "key_lengths", "keep")
"""The options that are arrays, of query's library."""


@dataclass(frozen=True)
class Problem:
    """Arguments of one attention after their contract: widened, expanded, checked."""

    xp: Any
    Q: Array
    K: Array
    V: Array
    scale: float
    group: int
    offset: Any
    allowed: Array
    readable: Array
    """Cells whose key and value are read: the allowed ones, and all of a row that is filled."""
    bias: Array | None
    slopes: Array | None
    sinks: Array | None
    options: dict[str, Any]


def resolve(
    function: str, query: Array, key: Array, value: Array, asked: AttentionOptions
) -> Problem:
    """Check the arguments of an attention and bring them into one form.

    Spec: OWN-ROUND1, OWN-GQA1, OWN-MASK1, OWN-POISON1.

    Raises:
        ShapeError, DtypeError, OptionError, MemoryLimitError: an argument is refused.
    """
    options, sizes, offset = check_arguments(function, query, key, value, asked)
    xp = array_namespace(query)
    n_q, n_k = sizes["n_q"], sizes["n_k"]
    lengths = {name: options.get(name) for name in ("query_lengths", "key_lengths")}
    check_matrices(function, query, sizes)
    bias = options.get("bias")
    bias = None if bias is None else widen(bias)
    allowed = allowed_pairs(
        n_q,
        n_k,
        causal=options["causal"],
        window=options.get("window"),
        mask=options.get("mask"),
        bias=bias,
        **lengths,
        offset=offset,
        xp=xp,
    )
    allowed = xp.broadcast_to(allowed, (*query.shape[:-2], n_q, n_k))
    group = group_size(function, query, key)
    K, V = (expand_heads(widen(a), group, head_map=options["head_map"]) for a in (key, value))
    scale = options.get("scale")
    return Problem(
        xp=xp,
        Q=widen(query),
        K=K,
        V=V,
        scale=default_scale(scale, sizes["d_k"]),
        group=group,
        offset=offset,
        allowed=allowed,
        readable=_readable(allowed, options, xp),
        bias=bias,
        slopes=None if options.get("slopes") is None else widen(options["slopes"]),
        sinks=None if options.get("sinks") is None else widen(options["sinks"]),
        options=options,
    )


def check_arguments(
    function: str, query: Array, key: Array, value: Array, asked: AttentionOptions
) -> tuple[dict[str, Any], dict[str, int], Any]:
    """Check the arguments of an attention without forming any n_q x n_k matrix.

    Returns:
        options: the given ones and the defaults of the others.
        sizes: n_q, n_k, d_k and d_v.
        offset: of the query positions; see `masks.position_offset`.

    Raises:
        ShapeError, DtypeError, OptionError: an argument is refused.
    """
    options = _with_defaults(function, asked)
    sizes = _check_arrays(function, query, key, value, options)
    options |= _plain_numbers(function, query, options)
    _check_values(function, query, options, sizes)
    lengths = {name: options.get(name) for name in ("query_lengths", "key_lengths")}
    offset = position_offset(
        function,
        sizes["n_q"],
        sizes["n_k"],
        alignment=options["alignment"],
        **lengths,
        xp=array_namespace(query),
    )
    _check_offset(function, query, offset)
    group_size(function, query, key)
    return options, sizes, offset


def _with_defaults(function: str, asked: AttentionOptions) -> dict[str, Any]:
    unknown = sorted(set(asked) - set(AttentionOptions.__annotations__))
    if unknown:
        raise OptionError(
            f"{unknown[0]} is no option of attention, but it must be one of "
            f"{', '.join(AttentionOptions.__annotations__)} [{function}]"
        )
    return DEFAULTS | dict(asked)


def _check_arrays(
    function: str, query: Array, key: Array, value: Array, options: dict[str, Any]
) -> dict[str, int]:
    sizes = check_shapes(
        function,
        query=(query, "... n_q d_k"),
        key=(key, "... n_k d_k"),
        value=(value, "... n_k d_v"),
    )
    shown = {"query": query, "key": key, "value": value}
    if query.ndim != key.ndim or key.ndim != value.ndim or key.shape[:-1] != value.shape[:-1]:
        raise ShapeError(
            f"value has leading axes {tuple(value.shape[:-1])}, but key has "
            f"{tuple(key.shape[:-1])} and query has {query.ndim} axes; they must be equal "
            f"{describe(function, shown)}"
        )
    if query.shape[:-3] != key.shape[:-3]:
        raise ShapeError(
            f"key has batch axes {tuple(key.shape[:-3])}, but query has "
            f"{tuple(query.shape[:-3])}; they must be equal {describe(function, shown)}"
        )
    for letter in ("n_k", "d_k"):
        if sizes[letter] == 0:
            raise ShapeError(
                f"key has {letter}=0, but it must be at least 1 {describe(function, shown)}"
            )
    arrays = given(**{name: options.get(name) for name in ARRAYS})
    check_arrays(function, query=query, **arrays)
    floats = {name: array for name, array in arrays.items() if name in ("bias", "slopes", "sinks")}
    check_floats(function, query=query, key=key, value=value, **floats)
    if is_array(options["alignment"]):
        check_arrays(function, query=query, alignment=options["alignment"])
    return sizes


def _plain_numbers(function: str, query: Array, options: dict[str, Any]) -> dict[str, Any]:
    """Check the numbers and return them as Python's, which widen no array they meet."""
    check_finite(function, **given(scale=options.get("scale")))
    positive = given(softcap=options.get("softcap")) | {
        "keep_probability": options["keep_probability"]
    }
    check_positive(function, **positive)
    numbers = positive | given(scale=options.get("scale"))
    check_computable(function, query, **numbers)
    window = check_window(function, options.get("window"))
    return {name: float(number) for name, number in numbers.items()} | {"window": window}


def _check_values(
    function: str, query: Array, options: dict[str, Any], sizes: dict[str, int]
) -> None:
    check_flag(function, causal=options["causal"], round_weights=options["round_weights"])
    check_option(function, "softcap_order", options["softcap_order"], SOFTCAP_ORDERS)
    check_option(function, "distance", options["distance"], DISTANCES)
    check_option(function, "head_map", options["head_map"], HEAD_MAPS)
    check_option(function, "empty_row", options["empty_row"], EMPTY_ROWS)
    check_option(function, "masked", options["masked"], MASKED)
    keep, chance = options.get("keep"), options["keep_probability"]
    if chance > 1 or (keep is None and chance != 1):
        raise OptionError(
            f"keep_probability is {chance}, but it must be at most 1, and 1 without keep "
            f"[{function}]"
        )
    logits = (*query.shape[:-2], sizes["n_q"], sizes["n_k"])
    for name in ("mask", "bias", "keep"):
        _check_broadcast(function, name, options.get(name), logits)
    for name in ("slopes", "sinks"):
        _check_by_head(function, name, options.get(name), query)
    _check_lengths(function, query, options, sizes)


def _check_by_head(function: str, name: str, array: Array | None, query: Array) -> None:
    if array is None:
        return
    where = describe(function, {"query": query, name: array})
    if query.ndim < 3:
        raise ShapeError(
            f"query has {query.ndim} axes, but {name} by head needs the 3 of (h, n, d) {where}"
        )
    if tuple(array.shape) != (query.shape[-3],):
        raise ShapeError(
            f"{name} has shape {tuple(array.shape)}, but query has {query.shape[-3]} heads; "
            f"they must be equal {where}"
        )


def _check_lengths(
    function: str, query: Array, options: dict[str, Any], sizes: dict[str, int]
) -> None:
    for name, n in (("query_lengths", sizes["n_q"]), ("key_lengths", sizes["n_k"])):
        if options.get(name) is not None:
            _check_batched(function, name, query)
            xp = array_namespace(query)
            check_lengths(function, name, options[name], query.shape[0], n, xp)


def _check_offset(function: str, query: Array, offset: Any) -> None:
    if isinstance(offset, int):
        return
    _check_batched(function, "alignment", query)
    if offset.shape[0] != query.shape[0]:
        raise ShapeError(
            f"alignment has {offset.shape[0]} offsets, but the batch has {query.shape[0]} items; "
            f"they must be equal {describe(function, {'query': query})}"
        )


def _check_batched(function: str, name: str, query: Array) -> None:
    if query.ndim != 4:
        raise ShapeError(
            f"query has {query.ndim} axes, but {name} by batch item needs the 4 of (b, h, n, d) "
            f"{describe(function, {'query': query})}"
        )


def _check_broadcast(
    function: str, name: str, array: Array | None, target: tuple[int, ...]
) -> None:
    if array is None:
        return
    if name != "bias" and dtype_name(array) not in ("bool", "bool_"):
        raise DtypeError(
            f"{name} has dtype {array.dtype}, but it must be bool, True = "
            f"{'attend' if name == 'mask' else 'keep'} [{function}]"
        )
    shape = tuple(array.shape)
    pairs = zip(reversed(shape), reversed(target), strict=False)
    if len(shape) > len(target) or any(a not in (1, t) for a, t in pairs):
        raise ShapeError(
            f"{name} has shape {shape}, but the logits have shape {target}; the first must "
            f"broadcast to the second [{function}]"
        )


def check_matrices(function: str, query: Array, sizes: dict[str, int]) -> None:
    """Refuse n_q x n_k matrices that do not fit into the memory that is free (OWN-MEMORY1)."""
    itemsize = 8 if dtype_name(query) == "float64" else 4
    shape = (*query.shape[:-2], sizes["n_q"], sizes["n_k"])
    check_memory(function, shape, itemsize=itemsize, arrays=MATRICES)


def _readable(allowed: Array, options: dict[str, Any], xp: Any) -> Array:
    if options["empty_row"] == "zero" or options.get("sinks") is not None:
        return allowed
    return allowed | ~xp.any(allowed, axis=-1, keepdims=True)
