"""Cases of the remaining ops: multi-head, importance, tiles, merging, scores, counts, streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refattn.vectors.families import Draw
from refattn.vectors.recipes import CaseRecipe, plain


def multihead_draws(
    *, b: int, n_q: int, n_k: int, e: int, h: int, d: int, same: bool, stream: str = ""
) -> dict[str, Draw]:
    """Return inputs and weights; with `same` the source is the query input (self-attention)."""

    def at(name: str) -> dict[str, Any]:
        return {"stream": f"{stream}/{name}"} if stream else {}

    e_s = e if same else e + 3
    source = {"stream": f"{stream or 'multihead'}/query_input"} if same else at("source_input")
    first = {"stream": f"{stream or 'multihead'}/query_input"} if same else at("query_input")
    return {
        "query_input": Draw("normal", (b, n_q, e), first),
        "source_input": Draw("normal", (b, n_k, e_s), source),
        "w_query": Draw("normal", (h, e, d), {"shift": -2, **at("w_query")}),
        "w_key": Draw("normal", (h, e_s, d), {"shift": -2, **at("w_key")}),
        "w_value": Draw("normal", (h, e_s, d + 1), {"shift": -2, **at("w_value")}),
        "w_output": Draw("normal", (h, d + 1, e + 1), {"shift": -2, **at("w_output")}),
    }


def gated(values: list[float]) -> dict[str, Draw]:
    """Return given head gates."""
    return {"head_gates": Draw("given", (len(values),), {"values": values})}


def multihead() -> list[CaseRecipe]:
    """Return self- and cross-attention by projections, one head, gates, and a pruned head."""
    found = []
    concat = ("VAS-S322a", "VAS-S322b", "HEADS-EQ1", "NUM-OTHER1")
    ways: Mapping[str, tuple[dict[str, Any], dict[str, Draw], dict[str, Any], tuple[str, ...]]] = {
        "self": ({"n_q": 5, "n_k": 5, "same": True}, {}, {}, ()),
        "cross": ({"n_q": 5, "n_k": 7, "same": False}, {}, {}, ()),
        "causal": ({"n_q": 7, "n_k": 7, "same": True}, {}, {"causal": True}, ()),
        "scale": ({"n_q": 3, "n_k": 5, "same": False}, {}, {"scale": 0.25}, ("OWN-SCALE1",)),
        "gates": ({"n_q": 5, "n_k": 5, "same": True}, gated([0.5, 0.0, 1.0]), {}, ()),
        "gates-cross": ({"n_q": 3, "n_k": 7, "same": False}, gated([1.0, -0.25, 0.75]), {}, ()),
    }
    for name, (sizes, gates, parameters, more) in ways.items():
        for backward in (False, True):
            end = "-backward" if backward else ""
            draws = multihead_draws(b=2, e=6, h=3, d=4, **sizes) | gates
            if backward:
                draws["d_output"] = Draw("normal", (2, sizes["n_q"], 7))
            found.append(
                plain(
                    "multihead",
                    f"multihead-{name}{end}",
                    f"Three heads with projections: {name.replace('-', ' ')}.",
                    (*concat, *more),
                    ("Plain",),
                    draws=draws,
                    parameters=parameters,
                )
            )
    found.append(
        plain(
            "multihead",
            "multihead-single",
            "One head with its projections.",
            ("HEADS-S21", "VAS-S322a", "NUM-OTHER1"),
            ("Plain",),
            draws=multihead_draws(b=1, n_q=5, n_k=7, e=8, h=1, d=8, same=False),
        )
    )
    return found + emptied() + pruned()


def emptied() -> list[CaseRecipe]:
    """Return the causal rule at the other corner, whose first queries see no key."""
    return [
        plain(
            "multihead",
            f"multihead-empty-{policy}",
            f"Causal, aligned bottom-right, more queries than keys; empty rows: {policy}.",
            ("VAS-S322a", "OWN-EMPTY1", "OWN-CAUSAL1", "NUM-OTHER1"),
            ("EmptyRow", "CausalAlignment"),
            draws=multihead_draws(b=1, n_q=7, n_k=5, e=6, h=2, d=4, same=False),
            parameters={"causal": True},
            conventions={"alignment": "bottom_right", "empty_row": policy},
        )
        for policy in ("zero", "uniform")
    ]


def pruned() -> list[CaseRecipe]:
    """Return heads with a gate of zero, and the same heads cut out: the outputs are equal."""
    stream = "multihead-pruned"
    whole = multihead_draws(b=1, n_q=5, n_k=7, e=6, h=1, d=4, same=False, stream=stream)
    extra = multihead_draws(b=1, n_q=5, n_k=7, e=6, h=4, d=4, same=False, stream=stream)
    clauses = ("HEADS-S4c", "HEADS-S23", "VAS-S322a", "NUM-OTHER1")
    # A stream is read from its start, so the weights of head 0 are the same in both.
    return [
        plain(
            "multihead",
            "multihead-pruned-gated",
            "Four heads of which the last three have a gate of zero.",
            clauses,
            ("Gates",),
            draws=extra | gated([1.0, 0.0, 0.0, 0.0]),
        ),
        plain(
            "multihead",
            "multihead-pruned-cut",
            "The one head that is left of the four: the output of the gated case.",
            clauses,
            ("Gates",),
            draws=whole,
        ),
    ]


def importance() -> list[CaseRecipe]:
    """Return head importance at every granularity, with a layer of zeros and with ties."""
    found = []
    for granularity in ("token", "example", "batch"):
        for name, shape in (("small", (2, 3, 4, 5, 7)), ("wide", (3, 2, 5, 3, 16))):
            found.append(
                plain(
                    "head_importance",
                    f"importance-{granularity}-{name}",
                    f"Head importance by {granularity} over layers, examples, heads {shape[:3]}.",
                    ("HEADS-EQ2", "HEADS-S4a", "HEADS-S4b", "OWN-IMPORTANCE1", "NUM-OTHER1"),
                    ("Granularity",),
                    draws={
                        "head_outputs": Draw("normal", shape),
                        "d_head_outputs": Draw("normal", shape),
                    },
                    conventions={"granularity": granularity},
                )
            )
    zeros = {"values": [1.0] * 12 + [0.0] * 12}
    found.append(
        plain(
            "head_importance",
            "importance-zero-layer",
            "A layer without gradient keeps its zeros, and ties are ordered by index.",
            ("HEADS-S4a", "HEADS-S4b", "OWN-EXACT1", "NUM-OTHER1"),
            ("Granularity",),
            draws={
                "head_outputs": Draw("positive", (2, 1, 3, 2, 2)),
                "d_head_outputs": Draw("given", (2, 1, 3, 2, 2), zeros),
            },
        )
    )
    return found


def tiles() -> list[CaseRecipe]:
    """Return the states of Algorithm 1 after each tile of keys, ragged and even."""
    found = []
    clauses = ("FA1-ALG1", "FA1-THM1", "FA1-S31", "NUM-OTHER1")
    kinds = {
        "normal": ("normal", "normal", {}),
        "rising": ("lead", "ramp", {"peak": 60}),
        "negative": ("positive", "positive", {"negate": True, "shift": 2}),
    }
    sizes = (
        (7, 11, 8, 3, 4),
        (5, 16, 4, 5, 4),
        (3, 37, 8, 2, 16),
        (9, 13, 8, 8, 13),
        (4, 6, 3, 1, 1),
    )
    for n_q, n_k, d, rows, cols in sizes:
        for kind, (query, key, options) in kinds.items():
            if kind != "normal" and n_k not in (11, 37):
                continue
            found.append(
                plain(
                    "tiles",
                    f"tiles-{n_q}x{n_k}-by-{rows}x{cols}-{kind}",
                    f"States after each of the tiles of {cols} keys, {kind} logits.",
                    clauses,
                    ("TileStates",),
                    draws={
                        "query": Draw(query, (n_q, d), {"shift": -1} if kind == "normal" else {}),
                        "key": Draw(key, (n_k, d), options),
                        "value": Draw("normal", (n_k, d - 1)),
                    },
                    parameters={
                        "block_rows": rows,
                        "block_cols": cols,
                        "scale": 1.0 if kind != "negative" else 0.5,
                    },
                )
            )
    return found


def merge() -> list[CaseRecipe]:
    """Return partial results to be joined: even, uneven, empty parts, all empty."""
    found = []
    listed: Mapping[str, tuple[int, int, Draw, dict[str, Any]]] = {
        "two": (2, 5, Draw("normal", (2, 5)), {}),
        "seven": (7, 3, Draw("normal", (7, 3), {"shift": 1}), {}),
        "one": (1, 4, Draw("normal", (1, 4)), {}),
        "uneven": (3, 4, Draw("normal", (3, 4), {"shift": 5}), {}),
        "empty-parts": (
            3,
            4,
            Draw(
                "given",
                (3, 4),
                {
                    "values": [
                        [0.5, "-inf", 1.0, "-inf"],
                        ["-inf", 2.0, -1.5, "-inf"],
                        [0.25, "-inf", "-inf", "-inf"],
                    ]
                },
            ),
            {},
        ),
    }
    for name, (parts, n, logsumexps, options) in listed.items():
        exact = ("OWN-EXACT1",) if name in ("one", "empty-parts") else ()
        found.append(
            plain(
                "merge",
                f"merge-{name}",
                f"{parts} partial results joined: {name.replace('-', ' ')}.",
                ("OWN-MERGE1", "FA1-S31", "NUM-OTHER1", *exact),
                ("Merge",),
                draws={"outputs": Draw("normal", (parts, n, 6), options), "logsumexps": logsumexps},
            )
        )
    return found


def scores() -> list[CaseRecipe]:
    """Return every score of the family."""
    found = []
    n_q, n_k, d, d_k, d_a = 5, 7, 6, 9, 4
    same = {"query": Draw("normal", (n_q, d)), "key": Draw("normal", (n_k, d))}
    mixed = {"query": Draw("normal", (n_q, d)), "key": Draw("normal", (n_k, d_k))}
    ways: Mapping[str, tuple[str, dict[str, Draw]]] = {
        "additive": (
            "SCORES-ADDITIVE1",
            mixed
            | {
                "w_query": Draw("normal", (d, d_a), {"shift": -1}),
                "w_key": Draw("normal", (d_k, d_a), {"shift": -1}),
                "v": Draw("normal", (d_a,)),
            },
        ),
        "dot": ("SCORES-DOT1", same),
        "general": ("SCORES-GENERAL1", mixed | {"weight": Draw("normal", (d, d_k))}),
        "scaled_dot": ("SCORES-SCALED1", same),
        "cosine": (
            "SCORES-COSINE1",
            same | {"strength": Draw("given", (), {"values": [2.5]})},
        ),
        "location": ("SCORES-LOCATION1", same | {"weight": Draw("normal", (d, n_k))}),
    }
    for kind, (clause, draws) in ways.items():
        for size in ("small", "outliers"):
            changed = (
                draws
                if size == "small"
                else {
                    n: w._replace(kind="outliers") if n in ("query", "key") else w
                    for n, w in draws.items()
                }
            )
            found.append(
                plain(
                    "score",
                    f"score-{kind.replace('_', '-')}-{size}",
                    f"The {kind.replace('_', ' ')} score, {size} inputs.",
                    (clause, "NUM-OTHER1"),
                    ("Score",),
                    draws=changed,
                    parameters={"kind": kind},
                )
            )
    return found


def traffic() -> list[CaseRecipe]:
    """Return counts of memory traffic: small memory, large memory, ragged tiles, both passes."""
    found = []
    sizes = (
        (64, 64, 16, 1024),
        (67, 101, 16, 1000),
        (128, 1, 8, 64),
        (1, 97, 32, 4096),
        (1024, 1024, 64, 49152),
    )
    for n_q, n_k, d, sram in sizes:
        for algorithm in ("standard", "standard_backward", "tiled", "tiled_backward"):
            backward = algorithm.endswith("backward")
            found.append(
                plain(
                    "traffic",
                    f"traffic-{algorithm.replace('_', '-')}-{n_q}x{n_k}x{d}-{sram}",
                    f"Elements moved by the {algorithm.replace('_', ' ')} pass.",
                    ("FA1-THM5" if backward else "FA1-THM2", "FA1-PROP3"),
                    ("Traffic",),
                    parameters={
                        "n_q": n_q,
                        "n_k": n_k,
                        "d": d,
                        "sram": sram,
                        "algorithm": algorithm,
                    },
                )
            )
    return found


def streams() -> list[CaseRecipe]:
    """Return keep masks of the specified stream: seeds, offsets, ragged ends, probabilities."""
    ways: Mapping[str, dict[str, Any]] = {
        "half": {"seed": 0, "offset": 0, "shape": [64], "keep_probability": 0.5},
        "ragged": {"seed": 20170612, "offset": 0, "shape": [3, 5, 7], "keep_probability": 0.9},
        "offset": {"seed": 7, "offset": 4096, "shape": [2, 2, 9, 11], "keep_probability": 0.75},
        "carry": {"seed": 1, "offset": 4294967294, "shape": [4, 10], "keep_probability": 0.5},
        "wide-seed": {
            "seed": 18446744073709551615,
            "offset": 1,
            "shape": [33],
            "keep_probability": 0.25,
        },
        "all": {"seed": 3, "offset": 0, "shape": [5, 5], "keep_probability": 1.0},
    }
    return [
        plain(
            "keep_mask",
            f"keep-mask-{name}",
            f"A keep mask from the specified stream: {name.replace('-', ' ')}.",
            ("OWN-DROPOUT2",),
            ("PhiloxStream",),
            parameters=parameters,
        )
        for name, parameters in ways.items()
    ]


def core() -> list[CaseRecipe]:
    """Return the core cases of this file."""
    groups = (multihead, importance, tiles, merge, scores, traffic, streams)
    return [recipe for make in groups for recipe in make()]
