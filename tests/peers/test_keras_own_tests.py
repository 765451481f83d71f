"""Keras's own tests of its attention layers, with ours in the layers' place.

The tests come from the installed package; `keras_posing.py` puts ours in.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from optional import lacking, require_device

pytestmark = pytest.mark.peer("keras")

OF_KERAS_3_15 = {
    # fit, which test_lora calls, is not there on numpy, and four tests ask for gradients
    "torch": {"passed": 116, "failed": 0, "skipped": 0},
    "numpy": {"passed": 111, "failed": 1, "skipped": 4},
}
"""Outcomes of Keras's tests by backend, the same without ours."""


@pytest.mark.clause("VAS-S322a", "OWN-MASK1", "OWN-EMPTY1", "OWN-GQA1", "OWN-BACKWARD1")
@pytest.mark.parametrize("backend", OF_KERAS_3_15)
def test_kerass_own_tests_pass_on_our_layers(backend: str, tmp_path: Path) -> None:
    require_device("keras", lacking("keras"))
    command = [
        sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider",
        "-p", "no:xdist", "-p", "keras_posing", "--pyargs", "keras.src.layers.attention",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "JAX"))}
    environment |= {"KERAS_BACKEND": backend, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    last = done.stdout.splitlines()[-1]
    counted = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped)", last)}
    none = {"passed": 0, "failed": 0, "skipped": 0}
    expected = OF_KERAS_3_15[backend]
    if version("keras").startswith("3.15."):
        assert none | counted == expected, done.stdout[-3000:]
    else:
        assert (none | counted)["failed"] == expected["failed"], done.stdout[-3000:]
    if backend == "numpy":
        assert "test_lora" in re.findall(r"FAILED .*", done.stdout)[0]
    calls = re.search(r"calls: (\d+) ours, (\d+) both refuse, (\d+) left", done.stdout)
    assert calls is not None
    ours, _, left = map(int, calls.groups())
    assert ours > 100 and left < 8
