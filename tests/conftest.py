"""What every run says first, and how to choose the tests of a clause."""

from __future__ import annotations

import pytest

from optional import lacking, required
from refattn import backends
from refattn.spec_text import load_clauses


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--clause",
        action="append",
        default=[],
        metavar="ID",
        help="run only the tests that prove this clause; may be given more than once",
    )


def pytest_configure(config: pytest.Config) -> None:
    unknown = sorted(set(config.getoption("--clause")) - set(load_clauses()))
    if unknown:
        raise pytest.UsageError(f"--clause {unknown[0]}: spec/clauses.toml has no such clause")
    for name in required():
        if why := lacking(name):
            raise pytest.UsageError(f"REFATTN_REQUIRE names {name}, but: {why}")


def pytest_report_header() -> list[str]:
    lines = [_state(name) for name in backends.BACKENDS]
    return [*lines, f"required: {', '.join(required()) or 'nothing (absent peers are skipped)'}"]


def _state(name: str) -> str:
    """Return whether a backend is loaded, and why not."""
    try:
        backend = backends.load(name)
    except backends.BackendAbsent as absent:
        return str(absent)  # it names the backend and says why
    return f"backend {name} is loaded: {', '.join(backend.dtypes)}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = set(config.getoption("--clause"))
    if not wanted:
        return
    config.hook.pytest_deselected(items=[item for item in items if not wanted & _clauses(item)])
    items[:] = [item for item in items if wanted & _clauses(item)]


def _clauses(item: pytest.Item) -> set[str]:
    """Return the clauses that a test says it proves."""
    return {clause for mark in item.iter_markers("clause") for clause in mark.args}
