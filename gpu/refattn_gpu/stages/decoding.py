"""One query a sequence beside torch's attention: what is asked is how fast K and V are read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from refattn_gpu import cuda
from refattn_gpu.cuda import machine
from refattn_gpu.stages.ground import Ground, Put, attempt
from refattn_gpu.stages.timing import SDPA, SIMULATED, Plan, Subject, race, rows_of

PLAN = Plan(
    lengths=(8192, 1024, 65536), features=(128,), rows=0, heads=32, rounds=(5, 21), budget=1.5
)
"""What is timed, the most telling first."""

BATCHES = (1, 16, 64)
"""Sequences."""

KEY_HEADS = (8, 32)
"""Of 32 query heads."""

LARGEST = 2**32
"""Bytes of K and V beyond which a problem is left out."""


def run(on: Ground, put: Put) -> None:
    """Report each shape: medians and spread, bytes of K and V a second, and who refused it."""
    plan = Plan(*SIMULATED) if on.simulated else PLAN
    batches, key_heads = ((1,), (1, 2)) if on.simulated else (BATCHES, KEY_HEADS)
    d = plan.features[0]
    for n_k in plan.lengths:
        for b in batches:
            for h_k in key_heads:
                if 4 * b * h_k * n_k * d <= LARGEST:
                    words = f"{b},{plan.heads}/{h_k},{n_k},{d}"
                    attempt(put, words, partial(_timed, on, plan, (b, h_k, n_k, d)))


def _timed(on: Ground, plan: Plan, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Time every subject that takes a key and value of a shape."""
    b, _, n_k, d = shape
    rng = on.xp.random.default_rng(0)
    arrays = [
        rng.standard_normal(size, dtype="float32").astype("float16")
        for size in ((b, plan.heads, 1, d), shape, shape)
    ]
    times, told = race(on, plan, _subjects(arrays))
    rows = rows_of(times, 4.0 * b * plan.heads * n_k * d)
    read = sum(array.nbytes for array in arrays[1:])
    for row in rows.values():
        row["gigabytes_a_second"] = read / row["seconds"] / 1e9
    return {"shape": shape, "heads": plan.heads, **told, "subjects": rows}


def _subjects(arrays: list[Any]) -> Iterator[Subject]:
    """Yield what computes attention of one query."""
    if not machine.absent():
        for kernel in ("split", "forward"):
            call = partial(cuda.attention, *arrays, kernel=kernel)
            yield Subject(f"refattn {kernel}", "float16", call)
    with contextlib.suppress(ImportError):
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        tensors = [torch.from_dlpack(array) for array in arrays]
        attend = torch.nn.functional.scaled_dot_product_attention
        grouped = arrays[0].shape[1] != arrays[1].shape[1]
        for name, word in SDPA.items():

            def theirs(word: str = word) -> Any:
                with sdpa_kernel(getattr(SDPBackend, word)):
                    return attend(*tensors, enable_gqa=grouped)

            yield Subject(f"torch {name}", "float16", theirs)
