"""Attention under every option, forward."""

import math

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refattn.attention import attention, attention_weights, scaled_dot_product_attention
from refattn.checks import DtypeError, MemoryLimitError, OptionError, ShapeError
from refattn.masks import causal_mask

B, H, G, N_Q, N_K, D_K, D_V = 2, 6, 2, 5, 7, 3, 11


def _problem(seed=0, *, b=B, h=H, h_k=H // G, n_q=N_Q, n_k=N_K, d_k=D_K, d_v=D_V):
    rng = np.random.default_rng(seed)
    return tuple(
        rng.normal(size=shape)
        for shape in ((b, h, n_q, d_k), (b, h_k, n_k, d_k), (b, h_k, n_k, d_v))
    )


def _loops(query, key, value, logit, allowed):
    """The equations cell by cell in exact-as-possible arithmetic: math.fsum and loops."""
    b, h, n_q, _ = query.shape
    g = h // key.shape[1]
    output = np.zeros((b, h, n_q, value.shape[-1]))
    lse = np.full((b, h, n_q), -math.inf)
    for i in np.ndindex(b, h, n_q):
        keys = [j for j in range(key.shape[2]) if allowed(*i, j)]
        if not keys:
            continue
        S = {
            j: logit(*i, j, math.fsum(query[i] * key[i[0], i[1] // g, j]) / math.sqrt(D_K))
            for j in keys
        }
        m = max(S.values())
        ell = math.fsum(math.exp(s - m) for s in S.values())
        lse[i] = m + math.log(ell)
        for c in range(value.shape[-1]):
            output[i][c] = (
                math.fsum(math.exp(S[j] - m) * value[i[0], i[1] // g, j, c] for j in keys) / ell
            )
    return output, lse


def _agree(result, expected):
    output, lse = expected
    assert np.allclose(result.output, output, rtol=1e-12, atol=1e-13)
    assert np.array_equal(np.isfinite(result.logsumexp), np.isfinite(lse))
    finite = np.isfinite(lse)
    assert np.allclose(result.logsumexp[finite], lse[finite], rtol=1e-12, atol=1e-13)


@pytest.mark.clause("VAS-EQ1")
def test_two_keys_by_hand():
    # logits 0 and ln 3 give weights 1/4 and 3/4
    query = np.asarray([[1.0]])
    key = np.asarray([[0.0], [math.log(3.0)]])
    value = np.asarray([[4.0, 0.0], [0.0, 8.0]])
    expected = [[1.0, 6.0]]
    assert np.allclose(scaled_dot_product_attention(query, key, value), expected, rtol=1e-15)
    result = attention(query, key, value)
    assert np.allclose(result.output, expected, rtol=1e-15)
    assert np.allclose(result.logsumexp, [math.log(4.0)], rtol=1e-15)


@pytest.mark.clause("VAS-EQ1", "OWN-SCALE1", "OWN-GQA1", "OWN-LSE1")
def test_the_plain_case_is_the_equation_cell_by_cell():
    query, key, value = _problem()
    _agree(
        attention(query, key, value),
        _loops(query, key, value, lambda b, h, i, j, x: x, lambda *_: True),
    )


@pytest.mark.clause("VAS-EQ1")
def test_the_equation_alone_equals_attention_without_options():
    query, key, value = _problem(h_k=H)
    assert np.allclose(
        scaled_dot_product_attention(query, key, value, scale=-0.3),
        attention(query, key, value, scale=-0.3).output,
        rtol=1e-13,
        atol=1e-14,
    )


@pytest.mark.clause(
    "OWN-SOFTCAP1", "OWN-BIAS1", "ALIBI-S3a", "ALIBI-FN10", "OWN-ALIBI1", "OWN-MASK1", "OWN-WINDOW1"
)
@pytest.mark.parametrize("order", ["before_bias", "after_bias"])
@pytest.mark.parametrize("distance", ["absolute", "signed", "column"])
def test_every_stage_together_is_the_equation_cell_by_cell(order, distance):
    query, key, value = _problem(1)
    rng = np.random.default_rng(3)
    bias = rng.normal(size=(H, 1, N_K))
    mask = rng.random((B, 1, N_Q, N_K)) < 0.8
    slopes = np.asarray([2.0**-a for a in range(H)])
    offset, cap = 2, 0.7
    form = {
        "absolute": lambda i, j: -abs(i + offset - j),
        "signed": lambda i, j: j - i - offset,
        "column": lambda i, j: j,
    }[distance]

    def logit(b, h, i, j, x):
        added = bias[h, 0, j] + slopes[h] * form(i, j)
        if order == "before_bias":
            return cap * math.tanh(x / cap) + added
        return cap * math.tanh((x + added) / cap)

    def allowed(b, h, i, j):
        p = i + offset
        return mask[b, 0, i, j] and p - 3 <= j <= p + 1

    _agree(
        attention(
            query,
            key,
            value,
            bias=bias,
            mask=mask,
            slopes=slopes,
            distance=distance,
            alignment=offset,
            window=(3, 1),
            softcap=cap,
            softcap_order=order,
        ),
        _loops(query, key, value, logit, allowed),
    )


@pytest.mark.clause("OWN-GQA1")
@pytest.mark.parametrize(
    ("head_map", "owner"), [("interleave", [0, 0, 1, 1]), ("tile", [0, 1, 0, 1])]
)
def test_a_query_head_reads_its_key_value_head(head_map, owner):
    query = np.zeros((1, 4, 1, 2))
    key = np.zeros((1, 2, 3, 2))
    value = np.asarray([10.0, 20.0]).reshape(1, 2, 1, 1) * np.ones((1, 2, 3, 1))
    output = attention(query, key, value, head_map=head_map).output
    assert output[0, :, 0, 0].tolist() == [10.0 * (1 + o) for o in owner]


@pytest.mark.clause("OWN-EMPTY1", "OWN-LSE1")
@pytest.mark.parametrize(("policy", "weight"), [("zero", 0.0), ("nan", math.nan), ("uniform", 0.2)])
def test_an_empty_row_follows_its_policy(policy, weight):
    query, key = np.ones((1, 1, 2, 3)), np.ones((1, 1, 5, 3))
    value = np.arange(5.0).reshape(1, 1, 5, 1)
    mask = np.asarray([[True] * 5, [False] * 5])
    options = {"mask": mask, "empty_row": policy}
    P = attention_weights(query, key, value, **options)
    assert np.array_equal(P[0, 0, 1], [weight] * 5, equal_nan=True)
    result = attention(query, key, value, **options)
    assert np.array_equal(result.output[0, 0, 1], [weight * 10], equal_nan=True)
    assert result.logsumexp[0, 0, 1] == -math.inf
    assert math.isclose(result.output[0, 0, 0, 0], 2.0)


@pytest.mark.clause("OWN-SINK1")
def test_a_sink_of_zero_beside_two_zero_logits_takes_a_third():
    query, key = np.zeros((1, 1, 1, 2)), np.zeros((1, 1, 2, 2))
    value = np.asarray([[[[3.0], [6.0]]]])
    result = attention(query, key, value, sinks=np.zeros(1))
    assert np.allclose(result.output, 3.0, rtol=1e-15)
    assert np.allclose(result.logsumexp, math.log(3.0), rtol=1e-15)


@pytest.mark.clause("OWN-SINK1", "OWN-EMPTY1")
def test_with_a_sink_no_row_is_empty():
    query, key, value = _problem(h=1, h_k=1)
    mask = np.zeros((N_Q, N_K), dtype=bool)
    result = attention(query, key, value, mask=mask, sinks=np.asarray([-7.5]), empty_row="nan")
    assert not result.output.any()
    assert (result.logsumexp == -7.5).all()


@pytest.mark.clause("OWN-SINK1")
def test_a_sink_is_one_more_key_with_value_zero():
    query, key, value = _problem(h_k=H)
    sinks = np.linspace(-2.0, 3.0, H)
    bias = np.concatenate(
        [np.zeros((H, N_Q, N_K)), np.broadcast_to(sinks[:, None, None], (H, N_Q, 1))], axis=-1
    )
    key_plus = np.concatenate([key, np.zeros((B, H, 1, D_K))], axis=-2)
    value_plus = np.concatenate([value, np.zeros((B, H, 1, D_V))], axis=-2)
    expected = attention(query, key_plus, value_plus, bias=bias)
    result = attention(query, key, value, sinks=sinks)
    assert np.allclose(result.output, expected.output, rtol=1e-13, atol=1e-15)
    assert np.allclose(result.logsumexp, expected.logsumexp, rtol=1e-13)


@pytest.mark.clause("OWN-LENGTH1", "OWN-CAUSAL1")
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_an_item_with_lengths_is_the_cropped_item(alignment):
    query, key, value = _problem()
    n_q, n_k = np.asarray([4, 3]), np.asarray([7, 5])
    options = {"causal": True, "alignment": alignment}
    whole = attention(query, key, value, query_lengths=n_q, key_lengths=n_k, **options)
    for b in range(B):
        alone = attention(
            query[b, :, : n_q[b]], key[b, :, : n_k[b]], value[b, :, : n_k[b]], **options
        )
        assert np.allclose(whole.output[b, :, : n_q[b]], alone.output, rtol=1e-13, atol=1e-14)
        assert not whole.output[b, :, n_q[b] :].any()
        assert (whole.logsumexp[b, :, n_q[b] :] == -math.inf).all()


@pytest.mark.clause("VAS-S323b", "OWN-MASK1")
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right", 1, -2])
def test_causal_equals_its_mask_and_its_bias(alignment):
    query, key, value = _problem()
    mask = causal_mask(N_Q, N_K, alignment=alignment)
    options = {"alignment": alignment}
    flagged = attention(query, key, value, causal=True, **options)
    masked = attention(query, key, value, mask=mask, **options)
    biased = attention(query, key, value, bias=np.where(mask, 0.0, -np.inf), **options)
    for other in (masked, biased):
        assert np.array_equal(flagged.output, other.output)
        assert np.array_equal(flagged.logsumexp, other.logsumexp)


@pytest.mark.clause("VAS-S323b")
def test_the_future_does_not_move_the_past():
    query, key, value = _problem(n_q=7, h_k=H)
    before = attention(query, key, value, causal=True).output
    key[..., 4:, :] += 100.0
    value[..., 4:, :] -= 100.0
    after = attention(query, key, value, causal=True).output
    assert np.array_equal(before[..., :4, :], after[..., :4, :])
    assert not np.allclose(before[..., 4:, :], after[..., 4:, :])


@pytest.mark.clause("OWN-POISON1")
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e300])
def test_selected_masking_never_reads_a_forbidden_cell(poison):
    query, key, value = _problem()
    mask = np.ones((N_Q, N_K), dtype=bool)
    mask[:3, 4] = False  # row 3 and 4 read key 4, so the cell cannot simply be cleared
    clean = attention(query, key, value, mask=mask)
    key[..., 4, :] = poison
    value[..., 4, :] = poison
    dirty = attention(query, key, value, mask=mask)
    assert np.allclose(dirty.output[..., :3, :], clean.output[..., :3, :], rtol=1e-13, atol=1e-14)
    assert np.allclose(dirty.logsumexp[..., :3], clean.logsumexp[..., :3], rtol=1e-13)
    assert not np.allclose(dirty.output[..., 3:, :], clean.output[..., 3:, :])


@pytest.mark.clause("OWN-POISON1")
def test_added_masking_lets_nan_through():
    query, key, value = _problem()
    mask = np.ones((N_Q, N_K), dtype=bool)
    mask[:, 4] = False
    value[..., 4, :] = math.nan
    assert np.isfinite(attention(query, key, value, mask=mask).output).all()
    assert np.isnan(attention(query, key, value, mask=mask, masked="add").output).all()
    value[..., 4, :] = 0.0
    key[..., 4, :] = math.nan
    assert np.isnan(attention(query, key, value, mask=mask, masked="add").output).all()


@pytest.mark.clause("OWN-POISON1", "OWN-EMPTY1")
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_an_empty_row_reads_every_value_where_masking_adds(poison):
    query, key, value = _problem()
    value[..., 4, 1] = poison
    forbidden = {"mask": np.arange(N_Q)[:, None] != 2}
    for policy, select, add in (
        ("zero", 0.0, math.nan),
        ("uniform", poison, poison),
        ("nan", math.nan, math.nan),
    ):
        for masked, expected in (("select", select), ("add", add)):
            row = attention(query, key, value, **forbidden, masked=masked, empty_row=policy)
            np.testing.assert_array_equal(row.output[..., 2, 1], expected, (policy, masked))
            if policy != "nan":
                assert np.isfinite(row.output[..., 2, 0]).all()
    key[..., 4, 1] = math.nan  # it changes the logits, and an empty row has its weights by policy
    row = attention(query, key, np.ones_like(value), **forbidden, masked="add")
    assert not row.output[..., 2, :].any()
    assert np.isneginf(row.logsumexp[..., 2]).all()


@pytest.mark.clause("OWN-POISON1", "OWN-BIAS1")
def test_on_finite_inputs_both_maskings_are_equal():
    query, key, value = _problem()
    options = {"causal": True, "alignment": -1, "softcap": 0.5}
    a = attention(query, key, value, **options)
    b = attention(query, key, value, masked="add", **options)
    assert np.array_equal(a.output, b.output)
    assert np.array_equal(a.logsumexp, b.logsumexp)


@pytest.mark.clause("OWN-LSE1")
@pytest.mark.parametrize("level", [1e4, -1e4, -84000.0])
def test_huge_logits_neither_overflow_nor_vanish(level):
    query, key = np.ones((1, 1, 3, 1)), np.full((1, 1, 5, 1), level)
    value = np.arange(5.0).reshape(1, 1, 5, 1)
    result = attention(query, key, value)
    assert np.allclose(result.output, 2.0, rtol=1e-15)
    assert np.allclose(result.logsumexp, level + math.log(5.0), rtol=1e-15)


@pytest.mark.clause("VAS-EQ1", "OWN-LSE1")
def test_one_key_returns_its_value():
    query, key, value = _problem(n_k=1)
    result = attention(query, key, value)
    expected = np.repeat(value, G, axis=1)
    assert np.array_equal(result.output, np.broadcast_to(expected, result.output.shape))


@pytest.mark.clause("VAS-EQ1")
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.permutations(range(N_K)))
def test_the_order_of_keys_does_not_matter(seed, order):
    query, key, value = _problem(seed)
    mask = np.random.default_rng(seed).random((N_Q, N_K)) < 0.7
    a = attention(query, key, value, mask=mask)
    b = attention(query, key[..., order, :], value[..., order, :], mask=mask[:, order])
    assert np.allclose(a.output, b.output, rtol=1e-12, atol=1e-13)


@pytest.mark.clause("VAS-EQ1")
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_the_output_stays_within_the_values(seed):
    query, key, value = _problem(seed, h_k=H)
    output = attention(query, key, value).output
    slack = 1e-12
    assert (output <= value.max(axis=-2, keepdims=True) + slack).all()
    assert (output >= value.min(axis=-2, keepdims=True) - slack).all()


@pytest.mark.clause("OWN-ROUND1")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bit_inputs_compute_in_float32_and_round_once(dtype):
    narrow = tuple(x.astype(dtype) for x in _problem())
    wide = tuple(x.astype(np.float32) for x in narrow)
    result, expected = attention(*narrow, causal=True), attention(*wide, causal=True)
    assert result.output.dtype == dtype
    assert np.array_equal(result.output, expected.output.astype(dtype))
    assert result.logsumexp.dtype == np.float32
    assert np.array_equal(result.logsumexp, expected.logsumexp)


@pytest.mark.clause("OWN-ROUND2")
def test_weights_are_rounded_only_when_asked():
    narrow = tuple(x.astype(np.float16) for x in _problem())
    P = attention_weights(*narrow).astype(np.float32)
    value = np.repeat(narrow[2].astype(np.float32), G, axis=1)
    rounded = attention(*narrow, round_weights=True).output
    assert np.array_equal(rounded, (P @ value).astype(np.float16))
    assert not np.array_equal(rounded, attention(*narrow).output)
    wide = _problem()
    assert np.array_equal(attention(*wide, round_weights=True).output, attention(*wide).output)


@pytest.mark.clause("OWN-ROUND1")
def test_any_array_library_runs_the_same_text():
    xp = array_api_strict
    query, key, value = _problem()
    options = {
        "bias": np.zeros((H, 1, N_K)),
        "mask": np.ones((N_Q, N_K), dtype=bool),
        "slopes": np.linspace(0.1, 1.0, H),
        "sinks": np.linspace(-1.0, 1.0, H),
        "key_lengths": np.asarray([7, 3]),
        "keep": np.ones((B, H, N_Q, N_K), dtype=bool),
    }
    plain = {"causal": True, "softcap": 3.0, "window": (4, None), "keep_probability": 0.5}
    strict = attention(
        *(xp.asarray(x) for x in (query, key, value)),
        **{name: xp.asarray(x) for name, x in options.items()},
        **plain,
    )
    expected = attention(query, key, value, **options, **plain)
    assert np.array_equal(np.from_dlpack(strict.output), expected.output)
    assert np.array_equal(np.from_dlpack(strict.logsumexp), expected.logsumexp)


@pytest.mark.clause("OWN-MEMORY1")
def test_a_matrix_that_does_not_fit_is_refused_before_it_is_made():
    x = np.zeros((1, 1, 3_000_000, 1), dtype=np.float32)
    with pytest.raises(MemoryLimitError, match=r"need \d+\.\d GiB, but \d+\.\d GiB are free"):
        attention(x, x, x)


BAD = [
    (
        ShapeError,
        {},
        (2, 3, 5, 4),
        (2, 3, 7, 3),
        (2, 3, 7, 3),
        "key has d_k=3, but query has d_k=4",
    ),
    (
        ShapeError,
        {},
        (2, 3, 5, 4),
        (2, 3, 7, 4),
        (2, 3, 6, 4),
        "value has n_k=6, but key has n_k=7",
    ),
    (ShapeError, {}, (2, 3, 5, 4), (2, 2, 7, 4), (2, 2, 7, 4), "query has 3 heads, but key has 2"),
    (ShapeError, {}, (2, 3, 5, 4), (1, 3, 7, 4), (1, 3, 7, 4), "key has batch axes"),
    (ShapeError, {}, (2, 3, 5, 4), (2, 3, 0, 4), (2, 3, 0, 4), "key has n_k=0, but"),
    (ShapeError, {}, (5,), (7, 4), (7, 4), "query has 1 axes, but"),
    (OptionError, {"scale": math.inf}, (5, 4), (7, 4), (7, 4), "scale is inf, but"),
    (OptionError, {"softcap": 0.0}, (5, 4), (7, 4), (7, 4), "softcap is 0.0, but"),
    (OptionError, {"empty_row": "none"}, (5, 4), (7, 4), (7, 4), "empty_row is 'none', but"),
    (OptionError, {"colour": 1}, (5, 4), (7, 4), (7, 4), "colour is no option"),
    (OptionError, {"window": (-1, 0)}, (5, 4), (7, 4), (7, 4), "window is"),
    (ShapeError, {"mask": np.ones((3, 7), bool)}, (5, 4), (7, 4), (7, 4), "mask has shape"),
    (DtypeError, {"mask": np.ones((5, 7), int)}, (5, 4), (7, 4), (7, 4), "mask has dtype int64"),
    (DtypeError, {"bias": np.ones((5, 7), "f4")}, (5, 4), (7, 4), (7, 4), "bias has dtype float32"),
    (ShapeError, {"slopes": np.ones(2)}, (3, 5, 4), (3, 7, 4), (3, 7, 4), "slopes has shape"),
    (ShapeError, {"key_lengths": np.ones(2, int)}, (5, 4), (7, 4), (7, 4), "query has 2 axes"),
    (ShapeError, {"alignment": [1, 2]}, (1, 1, 5, 4), (1, 1, 7, 4), (1, 1, 7, 4), "has 2 offsets"),
]


@pytest.mark.clause("OWN-MASK1", "OWN-SCALE1", "OWN-GQA1")
@pytest.mark.parametrize(("error", "options", "query", "key", "value", "sentence"), BAD)
def test_bad_input_is_refused_in_one_sentence(error, options, query, key, value, sentence):
    with pytest.raises(error, match="attention") as caught:
        attention(np.ones(query), np.ones(key), np.ones(value), **options)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.clause("OWN-ROUND1")
def test_dtypes_outside_the_contract_are_refused():
    x = np.ones((3, 2))
    with pytest.raises(DtypeError, match="key has dtype float32, but query has dtype float64"):
        attention(x, x.astype(np.float32), x)
    with pytest.raises(DtypeError, match="query has dtype int64, but it must be one of"):
        attention(x.astype(int), x, x)
