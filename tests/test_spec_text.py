"""The specification as data: read strictly, and told in one sentence where it does not read."""

from __future__ import annotations

from pathlib import Path

import pytest

from refattn.spec_text import (
    ID,
    SpecError,
    chapters,
    fields,
    find,
    load_clauses,
    section,
    spec_root,
)

ENTRY = """
[FA1-ALG1]
paper = "A paper"
version = "v2"
where = "Algorithm 1"
title = "Forward pass"
chapter = "one.md"
"""

CHAPTER = """# A chapter

## FA1-ALG1: Forward pass

Source: the paper, Algorithm 1.

States: $O = P V$.

Leaves open: nothing.

## Something else

Not of the clause.
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "clauses.toml").write_text(ENTRY, "utf-8")
    (tmp_path / "one.md").write_text(CHAPTER, "utf-8")
    return tmp_path


def test_an_entry_is_read_with_every_key(root: Path) -> None:
    clause = load_clauses(root)["FA1-ALG1"]
    assert (clause.paper, clause.version, clause.where) == ("A paper", "v2", "Algorithm 1")
    assert (clause.title, clause.chapter, clause.no_test) == ("Forward pass", "one.md", "")


def test_the_specification_has_clauses_of_every_chapter() -> None:
    clauses = load_clauses()
    keys = {id_.split("-")[0] for id_ in clauses}
    assert keys == {"VAS", "ROPE", "ALIBI", "FA1", "HEADS", "SCORES", "GPT", "FLA", "OWN", "NUM"}
    assert all(clause.title and ID.fullmatch(id_) for id_, clause in clauses.items())
    assert (spec_root() / "clauses.toml").is_file()


def test_a_section_ends_where_the_next_heading_starts(root: Path) -> None:
    text = section("FA1-ALG1", root)
    assert text.startswith("## FA1-ALG1: Forward pass\n")
    assert text.endswith("Leaves open: nothing.\n")


def test_the_parts_of_a_section_are_told_apart(root: Path) -> None:
    assert fields(section("FA1-ALG1", root)) == {
        "Source": "the paper, Algorithm 1.",
        "States": "$O = P V$.",
        "Leaves open": "nothing.",
    }


def test_chapters_are_read_by_the_index(root: Path) -> None:
    (root / "unlisted.md").write_text("## FA1-ALG9: Not of the index\n", "utf-8")
    assert {name: list(ids) for name, ids in chapters(root).items()} == {"one.md": ["FA1-ALG1"]}


def test_an_id_is_found_whatever_the_case_of_its_letters(root: Path) -> None:
    clauses = load_clauses(root)
    assert find("fa1-alg1", clauses) is clauses["FA1-ALG1"]


def test_an_unknown_id_names_the_nearest(root: Path) -> None:
    with pytest.raises(SpecError, match="there is no clause FA1-ALG7; near it: FA1-ALG1"):
        find("FA1-ALG7", load_clauses(root))


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("[FA1_ALG1]\n", "FA1_ALG1 is not of the form of a clause id"),
        ("FA1-ALG1 = 3\n", "FA1-ALG1 is 3, but it must be a table"),
        ('[FA1-ALG1]\npaper = "A"\n', "FA1-ALG1 has no where"),
        (ENTRY + 'shape = "round"\n', "FA1-ALG1 has shape, which is no key of a clause"),
        (ENTRY + "no_test = true\n", "FA1-ALG1 has no_test=True, but it must be a sentence"),
        (ENTRY + 'no_test = " "\n', "FA1-ALG1 has no_test=' ', but it must be a sentence"),
        (ENTRY + ENTRY, "does not read as an index of clauses"),
        ("[", "does not read as an index of clauses"),
    ],
)
def test_an_index_out_of_form_is_refused(root: Path, entry: str, sentence: str) -> None:
    (root / "clauses.toml").write_text(entry, "utf-8")
    with pytest.raises(SpecError) as refused:
        load_clauses(root)
    assert sentence in str(refused.value)


def test_a_chapter_that_is_missing_is_named(root: Path) -> None:
    (root / "one.md").unlink()
    with pytest.raises(SpecError, match=r"chapter one\.md does not read: No such file"):
        section("FA1-ALG1", root)


def test_a_clause_without_a_section_is_named(root: Path) -> None:
    (root / "one.md").write_text("# A chapter\n", "utf-8")
    with pytest.raises(SpecError, match=r"FA1-ALG1 is in the index, but one\.md has no section"):
        section("FA1-ALG1", root)


def test_a_section_that_stands_twice_is_refused(root: Path) -> None:
    (root / "one.md").write_text(CHAPTER + CHAPTER, "utf-8")
    with pytest.raises(SpecError, match=r"chapter one\.md has two sections of FA1-ALG1"):
        chapters(root)
