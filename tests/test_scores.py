"""The family of attention scores."""

from math import atanh, log, sqrt, tanh

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from directional import check_gradients
from refattn.attention import attention, scaled_dot_product_attention
from refattn.attention_backward import attention_backward
from refattn.checks import DtypeError, OptionError, ShapeError
from refattn.scores import score
from refattn.scores_backward import score_backward

N_Q, N_K, D_Q, D_KEY, D_A = 3, 5, 7, 2, 11

WEIGHTS = {
    "additive": {"w_query": (D_Q, D_A), "w_key": (D_KEY, D_A), "v": (D_A,)},
    "dot": {},
    "general": {"weight": (D_Q, D_KEY)},
    "scaled_dot": {},
    "cosine": {"strength": ()},
    "location": {"weight": (D_Q, N_K)},
}


def _arrays(kind, seed=0):
    rng = np.random.default_rng(seed)
    width = D_Q if kind in ("dot", "scaled_dot", "cosine") else D_KEY
    shapes = {"query": (N_Q, D_Q), "key": (N_K, width)} | WEIGHTS[kind]
    return {name: np.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


@pytest.mark.clause("SCORES-ADDITIVE1")
def test_additive_by_hand():
    # units: tanh(atanh 0.5 + 0) and tanh(0 + atanh 0.25); e = 4·0.5 - 8·0.25 = 0
    query, key = np.array([[atanh(0.5)]]), np.array([[atanh(0.25)], [0.0]])
    weights = {"w_query": np.array([[1.0, 0.0]]), "w_key": np.array([[0.0, 1.0]])}
    e = score(query, key, kind="additive", **weights, v=np.array([4.0, -8.0]))
    np.testing.assert_allclose(e, [[0.0, 2.0]], atol=1e-15)


@pytest.mark.clause("SCORES-ADDITIVE1")
def test_additive_adds_before_the_tanh():
    one = np.ones((1, 1))
    e = score(one, one, kind="additive", w_query=one, w_key=2 * one, v=np.ones(1))
    np.testing.assert_allclose(e, [[tanh(3.0)]], rtol=1e-15)


@pytest.mark.clause("SCORES-ADDITIVE1")
def test_additive_is_concat_with_the_matrices_side_by_side():
    a = _arrays("additive")
    W_a = np.concatenate([a["w_query"], a["w_key"]])
    for i, q in enumerate(a["query"]):
        for j, k in enumerate(a["key"]):
            concat = a["v"] @ np.tanh(W_a.T @ np.concatenate([q, k]))
            assert score(**a, kind="additive")[i, j] == pytest.approx(concat, rel=1e-12)


@pytest.mark.clause("SCORES-DOT1", "SCORES-SCALED1")
def test_dot_and_scaled_dot_by_hand():
    query = np.array([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 1.0, 0.0]])
    key = np.array([[1.0, 1.0, 1.0, 1.0], [2.0, 0.0, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    dot = [[10.0, 1.0, 0.0], [1.0, -1.0, 0.0]]
    assert score(query, key, kind="dot").tolist() == dot
    assert score(query, key, kind="scaled_dot").tolist() == [[x / 2 for x in row] for row in dot]


@pytest.mark.clause("SCORES-GENERAL1")
def test_general_by_hand():
    W = np.array([[1.0, 2.0], [0.0, -1.0], [3.0, 0.0]])
    e = score(np.array([[1.0, 1.0, 2.0]]), np.array([[1.0, 10.0]]), kind="general", weight=W)
    assert e.tolist() == [[17.0]]  # (1, 1, 2) W = (7, 1)


@pytest.mark.clause("SCORES-GENERAL1", "SCORES-DOT1")
def test_general_with_the_unit_matrix_is_dot():
    a = _arrays("dot")
    general = score(**a, kind="general", weight=np.eye(D_Q))
    np.testing.assert_allclose(general, score(**a, kind="dot"), rtol=1e-13)


@pytest.mark.clause("SCORES-COSINE1")
def test_cosine_by_hand():
    query, key = np.array([[3.0, 4.0]]), np.array([[6.0, 8.0], [-3.0, -4.0], [-4.0, 3.0], [1, 0]])
    e = score(query, key, kind="cosine", strength=np.asarray(2.5))
    np.testing.assert_allclose(e, [[2.5, -2.5, 0.0, 1.5]], rtol=1e-15, atol=1e-16)


@pytest.mark.clause("SCORES-COSINE1")
@given(st.integers(-120, 120), st.integers(-120, 120))
def test_cosine_sees_directions_only(p, q):
    a = _arrays("cosine", seed=1)
    narrow = {name: x.astype(np.float32) for name, x in a.items()}
    rescaled = narrow | {
        "query": narrow["query"] * np.float32(2.0**p),
        "key": narrow["key"] * np.float32(2.0**q),
    }
    np.testing.assert_array_equal(score(**rescaled, kind="cosine"), score(**narrow, kind="cosine"))


@pytest.mark.clause("SCORES-COSINE1")
def test_a_zero_vector_scores_zero_and_has_no_gradient():
    a = _arrays("cosine", seed=2)
    a["query"][1], a["key"][3] = 0.0, 0.0
    e = score(**a, kind="cosine")
    assert (e[1] == 0).all() and (e[:, 3] == 0).all()
    assert (e[[0, 2]][:, [0, 1, 2, 4]] != 0).all()
    gradients = score_backward(np.ones((N_Q, N_K)), **a, kind="cosine")
    assert (gradients.d_query[1] == 0).all() and (gradients.d_key[3] == 0).all()
    assert (gradients.d_query[[0, 2]] != 0).all()


@pytest.mark.clause("SCORES-COSINE1")
def test_the_gradient_of_cosine_is_orthogonal_to_the_vector():
    a = _arrays("cosine", seed=3)
    d_scores = np.random.default_rng(4).normal(size=(N_Q, N_K))
    gradients = score_backward(d_scores, **a, kind="cosine")
    for d, x in ((gradients.d_query, a["query"]), (gradients.d_key, a["key"])):
        np.testing.assert_allclose((d * x).sum(axis=1), 0.0, atol=1e-14)
        assert abs(d).max() > 1e-2


@pytest.mark.clause("SCORES-COSINE1")
def test_what_is_no_number_stays_visible():
    a = _arrays("cosine", seed=5)
    a["query"][1, 0] = np.nan
    e = score(**a, kind="cosine")
    assert np.isnan(e[1]).all() and np.isfinite(e[[0, 2]]).all()


@pytest.mark.clause("SCORES-LOCATION1")
def test_location_reads_the_query_alone():
    W = np.array([[1.0, 2.0, 3.0], [0.0, 10.0, 0.0]])
    query, key = np.array([[1.0, 1.0], [2.0, 0.0]]), np.full((3, 5), np.nan)
    assert score(query, key, kind="location", weight=W).tolist() == [[1, 12, 3], [2, 4, 6]]
    gradients = score_backward(np.ones((2, 3)), query, key, kind="location", weight=W)
    assert (gradients.d_key == 0).all()
    assert gradients.d_query.tolist() == [[6.0, 10.0]] * 2


@pytest.mark.clause("SCORES-SCALED1", "VAS-EQ1", "OWN-BIAS1")
def test_softmax_and_context_are_attention_with_the_scores_as_bias():
    a = _arrays("scaled_dot")
    value = np.random.default_rng(6).normal(size=(N_K, 2))
    context = _context(score(**a, kind="scaled_dot"), value)
    expected = scaled_dot_product_attention(a["query"], a["key"], value)
    np.testing.assert_allclose(context, expected, rtol=1e-13)


def _context(scores, value):
    """Return the mean of the values under the softmax of the scores."""
    nothing_q, nothing_k = np.zeros((1, N_Q, 1)), np.zeros((1, N_K, 1))
    return attention(nothing_q, nothing_k, value[None], bias=scores[None]).output[0]


@pytest.mark.clause("SCORES-COSINE1")
def test_the_weighting_by_content_by_hand():
    # cosines 1 and 0 at strength ln 3: weights 3/4 and 1/4
    query, key = np.array([[0.0, 5.0]]), np.array([[0.0, 0.5], [7.0, 0.0]])
    e = score(query, key, kind="cosine", strength=np.asarray(log(3.0)))
    zero = np.zeros((1, 2, 1))
    context = attention(zero[:, :1], zero, np.array([[[8.0], [0.0]]]), bias=e[None]).output
    np.testing.assert_allclose(context, [[[6.0]]], rtol=1e-15)


@pytest.mark.clause(
    "SCORES-ADDITIVE1",
    "SCORES-DOT1",
    "SCORES-GENERAL1",
    "SCORES-SCALED1",
    "SCORES-COSINE1",
    "SCORES-LOCATION1",
)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_gradients_match_central_differences(kind):
    a = _arrays(kind, seed=7)
    d_scores = np.random.default_rng(8).normal(size=(N_Q, N_K))
    gradients = score_backward(d_scores, **a, kind=kind)._asdict()
    present = {n.removeprefix("d_"): g for n, g in gradients.items() if g is not None}
    assert set(present) == set(a)
    if kind == "location":
        assert present["key"].shape == a["key"].shape
        assert (present.pop("key") == 0).all()
    check_gradients(
        lambda changed: float((score(**a | changed, kind=kind) * d_scores).sum()),
        {n: array for n, array in a.items() if n in present},
        present,
    )


@pytest.mark.clause(
    "SCORES-ADDITIVE1",
    "SCORES-DOT1",
    "SCORES-GENERAL1",
    "SCORES-SCALED1",
    "SCORES-COSINE1",
    "SCORES-LOCATION1",
)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_gradient_flows_through_softmax_and_context(kind):
    a = _arrays(kind, seed=9)
    rng = np.random.default_rng(10)
    value, d_context = rng.normal(size=(N_K, 3)), rng.normal(size=(N_Q, 3))
    zeros = np.zeros((1, N_Q, 1)), np.zeros((1, N_K, 1))
    d_scores = attention_backward(
        d_context[None], *zeros, value[None], bias=score(**a, kind=kind)[None]
    ).d_bias
    d_query = score_backward(d_scores[0], **a, kind=kind).d_query
    check_gradients(
        lambda c: float((_context(score(**a | c, kind=kind), value) * d_context).sum()),
        {"query": a["query"]},
        {"query": d_query},
    )


@pytest.mark.clause("OWN-ROUND1")
@pytest.mark.parametrize("kind", WEIGHTS)
def test_only_standard_functions_are_used(kind):
    a = _arrays(kind, seed=11)
    strict = {name: array_api_strict.asarray(x) for name, x in a.items()}
    e = score(**strict, kind=kind)
    np.testing.assert_allclose(np.asarray(e), score(**a, kind=kind), rtol=1e-14)
    gradients = score_backward(e, **strict, kind=kind)
    expected = score_backward(np.asarray(e), **a, kind=kind)
    for actual, wanted in zip(gradients, expected, strict=True):
        assert (actual is None) == (wanted is None)
        if wanted is not None:
            np.testing.assert_allclose(np.asarray(actual), wanted, rtol=1e-12)


@pytest.mark.clause("OWN-ROUND1")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_narrow_inputs_are_widened_and_the_result_is_rounded_once(kind, dtype):
    narrow = {n: x.astype(dtype) for n, x in _arrays(kind, seed=12).items()}
    wide = {n: x.astype(np.float32) for n, x in narrow.items()}
    e = score(**narrow, kind=kind)
    assert e.dtype == dtype
    np.testing.assert_array_equal(e, score(**wide, kind=kind).astype(dtype))
    gradients = score_backward(e, **narrow, kind=kind)
    expected = score_backward(e.astype(np.float32), **wide, kind=kind)
    for actual, wanted in zip(gradients, expected, strict=True):
        if wanted is not None:
            np.testing.assert_array_equal(actual, wanted.astype(dtype))


@pytest.mark.clause("OWN-ROUND1", "SCORES-SCALED1")
def test_a_product_beyond_float16_is_divided_before_it_is_rounded():
    row = np.full((1, 10000), 4.0, dtype=np.float16)
    assert score(row, row, kind="dot").tolist() == [[np.inf]]  # 160000
    assert score(row, row, kind="scaled_dot").tolist() == [[160000 / sqrt(10000)]]


@pytest.mark.clause("SCORES-DOT1", "SCORES-GENERAL1")
def test_arguments_that_do_not_fit_are_refused():
    a = _arrays("general")
    with pytest.raises(OptionError, match="kind is 'concat', but it must be one of additive, dot"):
        score(**a, kind="concat")
    with pytest.raises(OptionError, match="weight is given, but kind 'additive' takes none"):
        score(**a | _arrays("additive"), kind="additive")
    with pytest.raises(OptionError, match="v is absent, but kind 'additive' needs it"):
        score(a["query"], a["key"], kind="additive", w_query=a["weight"], w_key=a["weight"])
    with pytest.raises(ShapeError, match="key has d_q=2, but query has d_q=7; they must be equal"):
        score(a["query"], a["key"], kind="dot")
    with pytest.raises(ShapeError, match="weight has n_k=2, but key has n_k=5"):
        score(**a, kind="location")
    with pytest.raises(ShapeError, match="strength has 1 axes"):
        score(**_arrays("dot"), kind="cosine", strength=np.ones(1))
    with pytest.raises(ShapeError, match="d_q is 0, but every size must be at least 1"):
        score(np.ones((3, 0)), np.ones((5, 0)), kind="scaled_dot")
    with pytest.raises(DtypeError, match="weight has dtype float32, but query has dtype float64"):
        score(**a | {"weight": a["weight"].astype(np.float32)}, kind="general")
    with pytest.raises(ShapeError, match="d_scores has n_q=5, but query has n_q=3"):
        score_backward(np.ones((N_K, N_Q)), **a, kind="general")
