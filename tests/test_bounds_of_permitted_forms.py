"""The bounds hold for the forms that NUM-MODEL1 permits, at their worst, and tell others apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import rounded
from refattn.bounds import coefficients
from refattn.certify.attention_units import _row_term, forward
from refattn.certify.head_units import Head
from refattn.certify.majorant import Known, exact, tanh
from refattn.certify.units import units
from test_bounds import case_of, limits, worst

Array = np.ndarray[Any, Any]
FLOAT = np.float32
LOG2_E = FLOAT(np.log2(np.e))
FINE = rounded.ARITHMETICS["fp64"]
TINY = 2.0**-126
"""Smallest normal number of float32."""


def flushed(x: Array) -> Array:
    return np.where(np.abs(x) < TINY, 0.0, x)


def softmax_mean(logits: Array, value: Array) -> tuple[Array, float]:
    """Return Σ P v and the logsumexp in float64, from logits and one column of values."""
    S = np.asarray(logits, np.float64)
    weights = np.exp(S - S.max())
    return weights @ value / weights.sum(), float(S.max() + np.log(weights.sum()))


def one_row(logits: Array, value: Array) -> dict[str, Array]:
    """Return the inputs of attention with one query of 1, whose logits are its keys."""
    return case_of(np.ones((1, 1)), np.asarray(logits)[:, None], np.asarray(value)[:, None])


@pytest.mark.clause("NUM-BACKWARD1", "NUM-MODEL1")
@pytest.mark.parametrize("heads", [8, 32, 64])
@pytest.mark.parametrize("profile", ["fp16", "fp32"])
def test_each_head_of_a_group_may_store_its_gradients(profile: str, heads: int) -> None:
    stored = rounded.to_half if profile == "fp16" else flushed
    size, size_out = (2.0**-14, 2.0**-6) if profile == "fp16" else (2.0**-100, 2.0**-26)
    key = np.array([[0.0, 0.0], [1.0, 1.0], [-1.0, 0.5]])
    value = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.25]])
    for query, d_output in (
        (np.full((1, 2), size), size_out * np.array([[1.0, -0.5]])),
        (np.zeros((1, 2)), np.full((1, 2), 2.0**-22 if profile == "fp16" else 2.0**-125)),
    ):
        inputs = {n: x[None, None] for n, x in (("key", key), ("value", value))}
        for name, x in (("query", query), ("d_output", d_output)):
            inputs[name] = np.broadcast_to(x, (1, heads, *x.shape))
        limit = limits("attention", profile, inputs)
        _, dK, dV = rounded.gradients(d_output, query, key, value, FINE, from_lse=False)
        for name, x in (("d_key", dK), ("d_value", dV)):
            assert worst(stored(heads * stored(x)), heads * x, limit[name]) <= 1, name


@pytest.mark.clause("NUM-MODEL1", "NUM-BACKWARD1")
def test_each_product_of_a_sum_may_be_flushed() -> None:
    n_q, n_k = 96, 1024
    query, key, value = np.zeros((n_q, 1)), np.zeros((n_k, 1)), np.ones((n_k, 1))
    d_output = np.full((n_q, 1), 2.0**-118)
    limit = limits("attention", "fp32", case_of(query, key, value, d_output))["d_value"]
    product = d_output[0, 0] / n_k  # below the normal range, and flushed in every row
    assert flushed(np.asarray(product)) == 0
    assert worst(np.zeros((n_k, 1)), np.full((n_k, 1), n_q * product), limit) <= 1


@pytest.mark.clause("NUM-MODEL1", "NUM-FORWARD1")
@pytest.mark.parametrize(("highest", "permitted"), [(-20.0, True), (-77.0, True), (-80.0, False)])
def test_no_shift_is_for_exponentials_in_the_normal_range(highest: float, permitted: bool) -> None:
    logits, value = (highest - 3 * np.arange(4)).astype(FLOAT), np.array([1, -1, 0.5, 2], FLOAT)
    weights = np.exp(logits)
    weights[weights < TINY] = 0
    output = (weights @ value) / weights.sum(dtype=FLOAT)
    expected, _ = softmax_mean(logits, value)
    limit = limits("attention", "fp32", one_row(logits, value))["output"]
    assert (worst(output, expected, limit) <= 1) == permitted


@pytest.mark.clause("NUM-MODEL1", "NUM-FORWARD1")
@pytest.mark.parametrize(("highest", "permitted"), [(-7.5, True), (-14.0, False), (-16.0, False)])
def test_no_shift_is_for_half_weights_in_their_normal_range(
    highest: float, permitted: bool
) -> None:
    logits = (highest - np.arange(16) / 8).astype(FLOAT)
    value = rounded.to_half(np.random.default_rng(0).standard_normal(16).astype(FLOAT))
    weights = np.exp(logits)
    output = rounded.to_half(rounded.to_half(weights) @ value / weights.sum(dtype=FLOAT))
    expected, _ = softmax_mean(logits, value)
    limit = limits("attention", "fp16", one_row(logits, value))["output"]
    assert (worst(output, expected, limit) <= 1) == permitted


def decay(m_old: FLOAT, m_new: FLOAT, form: str) -> FLOAT:
    """Return e^(m_old - m_new) in base 2, its argument rounded in one of three ways."""
    if m_old == -np.inf:
        return FLOAT(0)
    if form == "difference":
        return FLOAT(np.exp2(FLOAT(FLOAT(m_old - m_new) * LOG2_E)))
    if form == "stored products":
        return FLOAT(np.exp2(FLOAT(FLOAT(m_old * LOG2_E) - FLOAT(m_new * LOG2_E))))
    return FLOAT(np.exp2(fused(m_old, FLOAT(m_new * LOG2_E))))


def fused(x: FLOAT, product: FLOAT) -> FLOAT:
    """Return x log2(e) - product with one rounding; float64 holds the product of two floats."""
    return FLOAT(np.float64(x) * np.float64(LOG2_E) - np.float64(product))


def biased_logits(n: int, lowest: float) -> Array:
    """Return rising logits whose products with log2(e) all round up, by nearly the most."""
    S = np.arange(int(lowest * 2**13), int(lowest * 2**13) + 60 * n) / 2**13
    S = S[S.astype(FLOAT) == S].astype(FLOAT)
    error = (S * LOG2_E).astype(np.float64) - S.astype(np.float64) * np.float64(LOG2_E)
    return S[error > np.quantile(error, 0.9)][:n]


def running(logits: Array, value: Array, form: str) -> tuple[FLOAT, FLOAT]:
    """Return output and logsumexp by a running maximum over single keys, in float32."""
    m, total, out = FLOAT(-np.inf), FLOAT(0), FLOAT(0)
    for s, v in zip(logits, value, strict=True):
        m_new = max(m, s)
        rescaling, p = decay(m, m_new, form), np.exp2(fused(s, FLOAT(m_new * LOG2_E)))
        total, out = FLOAT(total * rescaling + p), FLOAT(out * rescaling + FLOAT(p * v))
        m = m_new
    return FLOAT(out / total), FLOAT(m + np.log(total))


@pytest.mark.clause("NUM-MODEL1", "NUM-LOGIT1", "NUM-LSE1")
@pytest.mark.parametrize(("n", "lowest"), [(400, 100.0), (1500, 100.0), (1500, 500.0)])
def test_rescalings_of_numbers_rounded_once_do_not_drift(n: int, lowest: float) -> None:
    logits = biased_logits(n, lowest)
    value = np.where(np.arange(n) < n // 2, 1, -1).astype(FLOAT)
    expected = softmax_mean(logits, value)
    limit = limits("attention", "fp32", one_row(logits, value))
    for form, permitted in (
        ("difference", True),
        ("stored products", True),
        ("a product rounded anew", False),
    ):
        with np.errstate(under="ignore"):
            got = running(logits, value, form)
        for name, x, y in zip(("output", "logsumexp"), got, expected, strict=True):
            assert (worst(x, y, limit[name]) <= 1) == permitted, (form, name)


@pytest.mark.clause("NUM-FORWARD1", "NUM-MODEL1")
@pytest.mark.parametrize("logit", [1e2, 1e3, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_may_be_merged_by_their_logsumexp(parts: int, logit: float) -> None:
    n = 32 * parts
    size = FLOAT(np.sqrt(logit))
    key, value = np.full((n, 1), size, FLOAT), np.ones((n, 1), FLOAT)
    limit = limits("attention", "fp32", case_of(np.full((1, 1), size, FLOAT), key, value))
    scores = FLOAT(size * size) + np.log(np.full(parts, n / parts, FLOAT))
    top = scores.max()
    merged = FLOAT(top + np.log(np.exp(scores - top).sum(dtype=FLOAT)))
    output = np.exp(scores - merged).sum(dtype=FLOAT)  # the values are 1, and so is the output
    assert worst(output, np.ones(()), limit["output"]) <= 1


@pytest.mark.clause("NUM-LOGIT1", "NUM-FORWARD1")
@pytest.mark.parametrize("n", [4, 8, 16, 64])
def test_every_function_of_a_merge_may_err_by_the_most(n: int) -> None:
    u, part = 2.0**-24, n // 2
    value = np.where(np.arange(n) < part, 1.0, -1.0)
    zero = np.zeros((n, 4))
    limit = limits("attention", "fp32", case_of(zero[:1], zero, value[:, None]))["output"]
    functions = 8 * u * (np.log(part) + 1) + 2 * 8 * u  # the part's ln, its exp and the merge's
    sums = (part + 2 + 8) * u  # of the part, of the two parts, and what NUM-MODEL1 grants beside
    higher, lower = np.exp(functions + sums), np.exp(-functions - sums)
    output = (higher - lower) / (higher * (1 - sums) ** 2 + lower * (1 - sums) ** 2)
    assert worst(output, np.zeros(()), limit) <= 1


@pytest.mark.clause("NUM-FORWARD1", "NUM-MODEL1")
def test_underflow_stays_small_within_the_hull() -> None:
    query, key, value, _ = rounded.draw("normal", 3, 7, 8, 2, seed=8)
    limit = limits("attention", "fp16_accumulate", case_of(300 * query, key, value))["output"]
    _, logsumexp = rounded.attend(300 * query, key, value, FINE)
    common = np.exp(2.0**-11 * (np.abs(logsumexp).max() + 24 + 14 * np.log(2) + 2 * 24))
    assert (limit <= 2.1 * np.abs(value).max() * common).all()


@pytest.mark.clause("NUM-MODEL1", "NUM-OTHER1")
def test_every_number_stored_by_multihead_may_be_below_the_normal_range_of_half() -> None:
    heads, features = 8, 4
    ones = {"query_input": (1, 1, 1), "source_input": (1, 3, 1), "w_output": (heads, features, 1)}
    inputs = {name: np.ones(shape) for name, shape in ones.items()}
    inputs |= {name: np.zeros((heads, 1, 2)) for name in ("w_query", "w_key")}
    inputs["w_value"] = np.full((heads, 1, features), 2.0**-19 + 2.0**-24)
    inputs["source_input"] = np.full((1, 3, 1), 1.5)
    V = 1.5 * inputs["w_value"]  # 49.5 spacings of float16 there
    stored = rounded.to_half(V[:, 0])
    limit = limits("multihead", "fp16", inputs)["output"]
    assert worst(rounded.to_half(stored.sum()), V.sum(), limit) <= 1


@pytest.mark.clause("NUM-OTHER1", "NUM-MODEL1")
def test_weights_of_a_merge_may_be_below_the_normal_range_of_half() -> None:
    parts, small = 64, 13.5 * 2.0**-24
    L = np.full((parts + 1, 1), np.log(small))
    L[0] = 0.0
    outputs = np.ones((parts + 1, 1, 1))
    outputs[0] = 0.0
    limit = limits("merge", "fp16", {"outputs": outputs, "logsumexps": L})["output"]
    total = 1 + parts * small
    got = rounded.to_half(parts * rounded.to_half(np.asarray(small)) / total)
    assert worst(got, parts * small / total, limit) <= 1


@pytest.mark.clause("NUM-OTHER1", "NUM-MODEL1")
def test_an_importance_may_be_stored_in_half_before_it_is_normalised() -> None:
    A = np.array([4.5, 9.5, 2.5]) * 2.0**-12
    inputs = {"head_outputs": A.reshape(1, 1, 3, 1, 1)}
    inputs["d_head_outputs"] = np.full((1, 1, 3, 1, 1), 2.0**-12)
    limit = limits("head_importance", "fp16", inputs)["normalized"]
    stored = rounded.to_half(A * 2.0**-12)
    got = rounded.to_half(stored / np.linalg.norm(stored))
    assert worst(got, A / np.linalg.norm(A), limit) <= 1


@pytest.mark.clause("NUM-LOGIT1")
def test_slope_of_a_cap_holds_over_the_reach_of_every_profile() -> None:
    u = 2.0**-11
    for value in (0.5, 3.0, 10.0):
        for error in (1.0, 2.0**10, 2.0**13, 2.0**15):
            x = Known(np.asarray(value), np.asarray(error), np.asarray(0.0))
            moved = abs(np.tanh(value - u * error) - np.tanh(value))
            assert moved <= u * tanh(x).accumulated


@pytest.mark.clause("NUM-BACKWARD1")
def test_row_term_may_come_from_rounded_weights_of_projected_operands() -> None:
    query, key, value, d_output = rounded.draw("normal", 3, 7, 8, 2, seed=9)
    Q, K, V = (Known(x, 0 * x, np.abs(x)) for x in (query, key, value))
    head = Head(
        Q, K, V, np.ones((3, 7), bool), None, np.ones((3, 7)), 1.0, None, False, None, False
    )
    f = forward(head)
    P = f.rows.weights[:, :-1]
    A = d_output @ value.T
    w_P = P * f.rows.exponent.operand[:, :-1]
    weights, products = Known(P, 0 * P, w_P), Known(A, 0 * A, 0 * A)
    found = _row_term(f, weights, products, exact(d_output), head).operand[:, 0]
    assert (found >= 0.999999 * ((P + w_P) * np.abs(A)).sum(axis=1)).all()


@pytest.mark.clause("NUM-MODEL1")
def test_a_sum_beyond_the_range_of_the_arithmetic_is_not_asked() -> None:
    query, key, value = np.full((1, 2), 210.0), np.full((3, 2), 200.0), np.ones((3, 1))
    inputs = case_of(query, key, value)
    _, magnitudes = units("attention", inputs, {"scale": 0.25}, {})
    assert magnitudes["peak"] == 84000
    assert coefficients("attention", "fp16_accumulate", magnitudes) == {}
    assert set(coefficients("attention", "fp16", magnitudes)) == {"output", "logsumexp"}
    _, magnitudes = units("attention", case_of(query / 2, key, value), {"scale": 0.25}, {})
    assert set(coefficients("attention", "fp16_accumulate", magnitudes)) == {"output", "logsumexp"}


@pytest.mark.clause("NUM-MODEL1")
@pytest.mark.parametrize(
    ("op", "inputs", "parameters", "peak"),
    [
        ("tiles", case_of(np.full((2, 3), 5.0), np.full((4, 3), 7.0), np.ones((4, 1))), {}, 105),
        ("attention", case_of(np.zeros((2, 3)), np.zeros((4, 3)), np.full((4, 1), 9.0)), {}, 36),
    ],
)
def test_peak_is_the_largest_sum_of_magnitudes(
    op: str, inputs: dict[str, Array], parameters: dict[str, Any], peak: float
) -> None:
    if op == "tiles":
        inputs = {name: x[0, 0] for name, x in inputs.items()}
        parameters = {"block_rows": 1, "block_cols": 2}
    assert units(op, inputs, parameters, {})[1]["peak"] == peak
