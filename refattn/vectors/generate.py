"""Generation and verification of packs: the same bytes on any machine, whole cases or none."""

from __future__ import annotations

import os
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from refattn.judge import proves_nothing
from refattn.vectors.canonical import PackError
from refattn.vectors.cases import recipes
from refattn.vectors.draws import exact_dtypes
from refattn.vectors.families import draw
from refattn.vectors.pack import COMPANIONS, Case, Entry, read_case, read_index
from refattn.vectors.recipes import CaseRecipe, features
from refattn.vectors.workers import results
from refattn.vectors.write import Bound, stored_bounds, stored_unit, write_case, write_index

Certifier = Callable[[str, Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], Any]
Bounder = Callable[[str, str, Mapping[str, float]], Mapping[str, Bound]]
Progress = Callable[[int, int, str], None]

PROFILE_DTYPE = {
    "fp64": "float64",
    "fp32": "float32",
    "tf32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp16_accumulate": "float16",
}
"""The operand dtype of each profile; a case has bounds for the profiles whose dtype is exact.

It has none for a profile in whose arithmetic it would overflow (`refattn.bounds.coefficients`), or
whose bounds are so wide that zeros would pass (`refattn.judge.proves_nothing`).
"""

SCRATCH = ".generating"
"""Folder under the target in which cases are written before they appear, and the journal lies."""


class Engine(NamedTuple):
    """What certifies values and what derives bounds; tests put small stand-ins here."""

    certify: Certifier
    coefficients: Bounder


def engine() -> Engine:
    """Return ball arithmetic and the derived bounds.

    Raises:
        PackError: the packages of the certifying engine are absent.
    """
    try:
        from refattn.bounds import coefficients
        from refattn.certify import certify
    except ModuleNotFoundError as error:
        if error.name not in ("flint", "mpmath"):
            raise
        raise PackError(
            f"certification needs {error.name}, which is absent; "
            "install it with: pip install refattn[certify]"
        ) from None
    return Engine(certify, coefficients)


def spec_version() -> str:
    """Return the version of the specification that vectors are made under: the package's."""
    from importlib.metadata import version

    return version("refattn")


def drawn(recipe: CaseRecipe) -> Case:
    """Return the case of a recipe with its inputs drawn, before anything is certified."""
    inputs = {name: draw(recipe.id, name, how) for name, how in recipe.draws.items()}
    return Case(
        id=recipe.id,
        summary=recipe.summary,
        clauses=tuple(sorted(recipe.clauses)),
        flags=tuple(sorted(recipe.flags)),
        op=recipe.op,
        parameters=recipe.parameters,
        conventions=recipe.conventions,
        requires=tuple(sorted(features(recipe))),
        dtypes=exact_dtypes(inputs),
        draws={n: {"kind": d.kind, "options": dict(d.options)} for n, d in recipe.draws.items()},
        inputs=inputs,
        outputs={},
        units={},
        bounds={},
        certification={},
        kills=tuple(sorted(recipe.kills)),
    )


def make_case(recipe: CaseRecipe, with_: Engine) -> Case:
    """Draw, certify and bound one case.

    Raises:
        PackError: certification refuses the case; the sentence names it.
    """
    from dataclasses import replace

    case = drawn(recipe)
    try:
        certificate = with_.certify(case.op, case.inputs, case.parameters, case.conventions)
    except (ValueError, ArithmeticError, KeyError, TypeError, NotImplementedError) as error:
        raise PackError(f"{case.id} cannot be certified: {type(error).__name__}: {error}") from None
    bounds = {
        profile: with_.coefficients(case.op, profile, certificate.magnitudes)
        for profile, dtype in PROFILE_DTYPE.items()
        if dtype in case.dtypes
    }
    if any(x.dtype.kind == "f" for x in certificate.outputs.values()):
        bounds = {profile: found for profile, found in bounds.items() if found}
    made = replace(
        case,
        outputs=dict(certificate.outputs),
        units={name: stored_unit(unit) for name, unit in certificate.units.items()},
        bounds=stored_bounds(bounds),
        certification={k: v for k, v in certificate.record.items() if k != "version"},
    )
    asked = {p: found for p, found in made.bounds.items() if not proves_nothing(made, p)}
    return replace(made, bounds=asked)


def _made(recipe: CaseRecipe, folder: Path, with_: Engine | None) -> Entry:
    """Make and write one case; runs in a worker."""
    case = make_case(recipe, with_ or engine())
    entry = write_case(case, folder, scratch=folder.parent.parent / SCRATCH)
    read_case(folder, entry, folder.parent.parent)  # what is written must read, strictly
    return entry


def _trusted(target: Path) -> dict[str, Entry]:
    """Return the cases that pack.json or the journal of a broken run vouches for."""
    lines: list[list[str]] = []
    if (target / "pack.json").is_file():
        try:
            index = read_index(target)
            lines = [
                [e["id"], e["path"], e["case_sha256"], e["tensors_sha256"]] for e in index["cases"]
            ]
        except PackError:
            lines = []  # a damaged index vouches for nothing: all is made again
    journal = target / SCRATCH / "journal"
    if journal.is_file():
        lines += [line.split() for line in journal.read_text("ascii", "replace").splitlines()]
    return {line[0]: Entry(*line) for line in lines if len(line) == len(Entry._fields)}


def _same_recipe(recipe: CaseRecipe, case: Case) -> bool:
    """Tell whether a case on disk is what its recipe asks for, as far as that is drawn."""
    import numpy as np

    fresh = drawn(recipe)
    stated = ("summary", "clauses", "flags", "op", "parameters", "conventions", "draws")
    listed = ("requires", "dtypes", "kills")
    return all(_plain(getattr(fresh, n)) == _plain(getattr(case, n)) for n in stated + listed) and (
        fresh.inputs.keys() == case.inputs.keys()
        and all(
            np.array_equal(x, case.inputs[n], equal_nan=x.dtype.kind == "f")
            for n, x in fresh.inputs.items()
        )
    )


def _plain(value: Any) -> Any:
    """Return a value with tuples as lists and numbers as JSON has them."""
    import json

    return json.loads(json.dumps(value))


def _kept(recipe: CaseRecipe, folder: Path, entry: Entry | None) -> bool:
    """Tell whether a case is there, whole, unchanged and what its recipe asks for."""
    if entry is None or not folder.is_dir():
        return False
    try:
        return _same_recipe(recipe, read_case(folder, entry, folder.parent.parent))
    except PackError:
        return False


def _flags(used: set[str]) -> dict[str, dict[str, str]]:
    """Return the definitions of the flags that a pack uses."""
    from refattn.spec_text import spec_root

    table = tomllib.loads((spec_root() / "vectors" / "flags.toml").read_text("utf-8"))
    for flag in sorted(used - table.keys()):
        raise PackError(f"flag {flag} is used, but spec/vectors/flags.toml does not define it")
    return {flag: table[flag] for flag in sorted(used)}


def _results(
    todo: list[CaseRecipe], folder: Path, jobs: int, with_: Engine | None
) -> Iterator[Entry]:
    """Return the entries of cases as they are made."""
    asked = [(recipe, folder / recipe.id, with_) for recipe in todo]
    return results(_made, asked, jobs if with_ is None else 1)


def generate(
    target: Path | str,
    size: str = "core",
    jobs: int = 1,
    *,
    only: Sequence[CaseRecipe] | None = None,
    fresh: bool = False,
    with_: Engine | None = None,
    progress: Progress | None = None,
) -> str:
    """Generate a pack, or finish one that was broken off.

    Cases that are whole, unchanged and asked for by the same recipe are kept; pack.json is
    written last. Two runs anywhere give the same bytes.

    Args:
        target: folder of the pack; pack.json and `<size>/<id>/` come to lie in it.
        size: "core" or "full".
        jobs: how many processes certify at once.
        only: these recipes instead of the size's (the pack's size is then "part").
        fresh: keep nothing; needed after a change of the engine or of the bounds.
        with_: the engine, `engine()` if None; a given one runs in this process.
        progress: called with cases done, cases in all, and an id.

    Returns:
        The root hash.

    Raises:
        PackError: a case cannot be certified, or the target holds what no recipe makes.
    """
    listed = list(recipes(size) if only is None else only)
    name = size if only is None else "part"
    target = Path(target)
    if with_ is None:
        engine()  # absent: nothing has been written yet
    try:
        _refuse_strangers(target, name, {recipe.id for recipe in listed})
        return _generate(listed, name, target, jobs, fresh, with_, progress)
    except OSError as error:
        raise PackError(f"{target} cannot be written: {error.strerror or error}") from None


def _generate(
    listed: list[CaseRecipe],
    name: str,
    target: Path,
    jobs: int,
    fresh: bool,
    with_: Engine | None,
    progress: Progress | None,
) -> str:
    """Make what is not there yet, then the index; returns the root hash."""
    folder, scratch = target / name, target / SCRATCH
    for path in (folder, scratch):
        path.mkdir(parents=True, exist_ok=True)
    trusted = {} if fresh else _trusted(target)
    entries = {r.id: trusted[r.id] for r in listed if _kept(r, folder / r.id, trusted.get(r.id))}
    todo = [recipe for recipe in listed if recipe.id not in entries]
    with (scratch / "journal").open("a", encoding="ascii") as journal:
        journal.writelines("\n" + " ".join(entry) + "\n" for entry in entries.values())
        journal.flush()
        (target / "pack.json").unlink(missing_ok=True)
        for recipe in todo:
            _discard(folder / recipe.id, scratch)
        for entry in _results(todo, folder, jobs, with_):
            entries[entry.id] = entry
            journal.write("\n" + " ".join(entry) + "\n")
            journal.flush()
            if progress is not None:
                progress(len(entries), len(listed), entry.id)
    used = {flag for recipe in listed for flag in recipe.flags}
    made = list(entries.values())
    root = write_index(target, name, spec_version(), _flags(used), made, scratch)
    shutil.rmtree(scratch)
    return root


def _refuse_strangers(target: Path, name: str, ids: set[str]) -> None:
    """Refuse a target with files that a pack may not hold: it could not be read afterwards."""
    if target.exists() and not target.is_dir():
        raise PackError(f"{target} is a file, but it must be a folder")
    inside = {target: {"pack.json", name, SCRATCH, *COMPANIONS}, target / name: ids}
    for folder, known in inside.items():
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.name not in known:
                raise PackError(f"{path} is made by no recipe; remove it first")


def _discard(folder: Path, scratch: Path) -> None:
    """Take a stale case out of the pack in one step, then delete it."""
    if folder.exists():
        gone = scratch / f".{folder.name}.{os.getpid()}.stale"
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)
