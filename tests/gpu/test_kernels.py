"""The Numba-CUDA kernels: every option against the reference, and what only kernels get wrong."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from cpu_draws import draw, widened
from optional import require

require("numba")
require("refattn_gpu.device")
import refattn  # noqa: E402
from refattn.backends import Unsupported, load  # noqa: E402
from refattn.check import present  # noqa: E402
from refattn.checks import DtypeError, OptionError, ShapeError  # noqa: E402
from refattn_gpu import device, numba_cuda  # noqa: E402
from refattn_gpu.numba_cuda.problem import CLAIMED  # noqa: E402
from refattn_gpu.numba_cuda.shapes import row_shape, tile_shape  # noqa: E402

host = importlib.import_module("refattn_gpu.numba_cuda.attention")  # the function hides it

if device.STATE.kind == "absent":
    pytest.skip(device.STATE.reason, allow_module_level=True)

SMALL = [1, 2, 5, 8, 11, 17], [1, 3, 7, 8, 13, 19], [1, 3, 4, 8, 11]
"""Queries, keys and features; tiles of 8 rows end off the edges of most."""

FORMS = pytest.mark.parametrize("form", ["rows", "tiles"])


def drawn(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def problem(n_q=11, n_k=19, d=5, d_v=3, h=2, dtype=np.float64):
    shapes = (2, h, n_q, d), (2, h, n_k, d), (2, h, n_k, d_v)
    return [drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def drawn_problem(seed):
    arrays, options = draw(seed, *SMALL)
    return arrays, options | {name: CLAIMED[name] for name in options if name in CLAIMED}


def worst(found, exact):
    found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    assert np.array_equal(np.isfinite(found), np.isfinite(exact))
    finite = np.isfinite(exact)
    return np.abs(found[finite] - exact[finite]).max(initial=0.0)


def agree(found, rounded, exact, seed):
    for got, same, true in zip(found, rounded, exact, strict=True):
        assert (got is None) == (true is None), seed
        if got is None:
            continue
        assert (got.shape, got.dtype) == (same.shape, same.dtype), seed
        eps = float(np.finfo(np.float64 if got.dtype == np.float64 else np.float32).eps)
        size = max(1.0, float(np.abs(true[np.isfinite(true)]).max(initial=0.0)))
        # the reference's own rounding, and that of logits and distances of ordinary size
        assert worst(got, true) <= 3 * worst(same, true) + 256 * eps * size, seed


@pytest.mark.clause("VAS-EQ1", "FA1-ALG1", "OWN-ROUND1", "OWN-GQA1", "OWN-LENGTH1", "OWN-SINK1")
@pytest.mark.clause("OWN-BACKWARD1", "FA1-ALG4", "OWN-EMPTY1", "OWN-SOFTCAP1", "ALIBI-S3a")
@pytest.mark.parametrize("first", range(0, 40, 5))
@FORMS
def test_every_option_agrees_with_the_reference(form, first):
    for seed in range(first, first + 5):
        arrays, options = drawn_problem(seed)
        shape, dtype = arrays[0].shape, arrays[0].dtype
        before = [array.copy() for array in arrays]
        found = numba_cuda.attention(*arrays, form=form, **options)
        assert all(np.array_equal(a, b, True) for a, b in zip(before, arrays, strict=True))
        wide, wide_options = widened(arrays, options)
        rounded = refattn.attention(*arrays, **options)
        agree(found, rounded, refattn.attention(*wide, **wide_options), seed)
        d_output = drawn(*shape[:-1], arrays[2].shape[-1], seed=seed).astype(dtype)
        dL = {"d_logsumexp": drawn(*shape[:-1], seed=seed).astype(dtype)} if seed % 3 else {}
        found = numba_cuda.attention_backward(d_output, *arrays, form=form, **dL, **options)
        rounded = refattn.attention_backward(d_output, *arrays, **dL, **options)
        wide_dL = {name: x.astype(np.float64) for name, x in dL.items()}
        exact = refattn.attention_backward(
            d_output.astype(np.float64), *wide, **wide_dL, **wide_options
        )
        agree(found, rounded, exact, seed)


@pytest.mark.clause("OWN-POISON1")
@FORMS
def test_what_is_forbidden_is_never_read(form):
    query, key, value = (x[:1, :1] for x in problem())
    d_output = drawn(1, 1, 11, 3, seed=7)
    ways = {
        "causal": ({"causal": True}, slice(11, 19)),
        "window": ({"window": [5, 3]}, slice(14, 19)),
        "mask": ({"mask": (np.arange(19) % 7 > 0)[None, :]}, slice(0, 19, 7)),
        "lengths": ({"key_lengths": np.array([9])}, slice(9, 19)),
        "bias": ({"bias": np.where(np.arange(19) < 6, 0, -np.inf)}, slice(6, 19)),
        "capped": ({"causal": True, "softcap": 2.0}, slice(11, 19)),
    }
    for name, (options, rows) in ways.items():
        clean = numba_cuda.attention(query, key, value, form=form, **options)
        slopes = numba_cuda.attention_backward(d_output, query, key, value, form=form, **options)
        k, v = key.copy(), value.copy()
        k[:, :, rows], v[:, :, rows] = (np.inf, np.nan) if len(name) % 2 else (np.nan, -np.inf)
        stained = numba_cuda.attention(query, k, v, form=form, **options)
        assert all(map(np.array_equal, clean, stained)), name
        found = numba_cuda.attention_backward(d_output, query, k, v, form=form, **options)
        for a, b in zip(slopes[:3], found[:3], strict=True):
            assert np.array_equal(a, b), name


@pytest.mark.clause("OWN-POISON1", "OWN-LENGTH1")
@FORMS
def test_a_missing_query_row_reaches_no_gradient(form):
    query, key, value = problem()
    d_output, lengths = drawn(2, 2, 11, 3, seed=7), np.array([11, 4])
    options = {"query_lengths": lengths, "sinks": np.array([0.5, -1.0]), "form": form}
    clean = numba_cuda.attention_backward(d_output, query, key, value, **options)
    query[1, :, 4:] = d_output[1, :, 4:] = np.nan
    stained = numba_cuda.attention_backward(d_output, query, key, value, **options)
    for name, a, b in zip(clean._fields, clean, stained, strict=True):
        assert (a is None and b is None) or np.array_equal(a, b), name


@pytest.mark.clause("OWN-POISON1", "OWN-ROUND1")
@FORMS
def test_a_value_of_poison_reaches_the_queries_that_may_read_it_and_no_other(form):
    query, key, value = problem(n_q=19)
    value[:, :, 9] = np.nan
    output = numba_cuda.attention(query, key, value, causal=True, form=form).output
    assert np.isfinite(output[:, :, :9]).all()
    assert np.isnan(output[:, :, 9:]).all()


@pytest.mark.clause("FA1-ALG1", "OWN-SCALE1")
@FORMS
@pytest.mark.parametrize("magnitude", [1e4, -84000.0])
def test_large_logits_neither_overflow_nor_vanish(form, magnitude):
    query, key, value = problem(dtype=np.float32)
    key[..., 0], query[..., 0] = 1.0, magnitude
    found = numba_cuda.attention(query, key, value, scale=1.0, form=form)
    wide = (array.astype(np.float64) for array in (query, key, value))
    exact = refattn.attention(*wide, scale=1.0)
    assert worst(found.output, exact.output) < 0.05  # a logit is off by up to 2^-24 of 84000
    assert worst(found.logsumexp / magnitude, exact.logsumexp / magnitude) < 1e-6


@pytest.mark.clause("OWN-EMPTY1", "OWN-LSE1", "OWN-CAUSAL1")
@FORMS
@pytest.mark.parametrize("offset", [-(2**62), 2**62])
def test_the_farthest_offsets_leave_no_key_or_every_key(form, offset):
    query, key, value = problem()
    found = numba_cuda.attention(query, key, value, causal=True, alignment=offset, form=form)
    if offset < 0:
        assert not found.output.any()
        assert np.isneginf(found.logsumexp).all()
    else:
        whole = numba_cuda.attention(query, key, value, form=form)
        assert all(map(np.array_equal, found, whole))


@FORMS
def test_the_bits_do_not_depend_on_what_stands_beside(form):
    query, key, value = problem(dtype=np.float32)
    d_output = drawn(2, 2, 11, 3, dtype=np.float32)
    whole = numba_cuda.attention(query, key, value, causal=True, form=form)
    alone = [x[1:, 1:] for x in (query, key, value)]
    part = numba_cuda.attention(*alone, causal=True, form=form)
    assert all(np.array_equal(a[1:, 1:], b) for a, b in zip(whole, part, strict=True))
    runs = [
        numba_cuda.attention_backward(d, *arrays, causal=True, form=form)[:3]
        for d, arrays in ((d_output, (query, key, value)), (d_output[1:, 1:], alone))
    ]
    assert all(np.array_equal(a[1:, 1:], b) for a, b in zip(*runs, strict=True))


@pytest.mark.clause("FA1-ALG1")
@pytest.mark.parametrize("form", ["rows", "tiles"])
@pytest.mark.skipif(not device.SIMULATED, reason="a device uses these shapes in every test")
def test_the_shapes_of_a_device_run_in_the_simulator_too(form, monkeypatch):
    monkeypatch.setattr(host, "tile_shape", lambda d, dtype, simulated: tile_shape(d, dtype))
    monkeypatch.setattr(host, "row_shape", lambda d, size, simulated: row_shape(d, size))
    host._forward_kernel.cache_clear()
    query, key, value = (x[:1, :1] for x in problem(n_q=67, n_k=71, d=16, d_v=32))
    found = numba_cuda.attention(query, key, value, causal=True, form=form)
    host._forward_kernel.cache_clear()
    exact = refattn.attention(query, key, value, causal=True)
    assert max(map(worst, found, exact)) < 1e-13


def test_axes_are_added_where_the_reference_needs_none():
    query, key, value = problem()
    whole = numba_cuda.attention(query, key, value)
    part = numba_cuda.attention(query[1, 1], key[1, 1], value[1, 1])
    assert np.array_equal(part.output, whole.output[1, 1])
    assert part.logsumexp.shape == (11,)


def test_a_forward_result_that_is_given_is_not_computed_again():
    arrays, d_output = problem(), drawn(2, 2, 11, 3)
    forward = numba_cuda.attention(*arrays)
    given = numba_cuda.attention_backward(d_output, *arrays, forward=forward)
    again = numba_cuda.attention_backward(d_output, *arrays)
    assert all(np.array_equal(a, b) for a, b in zip(given[:3], again[:3], strict=True))
    other = forward._replace(logsumexp=forward.logsumexp + 1)
    moved = numba_cuda.attention_backward(d_output, *arrays, forward=other)
    assert not np.array_equal(moved.d_value, given.d_value)


@pytest.mark.clause("OWN-MERGE1", "FA1-S31")
def test_merging_parts_of_the_keys_gives_attention_over_all_of_them():
    query, key, value = problem()
    cuts = [(0, 5), (5, 6), (6, 19)]
    parts = [numba_cuda.attention(query, key[:, :, a:b], value[:, :, a:b]) for a, b in cuts]
    merged = numba_cuda.merge(*(np.stack(arrays) for arrays in zip(*parts, strict=True)))
    exact = refattn.attention(query, key, value)
    assert max(map(worst, merged, exact)) < 1e-14


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"empty_row": "nan"}, "empty_row is 'nan', but the Numba-CUDA kernels support 'zero'"),
        ({"masked": "add"}, "masked is 'add', but the Numba-CUDA kernels support 'select'"),
        ({"round_weights": True}, "round_weights is True, but the Numba-CUDA kernels support"),
    ],
)
def test_what_is_not_claimed_is_refused(options, sentence):
    with pytest.raises(Unsupported, match=sentence):
        numba_cuda.attention(*problem(), **options)
    with pytest.raises(Unsupported, match=r"a head has 257 features, but .* at most 256"):
        numba_cuda.attention(*problem(d=257))


def test_bad_arguments_are_refused_as_by_the_reference():
    query, key, value = problem()
    with pytest.raises(ShapeError, match=r"key has d_k=4, but query has d_k=5; they must be"):
        numba_cuda.attention(query, key[..., :4], value)
    with pytest.raises(DtypeError, match="value has dtype float32, but query has dtype float64"):
        numba_cuda.attention(query, key, value.astype(np.float32))
    with pytest.raises(OptionError, match="no_such is no option of attention"):
        numba_cuda.attention(query, key, value, no_such=1)
    with pytest.raises(OptionError, match="form is 'warps', but it must be"):
        numba_cuda.attention(query, key, value, form="warps")
    with pytest.raises(ShapeError, match=r"it must be \(p, ..., n, d\) with at least one part"):
        numba_cuda.merge(np.zeros((3, 5)), np.zeros(3))


@pytest.mark.skipif(not device.SIMULATED, reason="a device takes any size")
def test_the_simulator_is_named_and_is_given_small_cases_only():
    backend = load("numba-cuda")
    assert "simulator" in backend.simulator
    inputs = {name: np.zeros((1, 1, 129, 4)) for name in ("query", "key", "value")}
    sentence = "has 129 rows of 4 features, but the CUDA simulator is given at most 128 rows of 32"
    with pytest.raises(Unsupported, match=sentence):
        backend.run("attention", inputs, {}, {}, "float64")


@pytest.mark.skipif(not device.SIMULATED, reason="a device is asked for by nothing")
def test_a_check_of_all_backends_leaves_the_simulator_out_unless_it_is_asked_for(monkeypatch):
    monkeypatch.delenv("REFATTN_REQUIRE", raising=False)
    found, absent = present()
    assert "numba-cuda" not in [backend.name for backend in found]
    assert "refattn check --backend numba-cuda" in absent["numba-cuda"]
    assert [backend.name for backend in present(["numba-cuda"])[0]] == ["numba-cuda"]
    monkeypatch.setenv("REFATTN_REQUIRE", "numba-cuda")
    assert "numba-cuda" in [backend.name for backend in present()[0]]
