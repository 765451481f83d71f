"""What the kernels in CUDA C++ cost a GPU, learnt without one.

python -m refattn_gpu.cuda.costs            prints registers, spills and memory of every variant
python -m refattn_gpu.cuda.costs --write    makes them the budget that a test holds changes to
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from refattn.errors import RefattnError
from refattn_gpu.cuda.build import build, release
from refattn_gpu.cuda.catalogue import HOPPER, Variant, variants
from refattn_gpu.ptx import Table, as_toml

BUDGETS = Path(__file__).with_name("budgets.toml")
"""What each variant may cost; `ptxas` is the one inside NVRTC."""

REMEDY = "pip install nvidia-cuda-nvdisasm brings one"
"""Where a disassembler comes from."""

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9]*)", re.M)
"""A line of a disassembly: address, predicate, operation."""


def measured() -> Table:
    """Compile every variant for every target.

    Raises:
        BuildError: there is no compiler here, or it refuses a kernel.
    """
    return {v.name: {target: build(v, target).usage for target in v.targets} for v in variants()}


def _disassembler() -> str:
    spec = importlib.util.find_spec("nvidia")
    folders = (spec.submodule_search_locations or []) if spec else []
    found = (path for folder in folders for path in Path(folder).glob("*/bin/nvdisasm*"))
    return str(next(found, ""))


def no_nvdisasm() -> str:
    """Return why nothing disassembles here; an empty string if something does."""
    return "" if _disassembler() else f"nvdisasm was not found: {REMEDY}"


def operations(code: bytes) -> Counter[str]:
    """Return how often each operation of the machine stands in a cubin, modifiers aside.

    Raises:
        RefattnError: there is no disassembler, or it refuses the cubin.
    """
    return Counter(INSTRUCTION.findall(disassembly(code)))


def disassembly(code: bytes) -> str:
    """Return the machine code of a cubin as text.

    Raises:
        RefattnError: there is no disassembler, or it refuses the cubin.
    """
    if why := no_nvdisasm():
        raise RefattnError(why)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [_disassembler(), "-c", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RefattnError(f"nvdisasm refuses the cubin: {' '.join(done.stderr.split())[:300]}")
    return done.stdout


PRODUCTS = {
    "forward": ("S", "O"),
    "ffma": ("S", "O"),
    "split": ("S", "O"),
    "merge": (),
    "hopper": ("S", "O"),
    "backward_query": ("S", "dP", "dQ"),
    "backward_key": ("S", "dP", "dV", "dK"),
    "backward_only_key": ("S", "dP", "dK"),
    "backward_only_value": ("S", "dV"),
}
"""Products of tiles that each kernel makes in a turn of its loop."""


def products(variant: Variant) -> int:
    """Return how many mma, or wgmma, the text has: of one turn of its loop, or of two."""
    rows, cols, *_ = variant.tile
    if variant.kernel == "ffma":
        return 0
    if variant.kernel in HOPPER:
        return (1 + variant.overlaps) * (variant.features // 16 + cols // 16)
    steps = variant.features // 16 if variant.dtype != "float32" else 3 * (variant.features // 8)
    return len(PRODUCTS[variant.kernel]) * (rows // variant.shares // 16) * (cols // 8) * steps


def main(words: list[str] | None = None) -> int:
    """Print or write the costs of every variant."""
    parser = argparse.ArgumentParser(prog="python -m refattn_gpu.cuda.costs")
    parser.add_argument("--write", action="store_true", help="make the costs the budget")
    asked = parser.parse_args(words)
    try:
        text = as_toml(measured(), release(), "refattn_gpu.cuda.costs")
    except RefattnError as error:
        print(f"refattn_gpu.cuda.costs: {error}", file=sys.stderr)
        return 2
    if asked.write:
        BUDGETS.write_text(text, "utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
