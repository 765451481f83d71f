"""Attention on the CPU: tiled kernels in Numba, deterministic, in memory linear in the lengths."""

from refattn.cpu.attention import attention
from refattn.cpu.attention_backward import attention_backward

__all__ = ["attention", "attention_backward"]
