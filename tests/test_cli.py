"""The command line: quick, one line for a refusal, exit codes 0, 1 and 2, never a traceback."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from refattn import check, cli, coverage, spec_text
from refattn.cli.out import aligned, plain, print_table
from refattn.vectors.pack import core_pack
from refattn_gpu import cupy_text


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "refattn.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_overview_names_every_command() -> None:
    shown = _run("--help")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in cli.ROOMS)


@pytest.mark.parametrize("words", [["--version"], ["--help"]])
def test_the_overview_imports_neither_the_rooms_nor_heavy_libraries(words: list[str]) -> None:
    heavy = (
        "{'scipy', 'jsonschema', 'flint', 'torch', 'onnx', 'refattn.check', 'refattn.cli.audit'}"
    )
    ask = f"import sys; from refattn.cli import main; main({words})"
    ask += f"; print(set(sys.modules) & {heavy})"
    shown = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "set()"


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
        (("check", "--backend", "cupy"), "backend cupy is absent: no card is here"),
        (("check", "--backend", "abacus"), "there is no backend abacus"),
        (("check", "--clause", "FA2-ALG1"), "there is no clause FA2-ALG1"),
        (("check", "--dtype", "float8"), "dtype is 'float8', but it must be one of float64"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(
    words: tuple[str, ...],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cupy_text, "absent", lambda: "no card is here")
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
    (tmp_path / "tests").mkdir()
    shutil.copy(spec_text.spec_root() / "clauses.toml", root)
    monkeypatch.setattr(spec_text, "spec_root", lambda: root)
    assert cli.main(["spec", "coverage", "--check"]) == 1
    assert "stale" in capsys.readouterr().out
    assert cli.main(["spec", "coverage", "--write"]) == 0
    assert cli.main(["spec", "coverage", "--check"]) == 0
    assert (root / "coverage.md").read_text("utf-8").startswith(coverage.TITLE)
    (root / "coverage.md").write_text("# Coverage\n", "utf-8")
    assert cli.main(["spec", "coverage", "--check"]) == 1


@pytest.mark.parametrize("word", ["--check", "--write"])
def test_without_the_tests_the_coverage_table_is_neither_judged_nor_written(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "spec_files"
    root.mkdir()
    shutil.copy(spec_text.spec_root() / "clauses.toml", root)
    monkeypatch.setattr(spec_text, "spec_root", lambda: root)
    assert cli.main(["spec", "coverage", word]) == 2
    shown = capsys.readouterr()
    assert "they come with the source, not the wheel" in shown.err
    assert shown.err.count("\n") == 1
    assert not (root / "coverage.md").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["check", "--backend", "numpy", "--clause", "OWN-SINK1"],
        ["check", "--backend", "numpy", "--clause", "OWN-SINK1", "--json"],
        ["spec", "list"],
        ["vectors", "list", "--json"],
    ],
)
def test_a_reader_that_leaves_early_ends_a_command_quietly(words: list[str]) -> None:
    command = [sys.executable, "-m", "refattn", *words]
    read_end, write_end = os.pipe()
    os.close(read_end)
    shown = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, check=False)
    os.close(write_end)
    assert (shown.returncode, shown.stderr) == (0, b"")


def test_a_closed_output_is_written_nowhere() -> None:
    command = f"{sys.executable} -m refattn spec list >&-"
    shown = subprocess.run(command, shell=True, capture_output=True, check=False)
    assert (shown.returncode, shown.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_an_output_that_is_full_is_one_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "refattn", "spec", "list"]
        shown = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert shown.returncode == 2
    assert shown.stderr.startswith("refattn: the output cannot be written: ")
    assert shown.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_what_a_terminal_cannot_show_is_a_question_mark(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "refattn", *"check --backend numpy --clause OWN-SINK1".split()]
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONIOENCODING"}
    shown = subprocess.run(command, capture_output=True, env=kept | environment, check=False)
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert b"OWN-SINK1" in shown.stdout


@pytest.mark.parametrize(
    "words",
    [["vectors", "generate", ""], ["vectors", "list", "--pack="], ["check", "--clause", ""]],
)
def test_an_empty_argument_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert capsys.readouterr().err == (
        "refattn: an argument is empty, but each must say something\n"
    )


@pytest.mark.parametrize("width", [40, 80, 100, 300])
def test_no_id_is_cut_in_a_narrow_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    seen = Terminal()
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "stdout", seen)
    rows = [(id_, *["ok 0.12 (109)"] * 4) for id_ in spec_text.load_clauses()]
    print_table(("clause", *["numpy-tiled float32"] * 4), rows)
    lines = seen.getvalue()
    assert all(re.search(rf"(^|│ ){row[0]}( |$)", lines, re.MULTILINE) for row in rows)


def test_check_says_why_runs_were_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "--clause", "OWN-SINK1", "--backend", "numpy-tiled", "--backend", "numpy"]
    assert cli.main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    reasons = shown["not_run_reasons"]
    assert sum(reasons.values()) == shown["not_run"] > 0
    assert all(why.startswith("numpy-tiled: the case has ") for why in reasons)
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"not run: {max(reasons.values())} runs: {next(iter(reasons))}" in lines


def test_a_case_without_bounds_of_a_dtype_is_not_run() -> None:
    case = next(case for case in core_pack().cases if case.op == "alibi")
    bounds = {"fp64": case.bounds["fp64"]}
    found = check.run(check.Job(replace(case, bounds=bounds), "numpy", "float32"))
    assert (found.verdict, found.reason) == ("not run", "the case has no bounds of profile fp32")


def test_the_command_line_needs_a_typer_that_runs_its_commands() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    floors = tomllib.loads(text)["project"]["dependencies"]
    assert "typer>=0.15.1" in floors
    assert all(re.fullmatch(r"[a-z-]+>=[0-9.]+", floor) for floor in floors)  # .ci/run pins them


def test_check_proves_the_vectors_of_a_clause(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cupy_text, "absent", lambda: "no card is here")
    words = ["check", "--clause", "OWN-SINK1", "--dtype", "float64"]
    assert cli.main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    cells = shown["clauses"]["OWN-SINK1"]
    assert cells["numpy float64"]["not_run"] == 0
    for cell in cells.values():
        assert cell["failed"] == 0
        assert 0 < cell["ratio"] <= 1 or not cell["passed"]
    assert sum(cell["passed"] for cell in cells.values()) == shown["passed"] > 0
    assert "cupy" in shown["absent"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "OWN-SINK1" in text
    assert "backend cupy is absent: no card is here" in text


def test_a_required_backend_that_is_absent_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["check", "--clause", "OWN-SINK1", "--dtype", "float64"]
    monkeypatch.setattr(cupy_text, "absent", lambda: "no card is here")
    monkeypatch.setenv(check.REQUIRE, "torch, cupy")
    assert cli.main(words) == 1
    assert "no card is here (required)" in capsys.readouterr().out
    monkeypatch.setenv(check.REQUIRE, "torch,numpy")
    assert cli.main(words) == 0


def test_a_table_in_a_pipe_is_aligned_words() -> None:
    assert aligned(("a", "bb"), [("ccc", "d")]) == "a    bb\nccc  d"


def test_numbers_without_a_form_in_json_become_words() -> None:
    found = plain({"a": (float("inf"), float("nan")), 1: [1.5]})
    assert found == {"a": ["inf", "nan"], "1": [1.5]}
