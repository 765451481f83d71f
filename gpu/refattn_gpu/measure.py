"""Measure the GPU port where there is a GPU: `python -m refattn_gpu.measure`.

Each stage runs in a process of its own with a time limit and writes its results as they come; the
file of the run is renewed every second, so that nothing found is lost, whatever ends the run.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA = 1
"""Version of the form of a results file."""

NEEDED = {
    "numpy": "numpy",
    "scipy": "scipy",
    "ml_dtypes": "ml-dtypes",
    "array_api_compat": "array-api-compat",
    "safetensors": "safetensors",
    "jsonschema": "jsonschema",
    "numba": "numba",
}
"""Modules that every stage needs, and the packages that bring them."""

DEVICE = {"numba_cuda": "numba-cuda", "cupy": "cupy-cuda13x"}
"""Those that a device needs beside; torch is timed where it is."""

SECOND = 1.0
"""Seconds between two looks at a stage's journal."""


def main(words: list[str] | None = None) -> int:
    """Run the stages that are asked for, or be one of them."""
    asked = _parser().parse_args(words)
    if asked.vendor:
        sys.path.insert(0, str(asked.vendor.resolve()))
    if why := lacking(asked.simulate):
        print(f"refattn_gpu.measure: {why}", file=sys.stderr)
        return 2
    if asked.stage:
        return _be(asked.stage, asked.journal, asked.simulate)
    return _measure(asked)


def _parser() -> argparse.ArgumentParser:
    from refattn_gpu.stages import STAGES

    names = [stage.name for stage in STAGES]
    text = "; ".join(f"{s.name} ({s.limit} s): {s.says}" for s in STAGES)
    parser = argparse.ArgumentParser(prog="python -m refattn_gpu.measure", description=text)
    parser.add_argument("--only", action="append", choices=names, help="may be given again")
    parser.add_argument("--out", type=Path, help="the file; one of gpu/results if not given")
    parser.add_argument("--limit", type=float, help="seconds a stage, instead of its own")
    parser.add_argument("--simulate", action="store_true", help="tiny sizes, in the simulator")
    parser.add_argument("--vendor", type=Path, help="a folder of packages that are not installed")
    parser.add_argument("--stage", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)
    return parser


def lacking(simulate: bool) -> str:
    """Return what is not installed and how to get it; an empty string if nothing is."""
    needed = NEEDED if simulate else NEEDED | DEVICE
    absent = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if not absent:
        return ""
    names = " ".join(absent)
    return (
        f"not installed: {', '.join(absent)}; pip install {names}, or, without an index, carry a "
        f"folder made by pip install --target FOLDER {names} and give --vendor FOLDER"
    )


def _be(name: str, path: Path, simulate: bool) -> int:
    """Run one stage in this process."""
    from refattn_gpu.stages.ground import ground, journal
    from refattn_gpu.stages.machine import machine

    put = journal(path)
    on = ground(simulate)
    put("machine", machine(on))
    importlib.import_module(f"refattn_gpu.stages.{name}").run(on, put)
    return 0


def _measure(asked: argparse.Namespace) -> int:
    """Run the stages one after another and keep the file of the run up to date."""
    from refattn_gpu.stages import STAGES

    begun = datetime.now(UTC)
    whole: dict[str, Any] = {
        "schema": SCHEMA,
        "date": begun.isoformat(timespec="seconds"),
        "simulated": bool(asked.simulate),
        "machine": {},
        "stages": {},
    }
    out: Path = asked.out or _default_out(begun, asked.simulate)
    failed = 0
    for stage in STAGES:
        if asked.only and stage.name not in asked.only:
            continue
        result = _run_stage(stage.name, asked.limit or stage.limit, asked, whole, out)
        wrong = complaints(result)
        failed += bool(wrong)
        print(f"{stage.name}: {result['status']} after {result['seconds']} s")
        print("".join(f"  {line}\n" for line in wrong), end="")
    print(f"wrote {out}")
    return 1 if failed else 0


def complaints(result: dict[str, Any]) -> list[str]:
    """Return what is wrong with a stage: that it did not end, or what it found."""
    lines = [f"{result['status']}: {result['reason']}"] if result["status"] != "done" else []
    for name, value in result["results"].items():
        if name.startswith("finding "):
            lines.append(f"{name}: {value}")
        elif isinstance(value, dict) and "error" in value:
            lines.append(f"{name}: {value['error']}")
        elif isinstance(value, dict) and not value.get("ok", True):
            lines.append(f"{name}: {value['summary']}")
        elif isinstance(value, dict) and (value.get("results", 1) != 1 or value.get("moved")):
            lines.append(f"{name}: {value['results']} results, moved by batches {value['moved']}")
    return lines


def _run_stage(
    name: str, limit: float, asked: argparse.Namespace, whole: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Run one stage until it ends or its time is up; the file holds what it has found so far."""
    from refattn_gpu.stages.ground import read_journal

    with tempfile.TemporaryDirectory() as folder:
        path, said = Path(folder) / "journal", Path(folder) / "stderr"
        command = command_of(name, path, asked.simulate)
        begin = time.monotonic()
        result: dict[str, Any] = {"status": "running", "seconds": 0.0, "reason": "", "results": {}}
        whole["stages"][name] = result
        with said.open("wb") as errors:
            process = subprocess.Popen(
                command, env=_environment(asked), stderr=errors, start_new_session=True
            )
            try:
                while (status := _status(process, begin + limit)) == "running":
                    _renew(result, read_journal(path), begin, whole, out)
            finally:
                _end(process)
        result["status"] = status
        if status != "done":
            lines = said.read_text("utf-8", "replace").strip().splitlines()
            result["reason"] = lines[-1][:300] if lines and status == "failed" else f"{limit:g} s"
        _renew(result, read_journal(path), begin, whole, out)
    return result


def command_of(name: str, path: Path, simulate: bool) -> list[str]:
    """Return the command that runs one stage."""
    command = [sys.executable, "-m", "refattn_gpu.measure", "--stage", name]
    return [*command, "--journal", str(path), *["--simulate"] * simulate]


def _status(process: subprocess.Popen[bytes], deadline: float) -> str:
    """Wait a moment and return "running", "done", "failed" or "timeout"."""
    try:
        code = process.wait(timeout=max(0.01, min(SECOND, deadline - time.monotonic())))
    except subprocess.TimeoutExpired:
        return "running" if time.monotonic() < deadline else "timeout"
    return "done" if code == 0 else "failed"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a stage and what it started, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # its process group is its own
        process.wait()


def _renew(
    result: dict[str, Any],
    results: dict[str, Any],
    begin: float,
    whole: dict[str, Any],
    out: Path,
) -> None:
    """Write the file of the run anew, whole or not at all."""
    machine = results.pop("machine", None)
    whole["machine"] = machine or whole["machine"]
    result.update(seconds=round(time.monotonic() - begin, 1), results=results)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(as_text(whole), "utf-8")
    part.replace(out)


def as_text(whole: dict[str, Any]) -> str:
    """Return a file's text: JSON with an entry a line, and innermost lists on one."""
    text = json.dumps(whole, indent=1)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def _environment(asked: argparse.Namespace) -> dict[str, str]:
    """Return the environment of a stage."""
    from refattn import errors

    paths = [str(Path(file).parents[1]) for file in (errors.__file__, __file__)]
    vendored = [str(asked.vendor.resolve())] if asked.vendor else []
    before = [path for path in [os.environ.get("PYTHONPATH", "")] if path]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([*vendored, *paths, *before]),
        # all arrays are of one stream: Numba need not wait for CuPy's at every launch
        "NUMBA_CUDA_ARRAY_INTERFACE_SYNC": "0",
        "NUMBA_ENABLE_CUDASIM": "1" if asked.simulate else "0",
    }


def _default_out(begun: datetime, simulate: bool) -> Path:
    """Return a file of gpu/results, named by date and device; a simulation's stays outside."""
    if simulate:
        return Path(tempfile.gettempdir()) / f"refattn-simulated-{os.getpid()}.json"
    from refattn_gpu.stages.machine import asked

    device = re.sub(r"[^a-z0-9]+", "-", asked("name").get("name", "gpu").lower()).strip("-")
    folder = Path(__file__).parents[1] / "results"
    return folder / f"{begun:%Y-%m-%d-%H%M}-{device}.json"


if __name__ == "__main__":
    sys.exit(main())
