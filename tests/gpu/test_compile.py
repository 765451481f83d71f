"""Every kernel compiles for A100 and H100 without either, and costs no more than it did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from optional import require, require_device
from refattn_gpu import ptx
from refattn_gpu.ptx import PtxError, Usage

REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3row' for 'sm_90'
ptxas info    : Function properties for _ZN3row
    384 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 24576 bytes smem
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """Return what a process of its own compiled: this one may have the simulator in its place."""
    require("numba_cuda")
    require_device("ptxas", ptx.no_ptxas())
    command = [sys.executable, "-m", "refattn_gpu.ptx", "--json"]
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "Unsupported .version" in done.stderr:
        require_device("ptxas", done.stderr.strip())
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_no_kernel_costs_more_than_its_budget(compiled: dict[str, Any]) -> None:
    table = {
        name: {target: Usage(**usage) for target, usage in row.items()}
        for name, row in compiled["table"].items()
    }
    assert ptx.grown(table, ptx.read_budgets(), compiled["ptxas"]) == []


def test_every_budget_is_of_a_kernel_that_there_is(compiled: dict[str, Any]) -> None:
    budgets = ptx.read_budgets()
    assert set(budgets) - {"ptxas"} == set(compiled["table"])
    for row in compiled["table"].values():
        assert set(row) == {"sm_80", "sm_90"}


def test_the_tiled_kernels_spill_nothing(compiled: dict[str, Any]) -> None:
    tiled = {name: row for name, row in compiled["table"].items() if "tiles" in name}
    for name, row in tiled.items():
        assert [usage["spill"] for usage in row.values()] == [0, 0], name


def test_shared_memory_stays_within_what_every_device_grants(compiled: dict[str, Any]) -> None:
    for name, row in compiled["table"].items():
        assert all(usage["shared"] <= 48 * 1024 for usage in row.values()), name


def test_a_report_of_the_assembler_is_read() -> None:
    assert ptx.usage_of(REPORT) == Usage(registers=96, spill=32, local=384, shared=24576)
    with pytest.raises(PtxError, match="said nothing about registers: ptxas info"):
        ptx.usage_of("ptxas info : 0 bytes gmem")


def test_a_kernel_that_grows_is_named() -> None:
    usage = Usage(96, 0, 384, 24576)
    budget = {"ptxas": "13.5", "row d64": {"sm_90": usage._asdict()}}

    def found(release: str, **changes: int) -> list[str]:
        return ptx.grown({"row d64": {"sm_90": usage._replace(**changes)}}, budget, release)

    assert found("13.5") == found("13.5", registers=90) == found("13.0", registers=112) == []
    assert found("13.5", registers=97) == ["row d64 on sm_90 has registers 97, but may have 96"]
    assert found("13.0", registers=113) == ["row d64 on sm_90 has registers 113, but may have 112"]
    assert found("13.0", spill=4) == ["row d64 on sm_90 has spill 4, but may have 0"]
    other = {"new d64": {"sm_90": usage}}
    assert ptx.grown(other, budget, "13.5") == ["new d64 on sm_90 has no budget"]


def test_a_table_is_written_as_it_is_read(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"row d64": {"sm_80": Usage(1, 2, 3, 4), "sm_90": Usage(5, 6, 7, 8)}}
    monkeypatch.setattr(ptx, "BUDGETS", tmp_path / "budgets.toml")
    ptx.BUDGETS.write_text(ptx.as_toml(table, "13.5"), "utf-8")
    budgets = ptx.read_budgets()
    assert budgets["ptxas"] == "13.5"
    assert ptx.grown(table, budgets, "13.5") == []


def test_without_an_assembler_the_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ptx, "assemblers", lambda: iter(()))
    assert ptx.main([]) == 2
    assert "ptxas was not found: pip install nvidia-cuda-nvcc" in capsys.readouterr().err
