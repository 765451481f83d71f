"""Cases of rotary embeddings and of linear biases: angles, pairings, variants, slopes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refattn.vectors.families import Draw
from refattn.vectors.recipes import CaseRecipe, plain

ROTATION = ("ROPE-EQ14", "ROPE-EQ15", "ROPE-EQ34", "OWN-ROPE1", "NUM-ROPE1")
"""Clauses of every rotation."""

FAR = (0, 1, 255, 256, 257, 1023, 4095, 4096, 65535, 131071)
"""Positions at which low-precision angles go wrong, one after the other."""

PAIRINGS = ("interleaved", "half_split")
"""Which features form a pair: the paper's, and the one that splits the features in halves."""

LONG_FACTORS = (1.0, 1.0, 1.125, 1.5, 2.0, 3.25, 5.0, 8.0)
"""Longrope's divisors of the eight frequencies of a head of 16, in the long regime."""

VARIANTS: Mapping[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "factor": 4.0},
    "dynamic-short": {"kind": "dynamic", "factor": 2.0, "original_length": 2048, "length": 512},
    "dynamic-long": {"kind": "dynamic", "factor": 2.0, "original_length": 2048, "length": 8192},
    "yarn": {"kind": "yarn", "factor": 4.0, "original_length": 4096},
    "yarn-untruncated": {
        "kind": "yarn",
        "factor": 32.0,
        "original_length": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "yarn-mscale": {
        "kind": "yarn",
        "factor": 40.0,
        "original_length": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
    },
    "yarn-attention-factor": {
        "kind": "yarn",
        "factor": 16.0,
        "original_length": 4096,
        "attention_factor": 1.25,
    },
    "longrope-short": {
        "kind": "longrope",
        "factor": 32.0,
        "original_length": 4096,
        "length": 4096,
        "short_factor": [1.0] * 4 + [1.0625] * 4,
        "long_factor": list(LONG_FACTORS),
    },
    "longrope-long": {
        "kind": "longrope",
        "factor": 32.0,
        "original_length": 4096,
        "length": 131072,
        "short_factor": [1.0] * 4 + [1.0625] * 4,
        "long_factor": list(LONG_FACTORS),
    },
    "llama3": {
        "kind": "llama3",
        "factor": 8.0,
        "original_length": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "llama3-small": {
        "kind": "llama3",
        "factor": 32.0,
        "original_length": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "proportional": {"kind": "proportional", "partial_rotary_factor": 0.25},
    "proportional-factor": {"kind": "proportional", "partial_rotary_factor": 0.5, "factor": 8.0},
}
"""Every variant of the frequencies, with numbers as found in model configurations."""


def rope(
    id_: str,
    summary: str,
    *,
    d: int,
    positions: Draw,
    h: int = 1,
    rotary_dim: int | None = None,
    pairing: str = "interleaved",
    base: float = 10000.0,
    variant: Mapping[str, Any] | None = None,
    backward: bool = False,
    stream: str | None = None,
    clauses: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
) -> CaseRecipe:
    """Return the recipe of a rotation."""
    shape = (1, h, positions.shape[0], d)
    draws = {
        "x": Draw("normal", shape, {"stream": stream} if stream else {}),
        "positions": positions,
    }
    if backward:
        draws["d_output"] = Draw("normal", shape)
    return plain(
        "rope",
        id_,
        summary,
        (*ROTATION, *clauses),
        ("Pairing", *flags),
        draws=draws,
        parameters={
            "base": base,
            "rotary_dim": rotary_dim or d,
            "variant": dict(variant or {"kind": "default"}),
        },
        conventions={"pairing": pairing},
    )


def consecutive(n: int, start: int = 0) -> Draw:
    """Return n consecutive positions."""
    return Draw("arange", (n,), {"start": start})


def listed(values: tuple[int, ...]) -> Draw:
    """Return the given positions."""
    return Draw("given", (len(values),), {"values": list(values), "dtype": "int64"})


def rotations() -> list[CaseRecipe]:
    """Return every head size and pairing, and the paper's two-dimensional case."""
    found = []
    for pairing in PAIRINGS:
        slug = pairing.replace("_", "-")
        for d in (2, 16, 32, 64, 80, 96, 128, 256):
            two = ("ROPE-EQ12", "ROPE-EQ13") if d == 2 else ("ROPE-EQ1",)
            found.append(
                rope(
                    f"rope-{slug}-{d}",
                    f"{d} features, pairs {pairing.replace('_', ' ')}, positions 0 to 6.",
                    d=d,
                    positions=consecutive(7),
                    pairing=pairing,
                    backward=d <= 64,
                    clauses=two,
                )
            )
        for base in (500000.0, 1000000.0, 100.0):
            found.append(
                rope(
                    f"rope-{slug}-base-{base:.0f}",
                    f"The base {base:.0f}.",
                    d=32,
                    positions=consecutive(5, 11),
                    pairing=pairing,
                    base=base,
                )
            )
        for d, rotary_dim in ((64, 16), (80, 32), (96, 24)):
            found.append(
                rope(
                    f"rope-{slug}-partial-{d}-{rotary_dim}",
                    f"{rotary_dim} of {d} features are rotated.",
                    d=d,
                    positions=consecutive(5, 3),
                    rotary_dim=rotary_dim,
                    pairing=pairing,
                    backward=True,
                    clauses=("OWN-ROPE2",),
                    flags=("PartialRotary",),
                )
            )
    return found


def far() -> list[CaseRecipe]:
    """Return positions with an offset, out of order, and up to 131071."""
    found = []
    origins: Mapping[str, Draw] = {
        "far": listed(FAR),
        "end": consecutive(8, 131064),
        "offset-1000": consecutive(5, 1000),
        "shuffled": listed((9, 2, 2, 0, 4096, 31)),
    }
    for pairing in PAIRINGS:
        for name, positions in origins.items():
            for d in (32, 128) if name == "far" else (32,):
                found.append(
                    rope(
                        f"rope-{pairing.replace('_', '-')}-{name}-{d}",
                        f"{d} features at positions: {name.replace('-', ' ')}.",
                        d=d,
                        positions=positions,
                        pairing=pairing,
                        clauses=("OWN-ROPE3", "OWN-ROPE5"),
                        flags=("LongPosition",),
                    )
                )
    return found


def relative() -> list[CaseRecipe]:
    """Return the same vectors at positions m and m + s: their inner products must agree."""
    return [
        rope(
            f"rope-relative-{shift}",
            f"The same vectors at positions shifted by {shift}: inner products do not change.",
            d=16,
            h=2,
            positions=consecutive(7, shift),
            stream="rope-relative/x",
            clauses=("ROPE-EQ1", "ROPE-EQ11", "ROPE-EQ16", "ROPE-EQ35", "OWN-ROPE3"),
        )
        for shift in (0, 1, 4097)
    ]


def variants() -> list[CaseRecipe]:
    """Return every variant of the frequencies, near and far."""
    found = []
    for name, variant in VARIANTS.items():
        base = 500000.0 if name.startswith("llama3") else 10000.0
        small = variant["kind"] == "longrope"
        found.append(
            rope(
                f"rope-variant-{name}",
                f"Frequencies by the rule {variant['kind']}: {name}.",
                d=16 if small else 64,
                positions=listed((0, 1, 7, 1000, 8191, 131071)),
                pairing="half_split",
                base=base,
                variant=variant,
                backward=name in ("yarn-mscale", "llama3", "longrope-long"),
                clauses=("OWN-ROPE4", "OWN-ROPE5"),
                flags=("RopeVariant", "LongPosition"),
            )
        )
    found.append(
        rope(
            "rope-variant-yarn-partial",
            "Yarn on 32 of 64 features.",
            d=64,
            rotary_dim=32,
            positions=listed((0, 5, 4096, 32767)),
            variant=VARIANTS["yarn"],
            clauses=("OWN-ROPE2", "OWN-ROPE4"),
            flags=("RopeVariant", "PartialRotary"),
        )
    )
    return found


def decay() -> list[CaseRecipe]:
    """Return the decay factor of the paper's figure and of small heads."""
    return [
        plain(
            "rope_decay",
            f"rope-decay-{d}-{base:.0f}",
            f"Mean absolute partial sum of rotations for {d} features and the base {base:.0f}.",
            ("ROPE-EQ35", "ROPE-EQ36", "ROPE-EQ37", "NUM-OTHER1"),
            ("Decay",),
            draws={"distances": listed((0, 1, 2, 3, 7, 16, 50, 100, 151, 256, 1000))},
            parameters={"d": d, "base": base},
        )
        for d, base in ((128, 10000.0), (16, 10000.0), (64, 500000.0), (2, 10000.0))
    ]


def alibi() -> list[CaseRecipe]:
    """Return slopes of 1 to 64 heads by both rules, and biases of every distance form."""
    found = []
    for heads in range(1, 65):
        printed = heads in (8, 16)
        power = heads & (heads - 1) == 0
        own = ("ALIBI-S3b",) if printed else ("ALIBI-S3b", "ALIBI-S3c") if power else ("ALIBI-S3c",)
        n = 7 if heads <= 16 else 3
        found.append(
            plain(
                "alibi",
                f"alibi-heads-{heads}",
                f"Slopes of {heads} heads by the authors' rule, and their bias.",
                ("ALIBI-S3a", *own, "NUM-OTHER1"),
                ("Alibi",),
                parameters={"heads": heads, "n_q": n, "n_k": n + (0 if heads <= 16 else 1)},
            )
        )
    for heads in (6, 8, 12):
        found.append(
            plain(
                "alibi",
                f"alibi-geometric-{heads}",
                f"Slopes of {heads} heads by one geometric sequence.",
                ("ALIBI-S3b", "OWN-ALIBI1", "NUM-OTHER1"),
                ("Alibi",),
                parameters={"heads": heads, "n_q": 5, "n_k": 5},
                conventions={"slope_rule": "geometric"},
            )
        )
    for distance in ("absolute", "signed", "column"):
        for name, alignment in (
            ("top-left", "top_left"),
            ("bottom-right", "bottom_right"),
            ("plus-9", 9),
        ):
            found.append(
                plain(
                    "alibi",
                    f"alibi-{distance}-{name}",
                    f"The bias by {distance} distance, aligned {name}.",
                    ("ALIBI-S3a", "OWN-ALIBI1", "NUM-OTHER1"),
                    ("Alibi",),
                    parameters={"heads": 6, "n_q": 5, "n_k": 13},
                    conventions={"distance": distance, "alignment": alignment},
                )
            )
    return found


def core() -> list[CaseRecipe]:
    """Return the core cases of this file."""
    return [r for make in (rotations, far, relative, variants, decay, alibi) for r in make()]
