"""Writing of cases and packs: canonical bytes, and whole files or none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from refattn.vectors.canonical import PackError, canonical_json, sha256
from refattn.vectors.pack import (
    CASE_FILES,
    GROUPS,
    SCHEMA_VERSION,
    Case,
    Entry,
    check_schema,
    root_hash,
    tensor_record,
)

Bound: TypeAlias = tuple[float, float, float]
"""a, b and floor of one output under one profile."""

UNIT_BITS = 8
"""Significant bits of a stored error unit, rounded up: under 1 % above the computed one."""

COEFFICIENT_BITS = 12
"""Significant bits of a stored bound coefficient, rounded up."""

NUDGE = 1 + 2.0**-40
"""Factor before rounding up. A value exactly on the grid, but for noise of float64, always lands
on the next grid point, so that machines which disagree in a last bit store the same number."""


def rounded_up(x: NDArray[Any], significant: int) -> NDArray[np.float64]:
    """Return float64 numbers >= x >= 0 of few significant bits; zero and infinity stay."""
    fraction, exponent = np.frexp(x.astype(np.float64) * NUDGE)
    steps = np.ceil(np.ldexp(fraction, significant))
    result: NDArray[np.float64] = np.ldexp(steps, exponent - significant)
    return result


def stored_unit(x: NDArray[Any]) -> NDArray[np.float32]:
    """Return an error unit as stored: float32, rounded up to eight bits, never a subnormal."""
    with np.errstate(over="ignore", under="ignore"):
        up = rounded_up(x, UNIT_BITS)
        floor = float(np.finfo(np.float32).tiny)
        return np.where((up > 0) & (up < floor), floor, up).astype(np.float32)


def stored_bounds(bounds: Mapping[str, Mapping[str, Bound]]) -> dict[str, dict[str, Bound]]:
    """Return bound coefficients as stored: rounded up to twelve bits."""
    return {
        profile: {output: _stored_bound(*bound) for output, bound in outputs.items()}
        for profile, outputs in bounds.items()
    }


def _stored_bound(a: float, b: float, floor: float) -> Bound:
    up = rounded_up(np.asarray([a, b, floor]), COEFFICIENT_BITS)
    return float(up[0]), float(up[1]), float(up[2])


def case_document(case: Case) -> dict[str, Any]:
    """Return case.json of a case, as it is parsed."""
    names = [name for group in GROUPS for name in getattr(case, group)]
    if len(names) != len(set(names)):
        raise PackError(f"{case.id} has two tensors of one name")
    return {
        "schema": SCHEMA_VERSION,
        "id": case.id,
        "summary": case.summary,
        "clauses": sorted(case.clauses),
        "flags": sorted(case.flags),
        "op": case.op,
        "parameters": dict(case.parameters),
        "conventions": dict(case.conventions),
        "requires": sorted(case.requires),
        "dtypes": list(case.dtypes),
        "draws": dict(case.draws),
        "bounds": {p: {o: list(b) for o, b in v.items()} for p, v in case.bounds.items()},
        "certification": dict(case.certification),
        "kills": sorted(case.kills),
        **{g: {n: tensor_record(x) for n, x in getattr(case, g).items()} for g in GROUPS},
    }


def case_bytes(case: Case) -> tuple[bytes, bytes]:
    """Return the bytes of case.json and tensors.safetensors.

    Raises:
        PackError: the case does not fit the schema.
    """
    from safetensors.numpy import save

    document = case_document(case)
    encoded = canonical_json(document)
    check_schema(document, "case", case.id)
    tensors = {n: np.asarray(x, order="C") for g in GROUPS for n, x in getattr(case, g).items()}
    return encoded, save(dict(sorted(tensors.items())))


def _write_file(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_case(case: Case, folder: Path | str, scratch: Path | str | None = None) -> Entry:
    """Write a case so that its folder appears whole or not at all.

    Args:
        case: what to write.
        folder: the case's folder; its name is the id, its parent the size.
        scratch: a folder of the same filesystem to write in first; the parent if None.

    Returns:
        The case's line of pack.json.

    Raises:
        PackError: the case does not fit the schema, or the folder exists.
    """
    folder = Path(folder)
    encoded, tensors = case_bytes(case)
    partial = Path(scratch or folder.parent) / f".{folder.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, data in zip(CASE_FILES, (encoded, tensors), strict=True):
            _write_file(partial / name, data)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise PackError(f"{folder} cannot be written: {error.strerror}") from None
    path = f"{folder.parent.name}/{folder.name}"
    return Entry(case.id, path, sha256(encoded), sha256(tensors))


def write_index(
    root: Path,
    size: str,
    spec_version: str,
    flags: Mapping[str, Any],
    entries: list[Entry],
    scratch: Path,
) -> str:
    """Write pack.json atomically, by way of a folder to write in first; returns its root hash."""
    index: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "size": size,
        "spec_version": spec_version,
        "flags": dict(flags),
        "cases": [entry._asdict() for entry in sorted(entries)],
    }
    index["root_sha256"] = root_hash(index)
    check_schema(index, "pack", "pack.json")
    partial = scratch / f".pack.json.{os.getpid()}.partial"
    partial.unlink(missing_ok=True)
    _write_file(partial, canonical_json(index))
    partial.replace(root / "pack.json")
    return str(index["root_sha256"])
