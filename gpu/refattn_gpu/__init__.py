"""Attention on NVIDIA GPUs: readable kernels in Numba-CUDA, and the reference text on CuPy.

Importing this package needs neither CUDA nor Numba; what is missing is named on first use.
"""
