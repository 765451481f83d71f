"""The arguments of the reference, checked by its own contract and brought into records."""

from __future__ import annotations

from typing import Any, NamedTuple

from refattn import rules
from refattn.arrays import Array, array_namespace, dtype_name
from refattn.backends import Unsupported
from refattn.claims import check_claimed
from refattn.options import AttentionOptions, check_arguments
from refattn.tiles import default_scale
from refattn_gpu.numba_cuda.records import Band, Operands, Terms
from refattn_gpu.numba_cuda.shapes import FEATURES

CLAIMED = {"empty_row": "zero", "masked": "select", "round_weights": False}
"""The one value that the kernels support of options which the reference takes more of."""


class Problem(NamedTuple):
    """An attention ready for the kernels, and what its results must look like."""

    operands: Operands
    band: Band
    terms: Terms
    dtype: Any
    """Of the computing format."""
    xp: Any
    """Array library of the arguments."""
    options: dict[str, Any]
    features: int
    """The larger of d_k and d_v."""


def problem_of(
    function: str, query: Array, key: Array, value: Array, given: AttentionOptions
) -> Problem:
    """Check the arguments and describe them to the kernels.

    Spec: OWN-ROUND1, OWN-SCALE1.

    Raises:
        ShapeError, DtypeError, OptionError: as the reference.
        Unsupported: what these kernels do not claim.
    """
    options, sizes, offset = check_arguments(function, query, key, value, given)
    features = max(sizes["d_k"], sizes["d_v"])
    check_claimed(function, "the Numba-CUDA kernels", query, options, CLAIMED)
    if features > FEATURES[-1]:
        raise Unsupported(
            f"a head has {features} features, but the Numba-CUDA kernels support at most "
            f"{FEATURES[-1]} [{function}]"
        )
    xp = array_namespace(query)
    dtype = xp.float64 if dtype_name(query) == "float64" else xp.float32
    q, k, v = (four_axes(array, dtype, xp) for array in (query, key, value))
    operands = Operands(q, k, v)
    band = band_of(options, q.shape, k.shape, offset, xp)
    terms = _terms(options, sizes["d_k"], dtype, xp)
    return Problem(operands, band, terms, dtype, xp, options, features)


def four_axes(array: Array, dtype: Any, xp: Any) -> Array:
    """Return an array of four axes in a dtype, the leading ones of size 1, contiguous.

    Spec: OWN-ROUND1.
    """
    shape = (1,) * (4 - array.ndim) + tuple(array.shape)
    return xp.ascontiguousarray(xp.astype(xp.reshape(array, shape), dtype, copy=False))


def band_of(
    options: dict[str, Any],
    query: tuple[int, ...],
    key: tuple[int, ...],
    offset: Any,
    xp: Any,
) -> Band:
    """Return which keys are seen; the window's sides, and causal as a right side of 0.

    Spec: OWN-CAUSAL1, OWN-WINDOW1, OWN-LENGTH1.

    Args:
        options: with their defaults.
        query: shape (b, h, n_q, d_k).
        key: shape (b, h_k, n_k, d_k).
        offset: of the query positions; see `masks.position_offset`.
        xp: array library of the arguments.
    """
    (b, _, n_q, _), n_k = query, key[2]
    ends = options.get("window") or (None, None)
    left, right = (rules.UNBOUNDED if end is None else int(end) for end in ends)
    return Band(
        offsets=_items(offset, b, xp),
        query_lengths=_items(options.get("query_lengths"), b, xp, n_q),
        key_lengths=_items(options.get("key_lengths"), b, xp, n_k),
        left=left,
        right=min(right, 0) if options["causal"] else right,
        tiled_heads=int(options["head_map"] == "tile"),
    )


def _items(numbers: Any, b: int, xp: Any, default: int = 0) -> Array:
    """Return one integer a batch item."""
    if numbers is None or isinstance(numbers, int):
        return xp.full((b,), default if numbers is None else numbers, dtype=xp.int64)
    return xp.ascontiguousarray(xp.astype(xp.reshape(numbers, (-1,)), xp.int64))


def _terms(options: dict[str, Any], d_k: int, dtype: Any, xp: Any) -> Terms:
    """Return what makes logits of products."""
    real = xp.zeros((), dtype=dtype).dtype.type
    cells = {name: options.get(name) for name in ("mask", "bias", "keep")}
    kinds = {"mask": xp.bool, "bias": dtype, "keep": xp.bool}
    by_cell = {
        name: xp.zeros((0, 0, 0, 0), dtype=kinds[name])
        if array is None
        else four_axes(array, kinds[name], xp)
        for name, array in cells.items()
    }
    by_head = {
        name: xp.zeros((0,), dtype=dtype)
        if options.get(name) is None
        else xp.ascontiguousarray(xp.astype(options[name], dtype))
        for name in ("slopes", "sinks")
    }
    cap = options.get("softcap")
    return Terms(
        **by_cell,
        **by_head,
        distance=rules.DISTANCE_CODES[options["distance"]],
        softcap_order=rules.NO_SOFTCAP
        if cap is None
        else rules.SOFTCAP_CODES[options["softcap_order"]],
        softcap=real(1 if cap is None else cap),
        scale=real(default_scale(options.get("scale"), d_k)),
        kept=real(1 / options["keep_probability"]),
    )
