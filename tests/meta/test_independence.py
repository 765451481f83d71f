"""The oracle certifies without a single module of the reference in memory."""

import subprocess
import sys
from pathlib import Path

import pytest

import refattn

PROGRAM = """
import sys, types
package = types.ModuleType("refattn")
package.__path__ = [sys.argv[1]]          # the package's folder without its public names
sys.modules["refattn"] = package
import numpy as np
from refattn.certify import certify
one = np.ones((1, 1, 1, 4), np.float32)
certificate = certify("attention", {"query": one, "key": one, "value": one}, {}, {})
assert certificate.outputs["output"].tolist() == one.tolist()
assert certificate.outputs["logsumexp"].tolist() == [[[2.0]]]
print("\\n".join(m for m in sys.modules if m.startswith("refattn.")))
"""


@pytest.mark.clause("OWN-EXACT1")
def test_certifying_loads_nothing_of_the_reference():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(refattn.__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert loaded
    strangers = [m for m in loaded if not m.startswith("refattn.certify")]
    assert not strangers
