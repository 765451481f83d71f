"""What an audit says of right and of wrong attention, and of subjects that misbehave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hand_cases import make_case
from planted import correct
from refattn import cli
from refattn.audit import report
from refattn.audit.capabilities import ANY, FEATURES, Capabilities, conventions, refusal
from refattn.audit.run import FAIL, NOT_RUN, PASS, Result, by_clause, measured, run, select
from refattn.audit.subject import declaration, from_callable, inferred, load_subject
from refattn.errors import RefattnError
from refattn.vectors.pack import Case, core_pack

PLAIN = make_case()
CAUSAL = make_case(name="causal", clauses=("VAS-S323b", "OWN-CAUSAL1"), causal=True)
GROUPED = make_case(
    name="grouped",
    clauses=("OWN-GQA1",),
    requires=("cross_lengths", "grouped_heads"),
    heads=4,
    key_heads=2,
)
BACKWARD = make_case(
    name="backward", clauses=("VAS-EQ1", "OWN-BACKWARD1"), backward=True, n_q=5, n_k=3
)
ALL = (PLAIN, CAUSAL, GROUPED, BACKWARD)


def _audit(name: str, cases: Sequence[Case] = ALL, **options: Any) -> list[Result]:
    options = {"dtypes": ("float64", "float32"), **options}
    profile = options.pop("profile", "")
    return list(run(load_subject(f"planted:{name}", **options), cases, profile=profile))


def _said(results: list[Result]) -> str:
    pack = SimpleNamespace(size="core", root_hash="0" * 64)
    subject = load_subject("planted:correct")
    return report.precision(report.summary(subject, pack, results))  # type: ignore[arg-type]


def _verdicts(results: list[Result]) -> dict[str, str]:
    return {verdict.id: verdict.status for verdict in by_clause(results)}


def _statuses(results: list[Result]) -> set[str]:
    return {result.status for result in results if result.dtype in ("float64", "float32")}


def test_a_right_attention_passes_every_clause() -> None:
    results = _audit("correct")
    assert _statuses(results) == {PASS}
    assert set(_verdicts(results).values()) == {PASS}
    assert all(0 < result.ratio <= 1 for result in results if result.status == PASS)


@pytest.mark.parametrize(
    ("fault", "guilty", "innocent"),
    [
        ("missing_scale", "VAS-EQ1", None),
        ("bottom_right", "OWN-CAUSAL1", "VAS-EQ1"),
        ("head_tile", "OWN-GQA1", "VAS-S323b"),
        ("exp_in_float16", "VAS-EQ1", None),
        ("gradient_without_row_sum", "OWN-BACKWARD1", "VAS-EQ1"),
    ],
)
def test_a_planted_fault_is_found_in_its_clause(
    fault: str, guilty: str, innocent: str | None
) -> None:
    verdicts = _verdicts(_audit(fault))
    assert verdicts[guilty] == FAIL
    assert innocent is None or verdicts[innocent] == PASS


def test_a_finding_names_output_element_case_dtype_and_profile() -> None:
    (verdict,) = (v for v in by_clause(_audit("bottom_right")) if v.id == "OWN-CAUSAL1")
    assert "output" in verdict.finding
    assert verdict.finding.endswith("[causal, float64, fp64]")
    assert verdict.ratio > 1


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("raises", "RuntimeError: the kernel refused"),
        ("leaves", "SystemExit: 0"),
        ("wrong_shape", "shape"),
        ("not_a_number", "nan"),
        ("nothing", "returned"),
        ("overwrites", "it changed its input query"),
        ("integers", "dtype int64"),
    ],
)
def test_a_subject_that_misbehaves_is_a_finding(
    fault: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (result,) = _audit(fault, [PLAIN], capabilities=("cross_lengths",), dtypes=("float32",))[1:2]
    assert capsys.readouterr().out == ""
    assert (result.status, result.dtype) == (FAIL, "float32")
    assert sentence in result.reason
    assert "\n" not in result.reason


def test_what_was_not_declared_is_not_run_and_not_passed() -> None:
    results = _audit("bare")
    verdicts = _verdicts(results)
    assert verdicts["VAS-EQ1"] == PASS
    assert verdicts["OWN-CAUSAL1"] == verdicts["OWN-GQA1"] == NOT_RUN
    reasons = {r.case_id: r.reason for r in results if r.status == NOT_RUN and r.dtype == "float64"}
    assert reasons["causal"].startswith("causal is not offered")
    assert reasons["grouped"].startswith("grouped_heads is not offered")


def test_a_clause_is_proven_only_by_the_outputs_that_can_prove_it() -> None:
    verdicts = _verdicts(_audit("forward_only", [PLAIN, BACKWARD]))
    assert verdicts == {"VAS-EQ1": PASS, "OWN-LSE1": NOT_RUN, "OWN-BACKWARD1": NOT_RUN}


def test_a_failure_that_no_clause_of_the_case_owns_falls_on_all_of_them() -> None:
    case = replace(BACKWARD, clauses=("VAS-EQ1",))
    assert _verdicts(_audit("gradient_without_row_sum", [case])) == {"VAS-EQ1": FAIL}


def test_another_choice_of_convention_is_not_run_with_both_choices_named() -> None:
    results = _audit("correct", [CAUSAL], conventions={"alignment": "bottom_right"})
    assert _statuses(results) == {NOT_RUN}
    assert results[0].reason == "alignment is bottom_right here, and the case asks for top_left"


def test_a_declared_choice_is_judged_by_that_choice() -> None:
    square = make_case(name="square", causal=True, n_q=5, n_k=5)
    results = _audit("bottom_right", [square], conventions={"alignment": "bottom_right"})
    assert _statuses(results) == {PASS}  # with as many queries as keys the two are the same


def test_a_choice_taken_as_an_argument_is_passed_on() -> None:
    wanted = {**CAUSAL.conventions, "alignment": "bottom_right"}
    other = replace(CAUSAL, id="other", conventions=wanted)
    results = _audit("shifts_causally", [CAUSAL, other], dtypes=("float64",))
    passed = {r.case_id: r.status for r in results if r.dtype == "float64"}
    assert passed == {"causal": PASS, "other": FAIL}  # the expected values are top_left's


def test_an_undeclared_choice_matters_only_where_it_decides() -> None:
    offered = Capabilities(features=frozenset({"causal", "cross_lengths"}), conventions={})
    assert refusal(PLAIN, "float64", offered) == ""
    assert refusal(CAUSAL, "float64", offered).startswith("alignment is undeclared")


def test_features_that_exclude_each_other_are_not_run_together() -> None:
    offered = Capabilities(
        features=frozenset({"causal", "scale", "cross_lengths"}),
        exclusive=(frozenset({"causal", "scale"}),),
    )
    both = make_case(causal=True, scale=0.5)
    assert refusal(both, "float64", offered) == "causal and scale together are not offered"
    assert refusal(CAUSAL, "float64", offered) == ""


def test_a_case_decides_by_what_it_holds() -> None:
    assert conventions(PLAIN) == {}
    assert conventions(CAUSAL) == {"alignment": "top_left"}
    assert conventions(GROUPED) == {"head_map": "interleave"}
    empty = replace(PLAIN, outputs={**PLAIN.outputs, "logsumexp": np.full((2, 1, 3), -np.inf)})
    assert conventions(empty) == {"empty_row": "zero"}
    poison = {**CAUSAL.inputs, "key": np.full_like(CAUSAL.inputs["key"], np.nan)}
    assert conventions(replace(CAUSAL, inputs=poison))["masked"] == "select"


def test_a_layout_is_undone_on_the_way_in_and_out() -> None:
    results = _audit("by_length_first", [PLAIN], layout="bnhd", capabilities=("cross_lengths",))
    assert _statuses(results) == {PASS}


def test_the_precision_is_measured_and_not_believed() -> None:
    assert measured(_audit("correct"))["float64"]["fp64"] == (4, 4)
    results = _audit("in_float32", [PLAIN])
    assert {r.status for r in results if r.dtype == "float64"} == {FAIL}
    assert measured(results)["float64"]["fp64"] == (0, 1)
    assert _said(results) == (
        "Declared precision: fp32, fp64. Measured: at least as exact as the bounds of "
        "fp32 in float64, fp32 in float32."
    )


def test_a_precision_is_not_claimed_from_the_passing_runs_alone() -> None:
    results = [r for r in _audit("bottom_right", [PLAIN, CAUSAL]) if r.dtype == "float64"]
    assert measured(results)["float64"]["fp64"] == (1, 2)
    assert "no profile was met in every run in float64 (fp64 in 1 of 2)" in _said(results)
    nothing = _audit("not_a_number", [PLAIN], capabilities=("cross_lengths",))
    assert "no profile was met in every run in float64 (fp64 in 0 of 1)" in _said(nothing)


def test_a_profile_that_no_case_has_bounds_of_is_not_reported_as_met() -> None:
    bounds = {"fp64": PLAIN.bounds["fp64"]}
    (right,) = _audit("correct", [replace(PLAIN, bounds=bounds, dtypes=("float64",))])
    assert measured([right])["float64"]["bf16"] == (0, 0)
    assert "bf16" not in _said([right])


def test_a_signature_shows_what_is_offered() -> None:
    def subject(query: Any, key: Any, value: Any, *, mask: Any, slopes: Any, head_map: str) -> None:
        """Do nothing."""

    offered = inferred(subject)
    assert offered.features == {"cross_lengths", "mask", "alibi"}
    assert offered.conventions["head_map"] == ANY
    assert offered.conventions["alignment"] == "top_left"


def test_a_declaration_of_the_function_or_its_module_is_read() -> None:
    declared = {"features": ["mask"], "dtypes": ["float16"], "layout": "bnhd"}
    offered = declaration(declared, "a")
    assert (offered.features, offered.dtypes, offered.layout) == ({"mask"}, ("float16",), "bnhd")

    def subject(query: Any, key: Any, value: Any) -> None:
        """Do nothing."""

    subject.refattn_capabilities = declared  # type: ignore[attr-defined]
    assert from_callable(subject, "a:subject").capabilities == offered


@pytest.mark.parametrize(
    ("declared", "sentence"),
    [
        ({"features": 3}, "has features=3, but it must be a list of words"),
        ({"features": [["mask"]]}, "must be a list of words"),
        ({"dtypes": "float64"}, "has dtypes='float64', but it must be a list of words"),
        ({"conventions": ["empty_row"]}, "must be a dict of words"),
        ({"conventions": {"empty_row": []}}, "must be a dict of words"),
        ({"layout": ["bhnd"]}, "has layout=['bhnd'], but it must be a word"),
        ({"ops": None}, "has ops=None, but it must be a list of words"),
        (["mask"], "must be a dict"),
        ({"feature": []}, "has feature, but its keys are"),
        ({"features": ["masks"]}, "capability masks is unknown"),
        ({"dtypes": ["float8"]}, "dtype float8"),
        ({"layout": "hbnd"}, "layout hbnd is unknown"),
        ({"conventions": {"empty_row": "one"}}, "empty_row one is unknown"),
        ({"conventions": {"rows": "zero"}}, "convention rows is unknown"),
    ],
)
def test_a_declaration_with_an_unknown_word_is_refused(declared: Any, sentence: str) -> None:
    with pytest.raises(RefattnError) as refused:
        declaration(declared, "a")
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nowhere:f", "module nowhere does not import: ModuleNotFoundError"),
        ("planted:absent", "module planted has no absent"),
        ("planted:number", "planted:number is int, but it must be callable"),
        ("torch", "subject is torch, but it must be module:function or one of torch-sdpa"),
        ("./planted.py:correct", "but a module is named, not a file: module:function"),
        ("os:getcwd", "os:getcwd takes (), but it is called with query, key and value by name"),
        ("planted:positional_only", "is called with query, key and value by name: "),
        ("planted:one_more", "missing a required argument: 'temperature'"),
        ("planted:Attention", "planted:Attention is a class, but it must be a function"),
    ],
)
def test_a_subject_that_is_not_there_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(RefattnError) as refused:
        load_subject(text)
    assert sentence in str(refused.value)


def test_an_empty_selection_is_refused() -> None:
    assert select(ALL, clauses=["OWN-GQA1"]) == [GROUPED]
    with pytest.raises(RefattnError, match="no case was selected: no vector has FA1-ALG4"):
        select(ALL, clauses=["FA1-ALG4"])
    with pytest.raises(RefattnError, match="no vector has Sink"):
        select(ALL, flags=["Sink"])


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(RefattnError, match="profile is fp8, but it must be one of fp64"):
        _audit("correct", profile="fp8")


def test_the_report_counts_and_names_what_was_found() -> None:
    pack = SimpleNamespace(size="core", root_hash="0" * 64)
    subject = load_subject("planted:bottom_right")
    data = report.summary(subject, pack, _audit("bottom_right"))  # type: ignore[arg-type]
    assert not data["ok"]
    assert data["counts"] == {PASS: 6, FAIL: 2, NOT_RUN: 8}  # the 16-bit dtypes were not offered
    assert json.loads(json.dumps(data)) == data
    for text in (report.as_markdown(data), report.as_html(data)):
        assert "planted:bottom_right" in text
        assert "OWN-CAUSAL1" in text
        assert "FAIL" in text
        assert "dtype float16 is not offered" in text
    assert "<script" not in report.as_html(data)


def test_a_report_in_html_escapes_what_it_is_given() -> None:
    pack = SimpleNamespace(size="core", root_hash="0" * 64)
    subject = load_subject("planted:raises")._replace(name="<b>")
    data = report.summary(subject, pack, _audit("raises"))  # type: ignore[arg-type]
    assert "<b>" not in report.as_html(data)


def test_the_command_judges_and_writes_its_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, data = tmp_path / "r.html", tmp_path / "r.json"
    words = ["audit", "planted:missing_scale", "--clause", "FA1-S22", "--dtype", "float32"]
    code = cli.main([*words, "--json", str(data), "--report", str(page)])
    assert code == 1
    found = json.loads(data.read_text("utf-8"))
    assert found["counts"][FAIL] > 0
    assert "planted:missing_scale" in page.read_text("utf-8")
    assert "finding: FA1-S22" in capsys.readouterr().out


def test_a_profile_without_bounds_is_not_met_by_a_wrong_output() -> None:
    bounds = {"fp64": PLAIN.bounds["fp64"], "fp32": PLAIN.bounds["fp32"]}
    case = replace(PLAIN, bounds=bounds, dtypes=("float64",))
    (wrong,) = _audit("not_a_number", [case], capabilities=("cross_lengths",))
    (right,) = _audit("correct", [case])
    assert wrong.met == frozenset()
    assert right.met == {"fp64", "fp32"}
    found = measured([right, wrong])["float64"]
    assert found["fp64"] == (1, 2)
    assert found["bf16"] == (0, 1)


def test_a_profile_without_bounds_is_not_run() -> None:
    case = replace(PLAIN, bounds={"fp64": PLAIN.bounds["fp64"]})
    results = {r.dtype: r for r in _audit("correct", [case])}
    assert results["float64"].status == PASS
    assert (results["float32"].status, results["float32"].reason) == (
        NOT_RUN,
        "the case has no bounds of profile fp32",
    )


def test_a_result_in_another_dtype_than_its_inputs_fails_the_rounding_clause_alone() -> None:
    case = replace(PLAIN, clauses=("VAS-EQ1", "OWN-ROUND1"))

    def wide(query: Any, key: Any, value: Any) -> Any:
        output = correct(query, key, value)["output"]
        return output.astype(np.float64)

    offered = Capabilities(features=frozenset({"cross_lengths"}), dtypes=("float64", "float32"))
    subject = from_callable(wide, "wide")._replace(capabilities=offered)
    results = list(run(subject, [case], dtypes=("float64", "float32")))
    assert [r.status for r in results] == [PASS, FAIL]
    verdicts = {v.id: v for v in by_clause(results)}
    assert (verdicts["VAS-EQ1"].status, verdicts["OWN-ROUND1"].status) == (PASS, FAIL)
    assert verdicts["OWN-ROUND1"].finding.startswith(
        "output has dtype float64, but its inputs have float32"
    )


def test_a_wider_logsumexp_is_right() -> None:
    case = replace(PLAIN, clauses=("VAS-EQ1", "OWN-ROUND1"))

    def wide(query: Any, key: Any, value: Any) -> Any:
        found = correct(query, key, value)
        return found["output"], found["logsumexp"].astype(np.float64)

    (result,) = run(from_callable(wide, "wide"), [case], dtypes=("float32",))
    assert result.status == PASS


def test_every_word_that_a_vector_of_attention_requires_can_be_declared() -> None:
    words = {w for case in core_pack().cases if case.op == "attention" for w in case.requires}
    assert {"alibi", "lengths", "value_size"} <= words <= set(FEATURES)


def test_only_the_dtypes_asked_for_are_run() -> None:
    found = run(load_subject("planted:correct"), [PLAIN], dtypes=["float32"])
    assert [(result.dtype, result.status) for result in found] == [("float32", PASS)]


def test_the_command_finds_nothing_in_a_right_subject(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["audit", "planted:correct", "--clause", "VAS-EQ1", "--flag", "Plain"]
    assert cli.main([*words, "--dtype", "float64", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"][FAIL] == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere:f"], "module nowhere does not import"),
        (["planted:correct", "--clause", "FA1-ALG77"], "there is no clause FA1-ALG77"),
        (["planted:correct", "--flag", "Wings"], "flag Wings is unknown; there are "),
        (["planted:correct", "--capability", "wings"], "capability wings is unknown"),
        (["planted:correct", "--convention", "alignment"], "must be of the form axis=choice"),
        (["planted:correct", "--report", "r.pdf"], "its name must end in .md or .html"),
        (["planted:correct", "--dtype", "float8"], "float8"),
        (["planted:correct", "--pack", "nowhere"], "cannot be read"),
        (["planted:correct", "--clause", "ROPE-EQ34"], "nothing was run: op rope is not offered"),
    ],
)
def test_the_command_refuses_in_one_line(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["audit", *words]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("refattn: ")
    assert sentence in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
