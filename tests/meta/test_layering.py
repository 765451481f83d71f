"""Imports run one way: the house stands because no floor leans on the one above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import refattn
import refattn_gpu

PACKAGE = Path(refattn.__file__).parent

FLOORS = (
    {"errors"},
    {"arrays", "checks", "spec_text"},
    {"clause files"},
    {"backends", "bounds", "claims", "cpu", "judge", "certify", "dialects"},
    {"vectors"},
    {"audit", "bench", "check", "coverage"},
    {"cli", "__main__"},
)
"""Rooms by floor, lowest first; a module imports from its own floor or from lower ones."""

ROOMS = frozenset().union(*FLOORS) - {"clause files"}
"""Every room with a name of its own; any other module of the package is a clause file."""


MODULES = sorted(PACKAGE.rglob("*.py"))

GPU = Path(refattn_gpu.__file__).parent


def _dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(dotted: str) -> str:
    """Return the room of a module of refattn: `vectors` for `refattn.vectors.pack`."""
    first = dotted.split(".")[1]
    return first if first in ROOMS else "clause files"


def _floor(dotted: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if _room(dotted) in rooms)


def imported(source: str, module: str, package: bool = False) -> set[str]:
    """Return the dotted names a module imports, at its top or inside a function."""
    home = module.split(".") if package else module.split(".")[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{stem}.{alias.name}" for alias in node.names}
    return names


def _imports(path: Path) -> set[str]:
    return imported(path.read_text("utf-8"), _dotted(path), path.name == "__init__.py")


def _ours(path: Path) -> set[str]:
    """Return the names of refattn that a module imports, but not the bare package."""
    return {name for name in _imports(path) if name.startswith("refattn.")}


def _ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_imports_of_a_module_are_all_found() -> None:
    source = "import refattn.a\nfrom refattn import b\nfrom . import c\nfrom ..d import e\n"
    inside = "def f():\n    from refattn.g import h\n"
    found = imported(source + inside, "refattn.room.module")
    assert found == {"refattn.a", "refattn.b", "refattn.room.c", "refattn.d.e", "refattn.g.h"}


def test_the_package_was_found() -> None:
    assert {"attention.py", "cli/__init__.py", "certify/__init__.py"} <= set(map(_ids, MODULES))


@pytest.mark.parametrize("path", sorted((PACKAGE / "certify").rglob("*.py")), ids=_ids)
def test_certify_imports_nothing_of_the_reference(path: Path) -> None:
    assert {n for n in _ours(path) if not n.startswith("refattn.certify")} == set()


@pytest.mark.parametrize("path", [p for p in MODULES if p != PACKAGE / "__init__.py"], ids=_ids)
def test_a_module_leans_on_no_higher_floor(path: Path) -> None:
    dotted = _dotted(path)
    higher = {name for name in _ours(path) if _floor(name) > _floor(dotted)}
    assert higher == set(), f"{dotted} imports from a floor above its own"


@pytest.mark.parametrize("path", MODULES, ids=_ids)
def test_the_gpu_package_is_imported_by_name_in_one_place(path: Path) -> None:
    assert not any(name.split(".")[0] == "refattn_gpu" for name in _imports(path))
    if _dotted(path) != "refattn.backends":
        assert "refattn_gpu" not in path.read_text("utf-8")


ONE_DOOR = {"numba": "device.py", "numba_cuda": "device.py", "cuda": "cuda/build.py"}
"""Packages that only one module of the GPU package may import: the first may end its days."""


@pytest.mark.parametrize(
    "path", sorted(GPU.rglob("*.py")), ids=lambda path: str(path.relative_to(GPU))
)
def test_numba_enters_the_gpu_package_by_one_door(path: Path) -> None:
    place = str(path.relative_to(GPU))
    for name in imported(path.read_text("utf-8"), f"refattn_gpu.{path.stem}"):
        assert ONE_DOOR.get(name.split(".")[0], place) == place


WITHOUT = """
import sys
for name in ("numba", "numba_cuda", "cupy", "cuda", "torch", "llvmlite"):
    sys.modules[name] = None  # an import of it fails
sys.path[:0] = {paths!r}
import refattn_gpu
print("imported")
"""
"""A program on a machine that has nothing for a GPU."""


def test_the_gpu_package_can_be_imported_where_there_is_nothing_for_a_gpu() -> None:
    paths = [str(PACKAGE.parent), str(GPU.parent)]
    command = [sys.executable, "-c", WITHOUT.format(paths=paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("imported\n", "")
