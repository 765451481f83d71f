"""Run by the tests in a process of its own, whose target they restrict: what does it compute?"""

from __future__ import annotations

import json
import sys

import numpy as np

import refattn
from refattn import cpu
from refattn.cpu.host import HOST


def main() -> None:
    drawn = np.random.default_rng(5)
    query, key, value = (drawn.standard_normal((1, 2, n, 40), np.float32) for n in (70, 91, 91))
    options = {"causal": True, "alignment": "bottom_right", "softcap": 3.0}
    found = cpu.attention(query, key, value, **options)
    wide = (array.astype(np.float64) for array in (query, key, value))
    exact = refattn.attention(*wide, **options)
    errors = [float(np.abs(a - b).max()) for a, b in zip(found, exact, strict=True)]
    json.dump({"host": HOST._asdict(), "errors": errors}, sys.stdout)


if __name__ == "__main__":
    main()
