"""The process that `refattn.bench.memory.measure` starts, by its name and with its words."""

from __future__ import annotations

import json
import sys
import warnings

from refattn.bench.memory import grow
from refattn.bench.problem import draw
from refattn.bench.shapes import Shape

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # what a library says while it loads is its own affair
    name, sizes, causal, backward, dtype, threads = json.loads(sys.argv[1])
    grown = grow(name, draw(Shape(*sizes), dtype, causal, backward, threads))
    print(json.dumps(list(grown)))
