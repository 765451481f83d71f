"""The command line: quick, one line for a refusal, exit codes 0, 1 and 2, never a traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refattn import check, cli, coverage, spec_text
from refattn.backends import BACKENDS
from refattn.cli.out import aligned, plain

HELP_LIMIT = 0.5
"""Seconds in which the overview must be on the screen."""


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "refattn.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_overview_names_every_command_in_half_a_second() -> None:
    fastest = float("inf")
    for _ in range(5):  # the fastest of five: other processes of the machine are not meant
        start = time.perf_counter()
        shown = _run("--help")
        fastest = min(fastest, time.perf_counter() - start)
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in cli.ROOMS)
    assert fastest < HELP_LIMIT


def test_the_overview_imports_neither_the_rooms_nor_heavy_libraries() -> None:
    ask = (
        "import sys; from refattn.cli import main; main(['--version']); "
        "print(*(set(sys.modules) & {'scipy', 'jsonschema', 'refattn.check', 'refattn.cli.audit'}))"
    )
    shown = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    version, loaded = shown.stdout.splitlines()
    assert version.startswith("refattn ")
    assert loaded == ""


def test_without_words_the_overview_is_shown() -> None:
    shown = _run()
    assert "check" in shown.stdout + shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize("words", [("frobnicate",), ("spec", "shout"), ("check", "--colour")])
def test_unknown_words_are_bad_usage(words: tuple[str, ...]) -> None:
    shown = _run(*words)
    assert shown.returncode == 2
    assert words[-1] in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("spec", "show", "FA1-ALG7"), "there is no clause FA1-ALG7; near it: "),
        (("spec", "list", "--chapter", "flamingo"), "there is no chapter flamingo; there are vas"),
        (("check", "--backend", "cupy"), "backend cupy is absent: not part of this release"),
        (("check", "--backend", "abacus"), "there is no backend abacus"),
        (("check", "--clause", "FA2-ALG1"), "there is no clause FA2-ALG1"),
        (("check", "--dtype", "float8"), "dtype is 'float8', but it must be one of float64"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(
    words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"refattn: {sentence}")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_a_missing_extra_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["audit", "torch-sdpa"]) == 2
    assert capsys.readouterr().err == (
        'refattn: torch is not installed, but this needs it: pip install "refattn[peers]"\n'
    )


def test_every_optional_module_is_in_the_extra_that_is_named() -> None:
    import tomllib

    text = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    packages = {"flint": "python-flint", "jaxlib": "jax", "llvmlite": "numba"}
    for module, extra in cli.EXTRAS.items():
        package = packages.get(module, module.replace("_", "-"))
        assert any(line.startswith(package) for line in extras[extra]), module


def test_spec_list_is_the_index(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["spec", "list", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [entry["id"] for entry in shown] == list(spec_text.load_clauses())
    assert cli.main(["spec", "list", "--chapter", "rope.md"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("ROPE-EQ1 ")
    wanted = [id_ for id_, c in spec_text.load_clauses().items() if c.chapter == "rope.md"]
    assert [line.split()[0] for line in lines[1:]] == wanted


def test_spec_show_sets_statement_code_and_tests_side_by_side(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["spec", "show", "own-causal1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["id"] == "OWN-CAUSAL1"
    assert shown["text"].startswith("## OWN-CAUSAL1: ")
    assert {"States", "Leaves open"} <= set(shown)
    assert "causal_mask" in {place["name"] for place in shown["references"]}
    assert all(place["file"].startswith("tests/") for place in shown["tests"])
    assert cli.main(["spec", "show", "OWN-CAUSAL1"]) == 0
    text = capsys.readouterr().out
    assert "refattn/masks.py:" in text
    assert shown["tests"][0]["name"] in text


def test_spec_coverage_has_a_row_a_clause(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["spec", "coverage", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in shown] == list(spec_text.load_clauses())
    assert cli.main(["spec", "coverage"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(shown)


def test_a_stale_coverage_table_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "spec"
    root.mkdir()
    shutil.copy(spec_text.spec_root() / "clauses.toml", root)
    monkeypatch.setattr(spec_text, "spec_root", lambda: root)
    assert cli.main(["spec", "coverage", "--check"]) == 1
    assert "stale" in capsys.readouterr().out
    assert cli.main(["spec", "coverage", "--write"]) == 0
    assert cli.main(["spec", "coverage", "--check"]) == 0
    assert (root / "coverage.md").read_text("utf-8").startswith(coverage.TITLE)
    (root / "coverage.md").write_text("# Coverage\n", "utf-8")
    assert cli.main(["spec", "coverage", "--check"]) == 1


def test_check_proves_the_vectors_of_a_clause(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "--clause", "OWN-SINK1", "--dtype", "float64"]
    assert cli.main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    cells = shown["clauses"]["OWN-SINK1"]
    for cell in cells.values():
        assert cell["failed"] == 0 < cell["passed"]
        assert 0 < cell["ratio"] <= 1
    assert sum(cell["passed"] for cell in cells.values()) == shown["runs"]
    assert {name.split()[0] for name in cells} == set(BACKENDS) - set(shown["absent"])
    assert "numpy float64" in cells
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "OWN-SINK1" in text
    assert "backend cupy is absent: not part of this release" in text


def test_a_required_backend_that_is_absent_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["check", "--clause", "OWN-SINK1", "--dtype", "float64"]
    monkeypatch.setenv(check.REQUIRE, "torch, cupy")
    assert cli.main(words) == 1
    assert "not part of this release (required)" in capsys.readouterr().out
    monkeypatch.setenv(check.REQUIRE, "torch,numpy")
    assert cli.main(words) == 0


def test_a_table_in_a_pipe_is_aligned_words() -> None:
    assert aligned(("a", "bb"), [("ccc", "d")]) == "a    bb\nccc  d"


def test_numbers_without_a_form_in_json_become_words() -> None:
    found = plain({"a": (float("inf"), float("nan")), 1: [1.5]})
    assert found == {"a": ["inf", "nan"], "1": [1.5]}
