"""What the kernels cost a GPU, learnt without one: compiled to PTX, assembled, measured.

    python -m refattn_gpu.ptx            prints registers, spills and memory of every kernel
    python -m refattn_gpu.ptx --write    makes them the budget that a test holds every change to

A register too many halves the warps that a multiprocessor holds, and a spill sends what was a
register to memory: neither changes a result, so that no other test would see it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from refattn.errors import RefattnError

TARGETS = ((8, 0), (9, 0))
"""Compute capabilities that kernels are compiled for: A100 and H100."""

BUDGETS = Path(__file__).with_name("budgets.toml")
"""What each kernel may cost."""

REMEDY = "pip install nvidia-cuda-nvcc brings one"
"""Where an assembler comes from."""

SLACK = 16
"""Registers beyond the budget that another release of the assembler may use."""


class PtxError(RefattnError):
    """A kernel that could not be assembled here."""


class Usage(NamedTuple):
    """What one kernel costs on one kind of device."""

    registers: int
    """A thread."""
    spill: int
    """Bytes a thread, stores and loads of what found no register."""
    local: int
    """Bytes a thread of arrays that are indexed by a variable, spills among them."""
    shared: int
    """Bytes a block."""


Table = dict[str, dict[str, Usage]]
"""Usage by kernel ("forward_rows float32 d64") and device ("sm_90")."""


def assemblers() -> Iterator[str]:
    """Yield the paths of `ptxas`: of the package, of CUDA's folder, on PATH."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        yield from (str(path) for path in sorted(Path(folder).glob("*/bin/ptxas*")))
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if path := shutil.which("ptxas", path=str(Path(os.environ.get(variable, "-")) / "bin")):
            yield path
    if path := shutil.which("ptxas"):
        yield path


def no_ptxas() -> str:
    """Return why there is no assembler; an empty string if there is one."""
    return "" if next(assemblers(), "") else f"ptxas was not found: {REMEDY}"


def release(ptxas: str) -> str:
    """Return the release of an assembler, as "13.0"."""
    said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else "unknown"


def newest() -> str:
    """Return the path of the newest assembler: each reads the PTX of its own release and below.

    Raises:
        PtxError: there is none.
    """
    if why := no_ptxas():
        raise PtxError(why)
    return max(assemblers(), key=lambda path: tuple(map(int, re.findall(r"\d+", release(path)))))


def assemble(ptxas: str, text: str, cc: tuple[int, int]) -> Usage:
    """Assemble one kernel and return what it costs.

    Raises:
        PtxError: the assembler refuses it.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(text, "utf-8")
        target = f"-arch=sm_{cc[0]}{cc[1]}"
        command = [ptxas, "-v", target, str(source), "-o", str(source.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = " ".join(done.stderr.replace(str(source), "the kernel").split())[:300]
        raise PtxError(f"ptxas {release(ptxas)} refuses the PTX that was compiled: {words}")
    return usage_of(done.stderr)


def usage_of(report: str) -> Usage:
    """Return the costs that a report of the assembler states.

    Raises:
        PtxError: it states none.
    """
    used = re.findall(r"Used (\d+) registers", report)
    if not used:
        raise PtxError(f"ptxas said nothing about registers: {' '.join(report.split())[:200]}")
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    return Usage(
        registers=max(map(int, used)),
        spill=sum(map(int, spills)),
        local=max(map(int, re.findall(r"(\d+) bytes stack frame", report)), default=0),
        shared=max(map(int, re.findall(r"(\d+) bytes smem", report)), default=0),
    )


def measured(ptxas: str) -> Table:
    """Compile and assemble every kernel for every target.

    Raises:
        PtxError: there is no compiler here, or the assembler refuses a kernel.
    """
    from refattn_gpu import device
    from refattn_gpu.numba_cuda import KERNELS

    if device.cuda is None or device.SIMULATED:
        raise PtxError(f"nothing here compiles to PTX: {device.STATE.reason}; {device.REMEDY}")
    table: Table = {}
    for entry in KERNELS:
        row = table.setdefault(f"{entry.name} {entry.dtype} d{entry.features}", {})
        for cc in TARGETS:
            text = device.compile_ptx(entry.function, entry.signature, cc)
            row[f"sm_{cc[0]}{cc[1]}"] = assemble(ptxas, text, cc)
    return table


def grown(table: Table, budgets: Mapping[str, Any], ptxas_release: str) -> list[str]:
    """Return every kernel that costs more than its budget, or has none, a sentence each."""
    slack = 0 if budgets.get("ptxas") == ptxas_release else SLACK
    found = []
    for name, row in table.items():
        for target, usage in row.items():
            limit = budgets.get(name, {}).get(target)
            if limit is None:
                found.append(f"{name} on {target} has no budget")
                continue
            for field, value in usage._asdict().items():
                most = limit[field] + (slack if field == "registers" else 0)
                if value > most:
                    found.append(f"{name} on {target} has {field} {value}, but may have {most}")
    return found


def read_budgets(path: Path | None = None) -> dict[str, Any]:
    """Return committed budgets: by kernel and target, and the assembler's release."""
    return tomllib.loads((path or BUDGETS).read_text("utf-8"))


def as_toml(table: Table, ptxas_release: str, command: str = "refattn_gpu.ptx") -> str:
    """Return a table as the text of a `budgets.toml`."""
    lines = [
        "# What every kernel costs a thread and a block, by device: a test fails where one grows.",
        f"# Made by `python -m {command} --write`.",
        f'ptxas = "{ptxas_release}"',
    ]
    for name, row in table.items():
        lines += ["", f'["{name}"]']
        for target, usage in row.items():
            fields = ", ".join(f"{field} = {value}" for field, value in usage._asdict().items())
            lines.append(f"{target} = {{ {fields} }}")
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> int:
    """Print or write the costs of every kernel; with --json, as one line for a test."""
    parser = argparse.ArgumentParser(prog="python -m refattn_gpu.ptx")
    parser.add_argument("--write", action="store_true", help="make the costs the budget")
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    asked = parser.parse_args(words)
    try:
        ptxas = newest()
        table = measured(ptxas)
    except RefattnError as error:
        print(f"refattn_gpu.ptx: {error}", file=sys.stderr)
        return 2
    text = as_toml(table, release(ptxas))
    if asked.write:
        BUDGETS.write_text(text, "utf-8")
    plain = {name: {t: u._asdict() for t, u in row.items()} for name, row in table.items()}
    print(json.dumps({"ptxas": release(ptxas), "table": plain}) if asked.json else text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
