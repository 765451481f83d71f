"""The wheel holds the two packages and the specification, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SIZE_LIMIT = 25 * 2**20
"""Bytes: 20 MiB of vectors, and the rest."""

IGNORED = {"__pycache__", ".DS_Store"}
"""Names that a working tree may hold and a wheel may not."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


def _names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def _files(folder: Path) -> set[str]:
    """Return the files under a folder of the working tree, relative to it."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if not IGNORED & set(path.parts)}


def test_its_top_level_is_the_two_packages_alone(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in _names(wheel)}
    (info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"refattn", "refattn_gpu", info}
    assert info.startswith("refattn-")


def test_it_holds_every_module_and_the_whole_specification(wheel: Path) -> None:
    inside = {name.removeprefix("refattn/") for name in _names(wheel)}
    assert _files(ROOT / "refattn") <= inside
    spec = {f"spec_files/{name}" for name in _files(ROOT / "spec")}
    assert {"spec_files/clauses.toml", "spec_files/glossary.md"} <= spec
    assert spec <= inside
    assert any(name.startswith("spec_files/vectors/core/") for name in inside)
    gpu = {f"refattn_gpu/{name}" for name in _files(ROOT / "gpu" / "refattn_gpu")}
    assert "refattn_gpu/cupy_text.py" in gpu
    assert gpu <= set(_names(wheel))


def test_it_holds_nothing_that_is_not_in_the_tree(wheel: Path) -> None:
    known = {f"refattn/{name}" for name in _files(ROOT / "refattn")}
    known |= {f"refattn/spec_files/{name}" for name in _files(ROOT / "spec")}
    known |= {f"refattn_gpu/{name}" for name in _files(ROOT / "gpu" / "refattn_gpu")}
    extra = {name for name in _names(wheel) if ".dist-info/" not in name} - known
    assert extra == set()


def test_it_is_no_larger_than_a_reader_would_forgive(wheel: Path) -> None:
    assert wheel.stat().st_size <= SIZE_LIMIT


def test_the_archive_of_the_sources_holds_the_kernels_with_what_proves_them(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"gpu/README.md", "gpu/refattn_gpu/__init__.py", "tests/gpu/test_cupy_text.py"} <= inside
    assert {f"gpu/{name}" for name in _files(ROOT / "gpu")} <= inside


def test_the_specification_is_found_inside_the_installed_package(
    wheel: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    ask = (
        "from refattn.spec_text import load_clauses, spec_root; print(spec_root(), load_clauses())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", ask],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert answer.startswith(str(tmp_path / "refattn" / "spec_files"))
    assert "FA1-ALG1" in answer
