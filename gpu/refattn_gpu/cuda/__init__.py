"""Attention in CUDA C++ on tensor cores: fast, and proven tile by tile without a device."""

from __future__ import annotations

from refattn_gpu.cuda.attention import attention
from refattn_gpu.cuda.attention_backward import attention_backward

__all__ = ["attention", "attention_backward"]
