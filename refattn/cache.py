"""Decoding with a cache of keys and values: attention whose queries start late."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

from refattn.arrays import Array, array_namespace
from refattn.attention import AttentionResult, attention
from refattn.checks import OptionError, check_floats, check_shapes, shown
from refattn.options import AttentionOptions


class Cache(NamedTuple):
    """Keys and values of every token so far."""

    key: Array
    value: Array


class CachedResult(NamedTuple):
    """The result for the new queries, and the cache that now holds the new tokens too."""

    result: AttentionResult
    cache: Cache


def extend(cache: Cache | None, key: Array, value: Array) -> Cache:
    """Append the keys and values of new tokens.

    Spec: OWN-CACHE1.

        K ← [K_cache; K_new],  V ← [V_cache; V_new]

    Args:
        cache: of the tokens so far; None = there are none.
        key: K_new, (..., h_k, n, d_k).
        value: V_new, (..., h_k, n, d_v).

    Returns:
        cache: (..., h_k, n_cache + n, d_k) and (..., h_k, n_cache + n, d_v).

    Raises:
        ShapeError: key and value differ in length, or from the cache in heads or features.
        DtypeError: an argument is no array, a dtype is not floating, or differs from the cache's.
        OptionError: cache is no `Cache`.
    """
    _check_cache("extend", cache)
    check_shapes("extend", key=(key, "... n d_k"), value=(value, "... n d_v"))
    check_floats("extend", key=key, value=value)
    if cache is None:
        return Cache(key, value)
    check_shapes(
        "extend", cache_key=(cache.key, "... n d_k"), cache_value=(cache.value, "... n d_v")
    )
    for name, old, new in (("key", cache.key, key), ("value", cache.value, value)):
        lead = " ".join(str(size) for size in old.shape[:-2])
        check_shapes("extend", **{name: (new, f"{lead} n {old.shape[-1]}")})
        check_floats("extend", **{f"cache_{name}": old, name: new})
    xp = array_namespace(key)
    return Cache(xp.concat([cache.key, key], axis=-2), xp.concat([cache.value, value], axis=-2))


def cached_attention(
    query: Array,
    key: Array,
    value: Array,
    cache: Cache | None = None,
    **options: Unpack[AttentionOptions],
) -> CachedResult:
    """Attend from new tokens to all tokens so far; the first new one stands after the cache.

    Spec: OWN-CACHE1, OWN-CAUSAL1.

        p_i = i + n_cache

    Args:
        query: Q of the new tokens, (..., h, n, d_k).
        key: K of the new tokens, (..., h_k, n, d_k).
        value: V of the new tokens, (..., h_k, n, d_v).
        cache: of the tokens so far; None = there are none.
        **options: as `attention`; the alignment is the cache's length and can't be given.

    Returns:
        result: output and logsumexp of the new queries.
        cache: with the new tokens appended.

    Raises:
        ShapeError, DtypeError, OptionError, MemoryLimitError: as `extend` and `attention`.
    """
    if "alignment" in options:
        raise OptionError(
            f"alignment is {shown(options['alignment'])}, but the cache's length decides it here "
            f"[cached_attention]"
        )
    grown = extend(cache, key, value)
    options["alignment"] = grown.key.shape[-2] - key.shape[-2]
    return CachedResult(attention(query, grown.key, grown.value, **options), grown)


def _check_cache(function: str, cache: Any) -> None:
    if not (cache is None or isinstance(cache, Cache)):
        raise OptionError(f"cache is {shown(cache)}, but it must be a Cache or None [{function}]")
