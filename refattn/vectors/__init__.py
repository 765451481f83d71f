"""Case families, certified packs, exports."""

from refattn.vectors.pack import Case, Pack, PackError, core_pack, read_case, read_pack

__all__ = ["Case", "Pack", "PackError", "core_pack", "read_case", "read_pack"]
