"""What the options of attention mean: which key a query may attend to, and how far it is.

Query i sits at position p_i = i + offset, key j at position j. A pair is disallowed by a mask
that is False, a bias of -∞, causality, the window, or a length.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from refattn.certify.errors import CertifyError
from refattn.certify.exact import Array

INPUTS = frozenset(
    [
        *"query key value mask bias slopes sinks".split(),
        *"key_lengths query_lengths keep d_output d_logsumexp".split(),
    ]
)
"""Names of the input tensors of attention."""

PARAMETERS = frozenset("scale causal window softcap keep_probability".split())
"""Names of the parameters of attention."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "softcap_order": ("before_bias", "after_bias"),
    "distance": ("absolute", "signed", "column"),
    "head_map": ("interleave", "tile"),
    "empty_row": ("zero", "nan", "uniform"),
    "masked": ("select", "add"),
    "round_weights": (False,),
}
"""Conventions of attention and their values; the first of each is the default."""


class Setting(NamedTuple):
    """The decoded options of one attention problem."""

    allowed: Array
    """bool (b, h, n_q, n_k): the pairs that take part."""
    empty: Array
    """bool (b, h, n_q): rows without an allowed key and without a sink."""
    offsets: list[int]
    kv_head: list[int]
    choice: dict[str, Any]


def expect(given: Mapping[str, Any], known: frozenset[str], what: str) -> None:
    """Refuse names that the operation does not define."""
    unknown = sorted(set(given) - known)
    if unknown:
        raise CertifyError(f"{what} {unknown[0]} is not one of {', '.join(sorted(known))}")


def choose(
    conventions: Mapping[str, Any], choices: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """Fill in the defaults of the conventions and refuse values that are not defined."""
    result = {}
    for name, values in choices.items():
        value = conventions.get(name, values[0])
        if value not in values:
            raise CertifyError(f"{name} is {value!r}, but certification defines {values}")
        result[name] = value
    return result


def offsets_of(
    alignment: Any, n_q: int, n_k: int, query_lengths: list[int], key_lengths: list[int]
) -> list[int]:
    """Return the offset of each batch item: 0, key length - query length, or as given."""
    items = len(key_lengths)
    if alignment == "top_left":
        return [0] * items
    if alignment == "bottom_right":
        return [k - q for q, k in zip(query_lengths, key_lengths, strict=True)]
    if isinstance(alignment, int | np.integer) and not isinstance(alignment, bool):
        return [int(alignment)] * items
    if isinstance(alignment, list | tuple | np.ndarray) and len(alignment) == items:
        return [int(x) for x in alignment]
    raise CertifyError(f"alignment is {alignment!r}, but there are {items} items")


def kv_heads(h: int, h_k: int, head_map: str) -> list[int]:
    """Map each query head to its key/value head."""
    if h_k < 1 or h % h_k:
        raise CertifyError(f"{h} query heads cannot share {h_k} key heads evenly")
    return [i // (h // h_k) if head_map == "interleave" else i % h_k for i in range(h)]


def lengths(inputs: Mapping[str, Array], name: str, items: int, full: int) -> list[int]:
    """Return the given lengths, or the full length for each item."""
    if name not in inputs:
        return [full] * items
    return [int(x) for x in np.asarray(inputs[name]).reshape(-1)]


def allowed_band(n_q: int, n_k: int, offset: int, causal: bool, window: tuple[Any, Any]) -> Array:
    """Mark the pairs that causality and the window allow."""
    left, right = window
    band = np.ones((n_q, n_k), dtype=bool)
    for i in range(n_q):
        p_i = i + offset
        for j in range(n_k):
            after = causal and j > p_i
            far_left = left is not None and j < p_i - left
            far_right = right is not None and j > p_i + right
            band[i, j] = not (after or far_left or far_right)
    return band


def decode(
    inputs: Mapping[str, Array], parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> Setting:
    """Decode the options of an attention problem."""
    expect(inputs, INPUTS, "input")
    expect(parameters, PARAMETERS, "parameter")
    expect(conventions, frozenset(CHOICES) | {"alignment"}, "convention")
    choice = choose(conventions, CHOICES)
    if "keep" not in inputs and parameters.get("keep_probability") not in (None, 1, 1.0):
        raise CertifyError("keep_probability is given, but no keep mask; certification draws none")
    b, h, n_q, _ = inputs["query"].shape
    h_k, n_k = inputs["key"].shape[1:3]
    key_lengths = lengths(inputs, "key_lengths", b, n_k)
    query_lengths = lengths(inputs, "query_lengths", b, n_q)
    offsets = offsets_of(
        conventions.get("alignment", "top_left"), n_q, n_k, query_lengths, key_lengths
    )
    window = tuple(parameters.get("window") or (None, None))
    allowed = np.ones((b, h, n_q, n_k), dtype=bool)
    for item in range(b):
        band = allowed_band(n_q, n_k, offsets[item], bool(parameters.get("causal", False)), window)
        allowed[item] &= band
        allowed[item, :, :, key_lengths[item] :] = False
        allowed[item, :, query_lengths[item] :, :] = False
    if "mask" in inputs:
        allowed &= np.broadcast_to(np.asarray(inputs["mask"], dtype=bool), allowed.shape)
    if "bias" in inputs:
        allowed &= np.broadcast_to(~np.isneginf(inputs["bias"]), allowed.shape)
    empty = np.array(~allowed.any(axis=-1))
    if "sinks" in inputs:
        empty[:] = False
    kv_head = kv_heads(h, h_k, choice["head_map"])
    return Setting(allowed, empty, offsets, kv_head, choice)


def distance(kind: str, p_i: int, j: int) -> int:
    """Return what the slope is multiplied by at position p_i and key j."""
    if kind == "absolute":
        return -abs(p_i - j)
    return j - p_i if kind == "signed" else j
