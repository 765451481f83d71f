"""Verification of packs: every byte made again, and values proven by a second engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from refattn.vectors.canonical import PackError, sha256
from refattn.vectors.families import Draw
from refattn.vectors.generate import Engine, engine, make_case
from refattn.vectors.pack import CASE_FILES, Case, Entry, read_case, read_pack
from refattn.vectors.recipes import CaseRecipe
from refattn.vectors.workers import results
from refattn.vectors.write import case_bytes

SAMPLE = 20
"""One case in this many is proven by the second engine, unless all are asked for."""


class Verified(NamedTuple):
    """What a verification did: cases made again, and those proven twice."""

    root_hash: str
    remade: int
    proven_twice: int


def sampled(ids: Sequence[str], one_in: int) -> list[str]:
    """Return a fixed sample of ids, about one in `one_in`, at least one."""
    by_hash = sorted(ids, key=lambda i: hashlib.sha256(i.encode()).hexdigest())
    return sorted(by_hash[: max(1, len(ids) // one_in)])


def recipe_of(case: Case) -> CaseRecipe:
    """Return the recipe that a case states."""
    draws = {n: Draw(d["kind"], case.inputs[n].shape, d["options"]) for n, d in case.draws.items()}
    stated = (case.id, case.summary, case.clauses, case.flags, case.op)
    return CaseRecipe(*stated, case.parameters, case.conventions, draws, case.kills)


def verify_case(root: Path, entry: Entry, second: bool = False, with_: Engine | None = None) -> str:
    """Make a case again from what it states and compare every byte.

    Args:
        root: folder of the pack.
        entry: the case's line of pack.json.
        second: prove the values by the second engine too.
        with_: the first engine, `engine()` if None.

    Returns:
        The id.

    Raises:
        PackError: the bytes differ, or the second engine disagrees.
    """
    case = read_case(root / entry.path, entry, root)
    again = case_bytes(make_case(recipe_of(case), with_ or engine()))
    stated = (entry.case_sha256, entry.tensors_sha256)
    for name, data, expected in zip(CASE_FILES, again, stated, strict=True):
        if sha256(data) != expected:
            raise PackError(f"{case.id}/{name} is not what certification gives here")
    if second:
        from refattn.certify import recertify

        try:
            recertify(case.op, case.inputs, case.parameters, case.conventions, case.outputs)
        except ValueError as error:
            raise PackError(f"{case.id} is not proven by the second engine: {error}") from None
    return case.id


def _results(root: Path, entries: Sequence[Entry], twice: set[str], jobs: int) -> Iterator[str]:
    """Return the ids of cases as they are verified."""
    return results(verify_case, [(root, e, e.id in twice) for e in entries], jobs)


def verify(
    path: Path | str,
    *,
    every: int = SAMPLE,
    jobs: int = 1,
    only: Sequence[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Verified:
    """Verify a pack: read it strictly, make every case again, prove a sample twice.

    Args:
        path: folder of the pack.
        every: one case in this many is proven by the second engine; 1 for all.
        jobs: how many processes work at once.
        only: these ids alone; all if None.
        progress: called with cases done, cases in all, and an id.

    Raises:
        PackError: the first thing that is not as it should be.
    """
    pack = read_pack(path)
    known = {entry.id for entry in pack.entries}
    for id_ in only or ():
        if id_ not in known:
            raise PackError(f"there is no case {id_} in {path}")
    entries = [e for e in pack.entries if only is None or e.id in only]
    twice = set(sampled([e.id for e in entries], every))
    for done, id_ in enumerate(_results(Path(path), entries, twice, jobs), 1):
        if progress is not None:
            progress(done, len(entries), id_)
    return Verified(pack.root_hash, len(entries), len(twice))
