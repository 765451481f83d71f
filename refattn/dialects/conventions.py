"""The closed list of conventions, and the record of a dialect: its choice in each of them.

A convention is an axis that the papers leave open; a dialect is one system's choices on every axis,
under that system's own name and version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

Choice: TypeAlias = str | Mapping[str, str]
"""One value of a convention, or one by circumstance where a system is not of one mind."""


class Convention(NamedTuple):
    """An axis on which systems differ."""

    name: str
    values: tuple[str, ...]
    sentence: str
    clause: str


CONVENTIONS: dict[str, Convention] = {
    convention.name: convention
    for convention in (
        Convention(
            "argument_order",
            ("query key value", "query value key"),
            "The order in which a call takes its sequences.",
            "VAS-EQ1",
        ),
        Convention(
            "layout",
            (
                "heads length features",
                "length heads features",
                "length batch features",
                "batch length features",
            ),
            "The order of the axes of query, key and value, batch axes that lead left out.",
            "VAS-S322b",
        ),
        Convention(
            "batch_axes",
            ("broadcast", "equal"),
            "Whether leading axes of query, key and value broadcast, or must be equal.",
            "OWN-BATCH1",
        ),
        Convention(
            "projections",
            ("none", "packed or separate", "one kernel each, by head"),
            "Whether linear projections belong to it, and how their weights are stored.",
            "VAS-S322b",
        ),
        Convention(
            "default_scale",
            ("1/sqrt(d_k)", "1", "required"),
            "The factor of the logits where none is given.",
            "OWN-SCALE1",
        ),
        Convention(
            "causal_alignment",
            ("top_left", "bottom_right", "offset", "given by the mask"),
            "Where the diagonal of causal attention starts when the lengths differ.",
            "OWN-CAUSAL1",
        ),
        Convention(
            "mask_polarity",
            ("True attends", "True ignores"),
            "What a True in a boolean mask means.",
            "OWN-MASK1",
        ),
        Convention(
            "float_mask",
            ("added", "refused", "as bool", "above 1/2", "(1 - mask)·(-1e9) added"),
            "What a mask of floats does to the scaled logits.",
            "OWN-BIAS1",
        ),
        Convention(
            "integer_mask",
            ("refused", "added", "as bool", "above 1/2", "(1 - mask)·(-1e9) added"),
            "What a mask of integers does.",
            "OWN-MASK1",
        ),
        Convention(
            "mask_with_causal",
            ("and", "refused", "causal alone", "mask alone", "nan"),
            "What rules when a mask and causal attention are asked for together.",
            "OWN-MASK1",
        ),
        Convention(
            "masked_cell",
            ("select", "add", "add a finite number"),
            "Whether a forbidden cell is never read, or read and sunk: by -∞, or by less.",
            "OWN-POISON1",
        ),
        Convention(
            "empty_row",
            ("zero", "nan", "uniform", "as unmasked, rounded"),
            "The weights of a query that may attend to no key.",
            "OWN-EMPTY1",
        ),
        Convention(
            "no_keys",
            ("zero", "refused"),
            "The output where there is no key at all.",
            "OWN-EMPTY1",
        ),
        Convention(
            "head_map",
            ("interleave", "tile", "equal heads"),
            "Which key-value head a query head reads where heads are grouped.",
            "OWN-GQA1",
        ),
        Convention(
            "window",
            ("none", "inclusive", "exclusive"),
            "Whether a sliding window counts the key at its end.",
            "OWN-WINDOW1",
        ),
        Convention(
            "softcap",
            ("none", "before bias", "after bias", "after bias, forbidden keys too"),
            "Whether logits are capped, and on which side of what is added to them.",
            "OWN-SOFTCAP1",
        ),
        Convention(
            "sinks",
            ("none", "in the denominator"),
            "Whether logits without a value join the softmax.",
            "OWN-SINK1",
        ),
        Convention(
            "dropout",
            ("none", "on the weights, kept ones scaled up"),
            "Where dropout acts.",
            "OWN-DROPOUT1",
        ),
        Convention(
            "returned_weights",
            ("none", "after dropout", "before dropout"),
            "Which weights a call returns.",
            "OWN-WEIGHTS1",
        ),
        Convention(
            "weights_over_heads",
            ("none", "mean by default", "each by default"),
            "Whether returned weights are averaged over the heads unless asked otherwise.",
            "OWN-WEIGHTS1",
        ),
        Convention(
            "softmax_dtype",
            ("computing dtype", "float32", "query dtype", "as asked"),
            "The format in which logits become weights.",
            "OWN-ROUND1",
        ),
    )
}
"""Every convention by name."""


@dataclass(frozen=True)
class Dialect:
    """A system's attention: its name and version, our functions of it, its conventions."""

    name: str
    alias: str
    system: str
    version: str
    sentence: str
    functions: tuple[str, ...]
    """Dotted names of the functions that state it."""
    conventions: Mapping[str, Choice]
    """A choice for each name in `CONVENTIONS`."""
    exceptions: tuple[str, ...]
    """What the system does and these functions do not, each with the reason."""


def choices(choice: Choice) -> tuple[str, ...]:
    """Return the values that a choice takes, whatever the circumstance."""
    return (choice,) if isinstance(choice, str) else tuple(choice.values())


def in_words(choice: Choice) -> str:
    """Return a choice as one line: `nan (need_weights), zero (else)`."""
    if isinstance(choice, str):
        return choice
    return ", ".join(f"{value} ({when})" for when, value in choice.items())


def differences(one: Dialect, other: Dialect) -> dict[str, tuple[Choice, Choice]]:
    """Return the conventions in which two dialects differ, with the choice of each."""
    pairs = {name: (one.conventions[name], other.conventions[name]) for name in CONVENTIONS}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
