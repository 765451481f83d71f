"""The measurement of a GPU, its control flow: in the simulator, and with stages that go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optional import require
from refattn_gpu import measure
from refattn_gpu.cuda import build
from refattn_gpu.cuda.catalogue import variants
from refattn_gpu.cuda.machine import absent
from refattn_gpu.stages import STAGES
from refattn_gpu.stages.accuracy import judged
from refattn_gpu.stages.compilation import cost_of
from refattn_gpu.stages.ground import journal, read_journal

JOURNAL = """
import json, sys, time
path = sys.argv[sys.argv.index("--journal") + 1]
with open(path, "a") as file:
    for line in {lines!r}:
        file.write(line + "\\n")
print({last!r}, file=sys.stderr)
time.sleep({sleep})
sys.exit({code})
"""
"""A stage that writes these lines, says something, waits and ends so."""


def _simulated(tmp_path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "results" / "run.json"
    code = measure.main(["--simulate", "--out", str(out), *words])
    return code, json.loads(out.read_text("utf-8"))


def _stand_in(
    monkeypatch: pytest.MonkeyPatch, sleep: float = 0, code: int = 0, last: str = ""
) -> None:
    """Put a stage in the place of every stage that finds one thing and ends so."""
    lines = ['["machine", {"device": {"name": "a card"}}]', '["first", {"ok": true}]', '["second']
    text = JOURNAL.format(lines=lines, last=last, sleep=sleep, code=code)
    command = measure.command_of

    def stand_in(*args: Any) -> list[str]:
        return [sys.executable, "-c", text, *command(*args)[3:]]

    monkeypatch.setattr(measure, "command_of", stand_in)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what a simulated run of every stage found."""
    require("numba")
    code, data = _simulated(tmp_path_factory.mktemp("simulated"))
    assert code == 0, data
    return data


def test_every_stage_runs_in_the_simulator(whole: dict[str, Any]) -> None:
    assert list(whole["stages"]) == [stage.name for stage in STAGES]
    assert {stage["status"] for stage in whole["stages"].values()} == {"done"}
    assert all(stage["results"] for stage in whole["stages"].values())


def test_a_simulated_run_says_that_it_is_one(whole: dict[str, Any]) -> None:
    assert whole["simulated"] is True
    assert whole["machine"]["device"]["name"] == "none: the CUDA simulator"
    assert {"python", "numpy", "numba"} <= set(whole["machine"]["versions"])


def test_conformance_counts_runs_by_backend_and_dtype(whole: dict[str, Any]) -> None:
    found = whole["stages"]["conformance"]["results"]
    formats = {"numba-cuda": {"float32", "float64"}, "numba-cuda rows": {"float32", "float64"}}
    if not absent():
        formats["cuda-cpp"] = {"bfloat16", "float32"}
        formats["cuda-cpp ffma"] = {"float32"}
    for name, dtypes in formats.items():
        tallies = found[name]["by_dtype"]
        assert dtypes <= set(tallies)
        for tally in tallies.values():
            assert tally["passed"] > 0 == tally["failed"]
            assert 0 < tally["ratio"] <= 1
        assert found[name]["runs"] == found[name]["of"]


def test_determinism_counts_different_results(whole: dict[str, Any]) -> None:
    found = whole["stages"]["determinism"]["results"]
    # two formats, two forms, forward and backward; and in CUDA C++ in each of three formats three
    # kernels forward, and backward
    assert len(found) == 8 + 12 * (not absent())
    for value in found.values():
        assert (value["results"], value["moved"]) == (1, [])


def test_memory_is_taken_at_every_length(whole: dict[str, Any]) -> None:
    found = whole["stages"]["memory"]["results"]
    for name in ("forward", "backward", "standard forward"):
        for lengths in ("8 x 16", "8 x 32", "32 x 32"):
            assert found[f"{name} {lengths}"]["taken"] > 0


def test_timing_has_every_subject_or_why_it_refused(whole: dict[str, Any]) -> None:
    found = whole["stages"]["timing"]["results"]
    assert [shape["causal"] for shape in found.values()] == [False, True]
    for shape in found.values():
        assert {"refattn rows float32", "refattn tiles float32"} <= set(shape["subjects"])
        fast = {"refattn cuda-cpp float16", "refattn cuda-cpp float32"}
        assert absent() or fast <= set(shape["subjects"])
        for row in shape["subjects"].values():
            assert 0 < row["low"] <= row["seconds"] <= row["high"]


def test_accuracy_has_the_errors_of_every_subject(whole: dict[str, Any]) -> None:
    found = whole["stages"]["accuracy"]["results"]
    assert [shape["causal"] for shape in found.values()] == [False, True]
    for shape in found.values():
        assert {"refattn rows float32", "refattn tiles float32"} <= set(shape["subjects"])
        fast = {f"refattn cuda-cpp {dtype}" for dtype in ("float16", "bfloat16", "float32")}
        assert absent() or fast <= set(shape["subjects"])
        for name, row in shape["subjects"].items():
            near = 0.05 if name.endswith("16") else 1e-4
            assert 0 < row["rms_error"] <= row["max_error"] < near, name


def test_an_error_larger_than_flash_attentions_is_a_complaint() -> None:
    def rows(ours: float) -> dict[str, dict[str, float]]:
        subjects = {"refattn cuda-cpp float16": ours, "torch flash float16": 2e-4}
        return {name: {"rms_error": error} for name, error in subjects.items()}

    assert judged(rows(2e-4))["ok"]
    assert judged({})["ok"]
    assert not judged(rows(float("nan")))["ok"]
    found = {"accuracy": judged(rows(3e-4))}
    (line,) = measure.complaints({"status": "done", "reason": "", "results": found})
    assert line.endswith("root mean square errors: float16 0.0003, torch flash 0.0002")


def test_compilation_tells_what_kernels_cost(whole: dict[str, Any]) -> None:
    found = whole["stages"]["compilation"]["results"]
    if build.no_nvrtc():
        assert set(found) == {"skipped"}
        return
    names = {variant.name for variant in variants()[:2]}
    assert set(found) == {"compiler", *names}
    assert all(found[name]["ok"] and found[name]["registers"] > 0 for name in names)


def test_a_kernel_that_does_not_compile_is_an_error_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "no_nvrtc", lambda: "nothing compiles")
    assert cost_of(variants()[0], "sm_90a") == {"error": "nothing compiles"}


def test_gradients_have_every_subject_or_why_it_refused(whole: dict[str, Any]) -> None:
    found = whole["stages"]["gradients"]["results"]
    assert [shape["causal"] for shape in found.values()] == [False, True]
    for shape in found.values():
        assert "refattn tiles float32" in shape["subjects"]
        fast = {"refattn cuda-cpp float16", "refattn cuda-cpp float32"}
        assert absent() or fast <= set(shape["subjects"])
        named = set(shape["subjects"]) | set(shape["refused"])
        assert {"torch flash float16", "torch math float32"} <= named
        for row in shape["subjects"].values():
            assert 0 < row["low"] <= row["seconds"] <= row["high"]


def test_decoding_has_every_subject_or_why_it_refused(whole: dict[str, Any]) -> None:
    found = whole["stages"]["decoding"]["results"]
    assert list(found) == ["1,2/1,16,8", "1,2/2,16,8"]
    for shape in found.values():
        fast = {"refattn split float16", "refattn forward float16"}
        assert absent() or fast <= set(shape["subjects"])
        for row in shape["subjects"].values():
            assert 0 < row["low"] <= row["seconds"] <= row["high"]
            assert row["gigabytes_a_second"] > 0


def test_a_tool_that_is_absent_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    _, data = _simulated(tmp_path, "--only", "sanitizer")
    found = data["stages"]["sanitizer"]["results"]
    assert found == {"skipped": "compute-sanitizer was not found on PATH or in CUDA_HOME/bin"}


@pytest.mark.parametrize(("errors", "code"), [(0, 0), (3, 1)])
def test_the_last_word_of_the_sanitizer_is_kept(
    errors: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("numba")
    tool = tmp_path / "compute-sanitizer"
    ends = 9 if errors else 0
    tool.write_text(
        f'#!/bin/sh\nshift 4\n"$@" || exit 1\necho "========= ERROR SUMMARY: {errors} errors"\n'
        f"exit {ends}\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    ended, data = _simulated(tmp_path, "--only", "sanitizer")
    found = data["stages"]["sanitizer"]["results"]
    assert ended == code
    forms = ("tiles", "rows", *(() if absent() else ("cuda-cpp",)))
    assert set(found) == {f"{t} {f}" for t in ("memcheck", "racecheck") for f in forms}
    for value in found.values():
        assert value["summary"] == f"ERROR SUMMARY: {errors} errors"
        assert value["ok"] is (errors == 0)


def test_a_stage_beyond_its_limit_is_ended_and_leaves_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stand_in(monkeypatch, sleep=600)
    code, data = _simulated(tmp_path, "--only", "memory", "--limit", "3")
    assert code == 1
    stage = data["stages"]["memory"]
    assert (stage["status"], stage["reason"]) == ("timeout", "3 s")
    assert stage["results"] == {"first": {"ok": True}}
    assert data["machine"] == {"device": {"name": "a card"}}


def test_a_stage_that_fails_leaves_its_last_word_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _stand_in(monkeypatch, code=1, last="RuntimeError: the card is gone")
    code, data = _simulated(tmp_path, "--only", "memory", "--only", "timing")
    assert code == 1
    assert list(data["stages"]) == ["memory", "timing"]
    for stage in data["stages"].values():
        assert (stage["status"], stage["reason"]) == ("failed", "RuntimeError: the card is gone")
        assert stage["results"] == {"first": {"ok": True}}
    assert "  failed: RuntimeError: the card is gone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("finding cupy float32 x", "far off", "finding cupy float32 x: far off"),
        ("forward 16", {"error": "no memory"}, "forward 16: no memory"),
        ("memcheck rows", {"ok": False, "summary": "3 errors"}, "memcheck rows: 3 errors"),
        ("forward rows", {"results": 2, "moved": []}, "forward rows: 2 results, moved by"),
        ("forward rows", {"results": 1, "moved": [5]}, "forward rows: 1 results, moved by"),
    ],
)
def test_what_a_stage_found_wrong_is_a_complaint(name: str, value: Any, line: str) -> None:
    fine = {"first": {"ok": True}, "pack": "6543", "second": {"results": 1, "moved": []}}
    result = {"status": "done", "reason": "", "results": fine}
    assert measure.complaints(result) == []
    (found,) = measure.complaints(result | {"results": {**fine, name: value}})
    assert found.startswith(line)


def test_a_journal_that_was_cut_short_is_read_up_to_there(tmp_path: Path) -> None:
    put = journal(tmp_path / "journal")
    put("first", 1)
    put("second", [2])
    put("first", 3)
    with (tmp_path / "journal").open("a") as file:
        file.write('["third", {"a"')
    assert read_journal(tmp_path / "journal") == {"first": 3, "second": [2]}
    assert read_journal(tmp_path / "absent") == {}


def test_lists_stand_on_one_line_and_texts_stay_as_they_are() -> None:
    whole = {"a": {"b": [1, 2.5], "c": ["x  [1]", "y"], "d": {}}}
    text = measure.as_text(whole)
    assert json.loads(text) == whole
    assert '"b": [ 1, 2.5 ]' in text


def test_what_is_missing_is_named_with_the_way_to_carry_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = {"cupy", "jsonschema"}
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in absent else object()
    )
    assert measure.main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith("refattn_gpu.measure: not installed: jsonschema, cupy-cuda13x; pip inst")
    assert "--target FOLDER jsonschema cupy-cuda13x and give --vendor FOLDER" in said
    assert said.count("\n") == 1


def test_a_stage_needs_nothing_of_the_terminal_and_nothing_that_certifies(tmp_path: Path) -> None:
    require("numba")
    path = tmp_path / "journal"
    ask = f"""
import sys
for name in ("typer", "rich", "click", "flint", "mpmath", "onnx", "hypothesis", "pytest"):
    sys.modules[name] = None  # an import of it fails
from refattn_gpu.measure import main
sys.exit(main(["--simulate", "--stage", "conformance", "--journal", {str(path)!r}]))
"""
    subprocess.run([sys.executable, "-c", ask], env=_simulator(), check=True)
    assert "numba-cuda" in read_journal(path)


def _simulator() -> dict[str, str]:
    return os.environ | {
        "NUMBA_ENABLE_CUDASIM": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
