"""The arguments of the reference, checked by its own contract and laid out for the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

from refattn import rules
from refattn.arrays import Array, array_namespace, dtype_name
from refattn.backends import Unsupported
from refattn.claims import check_claimed
from refattn.options import AttentionOptions, check_arguments
from refattn.tiles import default_scale
from refattn_gpu.cuda.catalogue import FORMATS, FORWARD, most_features
from refattn_gpu.cuda.records import Cells, Job, Rows
from refattn_gpu.numba_cuda.problem import CLAIMED, band_of

CHUNK = 16
"""Bytes that are copied at once: rows begin, and features end, at multiples."""

PLAIN_SCALES = (2.0**-60, 2.0**60)
"""Scales that a kernel without terms may take: logits are compared before they are scaled."""


class Problem(NamedTuple):
    """An attention ready to be launched."""

    job: Job
    arrays: list[Array]
    """Everything that the job points to."""
    output: Array
    """(b, h, n_q, d_v and a few more), as bits."""
    logsumexp: Array
    """(b, h, n_q), float32."""
    dtype: str
    features: int
    """The larger of d_k and d_v."""
    terms: bool
    """Whether logits need more than the scale."""


def problem_of(
    function: str,
    query: Array,
    key: Array,
    value: Array,
    given: AttentionOptions,
    kernels: tuple[str, ...] = FORWARD,
) -> Problem:
    """Check the arguments and describe them to the kernels.

    Spec: OWN-ROUND1, OWN-SCALE1.

    Args:
        function: as errors name it.
        query: Q.
        key: K.
        value: V.
        given: options.
        kernels: of which one is to run.

    Raises:
        ShapeError, DtypeError, OptionError: as the reference.
        Unsupported: what these kernels do not claim.
    """
    options, sizes, offset = check_arguments(function, query, key, value, given)
    features = max(sizes["d_k"], sizes["d_v"])
    _check_claimed(function, query, options, features, kernels)
    xp = array_namespace(query)
    arrays: list[Array] = []
    job, shapes = Job(), {}
    for name, array in (("query", query), ("key", key), ("value", value)):
        laid, rows = rows_of(array, xp)
        arrays.append(laid)
        setattr(job, name, rows)
        shapes[name] = laid.shape
    (b, h, n_q, d_k), (_, h_k, n_k, d_v) = shapes["query"], shapes["value"]
    output = xp.zeros((b, h, n_q, d_v), dtype=arrays[0].dtype)
    logsumexp = xp.empty((b, h, n_q), dtype=xp.float32)
    job.output, job.logsumexp = address(output), address(logsumexp)
    for name, size in zip(
        ("batch", "heads", "key_heads", "n_q", "n_k", "d_k", "d_v"),
        (b, h, h_k, n_q, n_k, d_k, d_v),
        strict=True,
    ):
        setattr(job, name, size)
    band = band_of(options, shapes["query"], shapes["key"], offset, xp)
    for name, number in band._asdict().items():
        setattr(job, name, _held(number, arrays) if hasattr(number, "shape") else number)
    terms = _put_terms(job, options, sizes["d_k"], arrays, xp)
    return Problem(job, arrays, output, logsumexp, dtype_name(query), features, terms)


def _check_claimed(
    function: str, query: Array, options: dict[str, Any], d: int, kernels: tuple[str, ...]
) -> None:
    """Refuse what the reference takes and these kernels do not."""
    name = dtype_name(query)
    who = f"kernel {kernels[0]} supports" if len(kernels) == 1 else "the CUDA kernels support"
    formats = [other for other in FORMATS if most_features(other, kernels)]
    if name not in formats:
        raise Unsupported(f"query has dtype {name}, but {who} {', '.join(formats)} [{function}]")
    check_claimed(function, "the CUDA kernels", query, options, CLAIMED)
    if d > (most := most_features(name, kernels)):
        raise Unsupported(
            f"a head has {d} features, but {who} at most {most} in {name} [{function}]"
        )


def rows_of(array: Array, xp: Any) -> tuple[Array, Rows]:
    """Return an array as the kernels read its rows, and the record of it."""
    laid = aligned(_four_axes(array, xp), xp)
    return laid, Rows(address(laid), *_strides(laid)[:3])


def _four_axes(array: Array, xp: Any) -> Array:
    """Return an array of four axes, the leading ones of size 1; numbers as bits."""
    kinds = {1: array.dtype, 2: xp.uint16, 4: xp.uint32}
    bits = array.view(kinds[array.dtype.itemsize])
    return xp.reshape(bits, (1,) * (4 - array.ndim) + tuple(array.shape))


def aligned(array: Array, xp: Any) -> Array:
    """Return rows of whole chunks, each at a multiple of 16 bytes: as they are, or as a copy."""
    each = CHUNK // array.dtype.itemsize
    shape = (*array.shape[:3], -(-array.shape[3] // each) * each)
    strides = _strides(array)
    if (
        shape == array.shape
        and strides[3] == 1
        and not any(stride % each for stride in strides[:3])
        and not address(array) % CHUNK
    ):
        return array
    numbers = shape[0] * shape[1] * shape[2] * shape[3]
    room = xp.zeros((numbers + each,), dtype=array.dtype)
    first = -address(room) % CHUNK // array.dtype.itemsize
    copy = xp.reshape(room[first : first + numbers], shape)
    copy[..., : array.shape[3]] = array
    return copy


def _strides(array: Array) -> tuple[int, ...]:
    """Return the distance between neighbours by axis, in numbers; 0 where an axis has one."""
    size = array.dtype.itemsize
    pairs = zip(array.shape, array.strides, strict=True)
    *rest, last = [0 if n == 1 else stride // size for n, stride in pairs]
    return (*rest, last if array.shape[-1] > 1 else 1)


def address(array: Array) -> int:
    """Return where an array of NumPy or CuPy begins."""
    return int(array.data.ptr if hasattr(array.data, "ptr") else array.ctypes.data)


def _held(array: Array, arrays: list[Array]) -> int:
    arrays.append(array)
    return address(array)


def _put_terms(job: Job, options: dict[str, Any], d_k: int, arrays: list[Array], xp: Any) -> bool:
    """Tell the job what makes logits of products; return whether it is more than the scale."""
    for name in ("mask", "bias", "keep"):
        if (array := options.get(name)) is not None:
            cells = _four_axes(array, xp)
            arrays.append(cells)
            strides = [s if n > 1 else 0 for n, s in zip(cells.shape, _strides(cells), strict=True)]
            setattr(job, name, Cells(address(cells), *strides))
    for name in ("slopes", "sinks"):
        if (array := options.get(name)) is not None:
            numbers = xp.ascontiguousarray(xp.astype(array, xp.float32))
            setattr(job, name, _held(numbers, arrays))
    job.distance = rules.DISTANCE_CODES[options["distance"]]
    cap = options.get("softcap")
    job.softcap_order = (
        rules.NO_SOFTCAP if cap is None else rules.SOFTCAP_CODES[options["softcap_order"]]
    )
    job.softcap = 1.0 if cap is None else cap
    job.scale = default_scale(options.get("scale"), d_k)
    job.kept = 1 / options["keep_probability"]
    parts = ("mask", "bias", "keep", "slopes", "sinks", "softcap")
    low, high = PLAIN_SCALES
    return any(options.get(n) is not None for n in parts) or not low <= job.scale <= high
