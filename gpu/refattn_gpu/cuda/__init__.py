"""Attention in CUDA C++ on tensor cores: fast, and proven tile by tile without a device."""
