"""An audit that expects a dialect's behaviour: what agrees with it, and what the report says."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from refattn import cli
from refattn.audit import expected, report
from refattn.audit.calls import HEADED
from refattn.audit.expected import ADAPTERS, expect, load_text
from refattn.audit.run import FAIL, NOT_RUN, PASS, Result, run
from refattn.audit.subject import Subject, from_callable, load_subject
from refattn.dialects import DIALECTS, find
from refattn.dialects.conventions import choices
from refattn.vectors.pack import Case, core_pack

CASES = {case.id: case for case in core_pack().cases}

EMPTY = CASES["attention-empty-mask-zero"]

DEPARTURES = {
    "torch_sdpa_2_13": {"masked add, not select"},
    "torch_mha_2_13": {"empty_row nan, not zero", "masked add, not select"},
    "jax_dpa_0_10": {
        "empty_row uniform, not zero, its own logsumexp",
        "masked add, not select, its own logsumexp",
        "its own logsumexp",
    },
    "onnx_attention_23": {"masked add, not select"},
    "onnx_attention_24": {"masked add, not select", "alignment bottom_right, not top_left"},
    "onnx_attention_25": {"masked add, not select", "alignment bottom_right, not top_left"},
    "onnx_attention_23_1_18": {
        "empty_row nan, not zero",
        "head_map tile, not interleave",
        "masked add, not select",
        "softcap_order after_bias, not before_bias",
    },
    "onnx_attention_23_1_20": {
        "empty_row nan, not zero",
        "masked add, not select",
        "softcap_order after_bias, not before_bias",
    },
    "onnx_attention_23_1_22": {"empty_row nan, not zero", "masked add, not select"},
    "keras_mha_3_15": {"empty_row uniform, not zero", "masked add, not select"},
    "keras_gqa_3_15": {"empty_row uniform, not zero", "masked add, not select"},
    "keras_mha_2_21": {"masked add, not select"},
}
"""How each dialect departs from the core pack, one way at least once."""

COMPOSED = {
    "attention-mask-causal",
    "attention-softcap-after-bias-mask",
    "attention-softcap-before-bias-mask",
}
"""Vectors of a mask beside causal attention, which was NaN in ONNX up to 1.22."""

CAPPED = {"attention-softcap-before-bias-bias"}
"""Vectors of a softcap and a bias with -∞, whose forbidden keys kept a weight up to 1.21."""

EMPTIED = {
    "attention-empty-mask-zero",
    "attention-empty-mask-zero-backward",
    "attention-lse-gradient-empty",
    "attention-mask-queries-only",
}
"""Vectors of an empty row, which tf.keras 2 does not have: 1e9 is less than infinity."""

UNNAMED = {
    # Keras 3 adds a finite number, so that a gradient passes the logits of an empty row
    "keras_mha_3_15": {"attention-empty-mask-zero-backward"},
    "keras_gqa_3_15": {"attention-empty-mask-zero-backward"},
    "keras_mha_2_21": EMPTIED,
    # JAX gives zeros beyond a query length, and the mean of the values where no key is left
    "jax_dpa_0_10": {"attention-lengths-both", "attention-lengths-both-backward"},
    "onnx_attention_23_1_18": CAPPED,
    "onnx_attention_23_1_20": CAPPED | COMPOSED,
    "onnx_attention_23_1_22": COMPOSED,
}
"""Vectors on which a dialect departs in a way that no one convention names."""


def attend(query: Any, key: Any, value: Any, *, mask: Any = None, empty: float = np.nan) -> Any:
    """Return attention whose empty rows have the given weight at every key."""
    logits = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1]).astype(query.dtype)
    logits = logits if mask is None else np.where(mask, logits, -np.inf)
    top = logits.max(axis=-1, keepdims=True)
    exps = np.exp(logits - np.where(top == -np.inf, 0, top))
    total = exps.sum(axis=-1, keepdims=True)
    weights = np.where(total == 0, empty, exps / np.where(total == 0, 1, total))
    return (weights.astype(query.dtype) @ value).astype(query.dtype)


def _subject(empty: float, *features: str) -> Subject:
    def subject(query: Any, key: Any, value: Any, *, mask: Any = None) -> Any:
        return attend(query, key, value, mask=mask, empty=empty)

    return from_callable(subject, "subject")


def _results(subject: Subject, dialect: str, *cases: Case) -> list[Result]:
    found = run(subject, cases, dtypes=("float64", "float32"), dialect=load_text(dialect))
    return list(found)


@pytest.mark.clause("OWN-EMPTY1")
def test_a_subject_that_makes_the_dialects_choice_passes_and_departs() -> None:
    results = _results(_subject(np.nan), "torch_mha", EMPTY)
    assert {r.status for r in results} == {PASS}
    assert {r.departure for r in results} == {"empty_row nan, not zero"}
    (plain,) = run(_subject(np.nan), [EMPTY], dtypes=("float64",))
    assert plain.status == FAIL and plain.departure == ""


def test_a_subject_that_keeps_to_the_default_fails_the_dialect_by_name() -> None:
    (result,) = _results(_subject(0.0), "torch_mha", EMPTY)[:1]
    assert result.status == FAIL and result.departure == ""
    assert result.reason.startswith(
        "it agrees with refattn's default, but the dialect has empty_row nan, not zero: output["
    )


def test_a_subject_that_agrees_with_neither_fails_plainly() -> None:
    (result,) = _results(_subject(0.25), "torch_mha", EMPTY)[:1]
    assert result.status == FAIL
    assert result.reason.startswith("output[")


def test_where_a_dialect_keeps_to_the_default_the_certified_values_are_expected() -> None:
    told = expect(EMPTY, load_text("torch_sdpa"))
    assert told.case is EMPTY
    assert told.departure == told.reason == ""


def test_a_case_that_asks_for_a_choice_that_the_dialect_does_not_make_is_not_run() -> None:
    results = _results(_subject(0.0), "torch_sdpa", CASES["attention-empty-mask-nan"])
    assert {(r.status, r.reason) for r in results} == {
        (NOT_RUN, "the case asks for empty_row nan, but dialect torch_sdpa_2_13 does not")
    }


def test_what_the_dialect_has_no_argument_for_is_not_run() -> None:
    case = next(c for c in CASES.values() if "alibi" in c.requires)
    told = expect(case, load_text("torch_mha"))
    assert told.case is None
    assert told.reason == "dialect torch_mha_2_13: alibi is not offered"


def test_a_named_exception_of_the_dialect_is_not_run() -> None:
    told = expect(CASES["attention-poison-causal"], load_text("torch_sdpa"))
    assert told.case is None and "named exceptions" in told.reason


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_vector_is_answered_by_the_default_or_by_a_named_convention(name: str) -> None:
    text = load_text(name)
    cases = [case for case in CASES.values() if case.op == "attention"]
    told = [expect(case, text) for case in cases]
    assert sum(t.case is not None and not t.departure for t in told) > 30
    pairs = zip(cases, told, strict=True)
    assert {t.departures(case) for case, t in pairs} - {""} == DEPARTURES[name]
    unnamed = {c.id for c, t in zip(cases, told, strict=True) if "no named" in t.reason}
    assert unnamed == UNNAMED.get(name, set())


def _revealed(name: str, heads: int = 1, key_heads: int = 1, **given: Any) -> np.ndarray:
    """Return the weights of 2 queries over 3 keys, which a query of 0 and an identity reveal."""
    marks = np.stack([np.eye(3) * (head + 1) for head in range(key_heads)])[None]
    inputs = {"query": np.zeros((1, heads, 2, 3)), "key": np.zeros((1, key_heads, 3, 3))}
    inputs |= {"value": marks, **{n: a for n, a in given.items() if isinstance(a, np.ndarray)}}
    options = {n: a for n, a in given.items() if n not in inputs}
    text = load_text(name)
    turned = (1, 2) if text.capabilities.layout == "bnhd" else (1, 1)
    inputs = {n: a.swapaxes(*turned) if n in HEADED else a for n, a in inputs.items()}
    return text.run(inputs, options)["output"].swapaxes(*turned)[0]


ROWS = {
    "zero": np.zeros(3),
    "nan": np.full(3, np.nan),
    "uniform": np.full(3, 1 / 3),
}
"""The weights of a row without a key, by their convention."""


@pytest.mark.clause("OWN-CAUSAL1", "OWN-EMPTY1", "OWN-GQA1")
@pytest.mark.parametrize("name", ADAPTERS)
def test_what_a_dialect_says_of_itself_is_what_its_text_does(name: str) -> None:
    said = {axis: choices(choice) for axis, choice in find(name).conventions.items()}
    offered = load_text(name).capabilities.features
    for axis in ("window", "softcap", "dropout", "sinks"):
        if axis != "dropout" or name != "torch_mha_2_13":  # its dropout is of a module in training
            assert (axis in offered) == (said[axis] != ("none",)), axis
    np.testing.assert_allclose(_revealed(name, causal=True)[0], [[1, 0, 0], [0.5, 0.5, 0]])
    assert {"top_left", "given by the mask"} & set(said["causal_alignment"])
    empty = _revealed(name, mask=np.array([[True] * 3, [False] * 3]))[0, 1]
    (found,) = (n for n, row in ROWS.items() if np.allclose(empty, row, equal_nan=True))
    assert found in said["empty_row"]
    if "grouped_heads" in offered:
        marks = _revealed(name, heads=4, key_heads=2)[:, 0].sum(axis=-1).round().tolist()
        assert said["head_map"] == ("interleave" if marks == [1, 1, 2, 2] else "tile",)


def test_the_report_says_what_differs_and_whom_it_agrees_with() -> None:
    pack = SimpleNamespace(size="core", root_hash="0" * 64)
    results = _results(_subject(np.nan), "torch_mha", EMPTY, CASES["attention-edge-keys-15"])
    data = report.summary(load_subject("planted:correct"), pack, results, dialect="torch_mha_2_13")  # type: ignore[arg-type]
    said = (
        "2 runs differ from refattn's default but agree with dialect torch_mha_2_13: "
        "empty_row nan, not zero"
    )
    assert said in report.departures(data)
    assert json.loads(json.dumps(data)) == data
    assert f"- {said}" in report.as_markdown(data)
    assert "agree with dialect torch_mha_2_13" in report.as_html(data)


def test_the_command_expects_a_dialect(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["audit", "planted:correct", "--dialect", "torch_sdpa", "--clause", "OWN-CAUSAL1"]
    assert cli.main([*words, "--dtype", "float64", "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["dialect"] == "torch_sdpa_2_13"
    assert data["counts"][PASS] > 0 and data["counts"][FAIL] == 0


def test_an_audit_can_expect_any_dialect() -> None:
    assert set(ADAPTERS) == set(DIALECTS)


def test_the_command_refuses_what_is_no_dialect_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # every dialect is one, but another need not be
    monkeypatch.delitem(expected.ADAPTERS, "torch_mha_2_13")
    for word, sentence in (
        ("numpy", "dialect is 'numpy', but it must be one of torch_sdpa_2_13"),
        ("torch_mha", "dialect is torch_mha_2_13, but an audit takes one that answers query"),
    ):
        assert cli.main(["audit", "planted:correct", "--dialect", word]) == 2
        shown = capsys.readouterr()
        assert sentence in shown.err
        assert shown.err.count("\n") == 1 and shown.out == ""
