"""compute-sanitizer over the kernels: what leaves its bounds, and races in shared memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from refattn_gpu.cuda import machine
from refattn_gpu.numba_cuda.attention import FORMS
from refattn_gpu.stages.ground import Ground, Put
from refattn_gpu.stages.sanitized import FAST

TOOLS = ("memcheck", "racecheck")
"""What compute-sanitizer looks for."""

SECONDS = 80
"""Longest run of one tool over one form; it slows a kernel a hundredfold."""

SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: .*$", re.MULTILINE)
"""The line with which a tool ends."""


def run(on: Ground, put: Put) -> None:
    """Report each tool's last word on each form, or why it was not asked."""
    tool = _tool()
    if tool is None:
        put("skipped", "compute-sanitizer was not found on PATH or in CUDA_HOME/bin")
        return
    for form in (*FORMS, *(() if machine.absent() else (FAST,))):
        for name in TOOLS:
            put(f"{name} {form}", _ask(tool, name, form, on.simulated))


def _tool() -> str | None:
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(folder))


def _ask(tool: str, name: str, form: str, simulated: bool) -> dict[str, object]:
    """Run the small problems of a form under a tool."""
    program = [sys.executable, "-m", "refattn_gpu.stages.sanitized", form]
    program += ["--simulate"] * simulated
    command = [tool, "--tool", name, "--error-exitcode", "9", *program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"ok": False, "summary": f"not done within {SECONDS} s"}
    said = done.stdout + done.stderr
    found = SUMMARY.search(said)
    lines = said.splitlines()
    summary = found[0].strip("= ") if found else "the tool gave no summary"
    clean = bool(found) and done.returncode == 0
    return {"ok": clean, "summary": summary, "exit": done.returncode} | (
        {} if clean else {"lines": lines[:30]}
    )
