"""Cases of attention without masks: families, tile edges, head sizes, decode, captured tensors."""

from __future__ import annotations

from itertools import cycle

from refattn.vectors.families import Draw
from refattn.vectors.recipes import FAMILY_FLAGS, CaseRecipe, attention

WORDS = {
    "normal": "signed inputs of deviation 1",
    "unit": "inputs in [0, 1)",
    "spread": "magnitudes over many powers of two",
    "rising": "a row maximum that rises from key to key",
    "negative": "strongly negative logits only",
    "deep": "logits near minus c squared, far below any finite stand-in for minus infinity",
    "high": "logits all far above the overflow of exp",
    "steep": "logits of both signs in the thousands",
    "cancelling": "values of opposite sign that nearly cancel",
    "outliers": "few features sixteen times as large as the rest",
    "ties": "keys that repeat with period 3",
    "equal": "keys that are all equal: uniform weights",
    "subnormal": "values that are subnormal in float32",
    "subnormal16": "values that are subnormal in float16",
    "one_key": "a single key",
}
"""What the summary of a case says of its family."""

EDGES = tuple(edge + step for edge in (16, 32, 64, 128, 256) for step in (-1, 0, 1))
"""Lengths below, on and above the usual tile edges."""

HEAD_SIZES = (16, 32, 64, 80, 96, 128, 256)
"""Head sizes found in trained models."""

TURNING = ("normal", "rising", "negative", "unit", "cancelling")
"""Families that cases over lengths and sizes go through in turn."""

REAL_LAYERS = (0, 2, 5)
"""Layers of the captured encoder."""

REAL_ROWS = (14, 42, 25)
"""Tokens of the captured sentences."""


def families() -> list[CaseRecipe]:
    """Return every family, forward and backward."""
    found = []
    for kind in FAMILY_FLAGS:
        if kind == "one_key":
            continue
        # With 1/√16 the largest of steep logits would be a rounding tie but for e^-1000.
        d = {"outliers": 64, "steep": 32}.get(kind, 16)
        slug = kind.replace("_", "-")
        found += [
            attention(
                f"attention-family-{slug}",
                f"Attention over {WORDS[kind]}.",
                n_q=19,
                n_k=37,
                h=1 if d == 64 else 2,
                d=d,
                kind=kind,
            ),
            attention(
                f"attention-family-{slug}-backward",
                f"Attention and its gradients over {WORDS[kind]}.",
                n_q=11,
                n_k=23,
                d=d,
                kind=kind,
                backward=True,
            ),
        ]
    return found


def long_families() -> list[CaseRecipe]:
    """Return families over several tiles of keys, where running maxima and sums move."""
    flat = attention(
        "attention-long-flat",
        "4099 keys of nearly equal logits: a row sum in half precision stops growing.",
        n_q=2,
        n_k=4099,
        kind="unit",
        options={"query": {"shift": -1}},
    )
    found = [
        attention(
            f"attention-long-{kind}",
            f"Three queries over 301 keys: {WORDS[kind]}.",
            n_q=3,
            n_k=301,
            d=32 if kind == "steep" else 16,
            kind=kind,
        )
        for kind in ("normal", "rising", "negative", "cancelling", "steep", "ties")
    ]
    return [flat, *found]


def one_key() -> list[CaseRecipe]:
    """Return cases with a single key."""
    return [
        attention(
            f"attention-one-key-{n_q}x{d}",
            f"{n_q} queries over one key: the output is the value, the logit gets no gradient.",
            n_q=n_q,
            n_k=1,
            h=2,
            d=d,
            kind="one_key",
            backward=True,
        )
        for n_q, d in ((1, 16), (7, 32), (3, 80))
    ]


def edges() -> list[CaseRecipe]:
    """Return lengths around tile edges, along the keys and along the queries."""
    found = []
    turn = cycle(TURNING)
    for n in EDGES:
        for n_q, n_k, axis in ((5, n, "keys"), (n, 13, "queries")):
            found.append(
                attention(
                    f"attention-edge-{axis}-{n}",
                    f"{n} {axis}, beside a tile edge.",
                    n_q=n_q,
                    n_k=n_k,
                    kind=next(turn),
                    flags=["TileEdge"],
                )
            )
    return found


def square_edges() -> list[CaseRecipe]:
    """Return causal self-attention with lengths around tile edges."""
    return [
        attention(
            f"attention-edge-causal-{n}",
            f"Causal self-attention over {n} tokens, beside a tile edge.",
            n_q=n,
            n_k=n,
            kind=kind,
            parameters={"causal": True},
            flags=["TileEdge"],
        )
        for n, kind in zip(EDGES[:12], cycle(("normal", "rising", "negative")), strict=False)
    ]


def backward_edges() -> list[CaseRecipe]:
    """Return gradients with lengths around tile edges on either side."""
    pairs = (
        (15, 17, "normal"),
        (33, 31, "negative"),
        (63, 65, "rising"),
        (64, 64, "normal"),
        (5, 129, "rising"),
        (129, 5, "normal"),
        (3, 257, "negative"),
        (257, 3, "normal"),
    )
    return [
        attention(
            f"attention-edge-backward-{n_q}x{n_k}",
            f"Gradients of {n_q} queries over {n_k} keys, beside tile edges.",
            n_q=n_q,
            n_k=n_k,
            kind=kind,
            backward=True,
            parameters={"causal": True} if n_q == n_k else {},
            flags=["TileEdge"],
        )
        for n_q, n_k, kind in pairs
    ]


def head_sizes() -> list[CaseRecipe]:
    """Return every head size, forward and backward, and values of another size."""
    found = []
    for d in HEAD_SIZES:
        for backward in (False, True):
            n_q, n_k = (3, 7) if backward else (7, 13)
            found.append(
                attention(
                    f"attention-head-size-{d}{'-backward' if backward else ''}",
                    f"Head size {d}{', with gradients' if backward else ''}.",
                    n_q=n_q,
                    n_k=n_k,
                    d=d,
                    backward=backward,
                    flags=["HeadSize"],
                )
            )
    for d, d_v in ((16, 24), (32, 8), (64, 1), (24, 80)):
        found.append(
            attention(
                f"attention-value-size-{d}-{d_v}",
                f"Keys of {d} features and values of {d_v}, with gradients.",
                n_q=5,
                n_k=11,
                h=2,
                d=d,
                d_v=d_v,
                backward=True,
                flags=["ValueSize"],
            )
        )
    return found


def scales() -> list[CaseRecipe]:
    """Return given scales: one, small, negative, and one that float64 cannot hold exactly."""
    return [
        attention(
            f"attention-scale-{name}",
            f"The given scale {scale} in place of one over the root of the head size.",
            n_q=7,
            n_k=11,
            parameters={"scale": scale},
            backward=True,
        )
        for name, scale in (("one", 1.0), ("small", 0.0625), ("negative", -0.125), ("third", 0.3))
    ]


def decode() -> list[CaseRecipe]:
    """Return one query over many keys: the last row of a cache."""
    found = []
    for n_k, h, h_k, kind in ((97, 4, 2, "normal"), (256, 4, 1, "rising"), (511, 2, 1, "negative")):
        found.append(
            attention(
                f"attention-decode-{n_k}",
                f"One query against a cache of {n_k} keys, {h} heads over {h_k}.",
                n_q=1,
                n_k=n_k,
                h=h,
                h_k=h_k,
                kind=kind,
                parameters={"causal": True},
                conventions={"alignment": "bottom_right"},
                clauses=["OWN-CACHE1"],
                flags=["Decode", "CausalAlignment"],
            )
        )
    found.append(
        attention(
            "attention-chunk-offset",
            "A chunk of five queries that starts at position 20 of a cache of 31 keys.",
            n_q=5,
            n_k=31,
            h=2,
            parameters={"causal": True},
            conventions={"alignment": 20},
            backward=True,
            clauses=["OWN-CACHE1"],
            flags=["Decode", "CausalAlignment"],
        )
    )
    return found


def real_draws(
    sentences: tuple[int, ...], layer: int, h: int, n: int, short: bool
) -> dict[str, Draw]:
    """Return draws of query, key and value from the captured tensors."""
    return {
        name: Draw(
            "real",
            (len(sentences), h, n, 32),
            {
                "names": [f"sentence{s}.layer{layer}.{name}" for s in sentences],
                "short": short,
            },
        )
        for name in ("query", "key", "value")
    }


def real() -> list[CaseRecipe]:
    """Return attention inside the encoder: as captured, cut to eight bits, padded, causal."""
    found = []
    for s, n in enumerate(REAL_ROWS):
        for layer in REAL_LAYERS:
            for short in (False, True):
                if short and s != 2:
                    continue
                bits = "cut to eight bits" if short else "as captured"
                found.append(
                    attention(
                        f"attention-real-s{s}-layer{layer}{'-short' if short else ''}",
                        f"Sentence {s}, layer {layer} of the MiniLM encoder, {bits}.",
                        n_q=n,
                        n_k=n,
                        h=2,
                        d=32,
                        inputs=real_draws((s,), layer, 2, n, short),
                        flags=["RealTensors"],
                    )
                )
    found.append(
        attention(
            "attention-real-backward",
            "Sentence 0, layer 2 of the MiniLM encoder, causal, with gradients.",
            n_q=14,
            n_k=14,
            h=2,
            d=32,
            inputs=real_draws((0,), 2, 2, 14, False),
            parameters={"causal": True},
            backward=True,
            flags=["RealTensors"],
        )
    )
    found.append(
        attention(
            "attention-real-padded",
            "Two sentences of 14 and 25 tokens in one padded batch, by key and query lengths.",
            b=2,
            n_q=25,
            n_k=25,
            h=2,
            d=32,
            inputs={
                **real_draws((0, 2), 2, 2, 25, True),
                "key_lengths": Draw("given", (2,), {"values": [14, 25], "dtype": "int64"}),
                "query_lengths": Draw("given", (2,), {"values": [14, 25], "dtype": "int64"}),
            },
            flags=["RealTensors"],
        )
    )
    return found


def core() -> list[CaseRecipe]:
    """Return the core cases of this file."""
    groups = (families, long_families, one_key, edges, square_edges, backward_edges)
    return [r for make in (*groups, head_sizes, scales, decode, real) for r in make()]
