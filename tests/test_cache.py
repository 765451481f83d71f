"""Decoding with a cache."""

import numpy as np
import pytest

from refattn.attention import attention
from refattn.cache import cached_attention, extend
from refattn.checks import DtypeError, OptionError, ShapeError

H, H_K, N, D = 4, 2, 11, 3


def _problem():
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(1, h, N, D)) for h in (H, H_K, H_K))


@pytest.mark.clause("OWN-CACHE1", "OWN-CAUSAL1")
@pytest.mark.parametrize("steps", [[1] * N, [4, 1, 1, 5], [N]])
@pytest.mark.parametrize("window", [None, (3, 0)])
def test_decoding_in_steps_equals_one_causal_call(steps, window):
    query, key, value = _problem()
    slopes = np.asarray([0.5, 0.25, 0.125, 0.0625])
    options = {"causal": True, "window": window, "slopes": slopes}
    whole = attention(query, key, value, **options)
    cache, start = None, 0
    for step in steps:
        rows = slice(start, start + step)
        result, cache = cached_attention(
            query[..., rows, :], key[..., rows, :], value[..., rows, :], cache, **options
        )
        assert np.allclose(result.output, whole.output[..., rows, :], rtol=1e-13, atol=1e-14)
        assert np.allclose(result.logsumexp, whole.logsumexp[..., rows], rtol=1e-13, atol=1e-14)
        start += step
    assert np.array_equal(cache.key, key)
    assert np.array_equal(cache.value, value)


@pytest.mark.clause("OWN-CACHE1")
def test_extending_leaves_the_old_cache_alone():
    _, key, value = _problem()
    old = extend(None, key, value)
    new = extend(old, key[..., :2, :], value[..., :2, :])
    assert old.key.shape[-2] == N
    assert new.key.shape[-2] == N + 2
    assert np.array_equal(new.value[..., N:, :], value[..., :2, :])


@pytest.mark.clause("OWN-CACHE1")
def test_tokens_that_do_not_fit_the_cache_are_refused():
    query, key, value = _problem()
    cache = extend(None, key, value)
    with pytest.raises(ShapeError, match="key has"):
        extend(cache, key[:, :1], value[:, :1])
    with pytest.raises(ShapeError, match="value has n=3, but key has n=11"):
        extend(cache, key, value[..., :3, :])
    with pytest.raises(DtypeError, match="but cache_key has dtype float64"):
        extend(cache, key.astype(np.float32), value.astype(np.float32))
    with pytest.raises(OptionError, match="alignment is 3, but the cache's length decides"):
        cached_attention(query, key, value, cache, alignment=3)
