"""Exports of vectors: NumPy archives, and directories in the form of ONNX node tests."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refattn.errors import RefattnError
from refattn.vectors.canonical import canonical_json
from refattn.vectors.pack import Case
from refattn.vectors.write import case_document


class ExportError(RefattnError):
    """A target that exists, or a form that is not known."""


class Exported(NamedTuple):
    """What an export did: ids written, and for each other id the reason."""

    written: tuple[str, ...]
    left_out: Mapping[str, str]


class NotExpressible(Exception):  # noqa: N818 - a property of the case
    """A case that the target form cannot express; the reason is the message."""


def write_npz(case: Case, target: Path) -> None:
    """Write `<id>.npz` (inputs, outputs and units; no pickle) and `<id>.json` (case.json)."""
    tensors: dict[str, Any] = {**case.inputs, **case.outputs, **case.units}
    np.savez(target / f"{case.id}.npz", **tensors)
    (target / f"{case.id}.json").write_bytes(canonical_json(case_document(case)))


def write_onnx(case: Case, target: Path) -> None:
    """Write `test_<id>/` with model.onnx, test_data_set_0 and the derived tolerance."""
    from refattn.vectors.export_onnx import node_test, write_node_test

    write_node_test(node_test(case), target / f"test_{case.id.replace('-', '_')}")


FORMS: Mapping[str, Callable[[Case, Path], None]] = {"npz": write_npz, "onnx": write_onnx}
"""The forms of export."""

NEEDS = {"onnx": "onnx"}
"""The optional module without which a form cannot be written."""


def export(
    cases: Iterable[Case], target: Path | str, form: str, *, overwrite: bool = False
) -> Exported:
    """Write cases into a folder in another form.

    Args:
        cases: what to export.
        target: a folder; made if absent.
        form: one of `FORMS`.
        overwrite: permit a folder that holds something; files of the same names are replaced.

    Returns:
        The ids written, and the others with the reason.

    Raises:
        ExportError: unknown form, or the folder holds something and overwrite is not set.
        ModuleNotFoundError: the form needs a module that is absent.
    """
    if form not in FORMS:
        raise ExportError(f"form is {form!r}, but it must be one of {', '.join(FORMS)}")
    if form in NEEDS:
        importlib.import_module(NEEDS[form])  # absent: nothing has been written yet
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file, but it must be a folder")
    try:
        target.mkdir(parents=True, exist_ok=True)
        if not overwrite and any(target.iterdir()):
            raise ExportError(f"{target} is not empty; name another folder, or pass --overwrite")
        written, left_out = [], {}
        for case in cases:
            try:
                FORMS[form](case, target)
            except NotExpressible as reason:
                left_out[case.id] = str(reason)
            else:
                written.append(case.id)
    except OSError as error:
        raise ExportError(f"{target} cannot be written: {error.strerror or error}") from None
    return Exported(tuple(written), left_out)
