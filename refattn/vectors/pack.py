"""Packs of certified vectors: what a case is, and how a pack is read, strictly.

Everything that a pack holds is stated twice (in an index and in the files) and compared: names,
shapes, dtypes and hashes. Whatever does not fit is refused with one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.vectors.canonical import PackError, canonical_json, read_canonical, read_json, sha256
from refattn.vectors.ops import misbound, misfit

SCHEMA_VERSION = 1
"""Version of the form of case.json and pack.json."""

CASE_FILES = ("case.json", "tensors.safetensors")
"""What a case's folder holds, and nothing else."""

COMPANIONS = (".gitattributes", "README.md", "flags.toml", "real", "schema.json")
"""What may lie beside pack.json: the files of spec/vectors that belong to no case."""

GROUPS = ("inputs", "outputs", "units")
"""The three groups of tensors of a case."""

Tensors = Mapping[str, NDArray[Any]]

__all__ = [
    "CASE_FILES",
    "Case",
    "Entry",
    "Flag",
    "Pack",
    "PackError",
    "core_pack",
    "read_case",
    "read_pack",
    "unbounded",
]


@dataclass(frozen=True)
class Case:
    """A vector: one problem, its certified outputs and its bounds."""

    id: str
    summary: str
    clauses: tuple[str, ...]
    flags: tuple[str, ...]
    op: str
    parameters: Mapping[str, Any]
    conventions: Mapping[str, Any]
    requires: tuple[str, ...]
    dtypes: tuple[str, ...]
    draws: Mapping[str, Any]
    inputs: Tensors
    outputs: Tensors
    units: Tensors
    bounds: Mapping[str, Mapping[str, tuple[float, float, float]]]
    certification: Mapping[str, Any]
    kills: tuple[str, ...] = ()


def unbounded(case: Case, profile: str) -> str:
    """Return why a case cannot be judged in a profile; an empty string if it can."""
    if profile in case.bounds:
        return ""
    return f"the case has no bounds of profile {profile}"


class Flag(NamedTuple):
    """What a flag of a case stands for."""

    bug_type: str
    description: str
    effect: str


class Entry(NamedTuple):
    """A case's line in pack.json."""

    id: str
    path: str
    case_sha256: str
    tensors_sha256: str


class Pack(NamedTuple):
    """A pack as read: its index and all of its cases, in the order of their ids."""

    path: Path
    size: str
    spec_version: str
    root_hash: str
    flags: Mapping[str, Flag]
    entries: tuple[Entry, ...]
    cases: tuple[Case, ...]


@cache
def _validator(definition: str) -> Any:
    from jsonschema import Draft202012Validator

    from refattn.spec_text import spec_root

    path = spec_root() / "vectors" / "schema.json"
    schema = read_json(_read_bytes(path), path.name)
    return Draft202012Validator({**schema, "$ref": f"#/$defs/{definition}"})


def check_schema(value: Any, definition: str, name: str) -> None:
    """Check a parsed file against `case` or `pack` of spec/vectors/schema.json.

    Raises:
        PackError: names the place and the first thing that does not fit.
    """
    version = value.get("schema") if isinstance(value, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise PackError(
            f"{name} has schema version {version!r}, but this refattn reads {SCHEMA_VERSION}"
        )
    errors = sorted(
        _validator(definition).iter_errors(value), key=lambda e: (list(e.path), e.message)
    )
    if errors:
        place = "".join(f"[{p!r}]" for p in errors[0].absolute_path)
        message = errors[0].message
        raise PackError(f"{name}{place} does not fit the schema: {message[:200]}")


def _read_bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise PackError(f"{path} is no plain file")
        return path.read_bytes()
    except OSError as error:
        raise PackError(f"{path} cannot be read: {error.strerror or error}") from None


def _inside(root: Path, relative: str) -> Path:
    """Return root/relative, which must be there and inside root with every link followed."""
    try:
        path = (root / relative).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise PackError(f"{root / relative} cannot be read: {why}") from None
    if not path.is_relative_to(root.resolve()):
        raise PackError(f"{relative} leads outside the pack {root}")
    return path


def _listed(folder: Path, name: str) -> set[str]:
    try:
        return {p.name for p in folder.iterdir()}
    except OSError as error:
        raise PackError(f"{name} cannot be listed: {error.strerror}") from None


def _check_listing(folder: Path, expected: set[str], name: str) -> None:
    found = _listed(folder, name)
    for extra in sorted(found - expected):
        raise PackError(f"{name} holds {extra}, which its index does not name")
    for missing in sorted(expected - found):
        raise PackError(f"{name} lacks {missing}")


def tensor_record(x: NDArray[Any]) -> dict[str, Any]:
    """Return dtype, shape and SHA-256 of a tensor's little-endian bytes in C order."""
    data = np.asarray(x, dtype=x.dtype.newbyteorder("<"), order="C")
    return {"dtype": str(x.dtype), "shape": list(x.shape), "sha256": sha256(data.tobytes())}


def _read_tensors(data: bytes, document: Mapping[str, Any], name: str) -> dict[str, Tensors]:
    """Parse the tensors of a case and compare each with its record."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise PackError(f"{name} is not a whole safetensors file: {error}") from None
    if "__metadata__" in read_json(data[8 : 8 + int.from_bytes(data[:8], "little")], name):
        raise PackError(f"{name} holds __metadata__, but a vector's header names tensors alone")
    records = {t: (group, document[group][t]) for group in GROUPS for t in document[group]}
    for extra in sorted(tensors.keys() - records.keys()):
        raise PackError(f"{name} holds the tensor {extra}, which case.json does not name")
    for missing in sorted(records.keys() - tensors.keys()):
        raise PackError(f"{name} lacks the tensor {missing}")
    groups: dict[str, dict[str, NDArray[Any]]] = {group: {} for group in GROUPS}
    for tensor, (group, record) in records.items():
        found = tensor_record(tensors[tensor])
        for what in ("dtype", "shape", "sha256"):
            if found[what] != record[what]:
                raise PackError(
                    f"{name}: {tensor} has {what} {found[what]}, but case.json says {record[what]}"
                )
        tensors[tensor].flags.writeable = False
        groups[group][tensor] = tensors[tensor]
    return dict(groups)


@cache
def _clauses() -> frozenset[str]:
    from refattn.spec_text import load_clauses

    return frozenset(load_clauses())


def _check_sense(case: Case, name: str) -> None:
    """Refuse a case that is whole, but of which no operation or clause knows.

    Raises:
        PackError: names what does not fit.
    """
    unknown = [id_ for id_ in case.clauses if id_ not in _clauses()]
    drawn = sorted(case.draws.keys() ^ case.inputs.keys())
    if unknown:
        why = f"there is no clause {unknown[0]}"
    elif drawn:
        why = f"{drawn[0]} is not both an input and in draws"
    else:
        why = misfit(case.op, case.parameters, case.inputs, case.outputs)
        why = why or misbound(case.outputs, case.units, case.bounds)
    if why:
        raise PackError(f"{name}: {why}")


def _case(document: Mapping[str, Any], tensors: Mapping[str, Tensors]) -> Case:
    bounds = {
        profile: {output: (b[0], b[1], b[2]) for output, b in outputs.items()}
        for profile, outputs in document["bounds"].items()
    }
    lists = ("clauses", "flags", "requires", "dtypes", "kills")
    plain = ("id", "summary", "op", "parameters", "conventions", "draws", "certification")
    fields: dict[str, Any] = {name: document[name] for name in plain}
    fields |= {name: tuple(document[name]) for name in lists}
    fields |= {group: tensors[group] for group in GROUPS}
    return Case(**fields, bounds=bounds)


def read_case(folder: Path | str, entry: Entry | None = None, root: Path | None = None) -> Case:
    """Read one case strictly.

    Args:
        folder: the case's folder.
        entry: its line of pack.json; the hashes of the files are then compared with it.
        root: the pack that the files must lie in; the folder itself if None.

    Returns:
        The case; its arrays cannot be written to.

    Raises:
        PackError: anything missing, added or changed, or a case without sense.
    """
    folder = Path(folder)
    root = folder if root is None else root
    relative = folder.relative_to(root).as_posix()
    _check_listing(_inside(root, relative), set(CASE_FILES), str(folder))
    case_data, tensor_data = (
        _read_bytes(_inside(root, f"{relative}/{name}")) for name in CASE_FILES
    )
    if entry is not None:
        pairs = ((case_data, entry.case_sha256), (tensor_data, entry.tensors_sha256))
        for name, (data, expected) in zip(CASE_FILES, pairs, strict=True):
            if sha256(data) != expected:
                raise PackError(
                    f"{folder / name} has sha256 {sha256(data)}, but pack.json says {expected}"
                )
    document = read_canonical(case_data, str(folder / CASE_FILES[0]))
    check_schema(document, "case", str(folder / CASE_FILES[0]))
    expected_id = folder.resolve().name if entry is None else entry.id
    if document["id"] != expected_id:
        raise PackError(f"{folder} holds the case {document['id']}, not {expected_id}")
    tensors = _read_tensors(tensor_data, document, str(folder / CASE_FILES[1]))
    case = _case(document, tensors)
    _check_sense(case, str(folder))
    return case


def root_hash(index: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the canonical pack.json without its root hash."""
    return sha256(canonical_json({k: v for k, v in index.items() if k != "root_sha256"}))


def read_index(path: Path | str) -> dict[str, Any]:
    """Read pack.json of a pack strictly, without its cases.

    Raises:
        PackError: it is missing, does not fit the schema, or its root hash is wrong.
    """
    name = Path(path) / "pack.json"
    index = read_canonical(_read_bytes(_inside(Path(path), "pack.json")), str(name))
    check_schema(index, "pack", str(name))
    if root_hash(index) != index["root_sha256"]:
        raise PackError(f"{name} has root hash {root_hash(index)}, but says {index['root_sha256']}")
    ids = [entry["id"] for entry in index["cases"]]
    if ids != sorted(set(ids)):
        raise PackError(f"{name} lists its cases out of order, or one of them twice")
    result: dict[str, Any] = index
    return result


def read_pack(path: Path | str) -> Pack:
    """Read a whole pack strictly.

    Args:
        path: the folder that holds pack.json.

    Returns:
        The pack, with every case read and every hash compared.

    Raises:
        PackError: one sentence about the first thing missing, added or changed.
    """
    root = Path(path)
    index = read_index(root)
    size = index["size"]
    for path in sorted(_listed(root, str(root)) - {"pack.json", size, *COMPANIONS}):
        raise PackError(f"{root} holds {path}, which belongs to no pack")
    entries = tuple(
        Entry(e["id"], e["path"], e["case_sha256"], e["tensors_sha256"]) for e in index["cases"]
    )
    for entry in entries:
        _inside(root, entry.path)
        if entry.path != f"{size}/{entry.id}":
            raise PackError(f"{entry.id} has the path {entry.path}, not {size}/{entry.id}")
    _check_listing(_inside(root, size), {e.id for e in entries}, str(root / size))
    flags = {name: Flag(**flag) for name, flag in index["flags"].items()}
    cases = tuple(read_case(root / e.path, e, root) for e in entries)
    for case in cases:
        for flag in case.flags:
            if flag not in flags:
                raise PackError(f"{case.id} has the flag {flag}, which pack.json does not define")
    return Pack(root, size, index["spec_version"], index["root_sha256"], flags, entries, cases)


def core_pack() -> Pack:
    """Read the core pack of the specification.

    Raises:
        PackError: it is missing or damaged.
    """
    from refattn.spec_text import spec_root

    return read_pack(spec_root() / "vectors")
