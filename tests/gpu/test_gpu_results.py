"""What was measured on GPUs is printed with where and when, and nothing that was not measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from refattn import cli
from refattn.cli import gpu_results

ROW = {"seconds": 0.002, "low": 0.0019, "high": 0.0022, "tflops": 8.5}

DATA: dict[str, Any] = {
    "schema": 1,
    "date": "2026-01-02T03:04:05+00:00",
    "simulated": False,
    "machine": {"device": {"name": "a card", "driver": "1.2.3"}, "versions": {"numpy": "2.1"}},
    "stages": {
        "conformance": {
            "status": "done",
            "reason": "",
            "results": {
                "pack": "6543",
                "cupy": {
                    "runs": 2,
                    "by_dtype": {
                        "float64": {"passed": 2, "failed": 1, "not_run": 5, "ratio": 0.25}
                    },
                },
                "finding cupy float64 x": "too far",
            },
        },
        "accuracy": {
            "status": "done",
            "reason": "",
            "results": {
                "1,2,4096,64 full": {
                    "subjects": {"torch flash float16": {"max_error": 3e-3, "rms_error": 2e-4}},
                    "refused": {},
                    "ok": False,
                    "summary": "root mean square errors: larger",
                },
            },
        },
        "timing": {
            "status": "timeout",
            "reason": "180 s",
            "results": {
                "2,4,1024,64 full": {
                    "subjects": {
                        "refattn tiles float32": ROW,
                        "torch math float32": ROW | {"seconds": 0.005},
                        "refattn cuda-cpp float16": ROW | {"seconds": 0.0005},
                        "torch flash float16": ROW | {"seconds": 0.0004},
                        "torch flash bfloat16": ROW,
                    },
                    "refused": {"torch cudnn float32": "no such kernel"},
                },
                "1,4,16384,64 full": {"error": "MemoryError: too large"},
            },
        },
    },
}
"""A results file; no card was measured for it."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu_results, "FOLDER", tmp_path)
    return tmp_path


def _write(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(DATA | changes), "utf-8")
    return path


def test_where_nothing_was_measured_it_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "--gpu-results"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"no GPU has been measured: {folder} holds no results\n")
    assert cli.main(["bench", "--gpu-results", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_results_are_printed_with_device_driver_date_and_versions(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(folder / "one.json")
    assert cli.main(["bench", "--gpu-results"]) == 0
    said = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert lines[:2] == ["a card, driver 1.2.3, 2026-01-02T03:04:05+00:00", "numpy 2.1"]
    assert "cupy float64 2 1 5 0.250" in lines
    assert "finding cupy float64 x: too far" in lines
    assert "timing, timeout: 180 s" in lines
    assert "2,4,1024,64 full refattn tiles float32 2 1.9-2.2 8.50 1.00" in lines
    assert "2,4,1024,64 full torch math float32 5 1.9-2.2 8.50 2.50" in lines
    assert "2,4,1024,64 full torch flash float16 0.4 1.9-2.2 8.50 0.80" in lines
    assert "2,4,1024,64 full torch flash bfloat16 2 1.9-2.2 8.50 –" in lines
    assert "1,2,4096,64 full torch flash float16 3.00e-03 2.00e-04" in lines
    assert "1,2,4096,64 full: root mean square errors: larger" in lines
    assert "2,4,1024,64 full: torch cudnn float32 did not run: no such kernel" in lines
    assert "1,4,16384,64 full: error MemoryError: too large" in lines


def test_the_oldest_comes_first_and_a_file_can_be_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(folder / "a.json", date="2026-02-02")
    other = _write(folder / "b.json", date="2026-02-01")
    assert [data["date"] for data in gpu_results.read()] == ["2026-02-01", "2026-02-02"]
    assert cli.main(["bench", "--gpu-results", str(other), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["date"] == "2026-02-01"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (json.dumps(DATA | {"simulated": True}), "was made in the CUDA simulator, whose figures"),
        (json.dumps(DATA | {"schema": 2}), "is no results file of version 1"),
        ("[]", "is no results file of version 1"),
        ("{", "is not JSON"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_what_is_no_measurement_is_refused(
    text: str | None, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text, "utf-8")
    assert cli.main(["bench", "--gpu-results", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"refattn: {path} {why}")
    assert said.count("\n") == 1


def test_a_file_without_the_option_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "run.json"]) == 2
    assert "only --gpu-results takes a file" in capsys.readouterr().err


def test_committed_results_are_of_a_gpu_and_say_which() -> None:
    for data in gpu_results.read():
        device = data["machine"]["device"]
        assert device["name"] and device["driver"]
        assert data["date"] and data["machine"]["versions"]
