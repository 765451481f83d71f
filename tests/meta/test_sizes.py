"""Modules and functions stay small enough to be read in one sitting."""

from __future__ import annotations

import ast
from pathlib import Path
from statistics import median

import pytest

import refattn
import refattn_gpu

PACKAGES = [Path(package.__file__).parent for package in (refattn, refattn_gpu)]
MODULES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))

MODULE_LIMIT = 400
"""Lines of the longest module."""

BODY_LIMIT = 60
"""Lines of the longest function body, its docstring aside."""

KERNELS, KERNEL_LIMIT = "numba_cuda", 125
"""The folder of GPU kernels, and the lines of the longest: a whole listing with its barriers."""

MIDDLE_MODULE, MIDDLE_BODY = 165, 15
"""Medians: about 150 lines, and 15."""


def bodies(source: str) -> dict[str, int]:
    """Return the lines of every function's body without its docstring, by name and line."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
            found[f"{node.name} (line {node.lineno})"] = length
    return found


def test_a_body_is_counted_without_its_docstring() -> None:
    source = 'def f():\n    """One.\n\n    Two.\n    """\n    a = 1\n\n    return a\n'
    assert bodies(source) == {"f (line 1)": 3}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_module_or_body_is_too_long(path: Path) -> None:
    source = path.read_text("utf-8")
    assert len(source.splitlines()) <= MODULE_LIMIT
    most = KERNEL_LIMIT if path.parent.name == KERNELS else BODY_LIMIT
    assert {name: n for name, n in bodies(source).items() if n > most} == {}


def test_the_middle_module_and_the_middle_body_are_small() -> None:
    sources = [path.read_text("utf-8") for path in MODULES]
    assert len(sources) > 20
    assert median(len(source.splitlines()) for source in sources) <= MIDDLE_MODULE
    assert median(n for source in sources for n in bodies(source).values()) <= MIDDLE_BODY
