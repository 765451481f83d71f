"""Layer normalisation and the activations of a feed-forward layer, with their gradients."""

from math import erfc, exp, pi, sqrt

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from directional import check_gradients
from refattn.activations import ACTIVATIONS, activate, activation_slope
from refattn.checks import DtypeError, OptionError, ShapeError
from refattn.layer_norm import layer_norm, layer_norm_backward


def _arrays(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"x": (2, 3, 7), "weight": (7,), "bias": (7,)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


@pytest.mark.clause("OWN-NORM1")
def test_a_row_by_hand():
    # mean 2, variance ((-1)² + 1²)/2 = 1, with ε = 3 the deviation is 2
    x, weight, bias = np.array([1.0, 3.0]), np.array([10.0, 4.0]), np.array([0.0, 1.0])
    assert layer_norm(x, weight, bias, epsilon=3.0).tolist() == [-5.0, 3.0]


@pytest.mark.clause("OWN-NORM1")
def test_a_constant_row_is_the_bias():
    arrays = _arrays() | {"x": np.full((3, 7), 1e5)}
    np.testing.assert_array_equal(layer_norm(**arrays), np.tile(arrays["bias"], (3, 1)))


@pytest.mark.clause("OWN-NORM1")
@given(st.floats(-100, 100), st.floats(0.5, 100))
def test_shift_and_scale_of_a_row_change_nothing_but_what_epsilon_does(shift, scale):
    arrays = _arrays(1)
    moved = arrays | {"x": scale * arrays["x"] + shift}
    # scaling x scales its variance, so that ε must be scaled alike
    expected = layer_norm(**arrays, epsilon=1e-5)
    actual = layer_norm(**moved, epsilon=1e-5 * scale**2)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.clause("OWN-NORM1", "OWN-BACKWARD1")
def test_gradients_of_the_norm_are_the_slopes_of_the_loss():
    arrays = _arrays(2)
    d_output = np.random.default_rng(3).normal(size=(2, 3, 7))
    found = layer_norm_backward(d_output, **arrays, epsilon=0.125)
    check_gradients(
        lambda a: float((layer_norm(**a, epsilon=0.125) * d_output).sum()),
        arrays,
        {name: getattr(found, f"d_{name}") for name in arrays},
    )


@pytest.mark.clause("OWN-NORM1", "OWN-ROUND1")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_the_norm_of_narrow_inputs_is_rounded_once(dtype):
    narrow = {n: a.astype(dtype) for n, a in _arrays(4).items()}
    wide = {n: a.astype(np.float32) for n, a in narrow.items()}
    np.testing.assert_array_equal(layer_norm(**narrow), layer_norm(**wide).astype(dtype))
    found = layer_norm_backward(np.ones_like(narrow["x"]), **narrow)
    expected = layer_norm_backward(np.ones_like(wide["x"]), **wide)
    for actual, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted.astype(dtype))


@pytest.mark.clause("OWN-NORM1")
def test_what_does_not_fit_the_norm_is_refused():
    arrays = _arrays()
    with pytest.raises(ShapeError, match="bias has e=1, but x has e=7"):
        layer_norm(**arrays | {"bias": np.ones(1)})
    with pytest.raises(OptionError, match="epsilon is 0, but it must be finite and above zero"):
        layer_norm(**arrays, epsilon=0)
    with pytest.raises(DtypeError, match="weight has dtype float32, but x has dtype float64"):
        layer_norm(**arrays | {"weight": np.ones(7, np.float32)})
    with pytest.raises(ShapeError, match="d_output has 3=2, but the contract has 3=3"):
        layer_norm_backward(np.ones((2, 2, 7)), **arrays)
    with pytest.raises(DtypeError, match="d_output is None, but it must be an array"):
        layer_norm_backward(None, **arrays)


@pytest.mark.clause("OWN-ACTIVATION1")
def test_activations_by_hand():
    x = np.array([-3.0, -0.0, 0.0, 1.5, 2.0])
    assert activate(x, "squared_relu").tolist() == [0.0, 0.0, 0.0, 2.25, 4.0]
    assert activation_slope(x, "squared_relu").tolist() == [0.0, 0.0, 0.0, 3.0, 4.0]
    normal = [erfc(-v / sqrt(2)) / 2 for v in x]
    np.testing.assert_allclose(activate(x, "gelu"), x * normal, rtol=1e-15)
    slope = [p + v * exp(-v * v / 2) / sqrt(2 * pi) for v, p in zip(x, normal, strict=True)]
    np.testing.assert_allclose(activation_slope(x, "gelu"), slope, rtol=1e-14)


@pytest.mark.clause("OWN-ACTIVATION1")
def test_the_tail_of_gelu_is_accurate_relatively():
    # 1 + erf(-20/√2) is 0 in float64; -20 Φ(-20) = -20 · 2.7536241186062337e-89 is not
    (tail,) = activate(np.array([-20.0]), "gelu")
    assert tail == pytest.approx(-20 * 2.7536241186062337e-89, rel=1e-12)


@pytest.mark.clause("OWN-ACTIVATION1", "OWN-BACKWARD1")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("x", [-2.5, -0.75, 0.25, 3.0])
def test_the_slope_of_an_activation_is_its_difference_quotient(activation, x):
    step = 1e-6
    ahead, behind = activate(np.array([x + step, x - step]), activation)
    (slope,) = activation_slope(np.array([x]), activation)
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=1e-8, abs=1e-9)


@pytest.mark.clause("OWN-ACTIVATION1", "OWN-ROUND1")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_serve_any_array_library_and_let_a_nan_travel(activation):
    x = np.array([-1.5, 0.5, np.nan])
    for function in (activate, activation_slope):
        strict = function(array_api_strict.asarray(x), activation)
        np.testing.assert_allclose(np.asarray(strict), function(x, activation), rtol=1e-15)
        assert np.isnan(function(x, activation)[2])
    single = x[:2].astype(np.float32)
    assert activate(single, activation).dtype == np.float32
