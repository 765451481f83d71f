"""The bundled subjects on small vectors made by hand: what they offer is judged right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from hand_cases import make_case
from refattn.audit.capabilities import GRADIENTS
from refattn.audit.run import FAIL, NOT_RUN, PASS, Result, run
from refattn.audit.subject import Subject, load_subject
from refattn.vectors.pack import Case

Require = Callable[[str], ModuleType]

SUBJECTS = {
    "torch-sdpa": ("torch",),
    "onnxruntime": ("onnx", "onnxruntime"),
    "jax": ("jax",),
    "keras": ("keras",),
}
"""Bundled subjects, and the packages that each one needs."""

PLAIN = make_case(d=8)
CAUSAL = make_case(name="causal", causal=True, d=8)
SCALED = make_case(name="scaled", scale=0.75, d=8)
GROUPED = make_case(
    name="grouped", requires=("cross_lengths", "grouped_heads"), heads=4, key_heads=2, d=8
)
BACKWARD = make_case(name="backward", causal=True, backward=True, n_q=5, n_k=5, d=8)
CASES = (PLAIN, CAUSAL, SCALED, GROUPED, BACKWARD)


@pytest.fixture(
    params=[pytest.param(n, marks=[pytest.mark.peer(p) for p in ps]) for n, ps in SUBJECTS.items()]
)
def subject(request: pytest.FixtureRequest, require: Require) -> Subject:
    for package in SUBJECTS[request.param]:
        require(package)
    return load_subject(request.param)


def _results(subject: Subject, *cases: Case, dtype: str = "float32") -> list[Result]:
    return [result for result in run(subject, cases) if result.dtype == dtype]


def test_a_bundled_subject_is_judged_right_in_float32(subject: Subject) -> None:
    for result in _results(subject, *CASES):
        assert result.status == PASS, (result.case_id, result.reason)
        assert result.ratio > 0


def test_every_dtype_it_declares_is_run(subject: Subject) -> None:
    for dtype in subject.capabilities.dtypes:
        (result,) = _results(subject, PLAIN, dtype=dtype)
        assert result.outputs, (dtype, result.reason)


def test_other_expected_values_are_a_finding(subject: Subject) -> None:
    wrong = replace(PLAIN, outputs={**PLAIN.outputs, "output": PLAIN.outputs["output"] + 0.01})
    (result,) = _results(subject, wrong)
    assert result.status == FAIL


def test_gradients_are_judged_where_they_are_offered(subject: Subject) -> None:
    (result,) = _results(subject, BACKWARD)
    judged = {verdict.name for verdict in result.outputs}
    offered = bool(GRADIENTS & subject.capabilities.features)
    assert ({"d_query", "d_key", "d_value"} <= judged) == offered


def test_a_mask_and_a_bias_are_understood(subject: Subject) -> None:
    causal = np.tri(3, 5, dtype=bool)
    as_bias = np.where(causal, 0, -np.inf).astype(np.float32)
    bias = _with(CAUSAL, "bias", as_bias)
    mask = _with(CAUSAL, "mask", causal)
    for result in _results(subject, bias, mask):
        assert result.status == PASS, (result.case_id, result.reason)


def _with(case: Case, name: str, array: np.ndarray) -> Case:
    """Return a causal case whose causal flag is told by a mask or a bias instead."""
    return replace(
        case,
        id=name,
        inputs={**case.inputs, name: array},
        parameters={},
        requires=("cross_lengths", name),
    )


def test_what_it_does_not_offer_is_not_run(subject: Subject) -> None:
    sinks = replace(PLAIN, requires=("cross_lengths", "sinks"))
    (result,) = _results(subject, sinks)
    assert result.status == NOT_RUN
    assert result.reason.startswith("sinks is not offered")


@pytest.mark.peer("jax")
def test_attention_in_float64_that_computes_in_float32_is_found_out(require: Require) -> None:
    require("jax")
    (result,) = _results(load_subject("jax"), PLAIN, dtype="float64")
    assert result.status == FAIL
    assert "fp32" in result.met
