"""Case families, certified packs, exports."""
