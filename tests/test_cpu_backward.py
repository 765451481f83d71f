"""Gradients on the CPU: every option against the reference, finite differences, and determinism."""

from __future__ import annotations

import numpy as np
import pytest

from cpu_draws import draw, widened
from optional import require

require("numba")
import refattn  # noqa: E402
from refattn import cpu  # noqa: E402
from refattn.checks import DtypeError, ShapeError  # noqa: E402


def drawn(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def problem(n_q=97, n_k=131, d=40, d_v=24, h=3, dtype=np.float32):
    shapes = ((2, h, n_q, d), (2, h, n_k, d), (2, h, n_k, d_v), (2, h, n_q, d_v))
    return [drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def scale_of(gradient):
    return max(1.0, float(np.abs(np.nan_to_num(gradient)).max(initial=0.0)))


def worst(found, exact):
    found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    assert np.array_equal(np.isfinite(found), np.isfinite(exact))
    return np.abs(np.nan_to_num(found) - np.nan_to_num(exact)).max(initial=0.0)


@pytest.mark.clause("OWN-BACKWARD1", "FA1-ALG4", "OWN-GQA1", "OWN-SINK1", "OWN-EMPTY1")
@pytest.mark.parametrize("first", range(0, 80, 10))
def test_every_option_agrees_with_the_reference(first):
    for seed in range(first, first + 10):
        arrays, options = draw(seed)
        shape, dtype = arrays[0].shape, arrays[0].dtype
        d_output = drawn(*shape[:-1], arrays[2].shape[-1], seed=seed).astype(dtype)
        given = {"d_logsumexp": drawn(*shape[:-1], seed=seed).astype(dtype)} if seed % 3 else {}
        found = cpu.attention_backward(d_output, *arrays, threads=1 + seed % 3, **given, **options)
        rounded = refattn.attention_backward(d_output, *arrays, **given, **options)
        wide, wide_options = widened(arrays, options)
        wide_given = {name: x.astype(np.float64) for name, x in given.items()}
        exact = refattn.attention_backward(
            d_output.astype(np.float64), *wide, **wide_given, **wide_options
        )
        for name, got, same, true in zip(found._fields, found, rounded, exact, strict=True):
            assert (got is None) == (true is None), (seed, name)
            if got is None:
                continue
            assert (got.shape, got.dtype) == (same.shape, same.dtype), (seed, name)
            eps = float(np.finfo(np.float64 if dtype == np.float64 else np.float32).eps)
            error, own = worst(got, true), worst(same, true)
            slack = 4096 if name == "d_slopes" else 64  # a slope's sum has terms as large as n_k
            assert error <= 3 * own + slack * eps * scale_of(true), (seed, name, error, own)


@pytest.mark.clause("OWN-BACKWARD1")
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": [20, 9], "softcap": 3.0}])
def test_the_gradients_are_the_slopes_of_the_loss(options):
    *arrays, d_output = problem(n_q=67, n_k=71, dtype=np.float64)
    gradients = cpu.attention_backward(d_output, *arrays, **options)
    for i in range(3):
        direction = drawn(*arrays[i].shape, dtype=np.float64, seed=9)
        losses = []
        for step in (1e-5, -1e-5):
            moved = [a + step * direction if j == i else a for j, a in enumerate(arrays)]
            losses.append((cpu.attention(*moved, **options).output * d_output).sum())
        slope = (losses[0] - losses[1]) / 2e-5
        assert abs(slope - (gradients[i] * direction).sum()) <= 1e-6 * scale_of(slope)


@pytest.mark.clause("OWN-BACKWARD1")
@pytest.mark.parametrize("heads", [1, 3])
def test_the_bits_do_not_depend_on_the_number_of_threads(heads):
    *arrays, d_output = problem(n_q=531, n_k=523, d=64, d_v=64, h=heads)
    first = cpu.attention_backward(d_output, *arrays, threads=1, causal=True)
    for threads in (2, 3, 5):
        again = cpu.attention_backward(d_output, *arrays, threads=threads, causal=True)
        assert all(np.array_equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))


@pytest.mark.clause("OWN-BACKWARD1")
def test_a_forward_pass_that_is_given_is_used():
    *arrays, d_output = problem()
    forward = cpu.attention(*arrays, causal=True)
    whole = cpu.attention_backward(d_output, *arrays, causal=True)
    saved = cpu.attention_backward(d_output, *arrays, causal=True, forward=forward)
    assert all(np.array_equal(a, b) for a, b in zip(whole[:3], saved[:3], strict=True))


@pytest.mark.clause("OWN-POISON1", "OWN-BACKWARD1")
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_forbidden_is_never_read(poison):
    query, key, value, d_output = problem()
    mask = (np.arange(131) % 7 > 0)[None, :]
    ways = {
        "causal": ({"causal": True}, slice(97, 131)),
        "mask": ({"mask": mask}, slice(0, 131, 7)),
        "capped": ({"mask": mask, "softcap": 2.0}, slice(0, 131, 7)),
        "lengths": ({"key_lengths": np.array([90, 50])}, slice(90, 131)),
    }
    for name, (options, rows) in ways.items():
        clean = cpu.attention_backward(d_output, query, key, value, **options)
        k, v = key.copy(), value.copy()
        k[:, :, rows] = v[:, :, rows] = poison
        stained = cpu.attention_backward(d_output, query, k, v, **options)
        assert all(np.isfinite(g).all() for g in stained[:3]), name
        for a, b in zip(clean[:3], stained[:3], strict=True):
            assert np.abs(a - b).max() < 1e-5, name  # a row of poison is summed by another loop


@pytest.mark.clause("OWN-BACKWARD1", "FA1-ALG4", "OWN-SINK1")
@pytest.mark.parametrize("power", [10, 15, 22])
@pytest.mark.parametrize("sinks", [None, [3.0, -np.inf]])
@pytest.mark.parametrize("n_q", [1, 71])
def test_weights_are_found_again_at_logits_far_beyond_the_precision_of_the_logsumexp(
    n_q, sinks, power
):
    # whole multiples of a large number: products and sums are exact in float32, and some are equal
    whole = np.random.default_rng(n_q).integers
    query, key = (
        whole(-3, 4, (1, 2, n, 4)).astype(np.float32) * np.float32(2.0**power) for n in (n_q, 61)
    )
    value, d_output = drawn(1, 2, 61, 3), drawn(1, 2, n_q, 3)
    given = {"scale": 0.3, "query_lengths": np.array([n_q - n_q // 9])}
    given |= {} if sinks is None else {"sinks": np.float32(sinks)}
    found = cpu.attention_backward(d_output, query, key, value, **given)
    wide = [array.astype(np.float64) for array in (d_output, query, key, value)]
    given |= {} if sinks is None else {"sinks": np.float64(sinks)}
    exact = refattn.attention_backward(*wide, **given)
    for a, b in zip(found[:3], exact[:3], strict=True):
        assert np.abs(a - b).max() <= 3e-6 * max(1, np.abs(b).max())


@pytest.mark.clause("OWN-POISON1", "OWN-BACKWARD1")
@pytest.mark.parametrize("name", ["query", "key", "d_output"])
def test_a_query_that_is_not_a_number_does_not_reach_the_keys_it_may_not_see(name):
    ways = {
        "causal": ({"causal": True}, slice(71, 131)),
        "mask": ({"mask": np.arange(131) % 7 > 0}, slice(0, 131, 7)),
        "bias": ({"bias": np.where(np.arange(131) < 61, 0, -np.inf)}, slice(61, 131)),
        "lengths": ({"key_lengths": np.array([61, 131])}, slice(61, 131)),  # in no whole step
    }
    for case, (options, unseen) in ways.items():
        arrays = dict(zip(("query", "key", "value", "d_output"), problem(), strict=True))
        options = {n: x.astype(np.float32) if n == "bias" else x for n, x in options.items()}
        rest = {"query_lengths": np.array([71, 71])} | options  # row 70 is the last of them
        arrays[name][0, :, 1 if name == "key" else 70, 3] = np.nan
        g = cpu.attention_backward(arrays.pop("d_output"), **arrays, **rest)
        for gradient in (g.d_key[0], g.d_value[0]):
            assert not gradient[:, unseen].any(), case
        touched = g.d_value if name == "d_output" else g.d_key
        assert np.isnan(touched[0, :, 1, 3]).all(), case


def test_bad_cotangents_are_refused_as_by_the_reference():
    query, key, value, d_output = problem()
    with pytest.raises(ShapeError, match="d_output has 24=23"):
        cpu.attention_backward(d_output[..., :23], query, key, value)
    with pytest.raises(DtypeError, match="d_output has dtype float64, but query has dtype float32"):
        cpu.attention_backward(d_output.astype(np.float64), query, key, value)
