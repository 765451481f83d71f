"""Certified values: an oracle that imports nothing of the reference."""
