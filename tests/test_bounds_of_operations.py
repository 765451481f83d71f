"""The bounds of every operation hold for the reference in narrower formats, and reject faults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mpmath
import numpy as np
import pytest

import module_cases
import rounded
from refattn.backends import load
from refattn.bounds import coefficients, profile_of
from refattn.certify.rope_units import slopes_of
from refattn.certify.units import RULES, units

Array = np.ndarray[Any, Any]
DTYPES = ("float32", "float16", "bfloat16")


def normal(*shape: int, seed: int = 0, size: float = 1.0) -> Array:
    x = size * np.random.default_rng((seed, *shape)).standard_normal(shape)
    return rounded.to_bfloat16(np.asarray(x, np.float32))


def limits(
    op: str, profile: str, inputs: Mapping[str, Any], parameters: Any, conventions: Any
) -> dict[str, Array]:
    tensors, magnitudes = units(op, inputs, parameters, conventions)
    found = {}
    for name, (a, b, floor) in coefficients(op, profile, magnitudes).items():
        unit = tensors[f"{name}.unit"]
        found[name] = a * unit + b * tensors.get(f"{name}.unit_logit", np.zeros(())) + floor
    return found


def multihead(size: float) -> dict[str, Array]:
    shapes = {
        "query_input": (2, 5, 12),
        "source_input": (2, 7, 10),
        "w_query": (3, 12, 8),
        "w_key": (3, 10, 8),
        "w_value": (3, 10, 6),
        "w_output": (3, 6, 9),
        "head_gates": (3,),
        "d_output": (2, 5, 9),
    }
    return {name: normal(*shape, size=size) for name, shape in shapes.items()}


def rope(kind: str, **numbers: Any) -> tuple[Any, ...]:
    inputs = {
        "x": normal(2, 3, 5, 20),
        "positions": np.array([0, 1, 7, 4095, 131071]),
        "d_output": normal(2, 3, 5, 20, seed=1),
    }
    pairing = "half_split" if kind == "linear" else "interleaved"
    variant = {"kind": kind, **numbers}
    return "rope", inputs, {"rotary_dim": 16, "variant": variant}, {"pairing": pairing}


IMPORTANCE = {
    "head_outputs": normal(2, 3, 4, 5, 6),
    "d_head_outputs": normal(2, 3, 4, 5, 6, seed=1),
}
PARTS = normal(5, 11)
PARTS[2, 3] = PARTS[:, 4] = -np.inf
QUERY, KEY = normal(5, 8), normal(7, 8)

CASES: dict[str, tuple[Any, ...]] = {
    **module_cases.CASES,
    "multihead": ("multihead", multihead(0.5), {}, {}),
    "multihead causal": (
        "multihead",
        multihead(0.25),
        {"causal": True},
        {"alignment": "bottom_right", "empty_row": "uniform"},
    ),
    "importance by token": ("head_importance", IMPORTANCE, {}, {"granularity": "token"}),
    "importance by example": ("head_importance", IMPORTANCE, {}, {}),
    "importance by batch": ("head_importance", IMPORTANCE, {}, {"granularity": "batch"}),
    "rope": rope("default"),
    "rope linear": rope("linear", factor=4.0),
    "rope dynamic": rope("dynamic", factor=2.0, original_length=128, length=512),
    "rope yarn": rope("yarn", factor=8.0, original_length=4096, truncate=False),
    "rope longrope": rope(
        "longrope",
        short_factor=[1.0] * 8,
        long_factor=[1.0 + i for i in range(8)],
        original_length=4096,
        length=8192,
        factor=2.0,
    ),
    "rope llama3": rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192
    ),
    "alibi": ("alibi", {}, {"heads": 33, "n_q": 5, "n_k": 9}, {"alignment": "bottom_right"}),
    "alibi geometric": (
        "alibi",
        {},
        {"heads": 12, "n_q": 5, "n_k": 9},
        {"slope_rule": "geometric", "distance": "signed"},
    ),
    "tiles": (
        "tiles",
        {"query": normal(7, 8), "key": normal(23, 8), "value": normal(23, 6)},
        {"block_rows": 3, "block_cols": 4},
        {},
    ),
    "merge": ("merge", {"outputs": normal(5, 11, 6), "logsumexps": PARTS}, {}, {}),
    "additive": (
        "score",
        {
            "query": QUERY,
            "key": normal(7, 6),
            "w_query": normal(8, 4),
            "w_key": normal(6, 4),
            "v": normal(4),
        },
        {"kind": "additive"},
        {},
    ),
    "general": (
        "score",
        {"query": QUERY, "key": normal(7, 6), "weight": normal(8, 6)},
        {"kind": "general"},
        {},
    ),
    "location": (
        "score",
        {"query": QUERY, "key": KEY, "weight": normal(8, 7)},
        {"kind": "location"},
        {},
    ),
    "cosine": (
        "score",
        {"query": QUERY, "key": KEY, "strength": normal()},
        {"kind": "cosine"},
        {},
    ),
    "dot": ("score", {"query": QUERY, "key": KEY}, {"kind": "dot"}, {}),
    "scaled dot": ("score", {"query": QUERY, "key": KEY}, {"kind": "scaled_dot"}, {}),
    "decay": ("rope_decay", {"distances": np.arange(0, 500, 13)}, {"d": 64}, {}),
}
"""A case of every operation but attention."""


def attention_case(options: int) -> tuple[Any, ...]:
    """Return a case whose options are the bits of a number."""
    b, h, n_q, n_k = 2, 4, 5, 13
    inputs: dict[str, Array] = {
        "query": normal(b, h, n_q, 16),
        "key": normal(b, 2, n_k, 16),
        "value": normal(b, 2, n_k, 11),
        "d_output": normal(b, h, n_q, 11, seed=1),
        "d_logsumexp": normal(b, h, n_q),
    }
    parameters: dict[str, Any] = {}
    conventions: dict[str, Any] = {}
    if options & 1:
        inputs["bias"] = normal(h, 1, n_k) if options & 4 else normal(b, h, n_q, n_k)
    if options & 2:
        parameters["softcap"] = 5.0
        conventions["softcap_order"] = "after_bias" if options & 4 else "before_bias"
    if options & 8:
        inputs["slopes"] = np.float32(2.0) ** -np.arange(1, h + 1, dtype=np.float32)
    if options & 16:
        inputs["sinks"] = normal(h)
    if options & 32:
        inputs["keep"] = np.random.default_rng(options).random((b, h, n_q, n_k)) < 0.75
        parameters["keep_probability"] = 0.75
    if options & 64:
        parameters["causal"] = True
        conventions = {**conventions, "alignment": "bottom_right", "head_map": "tile"}
    return "attention", inputs, parameters, conventions


def check(op: str, inputs: Any, parameters: Any, conventions: Any, dtype: str) -> None:
    """Check the reference in one dtype against itself in float64, by the bounds."""
    run = load("numpy").run
    expected = run(op, inputs, parameters, conventions, "float64")
    actual = run(op, inputs, parameters, conventions, dtype)
    found = limits(op, profile_of(dtype), inputs, parameters, conventions)
    floats = {name for name, x in expected.items() if np.asarray(x).dtype.kind == "f"}
    assert set(found) == floats
    for name in floats:
        wanted = np.asarray(expected[name], np.float64)
        assert found[name].shape == wanted.shape, name
        finite = np.isfinite(wanted)
        actual_finite = np.where(finite, np.asarray(actual[name], np.float64), 0.0)
        within = np.abs(actual_finite - np.where(finite, wanted, 0.0)) <= found[name]
        assert within.all(), name


@pytest.mark.clause("NUM-ROPE1", "NUM-OTHER1")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_every_operation_stays_within_its_bounds(case: str, dtype: str) -> None:
    check(*CASES[case], dtype)


@pytest.mark.clause("NUM-LOGIT1", "NUM-FORWARD1", "NUM-LSE1", "NUM-BACKWARD1")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [0, 1, 3, 7, 10, 15, 16, 27, 32, 55, 64, 93, 127])
def test_attention_under_options_stays_within_its_bounds(options: int, dtype: str) -> None:
    check(*attention_case(options), dtype)


def rotations(positions: Array, d: int) -> tuple[Array, Array]:
    """Return cosine and sine with 50 digits, rounded to float64."""
    with mpmath.workdps(50):
        theta = [mpmath.mpf(10000) ** (mpmath.mpf(-2 * i) / d) for i in range(d // 2)]
        cells = [[int(m) * t for t in theta] for m in positions]
        cosine = [[float(mpmath.cos(x)) for x in row] for row in cells]
        sine = [[float(mpmath.sin(x)) for x in row] for row in cells]
    return np.array(cosine), np.array(sine)


@pytest.mark.clause("NUM-ROPE1")
def test_angles_in_float32_exceed_the_bound_and_angles_in_float64_do_not() -> None:
    d, positions = 128, np.array([1, 4095, 131071])
    inputs = {"x": normal(1, 1, 3, d), "positions": positions}
    expected = rotations(positions, d)
    for profile in ("fp64", "fp32"):
        limit = limits("rope", profile, inputs, {}, {})
        powers = -2 * np.arange(d // 2) / d
        fine = positions[:, None] * 10000.0**powers
        for name, function, wanted in zip(
            ("cosine", "sine"), (np.cos, np.sin), expected, strict=True
        ):
            assert (np.abs(function(fine) - wanted) <= limit[name]).all()
            rows = positions[:, None].astype(np.float32)
            coarse = rows * (np.float32(10000) ** powers.astype(np.float32))
            beyond = np.abs(function(coarse).astype(np.float64) - wanted) > limit[name]
            assert beyond[2].any()


@pytest.mark.clause("NUM-OTHER1")
@pytest.mark.parametrize("heads", [12, 20, 33])
def test_slopes_in_bfloat16_exceed_the_float32_bound(heads: int) -> None:
    limit = limits("alibi", "fp32", {}, {"heads": heads, "n_q": 3, "n_k": 5}, {})["slopes"]
    m = slopes_of(heads, "authors")
    assert (np.abs(m.astype(np.float32) - m) <= limit).all()
    assert (np.abs(rounded.to_bfloat16(m.astype(np.float32)) - m) > limit).any()


@pytest.mark.clause("NUM-OTHER1")
def test_merging_by_half_weights_exceeds_the_float32_bound() -> None:
    _, inputs, parameters, conventions = CASES["merge"]
    L, O_p = (np.asarray(inputs[n], np.float64) for n in ("logsumexps", "outputs"))
    keep = np.arange(11) != 4
    L, O_p = L[:, keep], O_p[:, keep]
    weights = np.exp(L - L.max(axis=0))
    weights /= weights.sum(axis=0)
    limit = limits("merge", "fp32", inputs, parameters, conventions)["output"][keep]
    exact = np.einsum("pn,pnd->nd", weights, O_p)
    wrong = np.einsum("pn,pnd->nd", rounded.to_half(weights), O_p)
    assert (np.abs(exact.astype(np.float32) - exact) <= limit).all()
    assert (np.abs(wrong - exact) > limit).any()


@pytest.mark.clause("NUM-OTHER1")
def test_integers_and_bits_have_no_bound() -> None:
    for op in ("traffic", "keep_mask"):
        assert units(op, {}, {}, {}) == ({}, {})
        assert coefficients(op, "fp32", {}) == {}


@pytest.mark.clause("NUM-MODEL1")
@pytest.mark.parametrize("case", CASES)
def test_units_are_finite_and_not_negative(case: str) -> None:
    op, inputs, parameters, conventions = CASES[case]
    tensors, magnitudes = units(op, inputs, parameters, conventions)
    assert op in RULES
    for name, unit in tensors.items():
        assert unit.dtype == np.float64
        assert np.isfinite(unit).all(), name
        assert (unit >= 0).all(), name
    assert all(np.isfinite(list(magnitudes.values())))
