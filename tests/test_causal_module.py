"""GPT's causal self-attention module: by hand, as VAS and as the sum over heads, gradients."""

from math import log

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from directional import check_gradients
from refattn.bounds import coefficients
from refattn.causal_module import causal_buffer, causal_self_attention
from refattn.causal_module_backward import causal_self_attention_backward
from refattn.certify.units import units
from refattn.checks import DtypeError, MemoryLimitError, OptionError, ShapeError
from refattn.dropout import keep_mask
from refattn.head_sum import head_outputs, sum_of_heads
from refattn.multihead import multihead_attention
from refattn.multihead_backward import multihead_attention_backward
from refattn.projections import unpack_output, unpack_projection

B, T, H, D = 2, 7, 3, 5
C = H * D
SIZES = {"heads": H, "block_size": 11}
SHAPES = {
    "x": (B, T, C),
    "w_qkv": (C, 3 * C),
    "b_qkv": (3 * C,),
    "w_output": (C, C),
    "b_output": (C,),
}
FORMS = {
    "whole": tuple(SHAPES),
    "without biases": ("x", "w_qkv", "w_output"),
    "merged heads": ("x", "w_qkv", "b_qkv"),
}
"""Which parameters the module has: all, no bias, or no projection out."""


def _arrays(seed=0, form="whole"):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=SHAPES[name]) / 2 for name in FORMS[form]}


def _dropout(seed=0):
    draw = {"seed": seed, "keep_probability": 0.75}
    return {
        "keep": keep_mask((B, H, T, T), **draw),
        "keep_probability": 0.75,
        "output_keep": keep_mask((B, T, C), offset=10**6, **draw),
        "output_keep_probability": 0.625,
    }


def _as_projections(arrays):
    """Return the module as VAS writes it: a weight a head, a bias as the weight of a feature 1."""
    rows = [arrays["w_qkv"], arrays["b_qkv"][None]] if "b_qkv" in arrays else [arrays["w_qkv"]]
    packed = np.split(np.concatenate(rows), 3, axis=1)
    x = arrays["x"]
    if "b_qkv" in arrays:
        x = np.concatenate([x, np.ones((B, T, 1))], axis=-1)
    w_output = unpack_output(arrays.get("w_output", np.eye(C)), H)
    names = ("w_query", "w_key", "w_value")
    weights = {n: unpack_projection(w, H) for n, w in zip(names, packed, strict=True)}
    return {"query_input": x, "source_input": x, **weights, "w_output": w_output}


def _allowed(inputs):
    """Return how far two correct runs of the multi-head attention may be apart in float64."""
    found, magnitudes = units("multihead", inputs, {"causal": True}, {})
    return {
        name: 2 * (a * found[f"{name}.unit"] + b * found[f"{name}.unit_logit"] + floor)
        for name, (a, b, floor) in coefficients("multihead", "fp64", magnitudes).items()
    }


@pytest.mark.clause("GPT-BUFFER1")
def test_the_buffer_is_a_lower_triangle_of_ones():
    x = np.ones((1, 1, 1), dtype=np.float32)
    buffer = causal_buffer(3, like=x)
    assert buffer.dtype == np.float32
    assert buffer.tolist() == [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]]
    assert causal_buffer(2, like=x.astype(np.float16)).dtype == np.float32


@pytest.mark.clause("GPT-MODULE1")
def test_two_tokens_by_hand():
    # one head, C = 1: q = 1, k = (ln 3, 0) and v = (4, 8); token 0 sees itself, token 1 both
    x = np.array([[[log(3.0)], [0.0]]])
    w_qkv, b_qkv = np.array([[0.0, 1.0, -4.0 / log(3.0)]]), np.array([1.0, 0.0, 8.0])
    merged = causal_self_attention(x, w_qkv, b_qkv, heads=1, block_size=2)
    # weights of token 1: 3/4 and 1/4
    np.testing.assert_allclose(merged, [[[4.0], [5.0]]], rtol=1e-14)
    w_output, b_output = np.array([[2.0]]), np.array([-1.0])
    projected = causal_self_attention(x, w_qkv, b_qkv, w_output, b_output, heads=1, block_size=2)
    np.testing.assert_allclose(projected, [[[7.0], [9.0]]], rtol=1e-14)


@pytest.mark.clause("GPT-MODULE1", "VAS-S322a", "VAS-S322b", "VAS-S323b")
@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_multi_head_attention_of_the_paper(form):
    arrays = _arrays(1, form)
    inputs = _as_projections(arrays)
    expected = multihead_attention(**inputs, causal=True) + arrays.get("b_output", 0.0)
    actual = causal_self_attention(**arrays, **SIZES)
    # the bias of the output is one more rounding, of a sum that the bound's spare ones cover
    assert (
        np.abs(actual - expected) <= _allowed(inputs)["output"] + 2**-52 * np.abs(expected)
    ).all()


@pytest.mark.clause("GPT-MODULE1", "HEADS-EQ1")
def test_the_last_token_is_the_sum_over_heads():
    # the last query sees every token, so that its row needs no mask
    arrays = _arrays(2, "without biases")
    inputs = _as_projections(arrays)
    inputs["query_input"] = inputs["query_input"][:, -1:]
    expected = sum_of_heads(head_outputs(**inputs))
    actual = causal_self_attention(**arrays, **SIZES)[:, -1:]
    found, magnitudes = units("multihead", inputs, {}, {})
    a, b, floor = coefficients("multihead", "fp64", magnitudes)["output"]
    bound = a * found["output.unit"] + b * found["output.unit_logit"] + floor
    assert (np.abs(actual - expected) <= 2 * bound).all()


@pytest.mark.clause("GPT-MODULE1", "HEADS-EQ1")
@given(st.integers(1, T))
def test_each_prefix_is_the_sum_over_heads_of_its_last_token(length):
    arrays = _arrays(3, "without biases")
    inputs = _as_projections(arrays)
    source = inputs["source_input"][:, :length]
    inputs |= {"query_input": source[:, -1:], "source_input": source}
    expected = sum_of_heads(head_outputs(**inputs))
    actual = causal_self_attention(**arrays, **SIZES)[:, length - 1 : length]
    np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.clause("GPT-MODULE1", "OWN-POISON1")
@pytest.mark.parametrize("future", [1e3, np.inf, np.nan], ids=str)
@pytest.mark.parametrize("past", range(1, T))
def test_future_tokens_change_nothing(past, future):
    arrays = _arrays(4)
    expected = causal_self_attention(**arrays, **SIZES)[:, :past]
    changed = arrays["x"].copy()
    changed[:, past:] = future
    # nothing of the future is read, but a product with another last row may be summed anew
    actual = causal_self_attention(**{**arrays, "x": changed}, **SIZES)[:, :past]
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.clause("GPT-BUFFER1")
def test_the_buffer_may_be_longer_than_the_sequence():
    arrays = _arrays(5)
    outputs = [causal_self_attention(**arrays, heads=H, block_size=n) for n in (T, T + 1, 64)]
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])


@pytest.mark.clause("GPT-BUFFER1")
def test_a_sequence_beyond_the_block_is_refused_in_one_sentence():
    sentence = r"^x has T=7 tokens, but block_size is 6; the first must be at least 1 and at most"
    for function in (causal_self_attention, causal_self_attention_backward):
        cotangent = [np.ones((B, T, C))] if function is causal_self_attention_backward else []
        with pytest.raises(ShapeError, match=sentence) as caught:
            function(*cotangent, **_arrays(), heads=H, block_size=6)
        assert "\n" not in str(caught.value)


@pytest.mark.clause("GPT-DROPOUT1", "OWN-DROPOUT1")
def test_dropout_multiplies_weights_and_output_by_what_is_kept():
    arrays, dropout = _arrays(6), _dropout(7)
    nothing = np.zeros((B, T, C), dtype=bool)
    gone = causal_self_attention(**arrays, **SIZES, **{**dropout, "output_keep": nothing})
    assert (gone == 0).all()  # the bias of the output is dropped too
    no_weights = {"keep": np.zeros((B, H, T, T), dtype=bool), "keep_probability": 0.5}
    bias_alone = causal_self_attention(**arrays, **SIZES, **no_weights)
    np.testing.assert_array_equal(bias_alone, np.broadcast_to(arrays["b_output"], (B, T, C)))
    weights = {n: dropout[n] for n in ("keep", "keep_probability")}
    inner = causal_self_attention(**arrays, **SIZES, **weights)
    expected = np.where(dropout["output_keep"], inner / 0.625, 0.0)
    np.testing.assert_array_equal(causal_self_attention(**arrays, **SIZES, **dropout), expected)
    assert (inner != causal_self_attention(**arrays, **SIZES)).any()


@pytest.mark.clause("GPT-MODULE1", "GPT-DROPOUT1", "OWN-BACKWARD1")
@pytest.mark.parametrize("dropped", [False, True], ids=["all kept", "dropout"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_the_slopes_of_the_loss(form, dropped):
    arrays = _arrays(8, form)
    options = SIZES | (_dropout(9) if dropped else {})
    d_output = np.random.default_rng(10).normal(size=(B, T, C))
    gradients = causal_self_attention_backward(d_output, **arrays, **options)
    named = {name: getattr(gradients, f"d_{name}") for name in arrays}
    check_gradients(
        lambda a: float((causal_self_attention(**a, **options) * d_output).sum()), arrays, named
    )
    absent = set(SHAPES) - set(arrays)
    assert all(getattr(gradients, f"d_{name}") is None for name in absent)


@pytest.mark.clause("GPT-MODULE1", "VAS-S322a", "OWN-BACKWARD1")
def test_gradients_are_those_of_the_paper_packed():
    arrays = _arrays(11, "without biases")
    inputs = _as_projections(arrays)
    d_output = np.random.default_rng(12).normal(size=(B, T, C))
    ours = causal_self_attention_backward(d_output, **arrays, **SIZES)
    theirs = multihead_attention_backward(d_output, **inputs, causal=True)
    allowed = _allowed(inputs | {"d_output": d_output})
    d_w = np.split(ours.d_w_qkv, 3, axis=1)
    for name, packed in zip(("w_query", "w_key", "w_value"), d_w, strict=True):
        error = np.abs(unpack_projection(packed, H) - getattr(theirs, f"d_{name}"))
        assert (error <= allowed[f"d_{name}"]).all(), name
    error = np.abs(unpack_output(ours.d_w_output, H) - theirs.d_w_output)
    assert (error <= allowed["d_w_output"]).all()
    both = theirs.d_query_input + theirs.d_source_input
    bound = allowed["d_query_input"] + allowed["d_source_input"] + 2**-52 * np.abs(both)
    assert (np.abs(ours.d_x - both) <= bound).all()


@pytest.mark.clause("GPT-MODULE1", "OWN-BACKWARD1")
def test_a_loss_on_the_past_has_no_gradient_in_the_future():
    arrays = _arrays(13)
    d_output = np.zeros((B, T, C))
    d_output[:, :3] = 1.0
    gradients = causal_self_attention_backward(d_output, **arrays, **SIZES)
    assert (gradients.d_x[:, 3:] == 0).all()
    assert (gradients.d_x[:, :3] != 0).all()


@pytest.mark.clause("GPT-MODULE1", "OWN-ROUND1")
def test_only_standard_functions_are_used():
    arrays, dropout = _arrays(14), _dropout(15)
    masks = {n: array_api_strict.asarray(dropout[n]) for n in ("keep", "output_keep")}
    strict = {name: array_api_strict.asarray(a) for name, a in arrays.items()}
    output = causal_self_attention(**strict, **SIZES, **{**dropout, **masks})
    expected = causal_self_attention(**arrays, **SIZES, **dropout)
    np.testing.assert_allclose(np.asarray(output), expected, rtol=1e-13)
    gradients = causal_self_attention_backward(output, **strict, **SIZES, **{**dropout, **masks})
    plain = causal_self_attention_backward(np.asarray(output), **arrays, **SIZES, **dropout)
    for actual, wanted in zip(gradients, plain, strict=True):
        np.testing.assert_allclose(np.asarray(actual), wanted, rtol=1e-11, atol=1e-14)


@pytest.mark.clause("GPT-MODULE1", "OWN-ROUND1")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_inputs_are_widened_and_the_result_is_rounded_once(dtype):
    narrow = {n: a.astype(dtype) for n, a in _arrays(16).items()}
    wide = {n: a.astype(np.float32) for n, a in narrow.items()}
    output = causal_self_attention(**narrow, **SIZES)
    assert output.dtype == dtype
    np.testing.assert_array_equal(output, causal_self_attention(**wide, **SIZES).astype(dtype))
    gradients = causal_self_attention_backward(np.ones_like(output), **narrow, **SIZES)
    expected = causal_self_attention_backward(np.ones((B, T, C), np.float32), **wide, **SIZES)
    for actual, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted.astype(dtype))


WRONG = {
    "columns": ({"w_qkv": np.ones((C, 5)), "b_qkv": None}, {}, ShapeError, "must be three times"),
    "bias": ({"b_qkv": np.ones(C)}, {}, ShapeError, "b_qkv has columns=15, but w_qkv has"),
    "output": ({"w_output": np.ones((C, D))}, {}, ShapeError, "w_output has C=5, but x has C=15"),
    "heads": ({}, {"heads": 4}, ShapeError, "x has C=15 features, but heads is 4"),
    "no heads": ({}, {"heads": 0}, OptionError, "heads is 0, but it must be an integer"),
    "block": ({}, {"block_size": 7.0}, OptionError, "block_size is 7.0, but it must be an integer"),
    "bias alone": ({"w_output": None}, {}, OptionError, "a bias needs its projection"),
    "dtype": ({"b_qkv": np.ones(3 * C, np.float32)}, {}, DtypeError, "b_qkv has dtype float32"),
    "no array": ({"w_output": [[1.0]]}, {}, DtypeError, "w_output is a list, but it must be"),
    "keep": ({}, {"keep": np.ones((B, H, T, T))}, DtypeError, "keep has dtype float64, but"),
    "keep by head": (
        {}, {"keep": np.ones((B, 1, T, T), bool)}, ShapeError, "it must have shape (2, 3, 7, 7)",
    ),
    "chance": ({}, {"keep_probability": 0.5}, OptionError, "at most 1, and 1 without keep"),
    "no chance": (
        {}, {"output_keep": np.ones((B, T, C), bool), "output_keep_probability": 0.0}, OptionError,
        "output_keep_probability is 0.0, but it must be finite and above zero",
    ),
    "chance of None": ({}, {"keep_probability": None}, OptionError, "keep_probability is None"),
}  # fmt: skip


@pytest.mark.clause("GPT-MODULE1", "GPT-DROPOUT1")
@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_in_one_sentence(case):
    arrays, options, error, words = WRONG[case]
    for cotangent in ([], [np.ones((B, T, C))]):
        function = causal_self_attention_backward if cotangent else causal_self_attention
        with pytest.raises(error) as caught:
            function(*cotangent, **{**_arrays(17), **arrays}, **{**SIZES, **options})
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.clause("GPT-MODULE1", "OWN-BACKWARD1")
def test_a_gradient_of_another_shape_is_refused():
    with pytest.raises(ShapeError, match="d_output has T=6, but x has T=7"):
        causal_self_attention_backward(np.ones((B, T - 1, C)), **_arrays(), **SIZES)


@pytest.mark.clause("GPT-BUFFER1", "OWN-MEMORY1")
def test_a_buffer_that_does_not_fit_is_refused():
    with pytest.raises(MemoryLimitError, match="GiB are free"):
        causal_self_attention(**_arrays(), heads=H, block_size=10**7)
