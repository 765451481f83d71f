"""`refattn bench --gpu-results`: what was measured on GPUs, and where and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from refattn.cli.out import print_json, print_table
from refattn.errors import RefattnError

SCHEMA = 1
"""Version of the form of a results file that is read here."""

FOLDER = Path(__file__).parents[2] / "gpu" / "results"
"""Committed results, in a checkout of the repository; an installed package has none."""


class ResultsError(RefattnError):
    """A results file that is missing, or is none."""


def read(file: Path | None = None) -> list[dict[str, Any]]:
    """Return results as plain data, the oldest first.

    Args:
        file: one file; every committed one if None.

    Raises:
        ResultsError: a file cannot be read, or was not measured on a GPU.
    """
    files = [file] if file else sorted(FOLDER.glob("*.json"))
    return sorted((_read(path) for path in files), key=lambda data: str(data["date"]))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ResultsError(f"{path} is not JSON") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or "stages" not in data:
        raise ResultsError(f"{path} is no results file of version {SCHEMA}")
    if data["simulated"]:
        raise ResultsError(f"{path} was made in the CUDA simulator, whose figures are no GPU's")
    return data


def show_gpu_results(file: Path | None, *, as_json: bool) -> None:
    """Print one file of results, or every committed one.

    Raises:
        ResultsError: as `read`.
    """
    results = read(file)
    if as_json:
        print_json(results)
    else:
        show(results)


def show(results: list[dict[str, Any]]) -> None:
    """Print results, a table a kind of stage."""
    if not results:
        print(f"no GPU has been measured: {FOLDER} holds no results")
        print("gpu/README.md says how to make them, where there is a GPU")
    for data in results:
        _show_head(data)
        for name, stage in data["stages"].items():
            ended = "" if stage["status"] == "done" else f", {stage['status']}: {stage['reason']}"
            print(f"\n{name}{ended}")
            _SHOW.get(name, _show_plain)(stage["results"])


def _show_head(data: dict[str, Any]) -> None:
    device = data["machine"].get("device", {})
    versions = data["machine"].get("versions", {})
    facts = [device.get("name", "unknown device"), f"driver {device.get('driver', 'unknown')}"]
    print(", ".join([*facts, data["date"]]))
    print(", ".join(f"{name} {number}" for name, number in versions.items()))


def _show_conformance(results: dict[str, Any]) -> None:
    rows = []
    for name, value in results.items():
        if isinstance(value, dict) and "by_dtype" in value:
            for dtype, t in value["by_dtype"].items():
                cells = (t["passed"], t["failed"], t["not_run"])
                rows.append((name, dtype, *map(str, cells), f"{t['ratio']:.3f}"))
    if rows:
        head = ("backend", "dtype", "agree", "do not", "not run", "worst error / bound")
        print_table(head, rows)
    _show_plain({n: v for n, v in results.items() if not (isinstance(v, dict) and "runs" in v)})


def _show_timing(results: dict[str, Any]) -> None:
    rows, rest = [], {}
    for shape, value in results.items():
        if "subjects" not in value:
            rest[shape] = value
            continue
        subjects = value["subjects"]
        rows += [
            (shape, name, *_times(row, _ours(name, subjects))) for name, row in subjects.items()
        ]
        rest |= {f"{shape}: {name} did not run": why for name, why in value["refused"].items()}
    if rows:
        head = ("b,h,n,d", "subject", "ms", "spread", "TFLOP/s", "time/ours")
        print_table(head, rows)
    _show_plain(rest)


def _ours(name: str, subjects: dict[str, dict[str, float]]) -> float | None:
    """Return the seconds of our fast kernel in a subject's format, or of the readable one."""
    dtype = name.rsplit(" ", 1)[-1]
    found = subjects.get(f"refattn cuda-cpp {dtype}") or subjects.get(f"refattn tiles {dtype}")
    return found["seconds"] if found else None


def _times(row: dict[str, float], ours: float | None) -> tuple[str, ...]:
    """Return the words of one subject's times: median, 10th to 90th part, rate, ratio."""
    spread = "-".join(f"{row[end] * 1e3:.3g}" for end in ("low", "high"))
    ratio = f"{row['seconds'] / ours:.2f}" if ours else "–"
    return f"{row['seconds'] * 1e3:.3g}", spread, f"{row['tflops']:.2f}", ratio


def _show_accuracy(results: dict[str, Any]) -> None:
    rows: list[tuple[str, ...]] = []
    rest: dict[str, Any] = {}
    for shape, value in results.items():
        subjects = value.get("subjects", {})
        rows += [(shape, n, *(f"{x:.2e}" for x in row.values())) for n, row in subjects.items()]
        rest |= {shape: value["error"]} if "error" in value else {}
        rest |= {shape: value["summary"]} if not value.get("ok", True) else {}
    if rows:
        print_table(("b,h,n,d", "subject", "largest error", "root mean square"), rows)
    _show_plain(rest)


def _show_plain(results: dict[str, Any]) -> None:
    for name, value in results.items():
        fields = value.items() if isinstance(value, dict) else ()
        words = ", ".join(f"{key} {field}" for key, field in fields) or str(value)
        print(f"{name}: {words}")


_SHOW = {
    "conformance": _show_conformance,
    "accuracy": _show_accuracy,
    "timing": _show_timing,
    "gradients": _show_timing,
}
"""Stages with a table of their own."""
