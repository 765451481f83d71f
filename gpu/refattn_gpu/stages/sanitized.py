"""The small problems that run under compute-sanitizer: ragged tiles, every option that indexes."""

from __future__ import annotations

import sys

import numpy as np

from refattn_gpu import cuda, numba_cuda
from refattn_gpu.cuda.attention import kernels
from refattn_gpu.stages.ground import drawn, ground

SIZES = (37, 71, 24)
"""Query rows, key rows and features: no tile ends at its edge."""

FAST = "cuda-cpp"
"""The name of the kernels in CUDA C++, beside the forms of those in Numba-CUDA."""

SIMULATED = (5, 11, 8)
"""The same for the simulation."""


def main(form: str, simulated: bool) -> None:
    """Run every pass in every format, without options and with those that index."""
    n_q, n_k, d = SIMULATED if simulated else SIZES
    on = ground(simulated)
    for dtype in ("float16", "float32") if form == FAST else ("float32", "float64"):
        shapes = [(2, 4, n_q, d), (2, 2, n_k, d), (2, 2, n_k, d), (2, 4, n_q, d)]
        query, key, value, d_output, bias = drawn(on, dtype, *shapes, (1, 4, n_q, n_k))
        lengths = on.xp.asarray(np.asarray([n_k, n_k // 2]))
        for options in (
            {},
            {"causal": True, "alignment": "bottom_right", "window": (7, 0)},
            {"bias": bias, "key_lengths": lengths, "softcap": 9.0},
        ):
            if form == FAST:
                for kernel in kernels(dtype):
                    cuda.attention(query, key, value, kernel=kernel, **options)
                cuda.attention_backward(d_output, query, key, value, **options)
                continue
            numba_cuda.attention(query, key, value, form=form, **options)
            gradients = numba_cuda.attention_backward
            gradients(d_output, query, key, value, form=form, **options)
    print(f"{form}: all problems ran")


if __name__ == "__main__":
    main(sys.argv[1], "--simulate" in sys.argv)
