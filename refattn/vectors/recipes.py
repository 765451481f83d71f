"""Recipes of cases: what is drawn, what is asked, and which clauses that exercises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from refattn.vectors.families import Draw, family

CONVENTIONS: Mapping[str, Mapping[str, Any]] = {
    "attention": {
        "alignment": "top_left",
        "softcap_order": "before_bias",
        "distance": "absolute",
        "head_map": "interleave",
        "empty_row": "zero",
        "masked": "select",
        "round_weights": False,
    },
    "multihead": {"alignment": "top_left", "empty_row": "zero"},
    "gated_cross_attention": {
        "attend": "immediate",
        "before_media": "zero",
        "cached_media": False,
        "activation": "squared_relu",
    },
    "head_importance": {"granularity": "example"},
    "rope": {"pairing": "interleaved"},
    "alibi": {"alignment": "top_left", "distance": "absolute", "slope_rule": "authors"},
}
"""The conventions of each op, with their defaults; ops that are not here have none."""

PLAIN_CLAUSES = (
    "VAS-EQ1",
    "FA1-S22",
    "FA1-S31",
    "FA1-ALG0",
    "FA1-ALG1",
    "FA1-THM1",
    "ROPE-EQ2",
    "OWN-SCALE1",
    "OWN-LSE1",
    "OWN-ROUND1",
    "NUM-MODEL1",
    "NUM-LOGIT1",
    "NUM-FORWARD1",
    "NUM-LSE1",
)
"""Clauses of attention without any further feature."""

PLAIN_BACKWARD_CLAUSES = ("FA1-ALG3", "FA1-ALG4", "OWN-BACKWARD1", "NUM-BACKWARD1")
"""Clauses of its gradients."""

FEATURE_CLAUSES: Mapping[str, tuple[str, ...]] = {
    "mask": ("OWN-MASK1", "FA1-ALG2"),
    "bias": ("OWN-BIAS1",),
    "causal": ("VAS-S323b", "OWN-CAUSAL1"),
    "window": ("OWN-WINDOW1",),
    "softcap": ("OWN-SOFTCAP1",),
    "alibi": ("ALIBI-S3a", "ALIBI-FN10", "OWN-ALIBI1"),
    "sinks": ("OWN-SINK1",),
    "lengths": ("OWN-LENGTH1",),
    "dropout": ("OWN-DROPOUT1", "FA1-ALG2"),
    "grouped_heads": ("OWN-GQA1",),
    "backward": ("OWN-BACKWARD1",),
    "logsumexp_gradient": ("OWN-LSE1",),
    "cross": ("VAS-S323a",),
    "gates": ("HEADS-S23",),
}
"""Clauses that a feature of a case exercises."""

FEATURE_FLAGS: Mapping[str, str] = {
    "window": "WindowEdge",
    "alibi": "Alibi",
    "sinks": "Sink",
    "lengths": "VariableLengths",
    "dropout": "Dropout",
    "grouped_heads": "GroupedHeads",
    "logsumexp_gradient": "LogsumexpGradient",
    "gates": "Gates",
}
"""Flags that a feature of a case brings."""

FAMILY_FLAGS: Mapping[str, str] = {
    "normal": "Plain",
    "unit": "Plain",
    "one_key": "OneKey",
    "rising": "RisingMaximum",
    "negative": "NegativeLogits",
    "deep": "DeepLogits",
    "high": "HighLogits",
    "steep": "SteepLogits",
    "cancelling": "Cancellation",
    "spread": "WideMagnitudes",
    "outliers": "Outliers",
    "ties": "RepeatedKeys",
    "equal": "RepeatedKeys",
    "subnormal": "Subnormal",
    "subnormal16": "Subnormal",
}
"""The flag of each family."""

EXACT_FAMILIES = ("one_key", "equal")
"""Families whose results are exact by structure."""


class CaseRecipe(NamedTuple):
    """What a case is made from: everything but the drawn, certified and derived numbers."""

    id: str
    summary: str
    clauses: tuple[str, ...]
    flags: tuple[str, ...]
    op: str
    parameters: Mapping[str, Any]
    conventions: Mapping[str, Any]
    draws: Mapping[str, Draw]
    kills: tuple[str, ...] = ()


def requires(op: str, draws: Iterable[str], parameters: Mapping[str, Any], sizes: Any) -> set[str]:
    """Return the features that a subject must offer to be given a case.

    Args:
        op: the operation.
        draws: names of the input tensors.
        parameters: the case's parameters.
        sizes: mapping of an input's name to its shape.
    """
    names = set(draws)
    by_input = {
        "mask": "mask",
        "bias": "bias",
        "slopes": "alibi",
        "sinks": "sinks",
        "key_lengths": "lengths",
        "query_lengths": "lengths",
        "keep": "dropout",
        "d_output": "backward",
        "d_logsumexp": "logsumexp_gradient",
        "head_gates": "gates",
    }
    found = {feature for name, feature in by_input.items() if name in names}
    found |= {p for p in ("scale", "window", "softcap") if p in parameters}
    found |= {"causal"} if parameters.get("causal") else set()
    if op == "attention":
        query, key, value = (sizes[n] for n in ("query", "key", "value"))
        found |= {"grouped_heads"} if query[1] != key[1] else set()
        found |= {"value_size"} if key[3] != value[3] else set()
        found |= {"cross_lengths"} if query[2] != key[2] else set()
    if op == "rope":
        found |= {"partial_rotary"} if parameters["rotary_dim"] != sizes["x"][3] else set()
        found.add(f"variant_{parameters['variant']['kind']}")
    if op == "multihead" and sizes["source_input"][1] != sizes["query_input"][1]:
        found.add("cross")
    return found - ({"scale"} if op == "tiles" else set())


def features(recipe: CaseRecipe) -> set[str]:
    """Return `requires` of a recipe."""
    shapes = {name: how.shape for name, how in recipe.draws.items()}
    return requires(recipe.op, recipe.draws, recipe.parameters, shapes)


NEUTRAL = {"backward", "scale", "value_size", "cross_lengths"}
"""Features that leave attention plain."""


def attention(
    id_: str,
    summary: str,
    *,
    n_q: int,
    n_k: int,
    b: int = 1,
    h: int = 1,
    h_k: int | None = None,
    d: int = 16,
    d_v: int | None = None,
    kind: str = "normal",
    backward: bool = False,
    inputs: Mapping[str, Draw] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    parameters: Mapping[str, Any] | None = None,
    conventions: Mapping[str, Any] | None = None,
    clauses: Iterable[str] = (),
    flags: Iterable[str] = (),
) -> CaseRecipe:
    """Return the recipe of an attention case.

    Args:
        id_: the case's id.
        summary: one sentence on what it shows.
        n_q: query rows.
        n_k: key rows.
        b: batch items.
        h: query heads.
        h_k: key-value heads; h if None.
        d: features of query and key.
        d_v: features of value; d if None.
        kind: the family of query, key and value.
        backward: draw d_output too.
        inputs: further input tensors.
        options: further options of the draws of query, key and value, by name.
        parameters: parameters of the op.
        conventions: those that differ from the default.
        clauses: clauses beside those of the features.
        flags: flags beside those of family and features.
    """
    shapes = {
        "query": (b, h, n_q, d),
        "key": (b, h_k or h, n_k, d),
        "value": (b, h_k or h, n_k, d_v or d),
    }
    draws = {
        name: Draw(form, shapes[name], {**base, **(options or {}).get(name, {})})
        for name, (form, base) in family(kind, d).items()
    }
    draws |= inputs or {}
    if backward and "d_output" not in draws:
        draws["d_output"] = Draw("normal", (b, h, n_q, d_v or d))
    bare = CaseRecipe(
        id=id_,
        summary=summary,
        clauses=(),
        flags=(),
        op="attention",
        parameters=dict(parameters or {}),
        conventions={**CONVENTIONS["attention"], **(conventions or {})},
        draws=draws,
    )
    return _annotated(bare, kind, clauses, flags)


def _annotated(
    bare: CaseRecipe, kind: str, clauses: Iterable[str], flags: Iterable[str]
) -> CaseRecipe:
    """Add the clauses and flags of an attention case's features."""
    found = features(bare)
    all_clauses = {c for f in found for c in FEATURE_CLAUSES.get(f, ())} | set(clauses)
    all_flags = {FEATURE_FLAGS[f] for f in found if f in FEATURE_FLAGS} | set(flags)
    if found <= NEUTRAL:
        all_clauses |= set(PLAIN_CLAUSES)
        all_clauses |= set(PLAIN_BACKWARD_CLAUSES) if "backward" in found else set()
    if kind in EXACT_FAMILIES:
        all_clauses.add("OWN-EXACT1")
    if FAMILY_FLAGS[kind] != "Plain" or found <= NEUTRAL:
        all_flags.add(FAMILY_FLAGS[kind])
    if "scale" in bare.parameters:
        all_clauses.add("OWN-SCALE1")
        all_flags.add("GivenScale")
    return bare._replace(clauses=tuple(sorted(all_clauses)), flags=tuple(sorted(all_flags)))


def plain(
    op: str,
    id_: str,
    summary: str,
    clauses: Iterable[str],
    flags: Iterable[str],
    *,
    draws: Mapping[str, Draw] | None = None,
    parameters: Mapping[str, Any] | None = None,
    conventions: Mapping[str, Any] | None = None,
) -> CaseRecipe:
    """Return the recipe of a case of any other op."""
    bare = CaseRecipe(
        id=id_,
        summary=summary,
        clauses=(),
        flags=(),
        op=op,
        parameters=dict(parameters or {}),
        conventions={**CONVENTIONS.get(op, {}), **(conventions or {})},
        draws=dict(draws or {}),
    )
    found = features(bare) if op == "multihead" else set()
    all_clauses = set(clauses) | {c for f in found for c in FEATURE_CLAUSES.get(f, ())}
    all_flags = set(flags) | {FEATURE_FLAGS[f] for f in found if f in FEATURE_FLAGS}
    return bare._replace(clauses=tuple(sorted(all_clauses)), flags=tuple(sorted(all_flags)))
