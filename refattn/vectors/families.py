"""Families of inputs: what each tensor of a case is drawn from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from refattn.vectors.draws import (
    ELEMENTWISE,
    DrawError,
    Tensor,
    bits,
    normal,
    normal_numerator,
    poisoned,
    scaled,
    to_eight_bits,
    words,
)

REAL_FIXTURE = "vectors/real/minilm.safetensors"
"""Place of the captured tensors under spec/."""


class Draw(NamedTuple):
    """How one input tensor is drawn: its kind, its shape, and what the kind needs."""

    kind: str
    shape: tuple[int, ...] = ()
    options: Mapping[str, Any] = {}


def ramp(stream: str, shape: tuple[int, ...], peak: int) -> Tensor:
    """Return keys whose feature 0 rises from 0 to `peak` along the rows; the rest is small.

    Against queries of kind `lead` the logits rise from key to key, so that every tile of keys
    raises the running row maximum.
    """
    x = scaled(normal_numerator(words(stream, math.prod(shape))), -7).reshape(shape)
    n = shape[-2]
    quarters = np.arange(n, dtype=np.int64) * (4 * peak) // max(n - 1, 1)
    x[..., 0] = to_eight_bits(scaled(quarters, -2))
    return x


def lead(stream: str, shape: tuple[int, ...]) -> Tensor:
    """Return queries with 2 in feature 0 and small numbers elsewhere: the partner of `ramp`."""
    x = scaled(normal_numerator(words(stream, math.prod(shape))), -7).reshape(shape)
    x[..., 0] = 2.0
    return x


def deep(stream: str, shape: tuple[int, ...], level: int) -> Tensor:
    """Return normal numbers in features 0 and 1 and `level` in all others.

    Every logit of level +c against level -c is near -c²(d-2)/√d, and they differ by order 1.
    """
    x = normal(words(stream, math.prod(shape))).reshape(shape)
    x[..., 2:] = np.float32(level)
    return x


def alternating(stream: str, shape: tuple[int, ...]) -> Tensor:
    """Return rows in pairs of opposite sign: near-uniform weights then cancel."""
    half = (*shape[:-2], -(-shape[-2] // 2), shape[-1])
    x = normal(words(stream, math.prod(half))).reshape(half)
    return np.stack([x, -x], axis=-2).reshape(*shape[:-2], -1, shape[-1])[..., : shape[-2], :]


def repeated(stream: str, shape: tuple[int, ...], period: int) -> Tensor:
    """Return rows that repeat with a period: row j is row j mod period."""
    base = (*shape[:-2], period, shape[-1])
    x = normal(words(stream, math.prod(base))).reshape(base)
    return np.take(x, np.arange(shape[-2]) % period, axis=-2)


def given(stream: str, shape: tuple[int, ...], values: Any, dtype: str = "float32") -> Tensor:
    """Return the listed values."""
    del stream
    return np.asarray(values, dtype=dtype).reshape(shape)


def arange(stream: str, shape: tuple[int, ...], start: int, step: int = 1) -> Tensor:
    """Return start, start + step, … as int64."""
    del stream
    return (start + step * np.arange(math.prod(shape), dtype=np.int64)).reshape(shape)


def mask(
    stream: str,
    shape: tuple[int, ...],
    eighths: int = 5,
    empty_rows: tuple[int, ...] = (),
    key_ranges: tuple[tuple[int, int], ...] = (),
) -> Tensor:
    """Return a mask in which each key is allowed with a probability of eighths/8.

    Cell (i, (7i+3) mod n_k) is always allowed, so that no row is empty by chance; the rows in
    `empty_rows` are empty on purpose. With `key_ranges`, item b allows keys lo_b … hi_b - 1 alone.
    """
    m: Tensor = (bits(words(stream, math.prod(shape)), 40, 3) < eighths).reshape(shape)
    rows, keys = shape[-2:]
    i = np.arange(rows)
    m[..., i, (7 * i + 3) % keys] = True
    for item, (low, high) in enumerate(key_ranges):
        j = np.arange(keys)
        m[item] = (low <= j) & (j < high)
    m[..., list(empty_rows), :] = False
    return m


def bias(stream: str, shape: tuple[int, ...], shift: int = 0, barred_eighths: int = 0) -> Tensor:
    """Return a normal bias times 2^shift, -inf with a probability of barred_eighths/8.

    Cell (i, (7i+3) mod n_k) is never -inf, so that no row is empty by chance.
    """
    w = words(stream, math.prod(shape))
    x = scaled(normal_numerator(w), shift - 5).reshape(shape)
    barred = (bits(w, 0, 3) < barred_eighths).reshape(shape)
    i = np.arange(shape[-2])
    barred[..., i, (7 * i + 3) % shape[-1]] = False
    return np.where(barred, np.float32(-np.inf), x)


@cache
def fixture() -> Mapping[str, Tensor]:
    """Return the tensors captured from the MiniLM encoder."""
    from safetensors.numpy import load_file

    from refattn.spec_text import spec_root

    path = spec_root() / REAL_FIXTURE
    if not path.is_file():
        raise DrawError(f"the captured tensors are missing at {path}")
    tensors: Mapping[str, Tensor] = load_file(path)
    return tensors


def real(
    stream: str, shape: tuple[int, ...], names: tuple[str, ...], short: bool = False
) -> Tensor:
    """Return captured tensors, one a batch item, padded with zeros; `short` cuts to eight bits."""
    del stream
    out = np.zeros(shape, np.float32)
    for item, name in enumerate(names):
        x = fixture()[name][: shape[1], : shape[2]]
        out[item, :, : x.shape[1]] = x
    return to_eight_bits(out) if short else out


STRUCTURED: Mapping[str, Callable[..., Tensor]] = {
    "ramp": ramp,
    "lead": lead,
    "deep": deep,
    "alternating": alternating,
    "repeated": repeated,
    "given": given,
    "arange": arange,
    "mask": mask,
    "bias": bias,
    "real": real,
}
"""Kinds in which an element also depends on its place."""


def draw(case_id: str, tensor: str, how: Draw) -> Tensor:
    """Draw one input tensor.

    Spec: OWN-DRAW1

    Args:
        case_id: the case; with the tensor's name it names the stream.
        tensor: the input's name.
        how: kind, shape and options. Every kind knows the options `stream` (another stream's
            name), `shift` (times 2^shift), `negate`, `poison_rows` and `poison` (cells that must
            not be read).

    Returns:
        float32, int64 or bool of the shape.

    Raises:
        DrawError: unknown kind, or an option that the kind has not.
    """
    options = dict(how.options)
    stream = options.pop("stream", f"{case_id}/{tensor}")
    shift, negate = options.pop("shift", 0), options.pop("negate", False)
    if how.kind == "bias":
        options["shift"], shift = shift, 0
    rows, values = options.pop("poison_rows", None), options.pop("poison", ("nan",))
    try:
        if how.kind in ELEMENTWISE:
            x = ELEMENTWISE[how.kind](words(stream, math.prod(how.shape)), **options)
        else:
            x = STRUCTURED[how.kind](stream, how.shape, **options)
    except (KeyError, TypeError) as error:
        raise DrawError(f"{case_id}/{tensor} cannot be drawn as {how.kind}: {error}") from None
    x = x.reshape(how.shape)
    if shift or negate:
        x = (-x if negate else x) * np.float32(2.0**shift)
    return x if rows is None else poisoned(x, rows, values)


Family = Mapping[str, tuple[str, Mapping[str, Any]]]

NORMAL: dict[str, tuple[str, Mapping[str, Any]]] = {
    name: ("normal", {}) for name in ("query", "key", "value")
}
"""Signed inputs of deviation 1."""


def family(name: str, d_k: int) -> Family:
    """Return kind and options of query, key and value of a family, for a head size.

    Raises:
        DrawError: unknown family.
    """
    rise = 20 * math.isqrt(d_k)
    level = 155 if d_k <= 16 else 104  # logits near ±84000 for d_k = 16 and 64
    changes: dict[str, dict[str, tuple[str, Mapping[str, Any]]]] = {
        "normal": {},
        "one_key": {},
        "unit": {n: ("unit", {}) for n in NORMAL},
        "spread": {
            "query": ("spread", {"low": -6, "high": 2}),
            "key": ("spread", {"low": -6, "high": 2}),
            "value": ("spread", {"low": -10, "high": 6}),
        },
        "rising": {"query": ("lead", {}), "key": ("ramp", {"peak": rise})},
        "negative": {
            "query": ("positive", {}),
            "key": ("positive", {"shift": 3, "negate": True}),
        },
        "deep": {"query": ("deep", {"level": level}), "key": ("deep", {"level": -level})},
        "high": {n: ("deep", {"level": level}) for n in ("query", "key")},
        "steep": {n: ("normal", {"shift": 4}) for n in ("query", "key")},
        "cancelling": {
            "query": ("normal", {"shift": -1}),
            "key": ("normal", {"shift": -3}),
            "value": ("alternating", {}),
        },
        "outliers": {n: ("outliers", {}) for n in NORMAL},
        "ties": {"key": ("repeated", {"period": 3})},
        "equal": {"key": ("repeated", {"period": 1})},
        "subnormal": {"value": ("tiny", {"exponent": -149})},
        "subnormal16": {"value": ("tiny", {"exponent": -24})},
    }
    if name not in changes:
        raise DrawError(f"family is {name!r}, but it must be one of {', '.join(changes)}")
    return {**NORMAL, **changes[name]}
