"""The judge: form first, then non-finite values, then the error against the bound."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import rounded
from refattn.bounds import PROFILES, coefficients
from refattn.certify.units import units
from refattn.checks import OptionError
from refattn.judge import NULLS, Judged, Verdict, judge, vacuous

Array = np.ndarray[Any, Any]


class Case(NamedTuple):
    id: str
    op: str
    dtypes: tuple[str, ...]
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    units: dict[str, Array]
    bounds: dict[str, dict[str, tuple[float, float, float]]]


def small(expected: list[Any], unit: list[float] | None = None, name: str = "output") -> Case:
    """Return a case of one output whose bound is 0.01·unit in every profile."""
    values = np.array(expected, np.float64)
    bounds = {profile: {name: (0.01, 0.0, 0.0)} for profile in PROFILES}
    sizes = np.ones(values.shape) if unit is None else np.array(unit)
    return Case("c", "merge", ("float64",), {}, {name: values}, {f"{name}.unit": sizes}, bounds)


def reason(verdict: Verdict) -> str:
    assert not verdict.ok
    return verdict.outputs[0].reason


def real_case(family: str = "normal", n_k: int = 7) -> Case:
    query, key, value, d_output = rounded.draw(family, 5, n_k, 16, 3, seed=7)
    inputs = {"query": query, "key": key, "value": value, "d_output": d_output}
    inputs = {name: x[None, None] for name, x in inputs.items()}
    fine = rounded.ARITHMETICS["fp64"]
    output, logsumexp = rounded.attend(query, key, value, fine)
    gradients = rounded.gradients(d_output, query, key, value, fine, from_lse=False)
    names = ("d_query", "d_key", "d_value")
    outputs = {"output": output, "logsumexp": logsumexp, **dict(zip(names, gradients, strict=True))}
    tensors, magnitudes = units("attention", inputs, {}, {})
    bounds = {profile: coefficients("attention", profile, magnitudes) for profile in PROFILES}
    return Case(
        "real",
        "attention",
        ("float64", "float32"),
        inputs,
        {name: x[None, None] for name, x in outputs.items()},
        {name: x.astype(np.float32) for name, x in tensors.items()},
        bounds,
    )


@pytest.mark.clause("NUM-MODEL1")
def test_element_at_its_bound_passes_and_beyond_it_fails() -> None:
    case = small([0.0, 2.0], [1.0, 4.0])
    at_bound = judge(case, {"output": np.array([0.01, 2.0])}, "fp64")
    assert at_bound.ok
    assert at_bound.ratio == 1
    half = judge(case, {"output": np.array([0.0, 2.02])}, "fp64")
    assert half.ratio == pytest.approx(0.5)
    assert half.outputs[0].index == (1,)
    beyond = judge(case, {"output": np.array([0.0, 2.05])}, "fp64")
    assert not beyond.ok
    assert beyond.ratio == pytest.approx(1.25)


@pytest.mark.clause("NUM-MODEL1")
def test_failure_names_the_worst_element_and_both_sides() -> None:
    case = small([[[0.5, 0.29]], [[1.0, 1.0]]])
    got = np.array([[[0.5, 0.33]], [[1.0, 1.02]]])
    assert reason(judge(case, {"output": got}, "fp32")) == (
        "output[0,0,1]=0.33, but should be 0.29 (|diff|=4.0e-02, bound 1.0e-02, fp32)"
    )


@pytest.mark.clause("NUM-MODEL1")
def test_form_is_judged_before_values() -> None:
    case = small([1.0, 2.0])
    missing = judge(case, {}, "fp64")
    assert reason(missing) == "output is missing, but should have shape (2,)"
    assert missing.ratio == np.inf
    flat = judge(case, {"output": np.array([[1.0, 2.0]])}, "fp64")
    assert reason(flat) == "output has shape (1, 2), but should have (2,)"
    kind = judge(case, {"output": np.array([1, 2])}, "fp64")
    assert reason(kind) == "output has dtype int64, but should be of kind float"


@pytest.mark.clause("NUM-MODEL1")
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_float_format_is_a_float(dtype: Any) -> None:
    assert judge(small([1.0, 2.0]), {"output": np.array([1.0, 2.0], dtype)}, "fp64").ok


@pytest.mark.clause("NUM-MODEL1")
@pytest.mark.parametrize("wanted", [np.nan, np.inf, -np.inf, 1.0])
@pytest.mark.parametrize("got", [np.nan, np.inf, -np.inf, 1.0])
def test_non_finite_values_agree_in_place_and_kind(wanted: float, got: float) -> None:
    same = str(wanted) == str(got)
    verdict = judge(small([0.0, wanted]), {"output": np.array([0.0, got])}, "fp64")
    assert verdict.ok == same
    if not same:
        assert reason(verdict) == (
            f"output[1]={got:.6g}, but should be {wanted:.6g} (1 of 2 differ in kind, fp64)"
        )


@pytest.mark.clause("NUM-MODEL1")
def test_value_beyond_the_range_of_the_format_must_be_infinite_in_it() -> None:
    case = small([70000.0, 1.0])
    assert judge(case, {"output": np.array([np.inf, 1.0], np.float16)}, "fp16").ok
    assert not judge(case, {"output": np.array([65504.0, 1.0], np.float16)}, "fp16").ok
    assert not judge(case, {"output": np.array([np.inf, 1.0], np.float32)}, "fp32").ok
    assert judge(case, {"output": np.array([70000.0, 1.0], np.float32)}, "fp32").ok
    assert judge(case, {"output": np.array([70000.0, 1.0], np.float32)}, "fp16").ok


@pytest.mark.clause("NUM-MODEL1")
def test_statistics_have_the_range_of_the_computing_format() -> None:
    case = small([-84000.0, 1.0], name="logsumexp")
    kept, lost = np.array([-84000.0, 1.0], np.float32), np.array([-np.inf, 1.0], np.float32)
    assert judge(case, {"logsumexp": kept}, "fp16").ok
    assert not judge(case, {"logsumexp": lost}, "fp16").ok
    assert judge(case, {"logsumexp": lost}, "fp16_accumulate").ok


@pytest.mark.clause("NUM-MODEL1")
def test_bound_of_zero_accepts_the_exact_value_only() -> None:
    case = small([3.0, 4.0], [0.0, 0.0])
    exact = judge(case, {"output": np.array([3.0, 4.0])}, "fp64")
    assert exact.ok
    assert exact.ratio == 0
    near = judge(case, {"output": np.array([3.0, np.nextafter(4.0, 5.0)])}, "fp64")
    assert not near.ok
    assert near.ratio == np.inf


@pytest.mark.clause("NUM-MODEL1", "OWN-EXACT1")
def test_integers_and_bits_are_exact() -> None:
    for expected in (np.array([3, 1, 2]), np.array([True, False, True])):
        case = small([0.0])._replace(outputs={"order": expected}, units={})
        assert judge(case, {"order": expected.astype(expected.dtype)}, "fp64").ok
        swapped = judge(case, {"order": expected[[1, 0, 2]]}, "fp64")
        assert reason(swapped).startswith(f"order[0]={expected[1]}, but should be {expected[0]} (2")
    kind = judge(case, {"order": np.array([1.0, 0.0, 1.0])}, "fp64")
    assert reason(kind) == "order has dtype float64, but should be of kind bool"


@pytest.mark.clause("NUM-MODEL1")
def test_empty_and_scalar_outputs_are_judged() -> None:
    empty = small([])
    assert judge(empty, {"output": np.zeros(0)}, "fp64").ok
    scalar = small([0.0])._replace(
        outputs={"output": np.array(2.0)}, units={"output.unit": np.array(1.0)}
    )
    assert judge(scalar, {"output": np.array(2.005)}, "fp64").ok
    assert reason(judge(scalar, {"output": np.array(2.5)}, "fp64")).startswith("output=2.5, but")


@pytest.mark.clause("NUM-MODEL1")
def test_further_outputs_are_ignored_and_each_expected_one_is_judged() -> None:
    case = real_case()
    verdict = judge(case, {**case.outputs, "weights": np.zeros(3)}, "fp64")
    assert verdict.ok
    assert [v.name for v in verdict.outputs] == list(case.outputs)
    wrong = judge(case, {**case.outputs, "d_key": -case.outputs["d_key"]}, "fp64")
    assert [v.name for v in wrong.outputs if not v.ok] == ["d_key"]
    assert not wrong.ok


@pytest.mark.clause("NUM-MODEL1")
def test_unknown_profile_is_refused() -> None:
    with pytest.raises(OptionError, match="profile is 'fp8', but it must be one of fp64"):
        judge(small([1.0]), {"output": np.array([1.0])}, "fp8")


@pytest.mark.clause("NUM-FORWARD1", "NUM-BACKWARD1")
@pytest.mark.parametrize("profile", ["fp64", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("family", ["unit", "normal", "rising", "cancel"])
def test_null_answers_are_rejected(family: str, profile: str) -> None:
    assert vacuous(real_case(family), profile) == []


@pytest.mark.clause("NUM-MODEL1")
def test_null_answers_are_found_where_a_bound_accepts_them() -> None:
    case = real_case()
    wide = {"fp64": {name: (1e3, 0.0, 0.0) for name in case.outputs}}
    accepted = vacuous(case._replace(bounds=wide))
    assert "d_key:zeros" in accepted
    assert {f"output:{null}" for null in NULLS} <= set(accepted)


@pytest.mark.clause("NUM-MODEL1")
def test_null_answer_that_is_right_is_not_held_against_a_vector() -> None:
    case: Judged = small([0.0, 0.0])
    assert vacuous(case) == []
    assert vacuous(small([0.001, 0.0])) == ["output:zeros"]
