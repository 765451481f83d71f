"""The kernel of multiply-adds, emulated: every claim of the others, and what tensor cores lose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import refattn
from cpu_draws import draw, widened
from cuda_cases import CASES, RUN, complaints, fits, forward
from optional import require_device
from refattn.backends import Unsupported
from refattn.checks import OptionError
from refattn_gpu import cuda
from refattn_gpu.cuda import emulate
from refattn_gpu.cuda.attention import emulated, kernel_for, result_of
from refattn_gpu.cuda.catalogue import FORMATS, SMALL, SMALL_FFMA, Tile, Variant, variants
from refattn_gpu.cuda.problem import problem_of

CLAIMED = [name for name in RUN if fits(CASES[name], "float32", "ffma")]
"""Vectors that the kernel claims."""

LEAST = 274
"""Vectors that run."""

WIDE = Tile(64, 64, 2, 1, False)
"""A tile whose threads have 8 rows by 8 keys, as the widest of a device."""

SIZES = [1, 5, 17, 33, 67, 129], [1, 3, 16, 31, 65, 97], [1, 8, 15, 24, 33, 64]
"""Queries, keys and features; tiles end off the edges of most."""

LEAST_NUMBER = 2.0**-149
"""Of float32."""


@pytest.fixture(autouse=True)
def _gxx() -> None:
    require_device("gxx", emulate.no_gxx())


def problem(
    n_q: int = 37, n_k: int = 53, d: int = 24, d_v: int = 16, h: int = 2
) -> list[np.ndarray]:
    shapes = (2, h, n_q, d), (2, h, n_k, d), (2, h, n_k, d_v)
    drawn = np.random.default_rng([n_q, n_k, d])
    return [drawn.standard_normal(shape).astype(np.float32) for shape in shapes]


def run(
    arrays: list[np.ndarray],
    tile: Tile = SMALL_FFMA,
    kernel: str = "ffma",
    backwards: bool = False,
    **options: Any,
) -> Any:
    given: Any = options
    found = problem_of("test", *arrays, given)
    emulated(found, tile, kernel=kernel, backwards=backwards)
    return result_of(found, arrays[0], arrays[2])


def exact(arrays: list[np.ndarray], **options: Any) -> Any:
    wide, wide_options = widened(arrays, options)
    return refattn.attention(*wide, **wide_options)


def off(found: Any, true: Any) -> float:
    """Return the largest error, over the largest number or over 1."""
    found, true = np.asarray(found, np.float64), np.asarray(true, np.float64)
    assert np.array_equal(np.isfinite(found), np.isfinite(true))
    finite = np.isfinite(true)
    size = max(1.0, np.abs(true[finite]).max(initial=0.0))
    return float(np.abs(found[finite] - true[finite]).max(initial=0.0) / size)


@pytest.mark.parametrize("name", CLAIMED)
def test_the_kernel_agrees_with_the_certified_values(name: str) -> None:
    for tile in (SMALL_FFMA, WIDE, None):
        outputs = forward(CASES[name], "float32", tile, kernel="ffma")
        assert not complaints(CASES[name], outputs, "float32")


def test_enough_vectors_run() -> None:
    assert len(CLAIMED) >= LEAST


@pytest.mark.clause("VAS-EQ1", "FA1-ALG1", "OWN-ROUND1", "OWN-GQA1", "OWN-LENGTH1", "OWN-SINK1")
@pytest.mark.clause("OWN-EMPTY1", "OWN-SOFTCAP1", "ALIBI-S3a", "OWN-WINDOW1", "OWN-DROPOUT1")
@pytest.mark.parametrize("first", range(0, 40, 10))
def test_every_option_agrees_with_the_reference(first: int) -> None:
    for seed in range(first, first + 10):
        arrays, options = draw(seed, *SIZES)
        arrays = [array.astype(np.float32) for array in arrays]
        narrow = {
            n: x.astype(np.float32) if n in ("bias", "slopes", "sinks") else x
            for n, x in options.items()
        } | {"empty_row": "zero", "masked": "select"}
        found = run(arrays, [SMALL_FFMA, WIDE][seed % 2], **narrow)
        true = exact(arrays, **narrow)
        assert off(found.output, true.output) <= 1e-5, seed
        assert off(found.logsumexp, true.logsumexp) <= 1e-4, seed


@pytest.mark.clause("FA1-ALG1")
@pytest.mark.parametrize(
    "variant",
    [variant for variant in variants() if variant.kernel == "ffma"],
    ids=lambda variant: variant.name,
)
def test_the_tiles_of_a_device_give_what_the_small_ones_give(variant: Variant) -> None:
    d = variant.features - 8
    arrays = problem(n_q=131, n_k=139, d=d, d_v=d, h=1)
    options: dict[str, Any] = {"causal": True, "alignment": "bottom_right"}
    if variant.terms:
        options["softcap"] = 20.0
    found, true = run(arrays, variant.tile, **options), exact(arrays, **options)
    assert off(found.output, true.output) <= 1e-5
    assert off(found.logsumexp, true.logsumexp) <= 1e-5


@pytest.mark.parametrize("tile", [SMALL_FFMA, WIDE])
def test_the_bits_depend_neither_on_the_order_of_threads_nor_on_the_batch(tile: Tile) -> None:
    arrays = problem()
    whole = run(arrays, tile, causal=True)
    again = run(arrays, tile, causal=True, backwards=True)
    assert all(map(np.array_equal, whole, again))
    alone = run([array[1:, 1:] for array in arrays], tile, causal=True)
    assert all(np.array_equal(a[1:, 1:], b) for a, b in zip(whole, alone, strict=True))


def test_a_row_does_not_depend_on_the_rows_after_it() -> None:
    arrays = problem(n_q=53)
    whole = run(arrays, causal=True)
    for n in (16, 17, 32, 48):
        cut = run([array[:, :, :n] for array in arrays], causal=True)
        assert np.array_equal(whole.output[:, :, :n], cut.output)
        assert np.array_equal(whole.logsumexp[:, :, :n], cut.logsumexp)


@pytest.mark.clause("OWN-POISON1")
def test_what_is_forbidden_is_never_read() -> None:
    arrays = problem(n_q=11, n_k=19)
    forbidding: dict[str, tuple[Any, slice]] = {
        "causal": ({"causal": True}, slice(11, 19)),
        "window": ({"window": [5, 3]}, slice(14, 19)),
        "mask": ({"mask": (np.arange(19) % 7 > 0)[None, :]}, slice(0, 19, 7)),
        "lengths": ({"key_lengths": np.array([9, 9])}, slice(9, 19)),
    }
    for name, (options, rows) in forbidding.items():
        clean = run(arrays, **options)
        query, key, value = (array.copy() for array in arrays)
        key[:, :, rows], value[:, :, rows] = np.inf, np.nan
        stained = run([query, key, value], **options)
        assert off(stained.output, clean.output) <= 1e-6, name  # rows made again sum otherwise
        assert np.array_equal(clean.logsumexp, stained.logsumexp), name


@pytest.mark.clause("OWN-POISON1")
def test_a_value_of_poison_reaches_the_queries_that_may_read_it_and_no_other() -> None:
    query, key, value = problem(n_q=53)
    value[:, :, 9] = np.nan
    output = run([query, key, value], causal=True).output
    assert np.isfinite(output[:, :, :9]).all()
    assert np.isnan(output[:, :, 9:]).all()


@pytest.mark.clause("FA1-ALG1", "OWN-SCALE1")
@pytest.mark.parametrize("scale", [600.0, -600.0, 0.0, 1e-30])
def test_any_scale_neither_overflows_nor_vanishes(scale: float) -> None:
    arrays = problem()
    found, true = run(arrays, scale=scale), exact(arrays, scale=scale)
    assert off(found.output, true.output) <= 1e-3
    assert off(found.logsumexp, true.logsumexp) <= 2e-6


def test_a_long_row_is_rounded_less_than_where_every_tile_is_added_to_it() -> None:
    arrays = problem(n_q=17, n_k=4001)
    true = exact(arrays).output

    def rms(output: np.ndarray) -> float:
        return float(np.sqrt(((output - true) ** 2).mean()))

    assert 0 < rms(run(arrays).output) <= 0.7 * rms(run(arrays, SMALL, "forward").output)


BOTH = pytest.mark.parametrize("more", [{}, {"softcap": 1e4}], ids=["plain", "terms"])
"""Both variants; the cap is too far to bend a logit by a float32's last bit."""


@BOTH
def test_queries_below_the_normal_range_keep_their_bits(more: Any) -> None:
    query, key, value = problem()
    arrays = [np.float32(1e-20) * np.float32(1e-20) * query, np.float32(1e37) * key, value]
    assert 0 < np.abs(arrays[0]).max() < 2.0**-126
    found = run(arrays, scale=300.0, **more)
    true = exact(arrays, scale=300.0, **more)
    assert np.ptp(true.logsumexp) > 0.1  # the logits differ
    assert off(found.output, true.output) <= 1e-5
    split = run(arrays, SMALL, "forward", scale=300.0, **more)  # TF32 has not their last bits
    assert off(split.output, true.output) > 1e-3


@BOTH
def test_values_below_the_normal_range_are_averaged_to_the_last_bits(more: Any) -> None:
    query, key, value = problem()
    tiny = np.float32(1e-20) * np.float32(1e-22) * value
    assert 100 < np.abs(tiny).max() / LEAST_NUMBER < 2.0**23
    found, true = run([query, key, tiny], **more).output, exact([query, key, tiny], **more).output
    assert np.abs(found.astype(np.float64) - true).max() <= 4 * LEAST_NUMBER
    assert np.abs(true).max() > 50 * LEAST_NUMBER


@BOTH
def test_weights_below_the_normal_range_meet_large_values(more: Any) -> None:
    query = np.ones((1, 1, 5, 8), np.float32)
    key = np.zeros((1, 1, 53, 8), np.float32)
    key[:, :, 7:, 0] = np.linspace(-91, -88, 46)  # weights of 2^-131 to 2^-127
    value = np.zeros((1, 1, 53, 8), np.float32)
    value[:, :, 7:] = 1e30
    arrays = [query, key, value]
    found = run(arrays, scale=1.0, **more).output
    true = exact(arrays, scale=1.0, **more).output
    assert 2.0**-131 * 1e30 < true.min()
    assert np.abs(found / true - 1).max() <= 2.0**-14  # a weight has 18 bits, its logit 17 below 1
    assert not run(arrays, SMALL, "forward", scale=1.0, **more).output.any()  # flushed


def test_rows_that_are_made_again_keep_their_least_weights() -> None:
    query = np.ones((1, 1, 1, 8), np.float32)
    key = np.zeros((1, 1, 3, 8), np.float32)
    key[0, 0, 1, 0] = -90
    value = np.zeros((1, 1, 3, 8), np.float32)
    value[0, 0, 1], value[0, 0, 2] = 1e30, np.nan
    mask = np.array([True, True, False])
    found = run([query, key, value], scale=1.0, mask=mask[None]).output
    assert np.allclose(found, np.exp(-90) * 1e30, rtol=2.0**-14, atol=0)


def test_heads_of_float32_beyond_128_features_are_claimed() -> None:
    arrays = problem(n_q=19, n_k=43, d=200, d_v=256, h=1)
    found, true = cuda.attention(*arrays, causal=True), exact(arrays, causal=True)
    assert off(found.output, true.output) <= 1e-5
    assert off(found.logsumexp, true.logsumexp) <= 1e-5
    with pytest.raises(Unsupported, match=r"129 features, but .* at most 128 in float32 \[cuda.at"):
        cuda.attention_backward(np.zeros((2, 2, 37, 16), np.float32), *problem(d=129))


def test_the_kernel_is_chosen_by_the_features_and_may_be_named() -> None:
    chosen = {d: kernel_for(problem_of("test", *problem(d=d), {})) for d in (24, 128, 129, 256)}
    assert chosen == {24: "forward", 128: "forward", 129: "ffma", 256: "ffma"}
    arrays = problem(n_q=5, n_k=7)
    named = cuda.attention(*arrays, kernel="ffma")
    assert all(map(np.array_equal, named, run(arrays, Tile(128, 64, 4, 2, False))))


@pytest.mark.parametrize("dtype", FORMATS[:2])
def test_what_the_kernel_does_not_claim_is_refused_in_one_sentence(dtype: str) -> None:
    arrays = [refattn.backends.cast_floats(array, dtype) for array in problem()]
    with pytest.raises(Unsupported, match=rf"dtype {dtype}, but kernel ffma supports float32 \["):
        cuda.attention(*arrays, kernel="ffma")
    with pytest.raises(Unsupported, match=r"129 features, but kernel forward supports at most"):
        cuda.attention(*problem(d=129), kernel="forward")
    with pytest.raises(
        Unsupported, match=r"257 features, but the CUDA kernels support at most 256"
    ):
        cuda.attention(*problem(d=257))
    with pytest.raises(OptionError, match="kernel"):
        cuda.attention(*problem(), kernel="no such")
