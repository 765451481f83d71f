"""Attention in Numba-CUDA: Algorithm 1 by threads and shared memory, readable before it is fast."""

from __future__ import annotations

from typing import Any

from refattn_gpu.numba_cuda.attention import attention
from refattn_gpu.numba_cuda.attention_backward import attention_backward
from refattn_gpu.numba_cuda.embedding import alibi_bias, merge, rope, rope_backward

__all__ = [
    "KERNELS",
    "alibi_bias",
    "attention",
    "attention_backward",
    "merge",
    "rope",
    "rope_backward",
]


def __getattr__(name: str) -> Any:
    """Make the list of kernels when it is first asked for; their texts need numba.cuda."""
    if name != "KERNELS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from refattn_gpu.numba_cuda.catalogue import kernels

    return globals().setdefault("KERNELS", kernels())
