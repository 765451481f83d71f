"""Every variant of the kernels: format, features, and the tiles that were chosen for them."""

from __future__ import annotations

from typing import NamedTuple

from refattn_gpu.cuda.records import BYTES

FORMATS = ("float16", "bfloat16", "float32")
"""Formats of query, key and value; sums are float32."""

FEATURES = (32, 64, 128, 256)
"""Most features of a head, by variant: registers have no index."""

TARGETS = ("sm_80", "sm_90a")
"""A100 and H100."""


ENTRIES = {"forward": "attention_forward", "instructions": "single_instructions"}
"""The kernel in each source."""


class Tile(NamedTuple):
    """How a block shares its work."""

    rows: int
    """B_r: queries of a block."""
    cols: int
    """B_c: keys of a tile; two tiles are in shared memory at a time."""
    warps: int
    """Of a block; each has 16 or 32 of the rows."""
    blocks: int
    """That a multiprocessor shall hold at least: it limits the registers of a thread."""
    q_in_registers: bool
    """Whether Q_i is read from shared memory once, or for every tile of keys."""


class Variant(NamedTuple):
    """One kernel as it is compiled."""

    kernel: str
    """Its source, without the suffix."""
    dtype: str
    features: int
    terms: bool
    """Whether logits need more than the scale: bias, mask, slopes, softcap, sinks or dropout."""
    tile: Tile

    @property
    def name(self) -> str:
        """As in `budgets.toml`."""
        kind = "terms" if self.terms else "plain"
        return f"{self.kernel} {self.dtype} d{self.features} {kind}"

    @property
    def entry(self) -> str:
        """The name of the function."""
        return ENTRIES[self.kernel]

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.tile.warps

    @property
    def shared_bytes(self) -> int:
        """Of a block: Q_i, and two stages of K_j and V_j."""
        return itemsize(self.dtype) * self.features * (self.tile.rows + 4 * self.tile.cols)

    def defines(self) -> dict[str, int]:
        """Return what the compiler is told."""
        rows, cols, warps, blocks, q_in_registers = self.tile
        return {
            "FEATURES": self.features,
            "ROWS": rows,
            "COLS": cols,
            "WARPS": warps,
            "BLOCKS": blocks,
            "Q_IN_REGISTERS": int(q_in_registers),
            "TERMS": int(self.terms),
            "BFLOAT16": int(self.dtype == "bfloat16"),
            "FLOAT32": int(self.dtype == "float32"),
            "JOB_BYTES": BYTES,
        }


PLAIN = {
    32: Tile(128, 64, 4, 2, True),
    64: Tile(128, 64, 4, 2, False),
    128: Tile(128, 64, 8, 1, True),
    256: Tile(128, 32, 8, 1, False),
}
"""Tiles by features. Where registers allow, a warp has 32 rows: it then reads every number of K_j
and V_j once for two products."""

TERMS = {
    32: Tile(128, 64, 8, 1, True),
    64: Tile(128, 64, 8, 1, True),
    128: Tile(128, 64, 8, 1, False),
    256: Tile(128, 16, 8, 1, False),
}
"""The same where logits are made of more: what they are made of takes registers too."""

FLOAT32 = {
    32: Tile(128, 64, 4, 2, False),
    64: Tile(128, 64, 8, 1, False),
    128: Tile(128, 32, 8, 1, False),
}
"""The same for float32, with and without terms; the parts of 256 features do not fit registers."""

SMALL = Tile(32, 16, 2, 1, True)
"""A tile for the emulation: two warps, and many tiles of a short sequence."""


def itemsize(dtype: str) -> int:
    """Return the bytes of a number."""
    return 4 if dtype == "float32" else 2


def features_for(d: int) -> int:
    """Return the smallest of `FEATURES` that holds d features."""
    return next(most for most in FEATURES if d <= most)


def variant_of(dtype: str, d: int, terms: bool) -> Variant:
    """Return the variant for heads of at most d features.

    It depends on nothing else: not on the batch, nor on the number of rows.
    """
    features = features_for(d)
    tiles = FLOAT32 if dtype == "float32" else TERMS if terms else PLAIN
    return Variant("forward", dtype, features, terms, tiles[features])


def most_features(dtype: str) -> int:
    """Return the features of the largest head that a format has a variant for."""
    return max(FLOAT32) if dtype == "float32" else FEATURES[-1]


def variants() -> list[Variant]:
    """Return every variant that a device may be given."""
    return [
        variant_of(dtype, d, terms)
        for dtype in FORMATS
        for d in FEATURES
        if d <= most_features(dtype)
        for terms in (False, True)
    ]
