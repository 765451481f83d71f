"""Attention on the CPU: tiled kernels in Numba, deterministic, in memory linear in the lengths."""

from refattn.cpu.alibi import alibi_bias
from refattn.cpu.attention import attention
from refattn.cpu.attention_backward import attention_backward
from refattn.cpu.rope import rope, rope_backward, rotate

__all__ = ["alibi_bias", "attention", "attention_backward", "rope", "rope_backward", "rotate"]
