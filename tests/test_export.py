import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from refattn.vectors.export import ExportError, NotExpressible, export
from refattn.vectors.export_onnx import node_test
from refattn.vectors.pack import core_pack

CASES = {case.id: case for case in core_pack().cases}

EXPRESSIBLE = (
    "attention-family-normal",
    "attention-causal-top-left-7x13",
    "attention-causal-bottom-right-13x7",
    "attention-mask-heads-shared",
    "attention-bias-barred",
    "attention-window-3-0",
    "attention-lengths-both",
    "attention-alibi-absolute-corner",
    "attention-alibi-items",
    "attention-grouped-4-2-interleave",
    "attention-softcap-before-bias-mask",
    "attention-value-size-24-80",
    "attention-real-s0-layer2",
    "rope-interleaved-partial-64-16",
    "rope-half-split-far-32",
)

INEXPRESSIBLE = {
    "attention-sinks-ordinary": "no input for sinks",
    "attention-dropout-half": "no input for dropout",
    "attention-poison-tail-nan": "non-finite masked cells",
    "attention-grouped-4-2-tile": "interleaving only",
    "attention-softcap-after-bias-bias": "before the bias only",
    "attention-empty-mask-uniform": "zeros for a row without a key",
    "attention-scale-negative": "root of the scale",
    "score-dot-small": "no operator for score",
}


def test_an_archive_holds_every_tensor_and_needs_no_pickle(tmp_path):
    case = CASES["attention-bias-keys-only"]
    found = export([case], tmp_path / "new", "npz")
    assert found.written == (case.id,)
    with np.load(tmp_path / "new" / f"{case.id}.npz", allow_pickle=False) as archive:
        expected = {**case.inputs, **case.outputs, **case.units}
        assert set(archive.files) == set(expected)
        assert all(np.array_equal(archive[n], x, equal_nan=True) for n, x in expected.items())
    assert json.loads((tmp_path / "new" / f"{case.id}.json").read_text())["id"] == case.id


def test_an_archive_holds_no_more_where_savez_takes_every_keyword_for_an_array(
    tmp_path, monkeypatch
):
    seen = {}

    def savez_of_numpy_2_1(file, *args, **arrays):
        seen.update(arrays)

    monkeypatch.setattr(np, "savez", savez_of_numpy_2_1)
    case = CASES["score-dot-small"]
    export([case], tmp_path, "npz")
    assert set(seen) == {*case.inputs, *case.outputs, *case.units}


def test_a_form_whose_package_is_absent_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError):
        export([CASES["score-dot-small"]], tmp_path / "new", "onnx")
    assert not (tmp_path / "new").exists()


def test_a_file_as_target_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ExportError, match="x is a file, but it must be a folder"):
        export([], tmp_path / "x", "npz")


def test_a_case_without_bounds_in_float32_is_left_out(tmp_path):
    case = CASES["attention-family-normal"]
    found = export([replace(case, bounds={"fp64": case.bounds["fp64"]})], tmp_path, "onnx")
    assert found.left_out == {case.id: "the case has no bounds of profile fp32"}


def test_nothing_is_overwritten_silently(tmp_path):
    case = CASES["score-dot-small"]
    export([case], tmp_path, "npz")
    with pytest.raises(ExportError, match="is not empty"):
        export([case], tmp_path, "npz")
    assert export([case], tmp_path, "npz", overwrite=True).written == (case.id,)


def test_an_unknown_form_is_refused(tmp_path):
    with pytest.raises(ExportError, match="form is 'csv', but it must be one of npz, onnx"):
        export([], tmp_path, "csv")


@pytest.mark.parametrize(("id_", "reason"), INEXPRESSIBLE.items())
def test_what_the_operator_cannot_be_told_is_left_out_with_the_reason(tmp_path, id_, reason):
    found = export([CASES[id_]], tmp_path, "onnx")
    assert found.written == ()
    assert reason in found.left_out[id_]
    assert not any(tmp_path.iterdir())


def test_every_case_is_either_expressed_or_has_a_reason():
    expressed, reasons = [], {}
    for case in CASES.values():
        try:
            test = node_test(case)
        except NotExpressible as reason:
            reasons[case.id] = str(reason)
        else:
            expressed.append(case.id)
            assert 0 < test.tolerance < np.inf
    assert len(expressed) > 200
    assert all(reasons.values())


@pytest.mark.parametrize("id_", EXPRESSIBLE)
def test_node_tests_agree_with_the_reference_evaluator_of_onnx(tmp_path, id_):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    assert export([CASES[id_]], tmp_path, "onnx").written == (id_,)
    folder = tmp_path / f"test_{id_.replace('-', '_')}"
    data = folder / "test_data_set_0"

    def tensor(path):
        return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))

    model = onnx.load(folder / "model.onnx")
    feeds = {v.name: tensor(data / f"input_{i}.pb") for i, v in enumerate(model.graph.input)}
    (actual,) = ReferenceEvaluator(model).run(None, feeds)
    limits = json.loads((folder / "data.json").read_text())
    np.testing.assert_allclose(
        actual, tensor(data / "output_0.pb"), rtol=limits["rtol"], atol=limits["atol"]
    )


def _run(*words):
    command = [sys.executable, "-m", "refattn.cli", "vectors", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_list_filters_by_clause_flag_and_op_and_speaks_json():
    done = _run("list", "--clause", "OWN-WINDOW1", "--flag", "Combined", "--json")
    assert done.returncode == 0
    listed = json.loads(done.stdout)["vectors"]
    expected = {
        c.id for c in CASES.values() if "OWN-WINDOW1" in c.clauses and "Combined" in c.flags
    }
    assert {v["id"] for v in listed} == expected
    assert expected


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("list", "--clause", "OWN-NOTHING9"),
            "no vector of this pack has the clause OWN-NOTHING9",
        ),
        (("list", "--op", "rope", "--flag", "Poison"), "fits all that was asked for"),
        (("export", "EMPTY", "--to", "csv"), "form is 'csv'"),
        (("generate", "EMPTY", "--size", "huge"), "size is 'huge'"),
        (("generate", "/dev/null/x"), "/dev/null/x cannot be written"),
        (("capture", "/dev/null/x"), "/dev/null/x is no folder"),
        (("verify", "EMPTY"), "pack.json cannot be read"),
        (("list", "--pack", "EMPTY"), "pack.json cannot be read"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_code_2(tmp_path, words, sentence):
    done = _run(*(str(tmp_path) if w == "EMPTY" else w for w in words))
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
