"""Attention on the CPU: tiled kernels in Numba, deterministic, in memory linear in the lengths."""

from refattn.cpu.attention import attention

__all__ = ["attention"]
