"""The bounds hold for correct implementations in every precision, and reject wrong precisions."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rounded
from refattn.bounds import PROFILES, coefficients, profile_of
from refattn.certify.errors import CertifyError
from refattn.certify.softmax_units import chain
from refattn.certify.units import units
from refattn.checks import OptionError

Array = np.ndarray[Any, Any]


def case_of(
    query: Array, key: Array, value: Array, d_output: Array | None = None
) -> dict[str, Array]:
    inputs = {"query": query[None, None], "key": key[None, None], "value": value[None, None]}
    return inputs if d_output is None else {**inputs, "d_output": d_output[None, None]}


def limits(
    op: str,
    profile: str,
    inputs: Mapping[str, Array],
    parameters: Mapping[str, Any] | None = None,
    conventions: Mapping[str, Any] | None = None,
) -> dict[str, Array]:
    """Return the bound of every element of every float output."""
    tensors, magnitudes = units(op, inputs, parameters or {}, conventions or {})
    found = {}
    for name, (a, b, floor) in coefficients(op, profile, magnitudes).items():
        unit = tensors[f"{name}.unit"]
        found[name] = a * unit + b * tensors.get(f"{name}.unit_logit", np.zeros(())) + floor
    return found


def worst(actual: Array, expected: Array, limit: Array) -> float:
    error = np.abs(np.asarray(actual, np.float64) - expected)
    return float(np.max(error / limit.reshape(error.shape)))


def exact_forward(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    """Return output and logsumexp with 40 digits, rounded to float64."""
    with mpmath.workdps(40):
        Q, K, V = (mpmath.matrix(x.tolist()) for x in (query, key, value))
        S = Q * K.T / mpmath.sqrt(Q.cols)
        outputs, sums = [], []
        for i in range(S.rows):
            weights = [mpmath.exp(S[i, j]) for j in range(S.cols)]
            l_i = mpmath.fsum(weights)
            sums.append(float(mpmath.log(l_i)))
            outputs.append([float(mpmath.fdot(weights, V[:, c]) / l_i) for c in range(V.cols)])
    return np.array(outputs), np.array(sums)


@pytest.mark.clause("NUM-FORWARD1", "NUM-LSE1")
@pytest.mark.parametrize("family", rounded.FAMILIES)
@pytest.mark.parametrize("profile", ["fp32", "tf32", "bf16", "fp16"])
def test_correct_forward_stays_within_its_bound(profile: str, family: str) -> None:
    for n_q, n_k, d_k, d_v in ((5, 7, 11, 3), (3, 53, 16, 7), (2, 149, 37, 5)):
        query, key, value, _ = rounded.draw(family, n_q, n_k, d_k, d_v, seed=n_k)
        output, logsumexp = rounded.attend(query, key, value, rounded.ARITHMETICS["fp64"])
        limit = limits("attention", profile, case_of(query, key, value))
        for block in (0, 1, 16, 64):
            for reverse in (False, True):
                for one_by_one in (False, True):
                    a = rounded.ARITHMETICS[profile]._replace(one_by_one=one_by_one)
                    got = rounded.attend(query, key, value, a, block, reverse)
                    assert worst(got[0], output, limit["output"]) <= 1
                    assert worst(got[1], logsumexp, limit["logsumexp"]) <= 1


@pytest.mark.clause("NUM-FORWARD1", "NUM-LSE1")
@pytest.mark.parametrize("family", ["unit", "normal", "ties", "cancel"])
def test_half_accumulation_stays_within_its_bound(family: str) -> None:
    query, key, value, _ = rounded.draw(family, 5, 23, 11, 3, seed=1)
    output, logsumexp = rounded.attend(query, key, value, rounded.ARITHMETICS["fp64"])
    limit = limits("attention", "fp16_accumulate", case_of(query, key, value))
    a = rounded.ARITHMETICS["fp16_accumulate"]
    for block in (0, 1, 5):
        got = rounded.attend(query, key, value, a, block)
        assert worst(got[0], output, limit["output"]) <= 1
        assert worst(got[1], logsumexp, limit["logsumexp"]) <= 1


@pytest.mark.clause("NUM-FORWARD1", "NUM-LSE1")
@pytest.mark.parametrize("family", rounded.FAMILIES)
def test_float64_stays_within_its_bound(family: str) -> None:
    query, key, value, _ = rounded.draw(family, 3, 29, 13, 2, seed=5)
    output, logsumexp = exact_forward(query, key, value)
    limit = limits("attention", "fp64", case_of(query, key, value))
    for block in (0, 1, 8):
        got = rounded.attend(query, key, value, rounded.ARITHMETICS["fp64"], block)
        assert worst(got[0], output, limit["output"]) <= 1
        assert worst(got[1], logsumexp, limit["logsumexp"]) <= 1


@pytest.mark.clause("NUM-BACKWARD1")
@pytest.mark.parametrize("family", rounded.FAMILIES)
@pytest.mark.parametrize("profile", ["fp32", "tf32", "bf16", "fp16"])
def test_correct_gradients_stay_within_their_bounds(profile: str, family: str) -> None:
    for n_q, n_k, d_k, d_v in ((5, 7, 11, 3), (19, 53, 16, 7)):
        query, key, value, d_output = rounded.draw(family, n_q, n_k, d_k, d_v, seed=n_k)
        fine = rounded.ARITHMETICS["fp64"]
        expected = rounded.gradients(d_output, query, key, value, fine, from_lse=False)
        limit = limits("attention", profile, case_of(query, key, value, d_output))
        for from_lse in (False, True):
            for one_by_one in (False, True):
                a = rounded.ARITHMETICS[profile]._replace(one_by_one=one_by_one)
                got = rounded.gradients(d_output, query, key, value, a, from_lse)
                for name, x, y in zip(("d_query", "d_key", "d_value"), got, expected, strict=True):
                    assert worst(x, y, limit[name]) <= 1, name


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(rounded.FAMILIES),
    n_k=st.integers(1, 67),
    d_k=st.integers(1, 24),
    block=st.integers(1, 17),
    seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.clause("NUM-MODEL1", "NUM-LOGIT1", "NUM-FORWARD1")
def test_any_draw_stays_within_its_bound(
    family: str, n_k: int, d_k: int, block: int, seed: int
) -> None:
    query, key, value, d_output = rounded.draw(family, 3, n_k, d_k, 2, seed)
    fine = rounded.ARITHMETICS["fp64"]
    output, logsumexp = rounded.attend(query, key, value, fine)
    expected = rounded.gradients(d_output, query, key, value, fine, from_lse=False)
    for profile in ("fp32", "fp16"):
        limit = limits("attention", profile, case_of(query, key, value, d_output))
        a = rounded.ARITHMETICS[profile]
        got = rounded.attend(query, key, value, a, block)
        assert worst(got[0], output, limit["output"]) <= 1
        assert worst(got[1], logsumexp, limit["logsumexp"]) <= 1
        found = rounded.gradients(d_output, query, key, value, a, from_lse=True)
        for name, x, y in zip(("d_query", "d_key", "d_value"), found, expected, strict=True):
            assert worst(x, y, limit[name]) <= 1, name


@pytest.mark.clause("NUM-FORWARD1")
@pytest.mark.parametrize("family", ["unit", "normal", "rising", "outliers"])
@pytest.mark.parametrize("fault", rounded.FAULTS)
def test_precision_fault_exceeds_the_float32_bound(fault: str, family: str) -> None:
    query, key, value, _ = rounded.draw(family, 5, 17, 16, 7, seed=2)
    query, key, value = (x * np.float32(1.0009765625 + 2**-13) for x in (query, key, value))
    output, _ = rounded.attend(query, key, value, rounded.ARITHMETICS["fp64"])
    limit = limits("attention", "fp32", case_of(query, key, value))
    right = rounded.attend(query, key, value, rounded.ARITHMETICS["fp32"])[0]
    wrong = rounded.attend(query, key, value, rounded.FAULTS[fault])[0]
    assert worst(right, output, limit["output"]) < 0.2
    assert worst(wrong, output, limit["output"]) > 2


@pytest.mark.clause("NUM-FORWARD1")
@pytest.mark.parametrize("family", [f for f in rounded.FAMILIES if f != "negative"])
def test_output_rounded_to_half_exceeds_the_float32_bound(family: str) -> None:
    query, key, value, _ = rounded.draw(family, 5, 17, 16, 7, seed=2)
    output, _ = rounded.attend(query, key, value, rounded.ARITHMETICS["fp64"])
    limit = limits("attention", "fp32", case_of(query, key, value))
    assert worst(rounded.to_half(output), output, limit["output"]) > 2


@pytest.mark.clause("NUM-BACKWARD1")
@pytest.mark.parametrize("fault", ["weights in 11 bits", "products in tf32"])
def test_precision_fault_in_gradients_exceeds_the_float32_bound(fault: str) -> None:
    query, key, value, d_output = rounded.draw("normal", 7, 11, 8, 5, seed=4)
    query, key, value = (x * np.float32(1.0009765625 + 2**-13) for x in (query, key, value))
    fine = rounded.ARITHMETICS["fp64"]
    expected = rounded.gradients(d_output, query, key, value, fine, from_lse=False)
    limit = limits("attention", "fp32", case_of(query, key, value, d_output))
    wrong = rounded.gradients(d_output, query, key, value, rounded.FAULTS[fault], from_lse=True)
    for name, x, y in zip(("d_query", "d_key", "d_value"), wrong, expected, strict=True):
        assert worst(x, y, limit[name]) > 2, name


@pytest.mark.clause("NUM-FORWARD1", "NUM-LSE1")
def test_one_key_by_hand() -> None:
    # P = 1: |V - O| = 0, so only sums and roundings count: 1 term and 8 beside it, on |V| and |O|
    query, key, value = np.ones((1, 1, 1, 4)), np.ones((1, 1, 1, 4)), np.full((1, 1, 1, 1), -3.0)
    tensors, _ = units("attention", {"query": query, "key": key, "value": value}, {}, {})
    assert tensors["output.unit"].item() == 6
    assert tensors["output.unit_logit"].item() == 9 * 6
    # S = 4·1/2 = L = m = 2: e = (4 + 8)·2 + 8·2 + 4·(2 + 2 + 2), then 9 terms and 8·(2 + 2 + 1)
    assert tensors["logsumexp.unit_logit"].item() == (24 + 16 + 24) + 9 + 40
    assert tensors["logsumexp.unit"].item() == 0


def rises(S: Array, j: int, edges: list[int]) -> int:
    """Count how often the maximum over the tiles between edges rises after the tile of key j."""
    maxima = [S[a:b].max() for a, b in pairwise(edges) if b > j]
    return sum(new > max(maxima[:i]) for i, new in enumerate(maxima) if i)


@pytest.mark.clause("NUM-LOGIT1")
def test_chain_counts_the_rises_after_a_key() -> None:
    S = np.array([[2.0, 1.0, 3.0, 3.0, 0.0, 5.0, 4.0]])
    allowed = np.ones(S.shape, bool)
    assert chain(S, allowed).tolist() == [[2, 2, 1, 1, 1, 0, 1]]
    allowed[0, 2:4] = False
    assert chain(S, allowed)[0, [0, 1, 4, 5, 6]].tolist() == [1, 1, 2, 0, 1]


@pytest.mark.clause("NUM-LOGIT1")
@settings(max_examples=60, deadline=None)
@given(
    S=st.lists(st.integers(-9, 9), min_size=1, max_size=13),
    cuts=st.sets(st.integers(1, 12)),
    start=st.integers(0, 12),
)
def test_no_tiling_of_contiguous_keys_rises_more_often(
    S: list[int], cuts: set[int], start: int
) -> None:
    row = np.array(S, np.float64)
    start = min(start, len(S) - 1)
    for logits in (row, row[::-1]):
        edges = [start, *sorted(c for c in cuts if start < c < len(S)), len(S)]
        r_ij = chain(logits[None], np.ones((1, len(S)), bool))[0]
        for j in range(start, len(S)):
            assert rises(logits, j, edges) <= r_ij[j]


@pytest.mark.clause("NUM-LOGIT1")
def test_softcap_shrinks_the_error_of_what_it_flattens() -> None:
    query, key, value, _ = rounded.draw("normal", 3, 7, 8, 2, seed=3)
    inputs = case_of(8 * query, 8 * key, value)
    free, _ = units("attention", inputs, {}, {})
    capped, _ = units("attention", inputs, {"softcap": 1.0}, {})
    assert capped["logsumexp.unit_logit"].max() < 0.5 * free["logsumexp.unit_logit"].min()


@pytest.mark.clause("NUM-MODEL1")
def test_what_a_mask_hides_does_not_reach_the_units() -> None:
    query, key, value, d_output = rounded.draw("normal", 3, 5, 4, 2, seed=6)
    inputs = case_of(query, key, value, d_output)
    inputs["mask"] = np.array([True, True, False, True, False])
    clean, sizes = units("attention", inputs, {}, {})
    for poison in (np.nan, np.inf, 1e30):
        for name in ("key", "value"):
            inputs[name] = inputs[name].copy()
            inputs[name][..., [2, 4], :] = poison
        tensors, magnitudes = units("attention", inputs, {}, {})
        assert magnitudes == sizes
        for name, unit in clean.items():
            assert np.array_equal(tensors[name], unit), name


@pytest.mark.clause("NUM-MODEL1")
def test_empty_rows_have_no_error() -> None:
    query, key, value, d_output = rounded.draw("normal", 3, 5, 4, 2, seed=6)
    inputs = case_of(query, key, value, d_output)
    inputs["mask"] = np.array([[True] * 5, [False] * 5, [True] * 5])
    tensors, _ = units("attention", inputs, {}, {})
    for name in ("output", "logsumexp", "d_query"):
        assert not tensors[f"{name}.unit"][0, 0, 1].any()
        assert not tensors[f"{name}.unit_logit"][0, 0, 1].any()
        assert tensors[f"{name}.unit_logit"][0, 0, 0].any()


@pytest.mark.clause("NUM-MODEL1", "NUM-FORWARD1")
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e9, 1e30])
def test_bounds_are_finite_whatever_the_logits(profile: str, size: float) -> None:
    query, key, value, d_output = rounded.draw("normal", 3, 7, 8, 2, seed=8)
    inputs = case_of(np.float32(size) * query, key, value, d_output)
    for name, limit in limits("attention", profile, inputs).items():
        assert np.isfinite(limit).all(), name
        assert (limit >= 0).all(), name


@pytest.mark.clause("NUM-FORWARD1")
def test_hopeless_logits_leave_the_hull_of_the_values() -> None:
    query, key, value, _ = rounded.draw("normal", 3, 7, 8, 2, seed=8)
    steep = np.float32(1e5) * query
    limit = limits("attention", "tf32", case_of(steep, key, value))["output"]
    diameter = 2 * np.abs(value).max()
    _, logsumexp = rounded.attend(steep, key, value, rounded.ARITHMETICS["fp64"])
    common = np.exp(2.0**-23 * np.abs(logsumexp).max())  # of a merge by the logsumexp
    assert (limit >= diameter).all()
    assert (limit <= 1.01 * common * diameter).all()


@pytest.mark.clause("NUM-MODEL1")
def test_profiles_order_as_their_precision_does() -> None:
    query, key, value, d_output = rounded.draw("normal", 3, 7, 8, 2, seed=9)
    inputs = case_of(query, key, value, d_output)
    order = ("fp64", "fp32", "tf32", "fp16_accumulate")
    sizes = [limits("attention", profile, inputs) for profile in order]
    for finer, coarser in pairwise(sizes):
        for name in finer:
            assert (finer[name] < coarser[name]).all(), name


@pytest.mark.clause("NUM-MODEL1")
def test_profile_of_a_dtype_computes_in_that_dtype() -> None:
    for dtype in ("float64", "float32", "float16", "bfloat16"):
        assert PROFILES[profile_of(dtype)].dtype == dtype


@pytest.mark.clause("NUM-MODEL1")
def test_unknown_names_are_refused() -> None:
    with pytest.raises(OptionError, match="dtype is 'int8', but it must be one of float64"):
        profile_of("int8")
    with pytest.raises(OptionError, match="profile is 'fp8', but it must be one of fp64"):
        coefficients("attention", "fp8", {})
    with pytest.raises(OptionError, match="magnitude terms is nan, but it must be finite"):
        coefficients("attention", "fp64", {"terms": float("nan")})
    with pytest.raises(CertifyError, match="op is 'softmax', but it must be one of attention"):
        units("softmax", {}, {}, {})
