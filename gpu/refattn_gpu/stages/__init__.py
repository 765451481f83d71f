"""What `python -m refattn_gpu.measure` does on a GPU, a stage a module, each on its own."""

from __future__ import annotations

from typing import NamedTuple


class Stage(NamedTuple):
    """One stage of a measurement."""

    name: str
    """Also its module, which has `run(ground, put)`."""
    limit: int
    """Seconds after which it is ended; what it had found by then is kept."""
    says: str
    """What it finds out."""


STAGES = (
    Stage("instructions", 20, "single instructions on the device, word by word as emulated"),
    Stage(
        "compilation", 45, "what every kernel in CUDA C++ costs here, by the compiler that is here"
    ),
    Stage("conformance", 150, "every certified vector, on every backend, in every dtype"),
    Stage("accuracy", 25, "errors on inputs with outliers, beside torch's attention"),
    Stage("determinism", 50, "the same bits in a hundred runs and whatever shares the batch"),
    Stage("memory", 40, "device memory beside inputs and outputs, against the number of keys"),
    Stage("timing", 130, "beside torch's attention and standard attention, turn by turn"),
    Stage("gradients", 50, "backward beside torch's, which is asked to be deterministic"),
    Stage("sanitizer", 90, "compute-sanitizer's memcheck and racecheck on small shapes"),
)
"""In the order in which they run; together they end within ten minutes."""
