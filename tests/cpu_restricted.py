"""Run by the tests in a process of its own, whose target they restrict: what does it compute?"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import ml_dtypes
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
    found = {"host": HOST._asdict(), "errors": errors, "rotations": list(rotations(drawn))}
    json.dump(found, sys.stdout)


def rotations(drawn: np.random.Generator) -> Iterator[bool]:
    """Yield whether the kernel has the reference's bits: by width, format and pairing."""
    for d in (10, 74):  # fewer pairs than lanes, and a last vector that overlaps
        x = drawn.standard_normal((3, 7, d), np.float32)
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            for pairing in ("interleaved", "half_split"):
                call = (x.astype(dtype), np.arange(7)), {"pairing": pairing}
                found, exact = (f(*call[0], **call[1]).output for f in (cpu.rope, refattn.rope))
                yield found.tobytes() == exact.tobytes()


if __name__ == "__main__":
    main()
