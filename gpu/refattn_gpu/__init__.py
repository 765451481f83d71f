"""Attention on NVIDIA GPUs: readable kernels, the reference text on the device, and their proof.

Importing this package needs neither CUDA nor Numba; what does says so at its first use.
"""
