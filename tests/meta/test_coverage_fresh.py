"""The table of coverage in the repository is the one that the repository gives."""

from __future__ import annotations

from refattn.coverage import as_markdown, rows
from refattn.spec_text import spec_root


def test_the_coverage_table_is_fresh() -> None:
    stored = (spec_root() / "coverage.md").read_text("utf-8")
    assert stored == as_markdown(rows()), "stale: run refattn spec coverage --write"
