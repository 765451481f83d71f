"""The specification as data: the index of clauses, and the section of each in its chapter."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from refattn.errors import RefattnError

ID = re.compile(r"\b(?:VAS|ROPE|ALIBI|FA1|HEADS|SCORES|GPT|FLA|OWN|NUM)-[A-Z]+[0-9]+[a-z]?\b")
"""Form of a clause id: the paper's key, then the kind and number of the place."""

REQUIRED = ("paper", "where", "title", "chapter")
"""Keys that every entry of the index has."""

OPTIONAL = ("version", "no_code", "no_test", "no_vectors")
"""Further keys: the paper's version, and the reason for each thing that a clause goes without."""

HEADING = re.compile(r"^## ([A-Z0-9]+-\w+): (.+)$", re.MULTILINE)
"""First line of a clause's section."""


class SpecError(RefattnError):
    """A specification that cannot be found, or does not read as one."""


class Clause(NamedTuple):
    """One numbered normative statement, as the index has it."""

    id: str
    paper: str
    version: str
    where: str
    title: str
    chapter: str
    no_code: str = ""
    no_test: str = ""
    no_vectors: str = ""


def spec_root() -> Path:
    """Return the folder of the specification: beside the package, or inside the wheel's.

    Raises:
        SpecError: neither is there.
    """
    package = Path(__file__).parent
    for root in (package / "spec_files", package.parent / "spec"):
        if (root / "clauses.toml").is_file():
            return root
    raise SpecError(
        f"the specification was not found in {package / 'spec_files'} or {package.parent / 'spec'};"
        " install refattn again"
    )


def load_clauses(root: Path | None = None) -> dict[str, Clause]:
    """Return every clause of the index by its id, in the index's order.

    Args:
        root: folder of the specification; `spec_root()` if None.

    Raises:
        SpecError: the index is unreadable, or an entry is not in the form above.
    """
    path = (root or spec_root()) / "clauses.toml"
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"{path.name} does not read as an index of clauses: {error}") from error
    return {id_: _clause(id_, entry, path) for id_, entry in table.items()}


def chapters(root: Path | None = None) -> dict[str, dict[str, str]]:
    """Return the sections of every chapter that the index names: chapter -> id -> text.

    Raises:
        SpecError: a chapter is missing, or a section stands twice.
    """
    root = root or spec_root()
    names = dict.fromkeys(clause.chapter for clause in load_clauses(root).values())
    return {name: _sections(root / name) for name in names}


def section(id_: str, root: Path | None = None) -> str:
    """Return the Markdown text of a clause, heading included.

    Raises:
        SpecError: the id is not in the index, or its chapter has no such section.
    """
    root = root or spec_root()
    clause = find(id_, load_clauses(root))
    sections = _sections(root / clause.chapter)
    if clause.id not in sections:
        raise SpecError(f"{clause.id} is in the index, but {clause.chapter} has no section of it")
    return sections[clause.id]


def find(id_: str, clauses: Mapping[str, Clause]) -> Clause:
    """Return one clause; its letters may be given in either case.

    Raises:
        SpecError: there is none of that id; names the nearest.
    """
    import difflib

    by_letters = {known.upper(): clause for known, clause in clauses.items()}
    if id_.upper() in by_letters:
        return by_letters[id_.upper()]
    near = [
        by_letters[k].id for k in difflib.get_close_matches(id_.upper(), by_letters, cutoff=0.5)
    ]
    hint = f"; near it: {', '.join(near)}" if near else ""
    raise SpecError(f"there is no clause {id_}{hint} (refattn spec list names them all)")


def fields(text: str) -> dict[str, str]:
    """Return the parts of a section: `Source`, `States`, `Leaves open`, `Notes`."""
    parts = re.split(r"^(Source|States|Leaves open|Notes):", text, flags=re.MULTILINE)
    return {name: body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def _clause(id_: str, entry: Any, path: Path) -> Clause:
    """Check one entry of the index."""
    if not ID.fullmatch(id_):
        raise SpecError(f"{path.name}: {id_} is not of the form of a clause id, such as FA1-ALG1")
    if not isinstance(entry, dict):
        raise SpecError(f"{path.name}: {id_} is {entry!r}, but it must be a table")
    for key in REQUIRED:
        if key not in entry:
            raise SpecError(f"{path.name}: {id_} has no {key}")
    for key, value in entry.items():
        if key not in (*REQUIRED, *OPTIONAL):
            raise SpecError(f"{path.name}: {id_} has {key}, which is no key of a clause")
        if not isinstance(value, str) or not value.strip():
            raise SpecError(f"{path.name}: {id_} has {key}={value!r}, but it must be a sentence")
    return Clause(id=id_, **{"version": "", **entry})


def _sections(path: Path) -> dict[str, str]:
    """Return the sections of one chapter by clause id."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise SpecError(f"chapter {path.name} does not read: {why}") from error
    found: dict[str, str] = {}
    for match in HEADING.finditer(text):
        if match[1] in found:
            raise SpecError(f"chapter {path.name} has two sections of {match[1]}")
        end = text.find("\n## ", match.end())
        found[match[1]] = text[match.start() : end if end >= 0 else None].rstrip() + "\n"
    return found
