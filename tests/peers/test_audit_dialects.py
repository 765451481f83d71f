"""Each bundled subject beside its own dialect, where that departs from the default."""

from __future__ import annotations

import pytest

from optional import require
from refattn.audit.expected import expect, load_text
from refattn.audit.run import FAIL, PASS, run
from refattn.audit.subject import load_subject
from refattn.vectors.pack import core_pack

PAIRS = {
    "torch-sdpa": ("torch_sdpa", ("torch",), 2),
    "jax": ("jax_dpa", ("jax",), 10),
    "onnxruntime": ("onnx_23", ("onnx", "onnxruntime"), 2),
}
"""A subject's dialect, the packages it needs, and how many vectors at least it departs on."""


@pytest.mark.clause("OWN-EMPTY1", "OWN-POISON1")
@pytest.mark.parametrize("name", PAIRS)
def test_a_system_agrees_with_its_dialect_where_it_departs_from_the_default(name: str) -> None:
    alias, packages, least = PAIRS[name]
    for package in packages:
        require(package)
    text = load_text(alias)
    cases = [c for c in core_pack().cases if c.op == "attention" and expect(c, text).departure]
    subject = load_subject(name)
    expected = list(run(subject, cases, dtypes=("float32",), dialect=text))
    assert [(r.case_id, r.reason) for r in expected if r.status == FAIL] == []
    assert sum(r.status == PASS and bool(r.departure) for r in expected) >= least
    # by the defaults, what is declared undecided is not run, and nothing passes that departs
    plain = [r for r in run(subject, cases, dtypes=("float32",)) if r.status == PASS]
    assert plain == []
