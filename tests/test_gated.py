"""Gated cross-attention: by hand, what each token sees, closed gates, leaks by name, gradients."""

from math import log, tanh

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

from directional import check_gradients
from refattn.activations import ACTIVATIONS
from refattn.checks import DtypeError, OptionError, ShapeError
from refattn.gated import GatedParameters, gated_cross_attention
from refattn.gated_backward import GatedGradients, gated_cross_attention_backward
from refattn.layer_norm import layer_norm
from refattn.media import ATTENDS, BEFORE_MEDIA, text_time
from refattn.multihead import multihead_attention

B, N, E, M, N_M, E_M, H, D_K, D_V, F = 2, 7, 5, 3, 2, 4, 3, 2, 3, 11
SHAPES = {
    "norm_weight": (E,),
    "norm_bias": (E,),
    "w_query": (H, E, D_K),
    "w_key": (H, E_M, D_K),
    "w_value": (H, E_M, D_V),
    "w_output": (H, D_V, E),
    "attention_gate": (1,),
    "feed_forward_norm_weight": (E,),
    "feed_forward_norm_bias": (E,),
    "w_up": (E, F),
    "w_down": (F, E),
    "feed_forward_gate": (1,),
    "media_norm_weight": (E_M,),
    "media_norm_bias": (E_M,),
}
MARKED = np.zeros((B, N), dtype=bool)
MARKED[0, [2, 4]] = True  # φ = 0 0 1 1 2 2 2
MARKED[1, [0, 1, 5]] = True  # φ = 1 2 2 2 2 3 3


def _inputs(seed=0):
    rng = np.random.default_rng(seed)
    return {"query_input": rng.normal(size=(B, N, E)), "media": rng.normal(size=(B, M, N_M, E_M))}


def _parameters(seed=0, **changed):
    rng = np.random.default_rng(seed + 100)
    drawn = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    return GatedParameters(**{**drawn, **changed})


def _block(inputs, parameters, **options):
    return gated_cross_attention(**inputs, parameters=parameters, **options)


@pytest.mark.clause("FLA-S22", "OWN-NORM1", "OWN-ACTIVATION1")
def test_one_token_by_hand():
    # ε = 3 makes the deviation of (1, 3) 2, so LN = (-1/2, 1/2); queries are the second feature
    text = np.array([[[1.0, 3.0]]])
    # keys 2·(ln 3, 0) meet the query 1/2: weights 3/4 and 1/4; values 4 and 8, so A = (5, 0)
    media = np.array([[[[2 * log(3.0), 4.0], [0.0, 8.0]]]])
    first, second = np.array([[[1.0], [0.0]]]), np.array([[[0.0], [1.0]]])
    ones, zeros = np.ones(2), np.zeros(2)
    gate = np.array([np.arctanh(0.4)])  # y = (1 + 0.4·5, 3) = (3, 3): LN = 0, then β = (1, -2)
    parameters = GatedParameters(
        ones, zeros, second, first, second, np.array([[[1.0, 0.0]]]), gate,
        ones, np.array([1.0, -2.0]), np.array([[3.0, 0.0], [0.0, 1.0]]), np.eye(2),
        np.array([np.arctanh(0.5)]),
    )  # fmt: skip
    options = {"norm_epsilon": 3.0, "activation": "squared_relu"}
    output = _block({"query_input": text, "media": media}, parameters, **options)
    # hidden (3, -2), activated (9, 0), gated by 1/2
    np.testing.assert_allclose(output, [[[7.5, 3.0]]], rtol=1e-14)


@pytest.mark.clause("FLA-S23", "OWN-MEDIA2")
def test_the_time_of_a_token_counts_the_media_up_to_it():
    assert text_time(MARKED, N).tolist() == [[0, 0, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 3, 3]]
    assert text_time(MARKED, 3, cached_media=True).tolist() == [[2, 2, 2], [3, 3, 3]]


def _seen(parameters, inputs, **options):
    """Return which media move each token: bool (B, N, M), by changing one medium at a time."""
    rng = np.random.default_rng(8)
    before = _block(inputs, parameters, **options)
    seen = []
    for m in range(M):
        media = inputs["media"].copy()
        media[:, m] = rng.normal(size=media[:, m].shape)
        seen.append((_block(inputs | {"media": media}, parameters, **options) != before).any(-1))
    return np.stack(seen, axis=-1)


PHI = np.array([[0, 0, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 3, 3]])[..., None]
ORDER = np.arange(1, M + 1)


@pytest.mark.clause("FLA-S23", "OWN-MEDIA1")
@pytest.mark.parametrize("before", BEFORE_MEDIA)
@pytest.mark.parametrize("attend", ATTENDS)
def test_a_token_sees_the_media_that_its_convention_lets_it_see(attend, before):
    options = {"media_locations": MARKED, "attend": attend, "before_media": before}
    expected = ORDER == PHI if attend == "immediate" else ORDER <= PHI
    if before != "zero":  # the leak: what stands before any medium sees all, those to come too
        expected = expected | (PHI == 0)
    np.testing.assert_array_equal(_seen(_parameters(1), _inputs(1), **options), expected)


@pytest.mark.clause("FLA-S23")
def test_without_locations_every_token_sees_every_medium():
    assert _seen(_parameters(2), _inputs(2)).all()


@pytest.mark.clause("OWN-MEDIA2", "FLA-S23")
@pytest.mark.parametrize("attend", ATTENDS)
def test_cached_media_serve_all_tokens_after_them(attend):
    # the text goes on behind the marked part: its tokens stand after all its media
    inputs, parameters = _inputs(3), _parameters(3)
    options = {"attend": attend, "cached_media": True}
    cached = _block(inputs, parameters, media_locations=MARKED[:, :5], **options)
    longer = np.concatenate([np.ones((B, 5, E)), inputs["query_input"]], axis=1)
    marks = np.concatenate([MARKED[:, :5], np.zeros((B, N), dtype=bool)], axis=1)
    whole = _block(
        inputs | {"query_input": longer}, parameters, media_locations=marks, attend=attend
    )
    np.testing.assert_allclose(cached, whole[:, 5:], rtol=1e-12)


@pytest.mark.clause("OWN-MEDIA1", "OWN-EMPTY1")
def test_a_text_without_media_before_it_passes_the_attention_unchanged():
    inputs, nowhere = _inputs(4), np.zeros((B, N), dtype=bool)
    parameters = _parameters(4, feed_forward_gate=np.zeros(1))
    output = _block(inputs, parameters, media_locations=nowhere)
    np.testing.assert_array_equal(output, inputs["query_input"])
    poisoned = inputs | {"media": np.full((B, M, N_M, E_M), np.nan)}
    np.testing.assert_array_equal(_block(poisoned, parameters, media_locations=nowhere), output)


@pytest.mark.clause("OWN-MEDIA1")
def test_under_uniform_a_token_before_any_medium_reads_the_mean_of_all_values():
    inputs, parameters = _inputs(5), _parameters(5, feed_forward_gate=np.zeros(1))
    options = {"media_locations": MARKED, "attend": "preceding", "before_media": "uniform"}
    moved = (_block(inputs, parameters, **options) - inputs["query_input"])[0, :2]
    X = layer_norm(inputs["media"][0], parameters.media_norm_weight, parameters.media_norm_bias)
    mean = X.reshape(-1, E_M).mean(0)
    expected = sum(mean @ parameters.w_value[h] @ parameters.w_output[h] for h in range(H))
    expected = tanh(parameters.attention_gate[0]) * expected
    np.testing.assert_allclose(moved, [expected, expected], rtol=1e-12)


@pytest.mark.clause("OWN-MEDIA1")
def test_under_everything_such_a_token_attends_by_scores_and_skips_the_feed_forward():
    inputs, parameters = _inputs(6), _parameters(6)
    options = {"media_locations": MARKED, "before_media": "everything"}
    early = _block(inputs, parameters, **options)[0, :2]
    open_text = _block(inputs, parameters._replace(feed_forward_gate=np.zeros(1)))[0, :2]
    np.testing.assert_allclose(early, open_text, rtol=1e-13)
    later = _block(inputs, parameters, media_locations=MARKED)[0, 2:]
    np.testing.assert_array_equal(_block(inputs, parameters, **options)[0, 2:], later)


@pytest.mark.clause("FLA-S22", "VAS-S323a")
def test_its_attention_is_the_cross_attention_of_the_paper():
    inputs = _inputs(7)
    parameters = _parameters(7, feed_forward_gate=np.zeros(1))
    output = _block(inputs, parameters, scale=0.5)
    text = layer_norm(inputs["query_input"], parameters.norm_weight, parameters.norm_bias)
    X = layer_norm(inputs["media"], parameters.media_norm_weight, parameters.media_norm_bias)
    A = multihead_attention(text, X.reshape(B, -1, E_M), *parameters[2:6], scale=0.5)
    expected = inputs["query_input"] + np.tanh(parameters.attention_gate) * A
    np.testing.assert_allclose(output, expected, rtol=1e-13)


@pytest.mark.clause("FLA-S22")
def test_media_are_taken_as_they_are_without_a_norm_of_theirs():
    inputs = _inputs(8)
    plain = _parameters(8, media_norm_weight=None, media_norm_bias=None)
    normed = _parameters(8)
    X = layer_norm(inputs["media"], normed.media_norm_weight, normed.media_norm_bias)
    expected = _block(inputs, normed, media_locations=MARKED)
    np.testing.assert_array_equal(
        _block(inputs | {"media": X}, plain, media_locations=MARKED), expected
    )
    found = gated_cross_attention_backward(np.ones((B, N, E)), **inputs, parameters=plain)
    assert found.d_media_norm_weight is None and found.d_media_norm_bias is None


@pytest.mark.clause("FLA-S22", "OWN-BACKWARD1")
@pytest.mark.parametrize("gates", [1, E])
def test_closed_gates_leave_the_text_alone_and_only_they_get_a_gradient(gates):
    inputs, closed = _inputs(9), np.zeros(gates)
    parameters = _parameters(9, attention_gate=closed, feed_forward_gate=closed)
    options = {"media_locations": MARKED, "activation": "gelu"}
    np.testing.assert_array_equal(_block(inputs, parameters, **options), inputs["query_input"])
    d_output = np.random.default_rng(10).normal(size=(B, N, E))
    found = gated_cross_attention_backward(d_output, **inputs, parameters=parameters, **options)
    np.testing.assert_array_equal(found.d_query_input, d_output)
    learning = {name for name, g in found._asdict().items() if (g != 0).any()}
    assert learning == {"d_query_input", "d_attention_gate", "d_feed_forward_gate"}
    assert np.abs(found.d_attention_gate).min() > 1e-3
    assert np.abs(found.d_feed_forward_gate).min() > 1e-3


@pytest.mark.clause("FLA-S22")
def test_a_gate_by_feature_with_equal_entries_is_one_gate():
    inputs, one = _inputs(11), _parameters(11)
    wide = one._replace(
        attention_gate=np.repeat(one.attention_gate, E),
        feed_forward_gate=np.repeat(one.feed_forward_gate, E),
    )
    np.testing.assert_array_equal(_block(inputs, wide), _block(inputs, one))
    d_output = np.random.default_rng(12).normal(size=(B, N, E))
    by_feature, whole = (
        gated_cross_attention_backward(d_output, **inputs, parameters=p) for p in (wide, one)
    )
    for name in ("d_attention_gate", "d_feed_forward_gate"):
        total = getattr(by_feature, name).sum()
        np.testing.assert_allclose(total, getattr(whole, name)[0], rtol=1e-12)


WAYS = {
    "immediate": {"attend": "immediate"},
    "preceding": {"attend": "preceding"},
    "uniform": {"attend": "preceding", "before_media": "uniform"},
    "everything": {"before_media": "everything"},
    "cached": {"cached_media": True, "attend": "preceding"},
    "scale": {"scale": -0.75},
    "epsilon": {"norm_epsilon": 0.5},
}


@pytest.mark.clause("FLA-S22", "FLA-S23", "OWN-MEDIA1", "OWN-ACTIVATION1", "OWN-BACKWARD1")
@pytest.mark.parametrize("gates", [1, E])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_the_slopes_of_the_loss(way, activation, gates):
    parameters = _parameters(13)
    rng = np.random.default_rng(14)
    gate = {"attention_gate": rng.normal(size=gates), "feed_forward_gate": rng.normal(size=gates)}
    arrays = _inputs(13) | parameters._asdict() | gate
    options = {"media_locations": MARKED, "activation": activation, **WAYS[way]}
    d_output = rng.normal(size=(B, N, E))

    def loss(a):
        parameters = GatedParameters(**{name: a[name] for name in SHAPES})
        inputs = {name: a[name] for name in ("query_input", "media")}
        return float((_block(inputs, parameters, **options) * d_output).sum())

    found = gated_cross_attention_backward(
        d_output,
        **_inputs(13),
        parameters=parameters._replace(**gate),
        **options,
    )
    named = {name.removeprefix("d_"): g for name, g in found._asdict().items()}
    check_gradients(loss, arrays, named, step=1e-6, rel_tol=2e-6)


@pytest.mark.clause("OWN-MEDIA1", "OWN-BACKWARD1")
def test_no_gradient_reaches_a_medium_that_no_token_sees():
    # in item 0 no token sees medium 3
    options = {"media_locations": MARKED, "attend": "preceding"}
    d_output = np.ones((B, N, E))
    plain = gated_cross_attention_backward(
        d_output, **_inputs(15), parameters=_parameters(15), **options
    )
    assert (plain.d_media[0, 2] == 0).all() and (plain.d_media[0, :2] != 0).all()
    leaking = gated_cross_attention_backward(
        d_output, **_inputs(15), parameters=_parameters(15), **options, before_media="uniform"
    )
    assert (leaking.d_media[0, 2] != 0).all()


@pytest.mark.clause("FLA-S22", "OWN-ROUND1")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_only_standard_functions_are_used(activation):
    inputs, parameters = _inputs(16), _parameters(16)
    strict = {name: array_api_strict.asarray(a) for name, a in inputs.items()}
    strict_parameters = GatedParameters(*(array_api_strict.asarray(w) for w in parameters))
    options = {"activation": activation, "before_media": "everything"}
    marks = {"media_locations": MARKED}
    strict_marks = {"media_locations": array_api_strict.asarray(MARKED)}
    output = _block(strict, strict_parameters, **options, **strict_marks)
    expected = _block(inputs, parameters, **options, **marks)
    np.testing.assert_allclose(np.asarray(output), expected, rtol=1e-12)
    found = gated_cross_attention_backward(
        output, **strict, parameters=strict_parameters, **options, **strict_marks
    )
    plain = gated_cross_attention_backward(
        np.asarray(output), **inputs, parameters=parameters, **options, **marks
    )
    for actual, wanted in zip(found, plain, strict=True):
        np.testing.assert_allclose(np.asarray(actual), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.clause("FLA-S22", "OWN-ROUND1")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_inputs_are_widened_and_the_result_is_rounded_once(dtype):
    narrow = {n: a.astype(dtype) for n, a in _inputs(17).items()}
    parameters = GatedParameters(*(w.astype(dtype) for w in _parameters(17)))
    wide = {n: a.astype(np.float32) for n, a in narrow.items()}
    wide_parameters = GatedParameters(*(w.astype(np.float32) for w in parameters))
    output = _block(narrow, parameters, media_locations=MARKED)
    assert output.dtype == dtype
    expected = _block(wide, wide_parameters, media_locations=MARKED)
    np.testing.assert_array_equal(output, expected.astype(dtype))
    d_output = np.ones((B, N, E), np.float32)
    found = gated_cross_attention_backward(d_output.astype(dtype), **narrow, parameters=parameters)
    wanted = gated_cross_attention_backward(d_output, **wide, parameters=wide_parameters)
    assert isinstance(found, GatedGradients)
    for actual, gradient in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(actual, gradient.astype(dtype))


MANY = np.ones((B, N), dtype=bool)
WRONG = {
    "attend": ({"attend": "all"}, {}, OptionError, "attend is 'all', but it must be one of"),
    "before": ({"before_media": 0}, {}, OptionError, "before_media is 0, but it must be one of"),
    "cached": ({"cached_media": 1}, {}, OptionError, "cached_media is 1, but it must be True or"),
    "activation": ({"activation": "relu"}, {}, OptionError, "activation is 'relu', but it must"),
    "epsilon": ({"norm_epsilon": 0.0}, {}, OptionError, "norm_epsilon is 0.0, but it must be"),
    "scale": ({"scale": np.inf}, {}, OptionError, "scale is inf, but it must be finite"),
    "marks": ({"media_locations": MANY}, {}, ShapeError, "marks 7 media in one item, but media"),
    "short marks": (
        {"media_locations": MARKED[:, 1:]}, {}, ShapeError, "media_locations has n=6, but",
    ),
    "marks of integers": (
        {"media_locations": MARKED.astype(int)}, {}, DtypeError, "int64, but it must be bool",
    ),
    "gate": ({}, {"attention_gate": np.ones(2)}, ShapeError, "it must have 1 or e=5"),
    "hidden": ({}, {"w_down": np.ones((3, E))}, ShapeError, "w_down has f=3, but w_up has f=11"),
    "heads": ({}, {"w_key": np.ones((2, E_M, D_K))}, ShapeError, "w_key has h=2, but w_query"),
    "half a norm": ({}, {"media_norm_bias": None}, OptionError, "given both or neither"),
    "no array": ({}, {"w_up": None}, DtypeError, "w_up is None, but it must be an array"),
    "dtype": ({}, {"w_up": np.ones((E, F), np.float32)}, DtypeError, "w_up has dtype float32"),
}  # fmt: skip


@pytest.mark.clause("FLA-S22", "FLA-S23", "OWN-MEDIA1", "OWN-MEDIA2")
@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_in_one_sentence(case):
    options, changed, error, words = WRONG[case]
    for cotangent in ([], [np.ones((B, N, E))]):
        function = gated_cross_attention_backward if cotangent else gated_cross_attention
        with pytest.raises(error) as caught:
            function(*cotangent, **_inputs(), parameters=_parameters(**changed), **options)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.clause("FLA-S22")
def test_parameters_and_media_are_what_they_must_be():
    with pytest.raises(OptionError, match="parameters is of type dict, but it must be Gated"):
        gated_cross_attention(**_inputs(), parameters={})
    empty = _inputs() | {"media": np.ones((B, 0, N_M, E_M))}
    with pytest.raises(ShapeError, match="media has m=0 media of n_m=2 tokens, but both must be"):
        gated_cross_attention(**empty, parameters=_parameters())
