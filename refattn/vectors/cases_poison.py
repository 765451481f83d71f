"""Cases with NaN, infinity or huge numbers in cells that must not be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refattn.vectors.cases_masks import lengths
from refattn.vectors.families import Draw
from refattn.vectors.recipes import CaseRecipe, attention


def core() -> list[CaseRecipe]:
    """Return cells that must not be read filled with what would be noticed."""
    found = []
    tail = [list(range(9, 13)), list(range(5, 13))]
    for name, values, backward in (
        ("nan", ["nan"], True),
        ("infinities", ["inf", "-inf", "nan"], True),
        ("huge", ["huge"], False),
        ("mixed", ["huge", "nan", "-inf"], False),
    ):
        stale = {"poison_rows": tail, "poison": values}
        found.append(
            attention(
                f"attention-poison-tail-{name}",
                f"Keys and values beyond each item's length hold {', '.join(values)}.",
                b=2,
                n_q=7,
                n_k=13,
                h=2,
                d=8,
                inputs={"key_lengths": lengths([9, 5])},
                options={"key": stale, "value": stale},
                backward=backward,
                clauses=["OWN-POISON1"],
                flags=["Poison"],
            )
        )
    return [*found, *unread(), *added(), beside_empty_rows()]


def unread() -> list[CaseRecipe]:
    """Return poison in query rows beyond the length, and in keys that no query may see."""
    found = []
    stale = {"poison_rows": [[5, 6], [2, 3, 4, 5, 6]], "poison": ["nan"]}
    found.append(
        attention(
            "attention-poison-queries",
            "Query rows beyond each item's length hold NaN.",
            b=2,
            n_q=7,
            n_k=11,
            d=8,
            inputs={"query_lengths": lengths([5, 2])},
            options={"query": stale},
            backward=True,
            clauses=["OWN-POISON1", "OWN-EMPTY1"],
            flags=["Poison", "EmptyRow"],
        )
    )
    first = {"poison_rows": [list(range(131))], "poison": ["nan"]}
    found.append(
        attention(
            "attention-poison-first-tiles",
            "The first 131 of 150 keys are masked and hold NaN: whole tiles that must be skipped.",
            n_q=5,
            n_k=150,
            inputs={"mask": Draw("mask", (1, 1, 5, 150), {"key_ranges": [[131, 150]]})},
            options={"key": first, "value": first},
            clauses=["OWN-POISON1"],
            flags=["Poison"],
        )
    )
    hole = {"poison_rows": [[0, 1, 2, 3]], "poison": ["nan", "inf"]}
    ahead = {"poison_rows": [list(range(7, 13))], "poison": ["nan", "huge"]}
    ways: Mapping[str, tuple[dict[str, Any], dict[str, Any], dict[str, Draw]]] = {
        "left-padding": (
            hole,
            {},
            {"mask": Draw("mask", (1, 1, 7, 13), {"key_ranges": [[4, 13]]})},
        ),
        "causal": (ahead, {"causal": True}, {}),
        "window": (ahead, {"window": [3, 0]}, {}),
    }
    for name, (stale, parameters, inputs) in ways.items():
        found.append(
            attention(
                f"attention-poison-{name}",
                f"Poison in keys that no query may see: {name.replace('-', ' ')}.",
                n_q=7,
                n_k=13,
                d=8,
                inputs=inputs,
                parameters=parameters,
                options={"key": stale, "value": stale},
                backward=True,
                clauses=["OWN-POISON1"],
                flags=["Poison"],
            )
        )
    return found


def beside_empty_rows() -> CaseRecipe:
    """Return poison that no query may see, beside empty rows, where minus infinity is added."""
    seen = {"key_ranges": [[0, 9], [0, 6]], "empty_rows": [1, 3]}
    return attention(
        "attention-poison-added-empty",
        "Masking by adding minus infinity: NaN passes in its own columns to empty rows too.",
        b=2,
        n_q=5,
        n_k=9,
        h=2,
        d=8,
        inputs={"mask": Draw("mask", (2, 1, 5, 9), seen)},
        conventions={"masked": "add"},
        options={"value": {"poison_rows": [[], [6, 8]], "poison": ["nan", "huge"]}},
        clauses=["OWN-POISON1", "OWN-EMPTY1"],
        flags=["Poison", "EmptyRow"],
    )


def added() -> list[CaseRecipe]:
    """Return the same poison where minus infinity is added: what IEEE arithmetic lets through."""
    found = []
    ways: Mapping[str, tuple[tuple[str, ...], list[str], str]] = {
        "huge": (("key", "value"), ["huge"], "nothing passes"),
        "nan-value": (("value",), ["nan", "huge"], "NaN passes in its own columns"),
        "nan-key": (("key",), ["nan"], "NaN passes to every row of its item"),
    }
    for name, (tensors, values, what) in ways.items():
        stale = {"poison_rows": [[], [6, 7, 8]], "poison": values}
        found.append(
            attention(
                f"attention-poison-added-{name}",
                f"Masking by adding minus infinity: {what}.",
                b=2,
                n_q=5,
                n_k=9,
                h=2,
                d=8,
                inputs={"key_lengths": lengths([9, 6])},
                conventions={"masked": "add"},
                options={t: stale for t in tensors},
                clauses=["OWN-POISON1"],
                flags=["Poison"],
            )
        )
    return found
