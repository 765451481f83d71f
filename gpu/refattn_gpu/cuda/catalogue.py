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


ENTRIES = {
    "forward": "attention_forward",
    "ffma": "attention_ffma",
    "split": "attention_split",
    "merge": "attention_merge",
    "backward_query": "attention_backward_query",
    "backward_key": "attention_backward_key",
    "backward_only_key": "attention_backward_key",
    "backward_only_value": "attention_backward_key",
    "instructions": "single_instructions",
    "hopper": "attention_forward_hopper",
    "instructions_hopper": "single_instructions",
}
"""The function that each kernel is."""

FORWARD = ("forward", "ffma", "split", "hopper")
"""The kernels of forward passes: each computes any attention that it has a variant for. Behind
"split" runs "merge"."""

BACKWARD = ("backward_query", "backward_key", "backward_only_key", "backward_only_value")
"""The kernels of backward passes: of dQ, of dK and dV, and of one of these where both do not fit a
thread's registers."""


HOPPER = ("hopper", "instructions_hopper")
"""The kernels that only a Hopper runs: they take maps of tensors, and have warps that only copy."""


class Tile(NamedTuple):
    """How a block shares its work."""

    rows: int
    """B_r: queries of a block; keys where it makes dK and dV."""
    cols: int
    """B_c: keys, or queries, of a tile; two tiles are in shared memory at a time."""
    warps: int
    """Of a block, of those that have 16 or 32 of the rows each."""
    blocks: int
    """That a multiprocessor shall hold at least: it limits the registers of a thread."""
    q_in_registers: bool
    """Whether Q_i is read from shared memory once, or for every tile of keys."""
    split: int = 0
    """Keys of a block whose warps share keys, `cols` each; 0 where they share rows."""


class Variant(NamedTuple):
    """One kernel as it is compiled."""

    kernel: str
    """One of `ENTRIES`."""
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
    def source(self) -> str:
        """The file that it is compiled from."""
        other = {"hopper": "forward_hopper.cu"}.get(self.kernel, f"{self.kernel}.cu")
        return "backward_key.cu" if "_only_" in self.kernel else other

    @property
    def entry(self) -> str:
        """The name of the function."""
        return ENTRIES[self.kernel]

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * (self.tile.warps + self.copying)

    @property
    def copying(self) -> int:
        """Warps of a block that only copy."""
        return 4 if self.kernel in HOPPER else 0

    @property
    def overlaps(self) -> bool:
        """Whether a Hopper makes weights of a tile while the values of the last one are multiplied.

        The text stands twice then: with terms it would be 30,000 instructions, and where a head
        has 256 features 172 bytes spilled.
        """
        return self.kernel == "hopper" and not self.terms and self.features <= 128

    @property
    def targets(self) -> tuple[str, ...]:
        """What it is compiled for."""
        return ("sm_90a",) if self.kernel in HOPPER else TARGETS

    @property
    def shared_bytes(self) -> int:
        """Of a block: own tiles, stages of K_j and V_j, or of Q_i and dO_i, weights, barriers."""
        if self.kernel == "merge":
            return 0
        keys = self.tile.cols * self.tile.warps // self.shares
        rows = self.own_tiles * self.tile.rows + 2 * self.stages * keys
        more = self.weight_bytes * self.tile.rows + (128 if self.copying else 0)
        return itemsize(self.dtype) * self.features * rows + more

    @property
    def shares(self) -> int:
        """Warps among which a block's rows are divided; those of a split have all rows each."""
        return 1 if self.tile.split else self.tile.warps

    @property
    def own_tiles(self) -> int:
        """Q_i; or Q_i and dO_i, or K_j and V_j."""
        return 2 if self.kernel in BACKWARD else 1

    @property
    def stages(self) -> int:
        """Two, of which one travels; or one, of which K_j travels while V_j is read."""
        return 1 if self.kernel == "ffma" else 2

    @property
    def weight_bytes(self) -> int:
        """Of a row, for weights that pass from lane to lane, 32 at a time; or 0."""
        return 128 if self.kernel == "ffma" else 0

    def runs_on(self, target: str) -> bool:
        """Return whether it compiles for a device."""
        return self.kernel not in HOPPER or target in self.targets

    def defines(self) -> dict[str, int]:
        """Return what the compiler is told."""
        rows, cols, warps, blocks, q_in_registers, split = self.tile
        return {
            "FEATURES": self.features,
            "SPLIT": split,
            "SHARES": self.shares,
            "ROWS": rows,
            "COLS": cols,
            "WARPS": warps,
            "BLOCKS": blocks,
            "Q_IN_REGISTERS": int(q_in_registers),
            "OWN_TILES": self.own_tiles,
            "STAGES": self.stages,
            "WEIGHT_BYTES": self.weight_bytes,
            "COPYING": self.copying,
            "MAPS": int(self.kernel in HOPPER),
            "OVERLAP": int(self.overlaps),
            "GIVES_KEY": int(self.kernel != "backward_only_value"),
            "GIVES_VALUE": int(self.kernel != "backward_only_key"),
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

FFMA = {
    32: Tile(128, 64, 4, 2, False),
    64: Tile(128, 64, 4, 2, False),
    128: Tile(128, 64, 8, 1, False),
    256: Tile(64, 32, 4, 1, False),
}
"""Those of the kernel of multiply-adds, likewise. Where sums leave room, a thread has 8 rows by 8
keys, which read 16 chunks for 256 multiply-adds; 4 rows by 8 keys read 12 for 128."""

SPLIT16 = {
    32: Tile(16, 16, 4, 4, False, 512),
    64: Tile(16, 16, 4, 4, False, 512),
    128: Tile(16, 16, 4, 3, False, 512),
    256: Tile(16, 16, 4, 1, False, 512),
}
"""Those of few queries and many keys, in 16 bits: 16 rows are the fewest that an mma takes."""

SPLIT32 = {
    32: Tile(16, 16, 4, 4, False, 512),
    64: Tile(16, 16, 4, 3, False, 512),
    128: Tile(16, 16, 4, 1, False, 512),
}
"""The same for float32."""
HOPPERS = {
    64: Tile(128, 128, 8, 1, False),
    128: Tile(128, 128, 8, 1, False),
    256: Tile(128, 64, 8, 1, False),
}
"""Tiles of 16 bits on a Hopper: two warp groups of 64 rows; smaller heads end in zeros."""

HOPPERS_TERMS = {
    64: HOPPERS[64],
    128: Tile(128, 64, 8, 1, False),
    256: Tile(128, 32, 8, 1, False),
}
"""The same where logits are made of more: at twice the keys 128 features spilled 148 bytes, and 256
spilled 228."""

NARROW = Tile(128, 16, 8, 1, False)
"""What fits of the widest heads: beside a sum of theirs there is room for little."""

BACKWARD16 = {
    "backward_query": {
        32: Tile(128, 64, 8, 1, False),
        64: Tile(128, 64, 8, 1, False),
        128: Tile(128, 32, 8, 1, False),
        256: NARROW,
    },
    "backward_key": {
        32: Tile(128, 64, 8, 1, False),
        64: Tile(128, 32, 8, 1, False),
        128: Tile(128, 32, 8, 1, False),
    },
    "backward_only_key": {256: NARROW},
    "backward_only_value": {256: NARROW},
}
"""Tiles of 16 bits for gradients, by kernel and features."""

KEYS_TERMS = {**BACKWARD16["backward_key"], 128: NARROW}
"""The same for dK and dV where logits are made of more: at twice the columns 16 bytes spilled on an
H100."""

BACKWARD32 = {
    "backward_query": {
        32: Tile(128, 32, 8, 1, False),
        64: Tile(128, 32, 8, 1, False),
        128: NARROW,
    },
    "backward_key": {32: Tile(128, 32, 8, 1, False), 64: Tile(128, 32, 8, 1, False)},
    "backward_only_key": {128: NARROW},
    "backward_only_value": {128: NARROW},
}
"""Tiles of float32, likewise, with and without terms."""

SMALL = Tile(32, 16, 2, 1, True)
"""A tile for the emulation: two warps, and many tiles of a short sequence."""

SMALL_SPLIT = Tile(16, 16, 2, 1, False, 32)
"""The same for the kernel that splits keys: several splits of a short sequence."""

SMALL_FFMA = Tile(32, 32, 2, 1, False)
"""The same for the kernel whose weights pass 32 at a time."""
SMALL_HOPPER = Tile(64, 16, 4, 1, False)
"""The same of one warp group."""


def itemsize(dtype: str) -> int:
    """Return the bytes of a number."""
    return 4 if dtype == "float32" else 2


def features_for(d: int) -> int:
    """Return the smallest of `FEATURES` that holds d features."""
    return next(most for most in FEATURES if d <= most)


def tiles_of(kernel: str, dtype: str, terms: bool) -> dict[int, Tile]:
    """Return the tiles of a kernel by features."""
    wide = dtype == "float32"
    if kernel == "hopper":
        return {} if wide else HOPPERS_TERMS if terms else HOPPERS
    if kernel == "backward_key" and terms and not wide:
        return KEYS_TERMS
    if kernel == "ffma":
        return FFMA if wide else {}
    if kernel in ("split", "merge"):
        return SPLIT32 if wide else SPLIT16
    if kernel in BACKWARD:
        return (BACKWARD32 if wide else BACKWARD16)[kernel]
    return FLOAT32 if wide else TERMS if terms else PLAIN


def has_variant(dtype: str, d: int, terms: bool, kernel: str) -> bool:
    """Return whether a kernel takes heads of d features."""
    return any(d <= most for most in tiles_of(kernel, dtype, terms))


def variant_of(dtype: str, d: int, terms: bool, kernel: str = "forward") -> Variant:
    """Return the variant of a kernel for heads of at most d features.

    It depends on nothing else: not on the batch, nor on the number of rows.
    """
    tiles = tiles_of(kernel, dtype, terms)
    features = next(most for most in tiles if d <= most)
    return Variant(kernel, dtype, features, terms, tiles[features])


def forward_variants(dtype: str, d: int, terms: bool, kernel: str) -> list[Variant]:
    """Return what a kernel of `FORWARD` runs, in the order in which it runs."""
    kernels = ("split", "merge") if kernel == "split" else (kernel,)
    return [variant_of(dtype, d, terms, name) for name in kernels]


def backward_variants(dtype: str, d: int, terms: bool) -> list[Variant]:
    """Return the kernels of a backward pass, in the order in which they run."""
    return [
        variant_of(dtype, d, terms, kernel)
        for kernel in BACKWARD
        if features_for(d) in tiles_of(kernel, dtype, terms)
    ]


def most_features(dtype: str, kernels: tuple[str, ...] = FORWARD) -> int:
    """Return the features of the largest head that a format has variants for; 0 without any."""
    every = [d for kernel in kernels for d in tiles_of(kernel, dtype, terms=False)]
    return max(every, default=0)


def variants() -> list[Variant]:
    """Return every variant that a device may be given."""
    return [
        variant_of(dtype, d, terms, kernel)
        for kernel in (*FORWARD, "merge", *BACKWARD)
        for dtype in FORMATS
        for d in tiles_of(kernel, dtype, terms=False)
        for terms in (False, True)
    ]
