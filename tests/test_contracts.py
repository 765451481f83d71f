"""Contracts of arguments: what is no array, no number, no size is refused in one sentence."""

import tracemalloc

import array_api_strict
import numpy as np
import pytest

import refattn
from refattn.checks import (
    DtypeError,
    MemoryLimitError,
    OptionError,
    RefattnError,
    ShapeError,
    check_arrays,
    check_counts,
    check_flag,
)
from refattn.masks import position_offset
from refattn.options import MATRICES
from refattn.pruning import prune_count
from refattn.rope_frequencies import rope_frequencies
from refattn.rope_scores import relative_scores

B, H, N_Q, N_K, D_K, D_V = 2, 3, 5, 7, 4, 6
INTEGERS = [f"{sign}int{bits}" for sign in ("u", "") for bits in (8, 16, 32, 64)]
TILE = {"block_rows": 2, "block_cols": 3}


def draw(dtype=np.float64):
    rng = np.random.default_rng(17)
    shapes = ((B, H, N_Q, D_K), (B, H, N_K, D_K), (B, H, N_K, D_V))
    return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)


def refusal(call, *args, **options) -> str:
    """Return the one sentence with which a call is refused."""
    with pytest.raises(RefattnError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- arrays


def calls():
    """Return the public functions with arrays that they accept."""
    q, k, v = draw()
    x, w = q[0, 0], np.ones((2, 4, 3))
    gates = np.ones((2, 3))
    forward = refattn.flash_attention_forward(q, k, v, **TILE)
    weights = refattn.standard_attention(q, k, v).weights
    dO = np.ones((B, H, N_Q, D_V))
    projections = {"w_query": w, "w_key": w, "w_value": w, "w_output": np.ones((2, 3, 4))}
    sequence = np.ones((1, 5, 4))
    tiled = {"query": q, "key": k, "value": v}
    row, square = np.ones(4), np.ones((4, 4))
    gated = refattn.GatedParameters(
        row, row, w, w, w, np.ones((2, 3, 4)), np.ones(1), row, row, square, square, np.ones(1)
    )
    return {
        "attention": (tiled, {}),
        "attention_weights": (tiled, {}),
        "attention_backward": ({"d_output": dO, **tiled}, {}),
        "scaled_dot_product_attention": (tiled, {}),
        "cached_attention": (tiled, {}),
        "flash_attention": (tiled, TILE),
        "flash_attention_forward": (tiled, TILE),
        "tile_states": (tiled, TILE),
        "flash_attention_backward": (
            {"d_output": dO, **tiled, **dict(zip(forward._fields[:3], forward, strict=False))},
            TILE,
        ),
        "standard_attention": (tiled, {}),
        "standard_attention_backward": ({"d_output": dO, **tiled, "weights": weights}, {}),
        "merge": ({"outputs": np.ones((2, 5, 3)), "logsumexps": np.ones((2, 5))}, {}),
        "multihead_attention": (
            {"query_input": sequence, "source_input": sequence, **projections},
            {},
        ),
        "multihead_attention_backward": (
            {
                "d_output": sequence,
                "query_input": sequence,
                "source_input": sequence,
                **projections,
            },
            {},
        ),
        "causal_self_attention": (
            {"x": sequence, "w_qkv": np.ones((4, 12))},
            {"heads": 2, "block_size": 8},
        ),
        "causal_self_attention_backward": (
            {"d_output": sequence, "x": sequence, "w_qkv": np.ones((4, 12))},
            {"heads": 2, "block_size": 8},
        ),
        "gated_cross_attention": (
            {"query_input": sequence, "media": np.ones((1, 2, 3, 4))},
            {"parameters": gated},
        ),
        "gated_cross_attention_backward": (
            {"d_output": sequence, "query_input": sequence, "media": np.ones((1, 2, 3, 4))},
            {"parameters": gated},
        ),
        "head_importance": (
            {"head_outputs": np.ones((2, 1, 3, 5, 4)), "d_head_outputs": np.ones((2, 1, 3, 5, 4))},
            {},
        ),
        "prune_heads": (projections, {"heads": [0]}),
        "pruning_order": ({"normalized": gates}, {}),
        "rope": ({"x": x, "positions": np.arange(N_Q)}, {}),
        "rope_backward": ({"d_output": x, "positions": np.arange(N_Q)}, {}),
        "rope_tables": ({"positions": np.arange(N_Q)}, {"rotary_dim": 4}),
        "rope_decay": ({"distances": np.arange(N_Q)}, {"d": 4}),
        "alibi_bias": ({"slopes": np.ones(3)}, {"n_q": 5, "n_k": 7}),
        "alibi_bias_backward": ({"d_bias": np.ones((3, 5, 7))}, {}),
        "split_heads": ({"x": x}, {"heads": 2}),
        "merge_heads": ({"x": np.ones((2, 5, 3))}, {}),
        "score": ({"query": x, "key": x}, {"kind": "dot"}),
        "score_backward": (
            {"d_scores": np.ones((N_Q, N_Q)), "query": x, "key": x},
            {"kind": "dot"},
        ),
    }


CALLS = calls()
"""Every public function of arrays."""

STRANGERS = {
    "None": lambda array: None,
    "a list": lambda array: ["x"],
    "a MaskedArray": np.ma.masked_array,
}
"""What is no array, by the words of the refusal."""


@pytest.mark.clause("OWN-ROUND1")
@pytest.mark.parametrize("words", STRANGERS)
@pytest.mark.parametrize("function", CALLS)
def test_an_argument_that_is_no_array_is_refused_by_name(function, words):
    arrays, options = CALLS[function]
    getattr(refattn, function)(**arrays, **options)
    for name in arrays:
        stranger = {name: STRANGERS[words](arrays[name])}
        sentence = refusal(getattr(refattn, function), **{**arrays, **stranger}, **options)
        assert f"is {words}, but it must be an array" in sentence


@pytest.mark.clause("OWN-ROUND1")
@pytest.mark.parametrize(
    "function", [name for name, (arrays, _) in CALLS.items() if len(arrays) > 1]
)
def test_arrays_of_two_libraries_are_refused(function):
    arrays, options = CALLS[function]
    *_, last = arrays
    mixed = {**arrays, last: array_api_strict.asarray(arrays[last])}
    assert "they must be of one library" in refusal(getattr(refattn, function), **mixed, **options)


@pytest.mark.clause("OWN-MASK1")
@pytest.mark.parametrize(
    "option", ["mask", "bias", "slopes", "sinks", "keep", "query_lengths", "key_lengths"]
)
def test_an_option_that_is_no_array_is_refused(option):
    with pytest.raises(DtypeError, match=f"{option} is a list, but it must be an array"):
        refattn.attention(*draw(), **{option: [1.0]})
    with pytest.raises(DtypeError, match=f"{option} is a float, but it must be an array"):
        refattn.attention(*draw(), **{option: 1.0})


def test_a_library_is_named_and_an_article_fits():
    x = np.ones(2)
    with pytest.raises(DtypeError, match="y is an array of array_api_strict, but x is one of nu"):
        check_arrays("f", x=x, y=array_api_strict.asarray(x))
    with pytest.raises(DtypeError, match=r"^y is an int, but it must be an array \[f\]$"):
        check_arrays("f", x=x, y=3)


# ---- numbers, flags, names


NUMBERS = ["x", 1j, np.ones(3), np.ones((3, 3)), 10**400, 10**5000, True, [1.0]]
"""What is no finite real number."""


@pytest.mark.clause("OWN-SCALE1", "OWN-SOFTCAP1", "OWN-DROPOUT1")
@pytest.mark.parametrize("number", NUMBERS, ids=range(len(NUMBERS)))
def test_what_is_no_finite_number_is_refused(number):
    keep = np.ones((B, H, N_Q, N_K), dtype=bool)
    for option in ("scale", "softcap", "keep_probability"):
        assert option in refusal(refattn.attention, *draw(), keep=keep, **{option: number})
    for function in ("flash_attention", "flash_attention_forward", "tile_states"):
        refusal(getattr(refattn, function), *draw(), scale=number, **TILE)
    for function in ("standard_attention", "scaled_dot_product_attention"):
        assert "scale is" in refusal(getattr(refattn, function), *draw(), scale=number)
    chance = {"keep": keep, "keep_probability": number}
    if number is not True:
        refusal(refattn.flash_attention_forward, *draw(), **chance, **TILE)
    x = draw()[0]
    assert "base is" in refusal(refattn.rope, x, np.arange(N_Q), base=number)
    variant = {"kind": "linear", "factor": number}
    assert "factor" in refusal(refattn.rope, x, np.arange(N_Q), variant=variant)


@pytest.mark.clause("OWN-SCALE1")
def test_none_is_refused_where_a_number_must_stand():
    for function in ("flash_attention", "tile_states"):
        assert "scale is None" in refusal(getattr(refattn, function), *draw(), scale=None, **TILE)
    assert "scale is None" in refusal(refattn.standard_attention, *draw(), scale=None)
    assert "keep_probability is None" in refusal(refattn.attention, *draw(), keep_probability=None)
    assert "base is None" in refusal(refattn.rope, draw()[0], np.arange(N_Q), base=None)


@pytest.mark.clause("OWN-SCALE1", "OWN-ROUND1")
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_number_that_leaves_the_computing_dtype_is_refused(dtype):
    arrays = draw(dtype)
    sentence = "scale is 1e+300, but query computes in float32, where that is inf"
    assert sentence in refusal(refattn.attention, *arrays, scale=1e300)
    assert sentence in refusal(refattn.scaled_dot_product_attention, *arrays, scale=1e300)
    assert sentence in refusal(refattn.flash_attention, *arrays, scale=1e300, **TILE)
    assert sentence in refusal(refattn.standard_attention, *arrays, scale=1e300)
    assert "where that is 0.0" in refusal(refattn.attention, *arrays, softcap=1e-60)
    assert np.isfinite(refattn.attention(*draw(), scale=1e300).output).all()
    assert np.isfinite(refattn.attention(*arrays, scale=0).output).all()


@pytest.mark.clause("OWN-ROUND1")
def test_a_number_of_numpy_does_not_widen_the_arrays():
    arrays = draw(np.float32)
    options = {"scale": np.float64(0.3), "softcap": np.float64(3)}
    plain = {name: float(number) for name, number in options.items()}
    assert refattn.attention(*arrays, **options).logsumexp.dtype == np.float32
    assert np.array_equal(
        refattn.attention(*arrays, **options).output, refattn.attention(*arrays, **plain).output
    )
    state = refattn.flash_attention(*arrays, scale=np.float64(0.3), **TILE)
    assert state.row_max.dtype == np.float32


@pytest.mark.clause("OWN-CAUSAL1", "OWN-ROUND2")
@pytest.mark.parametrize("flag", ["no", None, 1, np.ones((N_Q, N_K), dtype=bool)], ids=range(4))
def test_a_flag_is_true_or_false(flag):
    for option in ("causal", "round_weights"):
        assert "must be True or False" in refusal(refattn.attention, *draw(), **{option: flag})
    assert "causal is" in refusal(refattn.flash_attention_forward, *draw(), causal=flag, **TILE)
    check_flag("f", causal=np.True_)


@pytest.mark.clause("OWN-WINDOW1")
@pytest.mark.parametrize(
    "window", [3, "ab", (True, False), {1: 2, 3: 4}, (1.0, 0), (2**62 + 1, 0)], ids=str
)
def test_a_window_is_two_counts(window):
    assert "window is" in refusal(refattn.attention, *draw(), window=window)


@pytest.mark.clause("OWN-WINDOW1", "ALIBI-S3b", "FA1-THM2")
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_of_numpy_are_integers(dtype):
    one, eight = np.dtype(dtype).type(1), np.dtype(dtype).type(8)
    by_numpy = refattn.attention(*draw(), window=(one, one), alignment=one).output
    assert np.array_equal(by_numpy, refattn.attention(*draw(), window=(1, 1), alignment=1).output)
    assert np.array_equal(refattn.alibi_slopes(eight), refattn.alibi_slopes(8))
    mask = refattn.causal_mask(eight, one, alignment="bottom_right")
    assert np.array_equal(mask, refattn.causal_mask(8, 1, alignment="bottom_right"))
    big = np.dtype(dtype).type(127)
    sizes = {"n_q": big, "n_k": big, "d": big, "sram": big, "algorithm": "standard"}
    assert refattn.hbm_traffic(**sizes).reads == 5 * 127**2


def test_a_count_is_returned_as_a_plain_integer():
    assert check_counts("f", n=np.uint8(200), d=3) == [200, 3]
    assert [type(n) for n in check_counts("f", n=np.uint8(200))] == [int]
    with pytest.raises(OptionError, match=r"n is an integer of \d+ bits, but it must be"):
        check_counts("f", n=-(10**5000))


@pytest.mark.clause("OWN-CAUSAL1", "ALIBI-S3a")
@pytest.mark.parametrize("size", [-1, 2.5, "a", True, None])
def test_a_size_is_an_integer_that_is_not_negative(size):
    assert "n_q is" in refusal(refattn.causal_mask, size, 3)
    assert "n_k is" in refusal(refattn.causal_mask, 3, size)
    assert "n_k is" in refusal(refattn.alibi_bias, np.ones(2), 3, size)


@pytest.mark.clause("VAS-S322b", "HEADS-S4b", "HEADS-S4c")
@pytest.mark.parametrize("stranger", [3.0, "3", None, True], ids=str)
def test_heads_are_counted_by_integers(stranger):
    x = np.ones((5, 6))
    assert "heads is" in refusal(refattn.split_heads, x, stranger)
    assert "at_least is" in refusal(refattn.pruning_order, np.ones((2, 3)), at_least=stranger)
    assert "heads is" in refusal(prune_count, stranger, 0.5)


@pytest.mark.clause("HEADS-S4c")
@pytest.mark.parametrize("heads", [1, "a", None, [[0]], [1.0], [True], np.ones(1)], ids=str)
def test_heads_to_prune_are_a_list_of_integers(heads):
    arrays, _ = CALLS["prune_heads"]
    assert "must be a list of integers" in refusal(refattn.prune_heads, **arrays, heads=heads)


@pytest.mark.clause("OWN-DROPOUT2")
@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1.5},
        {"seed": True},
        {"offset": "x"},
        {"shape": 3},
        {"shape": (2.0, 3)},
        {"shape": "ab"},
        {"keep_probability": "a"},
        {"keep_probability": None},
    ],
    ids=str,
)
def test_a_keep_mask_is_drawn_from_integers(change):
    options = {"shape": (2, 3), "seed": 1, "keep_probability": 0.5} | change
    (name,) = change
    assert f"{name} is" in refusal(refattn.keep_mask, **options)


@pytest.mark.clause("OWN-ROPE4")
@pytest.mark.parametrize("kind", [[], {}, None, 3, np.ones(2)], ids=str)
def test_the_kind_of_a_variant_is_a_name(kind):
    assert "variant's kind is" in refusal(rope_frequencies, 4, variant={"kind": kind})


@pytest.mark.clause("OWN-CACHE1", "OWN-MERGE1")
def test_a_tuple_is_no_cache_and_no_state():
    q, k, v = draw()
    assert "must be a Cache or None" in refusal(refattn.cached_attention, q, k, v, (k, v))
    assert "must be a PartState" in refusal(refattn.merge_states, (1, 2, 3), None)


# ---- positions


@pytest.mark.clause("OWN-CAUSAL1", "OWN-LENGTH1")
@pytest.mark.parametrize("keys", INTEGERS)
@pytest.mark.parametrize("queries", INTEGERS)
def test_lengths_of_any_integer_dtype_place_the_corner(queries, keys):
    lengths = {"query_lengths": np.asarray([5, 2]), "key_lengths": np.asarray([3, 6])}
    narrow = {
        "query_lengths": lengths["query_lengths"].astype(queries),
        "key_lengths": lengths["key_lengths"].astype(keys),
    }
    offset = position_offset("f", N_Q, N_K, alignment="bottom_right", **narrow)
    assert offset.dtype == np.int64
    assert offset.reshape(-1).tolist() == [-2, 4]
    corner = {"causal": True, "alignment": "bottom_right"}
    actual = refattn.attention(*draw(), **narrow, **corner).output
    assert np.array_equal(actual, refattn.attention(*draw(), **lengths, **corner).output)


@pytest.mark.clause("ROPE-EQ16")
@pytest.mark.parametrize("dtype", INTEGERS)
def test_distances_of_unsigned_positions_may_be_negative(dtype):
    x = np.random.default_rng(3).normal(size=(5, 4))
    m, n = np.asarray([9, 7, 5, 3, 1]), np.arange(5)
    expected = relative_scores(x, x, query_positions=m, key_positions=n)
    narrow = {"query_positions": m.astype(dtype), "key_positions": n.astype(dtype)}
    assert np.array_equal(relative_scores(x, x, **narrow), expected)


@pytest.mark.clause("OWN-CAUSAL1")
@pytest.mark.parametrize(
    "far",
    [2**62 + 1, -(2**62) - 1, 2**70, [0, 2**70], np.asarray([0, 2**63], dtype=np.uint64)],
    ids=str,
)
def test_an_offset_beyond_two_to_the_sixty_two_is_refused(far):
    assert "beyond 2^62" in refusal(refattn.attention, *draw(), causal=True, alignment=far)
    assert "beyond 2^62" in refusal(refattn.causal_mask, 3, 5, alignment=far)


@pytest.mark.clause("OWN-CAUSAL1")
def test_the_farthest_offsets_do_not_wrap():
    assert refattn.causal_mask(3, 5, alignment=2**62).all()
    assert not refattn.causal_mask(3, 5, alignment=-(2**62)).any()


@pytest.mark.clause("OWN-CAUSAL1")
def test_an_empty_batch_has_an_empty_list_of_offsets():
    empty = (array[:0] for array in draw())
    assert refattn.attention(*empty, causal=True, alignment=[]).output.shape == (0, H, N_Q, D_V)


# ---- shapes and dtypes


@pytest.mark.clause("VAS-EQ1")
@pytest.mark.parametrize(
    ("query", "key", "sentence"),
    [
        ((2, 3, 5, 4), (2, 3, 0, 4), "key has n_k=0, but it must be at least 1"),
        ((2, 3, 5, 0), (2, 3, 7, 0), "key has d_k=0, but it must be at least 1"),
        ((2, 3, 5, 4), (4, 3, 7, 4), "key has leading axes (4, 3), but query has leading axes"),
        ((2, 3, 5, 4), (2, 2, 7, 4), "key has leading axes (2, 2), but query has leading axes"),
    ],
)
def test_the_equation_alone_has_the_contract_of_the_passes(query, key, sentence):
    arrays = np.ones(query), np.ones(key), np.ones(key)
    assert sentence in refusal(refattn.scaled_dot_product_attention, *arrays)
    assert sentence in refusal(refattn.flash_attention, *arrays, **TILE)
    assert sentence in refusal(refattn.standard_attention, *arrays)


@pytest.mark.clause("OWN-ALIBI1", "OWN-SINK1")
def test_slopes_of_a_query_without_heads_are_refused_by_its_axes():
    q, k, v = (array[0, 0] for array in draw())
    for name in ("slopes", "sinks"):
        with pytest.raises(ShapeError, match=f"query has 2 axes, but {name} by head needs the 3"):
            refattn.attention(q, k, v, **{name: np.ones(1)})


@pytest.mark.clause("OWN-BACKWARD1", "OWN-ROUND1")
def test_the_gradient_of_the_logsumexp_has_the_dtype_of_the_inputs_or_the_computing_one():
    dO, dL = np.ones((B, H, N_Q, D_V)), np.ones((B, H, N_Q))
    with pytest.raises(DtypeError, match="d_logsumexp has dtype float32, but widened_query has"):
        refattn.attention_backward(dO, *draw(), d_logsumexp=dL.astype(np.float32))
    half = tuple(array.astype(np.float16) for array in (dO, *draw()))
    with pytest.raises(DtypeError, match="d_logsumexp has dtype float64, but widened_query has"):
        refattn.attention_backward(*half, d_logsumexp=dL)
    wide, narrow = (
        refattn.attention_backward(*half, d_logsumexp=dL.astype(dtype))
        for dtype in (np.float32, np.float16)
    )
    assert np.array_equal(wide.d_query, narrow.d_query)


@pytest.mark.clause("OWN-POISON1", "OWN-BACKWARD1")
def test_a_query_of_nan_reaches_no_gradient_of_a_key_that_it_may_not_read():
    q, k, v = (array[:, :, :N_Q] for array in draw())
    clean = refattn.attention_backward(np.ones_like(v), q, k, v, causal=True)
    poisoned = q.copy()
    poisoned[:, :, 1] = np.nan  # causal: query 1 reads keys 0 and 1
    grads = refattn.attention_backward(np.ones_like(v), poisoned, k, v, causal=True)
    weights = refattn.attention_weights(poisoned, k, v, causal=True)
    assert (weights[:, :, 1, 2:] == 0).all()
    for name in ("d_key", "d_value"):
        assert np.isnan(getattr(grads, name)[:, :, :2]).all()
        assert np.array_equal(getattr(grads, name)[:, :, 2:], getattr(clean, name)[:, :, 2:])


# ---- memory


@pytest.mark.clause("OWN-MEMORY1")
@pytest.mark.parametrize(
    "make",
    [
        lambda: refattn.causal_mask(10**6, 10**6),
        lambda: refattn.causal_mask(10**30, 0),
        lambda: refattn.causal_mask(10**6, 10**6, alignment=[0, 1]),
        lambda: refattn.alibi_bias(np.ones(3), 10**7, 10**7),
        lambda: refattn.keep_mask((10**6, 10**6), seed=1, keep_probability=0.5),
        lambda: refattn.scaled_dot_product_attention(*[np.broadcast_to(1.0, (10**7, 1))] * 3),
    ],
)
def test_every_matrix_that_does_not_fit_is_refused(make):
    with pytest.raises(MemoryLimitError, match=r"need \d+\.\d GiB, but \d+\.\d GiB are free"):
        make()


@pytest.mark.clause("OWN-MEMORY1", "OWN-POISON1")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_no_pass_needs_more_matrices_than_are_counted_even_with_a_nan(dtype):
    n, d, heads = 251, 5, 2
    x = np.random.default_rng(5).normal(size=(1, heads, n, d)).astype(dtype)
    value = x.copy()
    value[:, :, -1] = np.nan
    options = {
        "causal": True,
        "window": (n, 0),
        "alignment": [1],
        "softcap": 3.0,
        "softcap_order": "after_bias",
        "slopes": np.ones(heads, dtype=dtype),
        "sinks": np.ones(heads, dtype=dtype),
        "bias": np.zeros((1, heads, n, n), dtype=dtype),
        "keep": np.ones((1, heads, n, n), dtype=bool),
        "keep_probability": 0.5,
    }
    matrix = heads * n * n * max(4, np.dtype(dtype).itemsize)
    for call in (
        lambda: refattn.attention(x, x, value, **options),
        lambda: refattn.attention_backward(x, x, value, value, **options),
    ):
        tracemalloc.start()
        try:
            call()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < MATRICES * matrix


@pytest.mark.clause("OWN-POISON1")
@pytest.mark.parametrize("masked", ["select", "add"])
def test_values_that_are_not_finite_combine_by_ieee(masked):
    inf, nan = np.inf, np.nan
    value = np.asarray([[inf, inf, nan, 1.0], [-inf, 2.0, 3.0, 2.0], [nan, inf, 5.0, -inf]])
    keep = np.asarray([[True, True, True], [False, True, True], [True, False, False]])
    x = np.zeros((3, 1))
    result = refattn.attention(
        x, x, value, mask=np.asarray([[1, 1, 0]] * 3, bool), keep=keep, masked=masked
    )
    rows = [
        [nan, inf, nan, 1.5],  # inf - inf; inf + 1; NaN; finite
        [nan, nan, nan, 1.0],  # a dropped weight of 0 times infinity is NaN
        [nan, inf, nan, 0.5],
    ]
    if masked == "add":  # the forbidden value row is read: 0 · NaN, 0 · inf
        rows = np.full((3, 4), nan)
    assert np.array_equal(result.output, rows, equal_nan=True)
