"""Calls a subject on a case: in its dtype, its layout and its words, and undoes the layout."""

from __future__ import annotations

import sys
import warnings
from contextlib import redirect_stdout
from typing import Any

import numpy as np

from refattn.audit.capabilities import ANY, CONVENTIONS, LAYOUTS
from refattn.audit.subject import Arrays, Subject
from refattn.backends import cast_floats
from refattn.errors import RefattnError
from refattn.vectors.pack import Case

HEADED = ("query", "key", "value", "d_output", "output", "d_query", "d_key", "d_value")
"""Tensors that the layout of a subject reorders."""


def call(subject: Subject, case: Case, dtype: str) -> Arrays:
    """Run the subject on copies of a case's tensors, in its layout and with its options."""
    offered = subject.capabilities
    inputs = {name: cast_floats(np.array(array), dtype) for name, array in case.inputs.items()}
    options = {**case.parameters, **case.conventions}
    if case.op == "attention":
        inputs, options = _understood(subject, inputs, dict(options))
    permuted = {name: _permute(name, array, offered.layout) for name, array in inputs.items()}
    # what a subject warns of or prints is its own affair: stdout may be carrying the report
    with warnings.catch_warnings(), np.errstate(all="ignore"), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        before = {name: array.tobytes() for name, array in permuted.items()}
        returned = subject.run(permuted, options)
    for name, array in permuted.items():
        if array.tobytes() != before[name]:
            raise RefattnError(f"it changed its input {name}")
    return {name: _permute(name, np.asarray(a), offered.layout) for name, a in returned.items()}


def _understood(
    subject: Subject, inputs: Arrays, options: dict[str, Any]
) -> tuple[Arrays, dict[str, Any]]:
    """Leave out what the subject does not take: gradients, false flags, fixed conventions."""
    made = subject.capabilities.conventions
    if not takes_gradients(subject, inputs):
        inputs = {n: a for n, a in inputs.items() if n not in ("d_output", "d_logsumexp")}
    chosen = {axis: choices[0] for axis, choices in CONVENTIONS.items()} | options
    options = {
        name: value
        for name, value in chosen.items()
        if value is not False and (name not in CONVENTIONS or made.get(name) == ANY)
    }
    return inputs, options


def takes_gradients(subject: Subject, inputs: Arrays) -> bool:
    """Return whether the gradients of a case can be asked of a subject."""
    features = subject.capabilities.features
    return "backward" in features and (
        "d_logsumexp" not in inputs or "logsumexp_gradient" in features
    )


def _permute(name: str, array: np.ndarray[Any, Any], layout: str) -> np.ndarray[Any, Any]:
    """Exchange heads and length of a tensor where the layout asks for it."""
    if layout == LAYOUTS[0] or name not in HEADED or array.ndim != 4:
        return array
    return np.ascontiguousarray(array.swapaxes(1, 2))
