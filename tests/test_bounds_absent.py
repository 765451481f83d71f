"""A case that leaves the range of a profile has no bounds for it, and is not run in it."""

from __future__ import annotations

import numpy as np
import pytest

import small_pack
from refattn.audit.run import NOT_RUN, run
from refattn.audit.subject import load_subject
from refattn.bounds import profile_of
from refattn.checks import OptionError
from refattn.judge import judge
from refattn.vectors import core_pack
from refattn.vectors.generate import Engine, make_case

CASES = {case.id: case for case in core_pack().cases}
BEYOND = ("attention-family-deep", "attention-family-high")
"""Vectors with logits of about 84000, more than float16 holds."""


@pytest.mark.clause("NUM-MODEL1")
@pytest.mark.parametrize("name", BEYOND)
def test_logits_beyond_float16_are_judged_in_every_profile_but_half_accumulation(name: str) -> None:
    case = CASES[name]
    assert set(case.bounds) >= {"fp64", "fp32", "bf16", "fp16"}
    with pytest.raises(OptionError, match="profile is 'fp16_accumulate', but it must be one of"):
        judge(case, case.outputs, "fp16_accumulate")


@pytest.mark.clause("NUM-MODEL1")
def test_logits_of_the_vectors_fit_float16_where_half_accumulation_has_bounds() -> None:
    for case in CASES.values():
        masked = "mask" in case.inputs  # what a mask hides may hold anything
        if case.op == "attention" and "fp16_accumulate" in case.bounds and not masked:
            group = case.inputs["query"].shape[1] // case.inputs["key"].shape[1]
            query, key = (
                np.nan_to_num(case.inputs[n].astype(np.float64), posinf=0, neginf=0)
                for n in ("query", "key")
            )
            products = query @ np.swapaxes(np.repeat(key, group, axis=1), -1, -2)
            assert np.abs(products).max() <= 65504, case.id


@pytest.mark.clause("NUM-MODEL1")
def test_every_vector_has_bounds_for_the_profile_of_each_of_its_dtypes() -> None:
    for case in CASES.values():
        assert {profile_of(dtype) for dtype in case.dtypes} <= set(case.bounds), case.id


@pytest.mark.clause("NUM-MODEL1")
def test_an_audit_does_not_run_a_case_without_bounds() -> None:
    subject = load_subject("planted:correct", dtypes=("float16",))
    cases = [CASES[name] for name in BEYOND]
    results = list(run(subject, cases, dtypes=["float16"], profile="fp16_accumulate"))
    assert [result.case_id for result in results] == list(BEYOND)
    for result in results:
        assert result.status == NOT_RUN
        assert result.reason == "the case has no bounds of profile fp16_accumulate"


def test_a_made_case_leaves_out_a_profile_without_bounds() -> None:
    def coefficients(op: str, profile: str, magnitudes: object) -> dict[str, object]:
        return {} if profile == "fp16" else {"scores": (1e-3, 0.0, 0.0)}

    engine = Engine(small_pack.certify, coefficients)
    case = make_case(small_pack.RECIPES[0], engine)
    assert "float16" in case.dtypes
    assert "fp16" not in case.bounds
    assert set(case.bounds) == {"fp64", "fp32", "tf32", "bf16", "fp16_accumulate"}
