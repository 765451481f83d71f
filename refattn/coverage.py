"""Where each clause is stated, tested and exercised: four readings of the same ids.

Code and tests are read as text, never imported, so that what is found does not depend on what
this machine can load.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from refattn import backends
from refattn.spec_text import ID, Clause, chapters, load_clauses, spec_root

PACKAGE = Path(__file__).parent
"""Folder of the package, whose docstrings state clauses."""

TITLE = "# Coverage"
"""First line of the generated table."""


class Place(NamedTuple):
    """A function, class or test, and the file and line where it starts."""

    name: str
    file: str
    line: int


class Row(NamedTuple):
    """What is known of one clause; tests is None where the tests are not at hand."""

    clause: Clause
    references: tuple[Place, ...]
    tests: tuple[Place, ...] | None
    vectors: tuple[str, ...]
    backends: tuple[str, ...]

    def holes(self) -> dict[str, str]:
        """Return what the clause goes without, each with its reason or an empty string."""
        clause = self.clause
        missing = {
            "reference": (not self.references, clause.no_code),
            "tests": (self.tests is not None and not self.tests, clause.no_test),
            "vectors": (not self.vectors, clause.no_vectors),
        }
        return {name: reason for name, (absent, reason) in missing.items() if absent}


def tests_root(root: Path | None = None) -> Path | None:
    """Return the folder of the tests, or None where the package came without them."""
    folder = (root or spec_root()).parent / "tests"
    return folder if folder.is_dir() else None


def stated(package: Path = PACKAGE) -> dict[str, list[Place]]:
    """Return the functions and classes whose docstring names a clause in its `Spec:` line."""
    found: dict[str, list[Place]] = {}
    for path, tree in _modules(package):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                place = Place(node.name, path.relative_to(package.parent).as_posix(), node.lineno)
                for id_ in spec_ids(ast.get_docstring(node) or ""):
                    found.setdefault(id_, []).append(place)
    return found


def spec_ids(docstring: str) -> list[str]:
    """Return the ids in the paragraph of a docstring that starts with `Spec:`, each once."""
    for paragraph in docstring.split("\n\n"):
        if paragraph.lstrip().startswith("Spec:"):
            return list(dict.fromkeys(ID.findall(paragraph)))
    return []


def tested(tests: Path) -> dict[str, list[Place]]:
    """Return the tests that carry `@pytest.mark.clause` with an id, directly or by their file."""
    found: dict[str, list[Place]] = {}
    for path, tree in _modules(tests):
        whole_file = [id_ for node in tree.body for id_ in _file_mark(node)]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                ids = [id_ for mark in node.decorator_list for id_ in _marked(mark)]
                if node.name.startswith("test_"):
                    ids += whole_file
                place = Place(node.name, path.relative_to(tests.parent).as_posix(), node.lineno)
                for id_ in dict.fromkeys(ids):
                    found.setdefault(id_, []).append(place)
    return found


def exercised(root: Path | None = None) -> dict[str, dict[str, str]]:
    """Return the vectors of the core pack by clause: id -> case id -> op."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(((root or spec_root()) / "vectors" / "core").glob("*/case.json")):
        case = json.loads(path.read_text("utf-8"))
        for id_ in case["clauses"]:
            found.setdefault(id_, {})[path.parent.name] = case["op"]
    return found


def rows(root: Path | None = None, package: Path = PACKAGE) -> list[Row]:
    """Return one row a clause, in the order of the index."""
    root = root or spec_root()
    folder = tests_root(root)
    references, vectors = stated(package), exercised(root)
    marks = tested(folder) if folder else None
    return [
        Row(
            clause,
            tuple(references.get(id_, ())),
            None if marks is None else tuple(marks.get(id_, ())),
            tuple(vectors.get(id_, ())),
            backends.claiming(id_, set(vectors.get(id_, {}).values())),
        )
        for id_, clause in load_clauses(root).items()
    ]


def findings(root: Path | None = None, package: Path = PACKAGE) -> list[str]:
    """Return every disagreement between index, chapters, docstrings, marks and vectors.

    Each is one sentence; an empty list says that the sets agree.
    """
    root = root or spec_root()
    clauses, folder = load_clauses(root), tests_root(root)
    sets: dict[str, Mapping[str, Any]] = {
        "a section": {id_: name for name, ids in chapters(root).items() for id_ in ids},
        "a Spec: line": stated(package),
        "a mark": tested(folder) if folder else {},
        "a vector": exercised(root),
    }
    found = [
        f"{id_} stands in {what} ({_where(ids[id_])}), but not in the index"
        for what, ids in sets.items()
        for id_ in ids
        if id_ not in clauses
    ]
    for id_, clause in clauses.items():
        if sets["a section"].get(id_) != clause.chapter:
            found.append(f"{id_} is in the index, but {clause.chapter} has no section of it")
    for row in rows(root, package):
        found += _row_findings(row)
    return found


def as_json(table: list[Row]) -> list[dict[str, Any]]:
    """Return the table as plain data."""
    return [
        {
            "id": row.clause.id,
            "title": row.clause.title,
            "chapter": row.clause.chapter,
            "references": [place._asdict() for place in row.references],
            "tests": None if row.tests is None else [place._asdict() for place in row.tests],
            "vectors": list(row.vectors),
            "backends": list(row.backends),
            "holes": row.holes(),
        }
        for row in table
    ]


def as_markdown(table: list[Row]) -> str:
    """Return the text of `spec/coverage.md`."""
    lines = [
        TITLE,
        "",
        "Generated by `refattn spec coverage --write`; do not edit.",
        "A clause, the functions whose docstring states it, the number of tests that carry its",
        "mark, the number of vectors of the core pack that exercise it, and the backends that",
        "claim the operations of those vectors.",
    ]
    for chapter in dict.fromkeys(row.clause.chapter for row in table):
        lines += ["", f"## {chapter}", ""]
        lines += ["| clause | title | reference | tests | vectors | backends |"]
        lines += ["| --- | --- | --- | ---: | ---: | --- |"]
        lines += [_line(row) for row in table if row.clause.chapter == chapter]
    lines += ["", "## Holes", ""]
    holes = [(row.clause.id, what, why) for row in table for what, why in row.holes().items()]
    lines += [f"- {id_} has no {what}: {why or '**no reason given**'}" for id_, what, why in holes]
    return "\n".join(lines + ([] if holes else ["None."])) + "\n"


def _line(row: Row) -> str:
    """Return one row of the Markdown table; a file's name says more than a line that moves."""
    shown = {f"`{p.file.removeprefix('refattn/').removesuffix('.py')}.{p.name}`": 0 for p in row[1]}
    cells = (
        f"[{row.clause.id}]({row.clause.chapter})",
        row.clause.title,
        ", ".join(shown) or "–",
        "unknown" if row.tests is None else str(len(row.tests)),
        str(len(row.vectors)),
        ", ".join(row.backends) or "–",
    )
    return "| " + " | ".join(cells) + " |"


def _row_findings(row: Row) -> Iterator[str]:
    """Yield the holes without a reason, and the reasons without a hole."""
    holes, clause = row.holes(), row.clause
    for what, reason in holes.items():
        if not reason:
            yield f"{clause.id} has no {what}, and the index gives no reason"
    given = {"reference": clause.no_code, "tests": clause.no_test, "vectors": clause.no_vectors}
    for what, reason in given.items():
        if reason and what not in holes and not (what == "tests" and row.tests is None):
            yield f"{clause.id} has {what}, but the index says why it has none: {reason}"


def _where(value: Any) -> str:
    """Return the first place of an id, for a finding."""
    first = next(iter(value)) if not isinstance(value, str) else value
    return f"{first.file}:{first.line}" if isinstance(first, Place) else str(first)


def _modules(folder: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Yield every Python file under a folder as a syntax tree."""
    for path in sorted(folder.rglob("*.py")):
        yield path, ast.parse(path.read_text("utf-8"), str(path))


def _file_mark(node: ast.stmt) -> list[str]:
    """Return the ids of a module's `pytestmark = ...`."""
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
        marks = node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else [node.value]
        return [id_ for mark in marks for id_ in _marked(mark)]
    return []


def _marked(mark: ast.expr) -> list[str]:
    """Return the literal ids of one `pytest.mark.clause(...)`."""
    if isinstance(mark, ast.Call) and ast.unparse(mark.func).endswith("mark.clause"):
        return [str(a.value) for a in mark.args if isinstance(a, ast.Constant)]
    return []
