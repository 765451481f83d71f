"""What a subject declares that it can do, and what a case needs of it.

A case that needs more than was declared, or another choice on an axis that the papers leave
open, is not run, and says why; it never counts as passed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refattn.arrays import FLOATS
from refattn.backends import OPS
from refattn.errors import RefattnError
from refattn.masks import position_offset
from refattn.vectors.pack import Case

FEATURES = {
    "scale": "takes another scale than 1/√d_k",
    "mask": "takes a boolean mask, True = attend",
    "bias": "takes an additive bias",
    "causal": "has a causal mask",
    "window": "has sliding windows",
    "softcap": "has a softcap",
    "alibi": "takes ALiBi slopes",
    "sinks": "has sinks",
    "lengths": "takes the valid lengths of each batch item",
    "dropout": "takes dropout's keep mask",
    "grouped_heads": "takes fewer key-value heads than query heads",
    "value_size": "takes values of another width than keys",
    "cross_lengths": "takes another number of keys than of queries",
    "backward": "returns gradients",
    "logsumexp_gradient": "takes a gradient of the logsumexp",
    "logsumexp": "returns the logsumexp",
}
"""Capabilities by the words of a case's `requires`; the last one no case requires."""

SHOWN_BY = {
    "scale": "scale",
    "mask": "mask",
    "bias": "bias",
    "causal": "causal",
    "window": "window",
    "softcap": "softcap",
    "slopes": "alibi",
    "sinks": "sinks",
    "key_lengths": "lengths",
    "query_lengths": "lengths",
    "keep": "dropout",
    "d_output": "backward",
    "d_logsumexp": "logsumexp_gradient",
}
"""The capability that an argument's name in a signature shows."""

GRADIENTS = frozenset({"backward", "logsumexp_gradient"})
"""Features without which the forward half of a case can still be run."""

CONVENTIONS: dict[str, tuple[str, ...]] = {
    "alignment": ("top_left", "bottom_right"),
    "softcap_order": ("before_bias", "after_bias"),
    "distance": ("absolute", "signed", "column"),
    "head_map": ("interleave", "tile"),
    "empty_row": ("zero", "nan", "uniform"),
    "masked": ("select", "add"),
}
"""Axes that the papers leave open, and the names of their choices; the first is the default."""

LAYOUTS = ("bhnd", "bnhd")
"""Order of the axes batch, heads, length, features."""

ANY = "any"
"""A convention whose value the subject takes as an argument."""


@dataclass(frozen=True)
class Capabilities:
    """What a subject declares.

    `conventions` gives the choice a subject makes on an axis, `ANY` where it takes the choice as
    an argument; an axis that is absent is undeclared, and a case that depends on it is not run.
    `exclusive` lists features that do not go together.
    """

    features: frozenset[str] = frozenset()
    dtypes: tuple[str, ...] = ("float64", "float32")
    conventions: Mapping[str, str] = field(
        default_factory=lambda: {axis: choices[0] for axis, choices in CONVENTIONS.items()}
    )
    layout: str = "bhnd"
    exclusive: tuple[frozenset[str], ...] = ()
    ops: tuple[str, ...] = ("attention",)

    def __post_init__(self) -> None:
        """Refuse words that are not of the tables above."""
        check_words("capability", self.features, FEATURES)
        check_words("convention", self.conventions, CONVENTIONS)
        check_words("layout", [self.layout], LAYOUTS)
        check_words("dtype", self.dtypes, FLOATS)
        check_words("op", self.ops, OPS)
        for axis, choice in self.conventions.items():
            check_words(axis, [choice], (*CONVENTIONS[axis], ANY))


def refusal(case: Case, dtype: str, offered: Capabilities) -> str:
    """Return why a case is not put to a subject in a dtype; an empty string if it is.

    Args:
        case: a vector.
        dtype: one of the case's dtypes.
        offered: what the subject declares.
    """
    if why := missing(case, dtype, offered):
        return why
    if case.op != "attention":
        return ""
    for axis, wanted in conventions(case).items():
        made = offered.conventions.get(axis)
        if made is None:
            return f"{axis} is undeclared, and the case depends on it"
        if made != ANY and not _same(case, axis, made, wanted):
            return f"{axis} is {made} here, and the case asks for {wanted}"
    return ""


def missing(case: Case, dtype: str, offered: Capabilities) -> str:
    """Return what a case needs and a subject does not offer, whatever its conventions."""
    if case.op not in offered.ops:
        return f"op {case.op} is not offered"
    if dtype not in offered.dtypes:
        return f"dtype {dtype} is not offered"
    if case.op != "attention":
        return ""
    needed = frozenset(case.requires) - GRADIENTS
    absent = sorted(needed - offered.features)
    if absent:
        word = absent[0]
        return f"{word} is not offered: the subject does not say that it {FEATURES.get(word, word)}"
    for pair in offered.exclusive:
        if pair <= needed:
            return f"{' and '.join(sorted(pair))} together are not offered"
    return ""


def conventions(case: Case) -> dict[str, Any]:
    """Return the choices that decide a case of attention, and only those.

    An alignment decides nothing without a rule of positions, a head map nothing without groups,
    and so on: a subject that chose otherwise still gets such a case right.
    """
    inputs = case.inputs
    heads, key_heads = inputs["query"].shape[1], inputs["key"].shape[1]
    placed = bool({"alibi", "causal", "window"} & set(case.requires))
    added = "slopes" in inputs or "bias" in inputs
    unreadable = not all(np.isfinite(inputs[name]).all() for name in ("key", "value"))
    decides = {
        "alignment": placed,
        "softcap_order": "softcap" in case.requires and added,
        "distance": "slopes" in inputs,
        "head_map": 1 < key_heads < heads,
        "empty_row": bool(np.isneginf(case.outputs["logsumexp"]).any()),
        "masked": unreadable and (placed or bool({"mask", "bias", "lengths"} & set(case.requires))),
    }
    return {
        axis: case.conventions.get(axis, CONVENTIONS[axis][0])
        for axis, matters in decides.items()
        if matters
    } | ({"round_weights": True} if case.conventions.get("round_weights") else {})


def _same(case: Case, axis: str, made: str, wanted: Any) -> bool:
    """Return whether two choices come to the same in a case."""
    if axis != "alignment" or made == wanted:
        return bool(made == wanted)
    return bool(np.all(_offset(case, made) == _offset(case, wanted)))


def _offset(case: Case, alignment: Any) -> Any:
    n_q, n_k = case.inputs["query"].shape[2], case.inputs["key"].shape[2]
    lengths = {name: case.inputs.get(name) for name in ("query_lengths", "key_lengths")}
    return position_offset("audit", n_q, n_k, alignment=alignment, **lengths)


def check_words(what: str, words: Iterable[str], table: Collection[str]) -> None:
    """Refuse a word that is not in a table.

    Raises:
        RefattnError: names the word and the table.
    """
    for word in words:
        if word not in table:
            raise RefattnError(f"{what} {word} is unknown; there are {', '.join(table)}")
