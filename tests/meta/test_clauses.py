"""Index, chapters, docstrings, marks and vectors name the same clauses."""

from __future__ import annotations

from pathlib import Path

import pytest

from refattn import coverage

INDEX = """
[OWN-LSE1]
paper = "refattn"
where = "this specification"
title = "The logsumexp"
chapter = "own.md"
"""

CODE = '''
def logsumexp(logits):
    """Return it.

    Spec: OWN-LSE1 lines 1-2.

        L = ln sum

    Raises:
        Nothing: OWN-EMPTY1 is only mentioned here.
    """
'''

TEST = """
import pytest


@pytest.mark.clause("OWN-LSE1")
def test_it():
    assert True
"""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """Return a small repository whose sets agree."""
    for folder in ("spec/vectors/core/one", "package", "tests"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "spec/clauses.toml").write_text(INDEX, "utf-8")
    (tmp_path / "spec/own.md").write_text("## OWN-LSE1: The logsumexp\n", "utf-8")
    case = '{"clauses": ["OWN-LSE1"], "op": "attention"}'
    (tmp_path / "spec/vectors/core/one/case.json").write_text(case, "utf-8")
    (tmp_path / "package/code.py").write_text(CODE, "utf-8")
    (tmp_path / "tests/test_code.py").write_text(TEST, "utf-8")
    return tmp_path


def _findings(house: Path) -> list[str]:
    return coverage.findings(house / "spec", house / "package")


def test_the_specification_the_code_the_tests_and_the_vectors_agree() -> None:
    assert coverage.tests_root() == Path(__file__).parents[1]
    assert coverage.findings() == []


def test_sets_that_agree_have_no_finding(house: Path) -> None:
    assert _findings(house) == []


def test_an_id_outside_the_spec_line_states_nothing(house: Path) -> None:
    assert set(coverage.stated(house / "package")) == {"OWN-LSE1"}


@pytest.mark.parametrize(
    ("file", "old", "new", "finding"),
    [
        ("package/code.py", "OWN-LSE1", "OWN-LSE2", "OWN-LSE2 stands in a Spec: line"),
        ("package/code.py", "OWN-LSE1", "nothing", "OWN-LSE1 has no reference"),
        ("tests/test_code.py", "OWN-LSE1", "OWN-LSE2", "OWN-LSE2 stands in a mark"),
        ("tests/test_code.py", "clause", "other", "OWN-LSE1 has no tests"),
        ("spec/own.md", "OWN-LSE1", "OWN-LSE2", "OWN-LSE2 stands in a section"),
        ("spec/own.md", "OWN-LSE1", "Lse", "OWN-LSE1 is in the index, but own.md has no section"),
        ("spec/vectors/core/one/case.json", "OWN-LSE1", "OWN-LSE2", "OWN-LSE2 stands in a vector"),
        ("spec/vectors/core/one/case.json", '"OWN-LSE1"', "", "OWN-LSE1 has no vectors"),
        ("spec/clauses.toml", "[OWN-LSE1]", "[OWN-LSE3]", "OWN-LSE1 stands in a Spec: line"),
        ("spec/clauses.toml", "title", 'no_test = "why"\ntitle', "OWN-LSE1 has tests, but"),
    ],
)
def test_each_disagreement_is_a_finding(
    house: Path, file: str, old: str, new: str, finding: str
) -> None:
    text = (house / file).read_text("utf-8")
    assert old in text
    (house / file).write_text(text.replace(old, new), "utf-8")
    assert any(found.startswith(finding) for found in _findings(house))


def test_a_hole_with_a_reason_is_no_finding(house: Path) -> None:
    (house / "tests/test_code.py").write_text("", "utf-8")
    (house / "spec/clauses.toml").write_text(INDEX + 'no_test = "a reason"\n', "utf-8")
    assert _findings(house) == []
    (row,) = coverage.rows(house / "spec", house / "package")
    assert row.holes() == {"tests": "a reason"}


def test_marks_of_a_whole_file_and_of_several_ids_are_read(house: Path) -> None:
    text = "import pytest\npytestmark = [pytest.mark.clause('OWN-LSE1', 'OWN-SINK1')]\n"
    (house / "tests/test_code.py").write_text(text + "def test_it(): ...\n", "utf-8")
    assert set(coverage.tested(house / "tests")) == {"OWN-LSE1", "OWN-SINK1"}


def test_without_the_tests_their_number_is_unknown(house: Path) -> None:
    (house / "tests/test_code.py").unlink()
    (house / "tests").rmdir()
    (row,) = coverage.rows(house / "spec", house / "package")
    assert row.tests is None
    assert "tests" not in row.holes()
    assert "| unknown |" in coverage.as_markdown([row])
