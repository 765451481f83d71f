"""Certified gradients against central differences of certified values along random directions."""

import numpy as np
import pytest

import module_cases
from refattn.certify import ENCLOSED
from refattn.certify.engine import solve

STEP = 2.0**-12
"""Step of the difference: its square times the third derivative stays below the tolerance."""

SLOPES = np.array([0.5, 0.25, 0.125, 1.0])


def draw(seed, *shape):
    return np.round(np.random.default_rng(seed).standard_normal(shape) * 8) / 8


def value_of(op, inputs, parameters, conventions, upstream):
    """Return Σ dY·Y over the outputs with an upstream gradient, from certified outputs."""
    out, _ = solve(ENCLOSED[op](inputs, parameters, conventions), "record")
    return sum(float((out[name] * g)[np.isfinite(out[name])].sum()) for name, g in upstream.items())


def check(op, inputs, parameters, conventions, upstream, gradients):
    """Compare each gradient, along one random direction, with a central difference."""
    out, _ = solve(ENCLOSED[op](inputs | gradients, parameters, conventions), "record")
    names = [name for name in inputs if f"d_{name}" in out]
    assert names
    for k, name in enumerate(names):
        direction = draw(100 + k, *inputs[name].shape)
        ends = [
            value_of(
                op, inputs | {name: inputs[name] + s * direction}, parameters, conventions, upstream
            )
            for s in (STEP, -STEP)
        ]
        slope = (ends[0] - ends[1]) / (2 * STEP)
        exact = float((out[f"d_{name}"] * direction).sum())
        assert slope == pytest.approx(exact, rel=1e-5, abs=1e-5), name


OPTIONS = {
    "causal": ({"causal": True}, {"alignment": 1, "empty_row": "uniform"}, ()),
    "capped": ({"softcap": 2.0}, {"head_map": "tile"}, ("bias", "slopes", "sinks")),
    "capped_bias": (
        {"softcap": 2.0, "window": [1, None]},
        {"softcap_order": "after_bias", "distance": "signed"},
        ("bias", "slopes", "sinks"),
    ),
    "dropout": ({"keep_probability": 0.75, "scale": 0.5}, {}, ("keep", "slopes", "key_lengths")),
}
EXTRA = {
    "bias": draw(5, 4, 1, 7),
    "slopes": SLOPES,
    "sinks": draw(6, 4),
    "keep": np.random.default_rng(7).random((1, 4, 5, 7)) < 0.75,
    "key_lengths": np.array([6]),
}


@pytest.mark.clause("OWN-BACKWARD1", "OWN-LSE1", "OWN-SOFTCAP1", "OWN-GQA1", "OWN-SINK1")
@pytest.mark.parametrize("name", OPTIONS)
def test_certified_gradients_are_the_slopes_of_certified_outputs(name):
    parameters, conventions, extra = OPTIONS[name]
    inputs = {
        "query": draw(1, 1, 4, 5, 6),
        "key": draw(2, 1, 2, 7, 6),
        "value": draw(3, 1, 2, 7, 3),
    }
    inputs |= {key: EXTRA[key] for key in extra}
    upstream = {"output": draw(8, 1, 4, 5, 3), "logsumexp": draw(9, 1, 4, 5)}
    gradients = {"d_output": upstream["output"], "d_logsumexp": upstream["logsumexp"]}
    check("attention", inputs, parameters, conventions, upstream, gradients)


@pytest.mark.clause("VAS-S322a", "HEADS-EQ1", "HEADS-S23", "OWN-BACKWARD1")
def test_certified_gradients_of_the_projections_are_slopes():
    inputs = {
        "query_input": draw(1, 2, 3, 4),
        "source_input": draw(2, 2, 5, 6),
        "w_query": draw(3, 2, 4, 3),
        "w_key": draw(4, 2, 6, 3),
        "w_value": draw(5, 2, 6, 2),
        "w_output": draw(6, 2, 2, 4),
        "head_gates": draw(7, 2),
    }
    upstream = {"output": draw(8, 2, 3, 4)}
    check("multihead", inputs, {"causal": True}, {}, upstream, {"d_output": upstream["output"]})


@pytest.mark.clause("GPT-MODULE1", "FLA-S22", "OWN-NORM1", "OWN-ACTIVATION1", "OWN-BACKWARD1")
@pytest.mark.parametrize("case", module_cases.CASES)
def test_certified_gradients_of_the_modules_are_slopes(case):
    op, inputs, parameters, conventions = module_cases.CASES[case]
    d_output = inputs["d_output"].astype(np.float64)
    forward = {name: x for name, x in inputs.items() if name != "d_output"}
    upstream = {"output": d_output}
    check(op, forward, parameters, conventions, upstream, {"d_output": d_output})


@pytest.mark.clause("GPT-MODULE1", "OWN-EXACT1")
def test_a_bias_of_keys_has_a_gradient_of_exactly_zero():
    op, inputs, parameters, _ = module_cases.CASES["causal module, dropout"]
    out, _ = solve(ENCLOSED[op](inputs, parameters, {}), "record")
    queries, keys, values = np.split(out["d_b_qkv"], 3)
    assert (keys == 0).all() and (queries != 0).all() and (values != 0).all()


@pytest.mark.clause("ROPE-EQ34", "OWN-BACKWARD1")
def test_the_certified_gradient_of_a_rotation_is_its_slope():
    inputs = {"x": draw(1, 1, 2, 3, 8), "positions": np.array([2, 3, 5])}
    upstream = {"output": draw(2, 1, 2, 3, 8)}
    parameters = {"variant": {"kind": "yarn", "factor": 4.0, "original_length": 64}}
    check("rope", inputs, parameters, {}, upstream, {"d_output": upstream["output"]})
